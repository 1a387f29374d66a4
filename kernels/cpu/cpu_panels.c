// The order in which a base matmul walks its weights, whatever they are kept in. Engine thread.
//
// k is cut into pieces, so that the rows' x of a piece stays in the first-level cache for all panels of
// a chunk. Up to tile_rows_max tokens fit one tile: weights stream past once, at memory speed. More
// tokens are cut into groups; a block of panels that fits, by a piece of k, the second-level cache
// is then used for every group before moving on. Each output is one accumulator over ascending k,
// kept in y between pieces, so a token's result has the same bits alone and in any batch.
#include "kernels/cpu/cpu_internal.h"

enum {
    PACK_INLINE_MAX = 65536, // elements of x the caller packs alone
    CHUNKS_A_THREAD = 6,     // work is claimed in so many parts, so that a slow thread holds
                             // nobody back
};

static void pack_group(void *context, int group, int thread) {
    (void)thread;
    const struct panel_job *job = context;
    job->pack(job, group);
}

// The panels of one chunk.
static void run_chunk(void *context, int chunk, int thread) {
    const struct panel_job *job = context;
    int whole = job->out / PANEL, at_once = job->b->kernels->tile_panels[job->groups.padded];
    if (job->groups.count > 1) at_once = min_int(at_once, 2);
    int first = chunk * job->panels_a_chunk;
    int end = min_int(first + job->panels_a_chunk, job->panels);
    for (int at = 0; at < job->words; at += job->piece)
        for (int group = 0; group < job->groups.count; group++)
            for (int panel = first, step; panel < end; panel += step) {
                step = min_int(at_once, max_int(1, min_int(end, whole) - panel));
                if (step == 3) step = 2;
                job->multiply(job, thread, group, panel, step, at,
                              min_int(job->piece, job->words - at));
            }
}

void cpu_panels_run(struct panel_job *job) {
    struct cpu_threads *threads = job->b->threads;
    if ((size_t)job->tokens * (size_t)job->in <= PACK_INLINE_MAX)
        for (int group = 0; group < job->groups.count; group++) job->pack(job, group);
    else cpu_threads_run(threads, pack_group, job, job->groups.count);

    bool stream = job->groups.count == 1;
    job->panels_a_chunk = job->block;
    if (stream) {
        int share = max_int(1, job->panels / (job->b->thread_count * CHUNKS_A_THREAD));
        job->panels_a_chunk = (int)round_up((size_t)share, TILE_PANELS_MAX);
    }
    cpu_threads_run(threads, run_chunk, job,
                    (job->panels + job->panels_a_chunk - 1) / job->panels_a_chunk);
}
