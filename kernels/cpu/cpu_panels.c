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
    // Work is claimed in so many parts, so that a slow thread holds nobody back: with one group of
    // rows, and, at least, with several.
    CHUNKS_A_THREAD = 6,
    CHUNKS_MANY_MIN = 3,
};

static void pack_group(void *context, int group, int thread) {
    (void)thread;
    const struct panel_job *job = context;
    job->pack(job, group);
}

// Chunks differ by one tile's panels at most, so that threads of equal speed end together.
static int chunk_begin(const struct panel_job *job, int chunk) {
    int tiles = divide_up(job->panels, job->at_once);
    int64_t first = (int64_t)tiles * chunk / job->chunks * job->at_once;
    return min_int((int)first, job->panels);
}

// The panels of one chunk.
static void run_chunk(void *context, int chunk, int thread) {
    const struct panel_job *job = context;
    int whole = job->out / PANEL;
    int first = chunk_begin(job, chunk), end = chunk_begin(job, chunk + 1);
    for (int at = 0; at < job->words; at += job->piece)
        for (int group = 0; group < job->groups.count; group++)
            for (int panel = first, step; panel < end; panel += step) {
                step = min_int(job->at_once, max_int(1, min_int(end, whole) - panel));
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
    int share = CHUNKS_A_THREAD;
    if (!stream)
        share = max_int(CHUNKS_MANY_MIN,
                        divide_up(job->panels, job->b->thread_count * job->block));
    job->at_once = job->b->kernels->tile_panels[job->groups.padded];
    if (!stream) job->at_once = min_int(job->at_once, 2);
    job->chunks = min_int(job->b->thread_count * share, divide_up(job->panels, job->at_once));
    cpu_threads_run(threads, run_chunk, job, job->chunks);
}
