// LoRA over a step's segments: shrink v = A x, expand y += weight B v. Engine thread.
//
// DESIGN. A [r, in] and B (panels of [r, 64 columns]) are read in place from the pool, from end to
// end, once for each segment (a long segment's tokens go in groups that the second-level cache
// holds). Ranks are true ranks. Pieces that cross into another page are put together in a buffer
// first. What a thread reads next it asks for while it multiplies: pieces are short runs in many
// places, which the processor's own prefetcher does not foresee.
//
// Shrink is cut by (segment, module, ranks, token groups). Expand is cut by output columns, and each
// part walks all segments in order: a token in several segments gets its sums in that order, by one
// thread. Neither order depends on what else is in the step.
#include "kernels/cpu/cpu_internal.h"

#include "base/verify.h"

#include <string.h>

enum {
    PIECE_BYTES = 4096,           // of a row of A at a time
    ITEM_RANKS = 16,              // of a shrink item
    ITEM_TOKENS = 64,
    SHRINK_CHUNK_BYTES = 64 << 10, // of A, about, that are worth a chunk of their own
    SHRINK_CHUNKS = 4,            // a thread: long runs are read faster than short ones
    EXPAND_CHUNKS = 2,
    EXPAND_COST_MIN = 16384,      // bytes of B, about, that are worth another thread
    EXPAND_AHEAD = 2,             // panels of B: asked for so long before
    V_ROW = LORA_TARGETS_MAX * LORA_RANK_MAX,
};

// ------------------------------------------------------------------ reading an image in pages

struct image {
    const struct backend *b;
    int layer;
    const int32_t *pages;
};

// Where an element of the image lies. Moving on costs no division.
struct image_place {
    size_t page, offset;
};

static struct image_place image_find(const struct image *image, int64_t element) {
    size_t page_elems = image->b->shape.page_elems;
    return (struct image_place){(size_t)element / page_elems, (size_t)element % page_elems};
}

static void image_advance(const struct image *image, struct image_place *place, size_t elements) {
    size_t page_elems = image->b->shape.page_elems;
    place->offset += elements;
    for (; place->offset >= page_elems; place->offset -= page_elems) place->page++;
}

static const char *image_at(const struct image *image, const struct image_place *place) {
    return cpu_page(image->b, image->layer, image->pages[place->page]) +
           place->offset * image->b->shape.elem_bytes;
}

// `count` elements from `place` on: in place when they lie in one page, else copied to `copy`.
static const char *image_read(const struct image *image, struct image_place place, size_t count,
                              char *copy) {
    size_t page_elems = image->b->shape.page_elems, bytes = image->b->shape.elem_bytes;
    if (place.offset + count <= page_elems) return image_at(image, &place);
    for (char *to = copy; count > 0;) {
        size_t part = page_elems - place.offset < count ? page_elems - place.offset : count;
        memcpy(to, image_at(image, &place), part * bytes);
        to += part * bytes;
        count -= part;
        if (count > 0) image_advance(image, &place, part);
    }
    return copy;
}

struct lora_scratch { // of a thread
    union {
        char pieces[DOT_ROWS][PIECE_BYTES];
        char panel[LORA_PANEL * LORA_RANK_MAX * sizeof(float)];
    } copy;
    float partial[DOT_ROWS * DOT_TOKENS_MAX][PANEL];
};

static int segment_rank(const struct lora_launch *launch, int segment, int target) {
    return launch->segments[segment].rank[launch->target[target].module];
}

// ------------------------------------------------------------------ shrink

// Ranks [rank_first, rank_end) of a module for tokens [token_first, token_end) of a segment.
struct shrink_item {
    int segment, target, rank_first, rank_end, token_first, token_end;
};

struct shrink_job {
    struct backend *b;
    const struct lora_launch *launch;
    struct shrink_item *items;
    int *chunk_first; // [chunks + 1] items of each chunk
};

// Where a chunk stands: DOT_ROWS rows of A from `rank` on, dot_tokens tokens from `token` on, the
// piece of both that begins at element `at`.
struct shrink_cursor {
    int item, rank, token, at;
};

static bool shrink_next(const struct shrink_job *job, int item_end, struct shrink_cursor *cursor) {
    const struct shrink_item *item = &job->items[cursor->item];
    cursor->at += PIECE_BYTES / (int)job->b->shape.elem_bytes;
    if (cursor->at < job->launch->in) return true;
    cursor->at = 0;
    cursor->token += job->b->kernels->dot_tokens;
    if (cursor->token < item->token_end) return true;
    cursor->token = item->token_first;
    cursor->rank += DOT_ROWS;
    if (cursor->rank < item->rank_end) return true;
    if (++cursor->item == item_end) return false;
    cursor->token = item[1].token_first;
    cursor->rank = item[1].rank_first;
    return true;
}

// Where the rows of A at the cursor begin.
static struct image shrink_rows(const struct shrink_job *job, const struct shrink_cursor *cursor,
                                struct image_place places[DOT_ROWS]) {
    const struct shrink_item *item = &job->items[cursor->item];
    const struct lora_segment *segment = &job->launch->segments[item->segment];
    struct image image = {job->b, job->launch->layer, segment->pages};
    size_t in = (size_t)job->launch->in;
    int64_t matrix = segment->a_offset[job->launch->target[item->target].module];
    places[0] = image_find(&image, matrix + (int64_t)cursor->rank * (int64_t)in + cursor->at);
    for (int i = 1; i < DOT_ROWS; i++) {
        places[i] = places[i - 1];
        if (cursor->rank + i < item->rank_end) image_advance(&image, &places[i], in);
    }
    return image;
}

static void shrink_piece(const struct shrink_job *job, const struct shrink_cursor *cursor,
                         const struct image *image, const struct image_place places[DOT_ROWS],
                         struct lora_scratch *scratch, struct cpu_dot *dot) {
    const struct lora_launch *launch = job->launch;
    const struct shrink_item *item = &job->items[cursor->item];
    const struct lora_segment *segment = &launch->segments[item->segment];
    size_t bytes = job->b->shape.elem_bytes, in = (size_t)launch->in;
    size_t count = (size_t)min_int(PIECE_BYTES / (int)bytes, launch->in - cursor->at);
    for (int i = 0; i < DOT_ROWS; i++)
        dot->a[i] = image_read(image, places[i], count, scratch->copy.pieces[i]);
    size_t token = (size_t)(segment->token_first + cursor->token);
    dot->x = (const char *)launch->x + (token * in + (size_t)cursor->at) * bytes;
    dot->x_stride = in * bytes;
    dot->bytes = count * bytes;
    dot->rows = min_int(DOT_ROWS, item->rank_end - cursor->rank);
    dot->tokens = min_int(job->b->kernels->dot_tokens, item->token_end - cursor->token);
    dot->first = cursor->at == 0;
    dot->last = (size_t)cursor->at + count == in;
    dot->partial = scratch->partial;
    dot->v = launch->v + (size_t)(segment->v_first + cursor->token) * V_ROW +
             item->target * LORA_RANK_MAX + cursor->rank;
    dot->v_stride = V_ROW;
    job->b->kernels->dot(dot, job->b->dtype == DTYPE_BF16);
}

static void shrink_chunk(void *context, int chunk, int thread) {
    const struct shrink_job *job = context;
    struct lora_scratch *scratch = cpu_thread_scratch(job->b, thread);
    int end = job->chunk_first[chunk + 1];
    struct shrink_cursor cursor = {.item = job->chunk_first[chunk]}, next;
    cursor.rank = job->items[cursor.item].rank_first;
    cursor.token = job->items[cursor.item].token_first;
    struct image_place places[DOT_ROWS], next_places[DOT_ROWS];
    struct image image = shrink_rows(job, &cursor, places), next_image;
    for (bool more = true; more; cursor = next, image = next_image) {
        next = cursor;
        more = shrink_next(job, end, &next);
        struct cpu_dot dot;
        next_image = image;
        memcpy(next_places, places, sizeof places);
        if (more) next_image = shrink_rows(job, &next, next_places);
        for (int i = 0; i < DOT_ROWS; i++) dot.a_next[i] = image_at(&next_image, &next_places[i]);
        shrink_piece(job, &cursor, &image, places, scratch, &dot);
        memcpy(places, next_places, sizeof places);
    }
}

// Lists the items; with items == NULL only counts them.
static int list_items(const struct lora_launch *launch, struct shrink_item *items) {
    int count = 0;
    for (int s = 0; s < launch->segment_count; s++)
        for (int target = 0; target < launch->target_count; target++) {
            int ranks = segment_rank(launch, s, target), tokens = launch->segments[s].token_count;
            for (int r = 0; r < ranks; r += ITEM_RANKS)
                for (int t = 0; t < tokens; t += ITEM_TOKENS, count++)
                    if (items)
                        items[count] = (struct shrink_item){
                            s, target, r, min_int(r + ITEM_RANKS, ranks),
                            t, min_int(t + ITEM_TOKENS, tokens)};
        }
    return count;
}

// Bytes of A, and the multiplications of long segments, which are worth about as much.
static size_t item_cost(const struct shrink_job *job, const struct shrink_item *item) {
    size_t tokens = (size_t)(item->token_end - item->token_first);
    return (size_t)(item->rank_end - item->rank_first) * (size_t)job->launch->in *
           (job->b->shape.elem_bytes + tokens / 8);
}

// Cuts the items into chunks of about equal cost, in their order. Returns how many.
static int cut_items(struct shrink_job *job, int count) {
    size_t total = 0, cost = 0;
    for (int i = 0; i < count; i++) total += item_cost(job, &job->items[i]);
    size_t wanted = (size_t)(job->b->thread_count * SHRINK_CHUNKS);
    if (wanted > total / SHRINK_CHUNK_BYTES) wanted = total / SHRINK_CHUNK_BYTES + 1;
    int chunks = 0;
    job->chunk_first[0] = 0;
    for (int i = 0; i < count; i++) {
        cost += item_cost(job, &job->items[i]);
        if (cost * wanted < total * ((size_t)chunks + 1)) continue;
        job->chunk_first[++chunks] = i + 1;
    }
    return chunks;
}

static void launch_verify(const struct backend *b, const struct lora_launch *launch) {
    VERIFY(b->pool);
    VERIFY_OP(launch->target_count, <=, LORA_TARGETS_MAX);
    for (int s = 0; s < launch->segment_count; s++)
        for (int target = 0; target < launch->target_count; target++)
            VERIFY_OP(segment_rank(launch, s, target), <=, LORA_RANK_MAX);
}

void cpu_lora_shrink(struct backend *b, const struct lora_launch *launch) {
    launch_verify(b, launch);
    struct shrink_job job = {.b = b, .launch = launch};
    int count = list_items(launch, NULL);
    if (count == 0) return;
    size_t item_bytes = (size_t)count * sizeof *job.items;
    char *lists = cpu_scratch(b, SCRATCH_ITEMS, item_bytes + ((size_t)count + 1) * sizeof(int));
    job.items = (struct shrink_item *)(void *)lists;
    job.chunk_first = (int *)(void *)(lists + item_bytes);
    list_items(launch, job.items);
    cpu_threads_scratch(b, sizeof(struct lora_scratch));
    cpu_threads_run(b->threads, shrink_chunk, &job, cut_items(&job, count));
}

// ------------------------------------------------------------------ expand

struct expand_job {
    struct backend *b;
    const struct lora_launch *launch;
    size_t panel_cost[LORA_TARGETS_MAX];
    size_t cost_first[LORA_TARGETS_MAX + 1]; // of the panels of the targets before
    int chunks;                              // of equal cost, all targets' panels in a row
};

// One panel of B of one segment, from column `first` on.
struct expand_part {
    int segment, target, first;
};

// The part behind `part` in the chunk that ends at column chunk_end: the next panel, or the next
// segment from column chunk_first on. false: there is none. part->segment == -1 stands before the
// first.
static bool expand_next(const struct expand_job *job, int chunk_first, int chunk_end,
                        struct expand_part *part) {
    const struct lora_launch *launch = job->launch;
    part->first += LORA_PANEL;
    if (part->segment >= 0 && part->first < chunk_end) return true;
    part->first = chunk_first;
    do
        if (++part->segment >= launch->segment_count) return false;
    while (segment_rank(launch, part->segment, part->target) == 0 ||
           launch->segments[part->segment].token_count == 0);
    return true;
}

static struct image_place expand_panel(const struct expand_job *job, const struct expand_part *part,
                                       struct image *image) {
    const struct lora_launch *launch = job->launch;
    const struct lora_segment *segment = &launch->segments[part->segment];
    *image = (struct image){job->b, launch->layer, segment->pages};
    int64_t rank = segment_rank(launch, part->segment, part->target);
    return image_find(image, segment->b_offset[launch->target[part->target].module] +
                                 part->first * rank);
}

// y[segment's tokens, the part's columns] += weight * v B; meanwhile asks for what lies at `ahead`.
static void expand_multiply(const struct expand_job *job, struct lora_scratch *scratch,
                            const struct expand_part *part, const struct expand_part *ahead) {
    const struct lora_launch *launch = job->launch;
    const struct cpu_kernels *kernels = job->b->kernels;
    const struct lora_segment *segment = &launch->segments[part->segment];
    int target = part->target, rank = segment_rank(launch, part->segment, target);
    int columns = min_int(LORA_PANEL, launch->target[target].out - part->first);
    struct image image, image_ahead;
    struct image_place place = expand_panel(job, part, &image);
    struct image_place place_ahead = expand_panel(job, ahead, &image_ahead);
    struct cpu_update update = {
        .b = image_read(&image, place, (size_t)(rank * columns), scratch->copy.panel),
        .b_next = image_at(&image_ahead, &place_ahead), .rank = rank, .columns = columns,
        .weight = segment->weight, .v_stride = V_ROW,
        .y_stride = (size_t)launch->target[target].stride};
    for (int token = 0; token < segment->token_count; token += kernels->update_tokens) {
        update.tokens = min_int(kernels->update_tokens, segment->token_count - token);
        update.v = launch->v + (size_t)(segment->v_first + token) * V_ROW + target * LORA_RANK_MAX;
        update.y = (float *)launch->target[target].y +
                   (size_t)(segment->token_first + token) * update.y_stride + part->first;
        kernels->update(&update, job->b->dtype == DTYPE_BF16);
    }
}

// Columns [first, end) of a target.
static void expand_columns(const struct expand_job *job, struct lora_scratch *scratch, int target,
                           int first, int end) {
    struct expand_part part = {.segment = -1, .target = target}, ahead = part;
    bool more = true;
    for (int i = 0; i < EXPAND_AHEAD; i++) more = more && expand_next(job, first, end, &ahead);
    while (expand_next(job, first, end, &part)) {
        more = more && expand_next(job, first, end, &ahead);
        expand_multiply(job, scratch, &part, more ? &ahead : &part);
    }
}

// The target's column where a chunk begins: of the first panel that begins in it, or behind all.
static int chunk_column(const struct expand_job *job, int chunk, int target) {
    const size_t *first = job->cost_first, total = first[job->launch->target_count];
    size_t cost = total * (size_t)chunk / (size_t)job->chunks;
    if (cost <= first[target]) return 0;
    int out = job->launch->target[target].out;
    if (cost >= first[target + 1]) return out;
    size_t panels = (cost - first[target] + job->panel_cost[target] - 1) / job->panel_cost[target];
    return min_int((int)panels * LORA_PANEL, out);
}

static void expand_chunk(void *context, int chunk, int thread) {
    const struct expand_job *job = context;
    struct lora_scratch *scratch = cpu_thread_scratch(job->b, thread);
    for (int target = 0; target < job->launch->target_count; target++) {
        int first = chunk_column(job, chunk, target), end = chunk_column(job, chunk + 1, target);
        if (first < end) expand_columns(job, scratch, target, first, end);
    }
}

// Work of one panel of a target: bytes of B, and the multiplications of long segments.
static size_t panel_cost(const struct expand_job *job, int target) {
    size_t cost = 0;
    for (int s = 0; s < job->launch->segment_count; s++) {
        int tokens = job->launch->segments[s].token_count;
        if (tokens == 0) continue;
        cost += (size_t)segment_rank(job->launch, s, target) *
                (job->b->shape.elem_bytes + (size_t)tokens / 4);
    }
    return cost * LORA_PANEL;
}

void cpu_lora_expand(struct backend *b, const struct lora_launch *launch) {
    launch_verify(b, launch);
    struct expand_job job = {.b = b, .launch = launch};
    for (int target = 0; target < launch->target_count; target++) {
        job.panel_cost[target] = panel_cost(&job, target);
        job.cost_first[target + 1] =
            job.cost_first[target] +
            job.panel_cost[target] * (size_t)divide_up(launch->target[target].out, LORA_PANEL);
    }
    size_t total = job.cost_first[launch->target_count];
    if (total == 0) return;
    job.chunks = min_int(b->thread_count * EXPAND_CHUNKS, (int)(total / EXPAND_COST_MIN) + 1);
    cpu_threads_scratch(b, sizeof(struct lora_scratch));
    cpu_threads_run(b->threads, expand_chunk, &job, job.chunks);
}
