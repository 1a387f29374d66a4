// The order in which a base matmul walks its weights, whatever they are kept in. Engine thread.
//
// k is cut into pieces, so that the rows' x of a piece stays in the first-level cache for all panels of
// a chunk. Up to tile_rows_max tokens fit one tile: weights stream past once, at memory speed. More
// tokens are cut into groups. Either a block of panels that fits, by a piece of k, the second-level
// cache is used for every group before moving on, and x stays in the first; or, panels outside, it is
// the panels of one tile that stay in the first-level cache while all groups pass. Each output is one
// accumulator over ascending k, kept in y or beside it between pieces, so a token's result has the same
// bits alone and in any batch.
#include "kernels/cpu/cpu_internal.h"

enum {
    PACK_INLINE_MAX = 16384, // elements of x the caller packs alone
    // Work is claimed in so many parts, so that a slow thread holds nobody back: with one group of
    // rows, and, at least, with several.
    CHUNKS_A_THREAD = 6,
    CHUNKS_MANY_MIN = 3,
};

static void pack_group(void *context, int group, int thread) {
    const struct panel_job *job = context;
    job->pack(job, group, thread);
}

// Chunks differ by one tile's panels at most, so that threads of equal speed end together.
static int chunk_begin(const struct panel_job *job, int chunk) {
    int tiles = divide_up(job->panels, job->at_once);
    int64_t first = (int64_t)tiles * chunk / job->chunks * job->at_once;
    return min_int((int)first, job->panels);
}

// The panels of a tile: the last columns, which may not fill a panel, are a tile of their own.
static int step_at(const struct panel_job *job, int panel, int end) {
    int whole = job->out / PANEL;
    int step = min_int(job->at_once, max_int(1, min_int(end, whole) - panel));
    return step == 3 ? 2 : step;
}

// A piece of k, a group of rows after the other past all panels of the chunk.
static void panels_inside(const struct panel_job *job, struct panel_part *part, int end) {
    for (part->group = 0; part->group < job->groups.count; part->group++)
        for (part->panel = part->chunk_begin; part->panel < end; part->panel += part->panels) {
            part->panels = step_at(job, part->panel, end);
            job->multiply(job, part);
        }
}

// A piece of k, a tile's panels after the other past all groups of rows.
static void panels_outside(const struct panel_job *job, struct panel_part *part, int end) {
    for (part->panel = part->chunk_begin; part->panel < end; part->panel += part->panels) {
        part->panels = step_at(job, part->panel, end);
        part->next_panel = part->panel + part->panels;
        part->next_first = part->first;
        if (part->next_panel >= end) {
            bool last = part->first + part->count == job->words;
            part->next_first = last ? 0 : part->first + part->count;
            part->next_panel = last ? part->chunk_next : part->chunk_begin;
        }
        job->multiply(job, part);
    }
}

static void run_chunk(void *context, int chunk, int thread) {
    const struct panel_job *job = context;
    int end = chunk_begin(job, chunk + 1), next = cpu_threads_next(job->b->threads, chunk, thread);
    struct panel_part part = {.thread = thread, .chunk_begin = chunk_begin(job, chunk),
                              .chunk_next = next < 0 ? -1 : chunk_begin(job, next)};
    for (; part.first < job->words; part.first += job->piece) {
        part.count = min_int(job->piece, job->words - part.first);
        if (job->outside) panels_outside(job, &part, end);
        else panels_inside(job, &part, end);
    }
}

void cpu_panels_run(struct panel_job *job) {
    struct cpu_threads *threads = job->b->threads;
    if ((size_t)job->tokens * (size_t)job->in <= PACK_INLINE_MAX)
        for (int group = 0; group < job->groups.count; group++) job->pack(job, group, 0);
    else cpu_threads_run(threads, pack_group, job, job->groups.count);

    bool stream = job->groups.count == 1;
    int share = stream ? CHUNKS_A_THREAD : CHUNKS_MANY_MIN;
    if (!stream || job->outside)
        share = max_int(share, divide_up(job->panels, job->b->thread_count * job->block));
    job->at_once = min_int(job->b->kernels->tile_panels[job->groups.padded],
                           stream && !job->outside ? TILE_PANELS_MAX : 2);
    job->chunks = min_int(job->b->thread_count * share, divide_up(job->panels, job->at_once));
    cpu_threads_run(threads, run_chunk, job, job->chunks);
}
