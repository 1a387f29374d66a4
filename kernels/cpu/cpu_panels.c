// The order in which a base matmul walks its weights, whatever they are kept in. Engine thread.
//
// Up to tile_rows_max tokens fit one tile: each panel streams past once, at memory speed, while all
// rows' accumulators stay in registers. More tokens are cut into groups; a block of panels and a
// piece of k that fit the second-level cache are then used for every group before moving on. Each
// output is one accumulator over ascending k in both cases (kept in y between pieces of k), so a
// token's result has the same bits alone and in any batch.
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

// A chunk when all tokens are one group.
static void stream_panels(void *context, int chunk, int thread) {
    const struct panel_job *job = context;
    int whole = job->out / PANEL, at_once = job->b->kernels->tile_panels[job->tokens];
    int first = chunk * job->panels_a_chunk;
    int end = min_int(first + job->panels_a_chunk, job->panels);
    for (int panel = first, step; panel < end; panel += step) {
        step = min_int(at_once, max_int(1, min_int(end, whole) - panel));
        if (step == 3) step = 2;
        job->multiply(job, thread, 0, panel, step, 0, job->words);
    }
}

// A chunk when there are several groups.
static void block_panels(void *context, int chunk, int thread) {
    const struct panel_job *job = context;
    int first = chunk * job->panels_a_chunk;
    int end = min_int(first + job->panels_a_chunk, job->panels);
    int at_once = min_int(2, job->b->kernels->tile_panels[job->groups.padded]);
    if (end * PANEL > job->out) { // the partial panel has no room in y between pieces
        end--;
        for (int group = 0; group < job->groups.count; group++)
            job->multiply(job, thread, group, end, 1, 0, job->words);
    }
    for (int at = 0; at < job->words; at += PIECE_WORDS) {
        int count = min_int(PIECE_WORDS, job->words - at);
        for (int group = 0; group < job->groups.count; group++)
            for (int panel = first, step; panel < end; panel += step) {
                step = min_int(at_once, end - panel);
                job->multiply(job, thread, group, panel, step, at, count);
            }
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
    cpu_threads_run(threads, stream ? stream_panels : block_panels, job,
                    (job->panels + job->panels_a_chunk - 1) / job->panels_a_chunk);
}
