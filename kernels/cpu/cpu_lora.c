// LoRA over a step's segments: shrink v = A x, expand y += weight B v. Engine thread.
//
// DESIGN. A and B are read in place from the pool, sixteen rows at a time: their pieces are turned
// into a panel (transposed in registers, in a buffer that stays in the first-level cache) which
// then serves every token of the segment, so an adapter's pages are read once for its segment.
// Ranks are true ranks; only the sixteen rows of a panel are filled up, with zeros that are not in
// memory. x is packed once per segment for all modules that read it.
//
// Shrink is cut by (segment, module, sixteen ranks, token groups). Expand is cut by output columns,
// and each part walks all segments in order: a token in several segments gets its sums in that
// order, by one thread. Neither order depends on what else is in the step.
#include "kernels/cpu/cpu_internal.h"

#include "base/verify.h"

#include <string.h>

enum {
    PIECE_WORDS = 64,        // of k at a time: 4 KiB, which is also how far ahead we prefetch
    AHEAD_BYTES = 4096,
    PANEL_WORDS_MAX = LORA_RANK_MAX, // of a panel: a piece of k in shrink, the rank in expand
    PACK_INLINE_MAX = 65536, // elements of x the caller packs alone
    GROUPS_AN_ITEM = 4,      // token groups of a shrink item
    CHUNKS_A_THREAD = 4,
    EXPAND_COST_MIN = 16384, // bytes of B, about, that are worth another thread
    EXPAND_PANEL_ROWS = 512, // rank x panels that expand holds at once: 32 KiB
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

// `count` elements from `place` on: in place when they lie in one page and fill whole words, else
// copied to `copy` and filled up with zero.
static const char *image_read(const struct image *image, struct image_place place, size_t count,
                              uint32_t *copy) {
    size_t page_elems = image->b->shape.page_elems, bytes = image->b->shape.elem_bytes;
    size_t total = count * bytes;
    if (place.offset + count <= page_elems && total % 4 == 0) return image_at(image, &place);
    char *to = (char *)copy;
    memset(to + total / 4 * 4, 0, total % 4 ? 4 : 0);
    while (count > 0) {
        size_t part = page_elems - place.offset < count ? page_elems - place.offset : count;
        memcpy(to, image_at(image, &place), part * bytes);
        to += part * bytes;
        count -= part;
        image_advance(image, &place, part);
    }
    return (const char *)copy;
}

// What a thread holds while it makes panels.
struct panel_scratch {
    uint32_t copies[PANEL][PANEL_WORDS_MAX];
    uint32_t words[PANEL_WORDS_MAX * PANEL];
    float wide[EXPAND_PANEL_ROWS * PANEL]; // expand: panels in f32
    float v[LORA_RANK_MAX * TILE_ROWS_MAX + 2 * TILE_ROWS_MAX]; // expand: packed v
    float y[TILE_ROWS_MAX * TILE_PANELS_MAX * PANEL];           // expand: what is added to y
};

// Rows [row, row + rows) of a matrix with `columns` elements a row, elements
// [at, at + count) of each -> scratch->words[n][PANEL]. Whole rows that fill their words are one
// piece of memory and are looked up once.
static int make_panel(const struct image *image, struct panel_scratch *scratch, int64_t matrix,
                      int columns, int row, int rows, int at, int count) {
    const uint32_t *pieces[PANEL] = {NULL};
    size_t row_bytes = (size_t)count * image->b->shape.elem_bytes;
    struct image_place place = image_find(image, matrix + (int64_t)row * columns + at);
    if (count == columns && row_bytes % 4 == 0) {
        const char *from = image_read(image, place, (size_t)rows * (size_t)count,
                                      scratch->copies[0]);
        for (int i = 0; i < rows; i++)
            pieces[i] = (const uint32_t *)(const void *)(from + (size_t)i * row_bytes);
    } else {
        for (int i = 0; i < rows; i++) {
            pieces[i] = (const uint32_t *)(const void *)image_read(image, place, (size_t)count,
                                                                   scratch->copies[i]);
            if (i + 1 < rows) image_advance(image, &place, (size_t)columns);
        }
    }
    int n = (int)((row_bytes + 3) / 4);
    image->b->kernels->transpose(scratch->words, pieces, n);
    return n;
}

// Asks for what make_panel with the same arguments will read. Panels are short runs in many places,
// which the processor's own prefetcher does not foresee.
static void prefetch_panel(const struct image *image, int64_t matrix, int columns, int row,
                           int rows, int at, int count) {
    size_t bytes = (size_t)count * image->b->shape.elem_bytes;
    struct image_place place = image_find(image, matrix + (int64_t)row * columns + at);
    if (count == columns) {
        bytes *= (size_t)rows;
        rows = 1;
    }
    for (int i = 0; i < rows; i++) {
        const char *from = image_at(image, &place);
        for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
        if (i + 1 < rows) image_advance(image, &place, (size_t)columns);
    }
}

// ------------------------------------------------------------------ shrink

struct shrink_item {
    int segment, target, rank_first, group_first, group_end;
};

struct shrink_job {
    struct backend *b;
    const struct lora_launch *launch;
    struct shrink_item *items;
    size_t *packed_at; // [segments] where each segment's packed x begins
    char *packed;
};

static int segment_rank(const struct lora_launch *launch, int segment, int target) {
    return launch->segments[segment].rank[launch->target[target].module];
}

static bool segment_works(const struct lora_launch *launch, int segment) {
    if (launch->segments[segment].token_count == 0) return false;
    for (int target = 0; target < launch->target_count; target++)
        if (segment_rank(launch, segment, target) > 0) return true;
    return false;
}

static size_t group_bytes(const struct row_groups *groups, int in) {
    return round_up(cpu_packed_bytes(groups->padded, in), 64);
}

static void pack_segment(void *context, int chunk, int thread) {
    (void)thread;
    const struct shrink_job *job = context;
    const struct lora_launch *launch = job->launch;
    const struct cpu_kernels *kernels = job->b->kernels;
    if (!segment_works(launch, chunk)) return;
    const struct lora_segment *segment = &launch->segments[chunk];
    struct row_groups groups = cpu_row_groups(kernels, segment->token_count);
    size_t in = (size_t)launch->in;
    for (int group = 0; group < groups.count; group++) {
        char *to = job->packed + job->packed_at[chunk] +
                   (size_t)group * group_bytes(&groups, launch->in);
        const float *x = (const float *)launch->x +
                         (size_t)(segment->token_first + group * groups.rows) * in;
        int rows = group_rows(&groups, group, segment->token_count);
        if (job->b->dtype == DTYPE_BF16) kernels->pack_bf16(to, x, in, rows, launch->in);
        else kernels->pack_f32(to, x, in, rows, launch->in);
    }
}

// v[tokens of the item's groups, 16 ranks] = x A^T, a piece of k at a time.
static void shrink_chunk(void *context, int chunk, int thread) {
    const struct shrink_job *job = context;
    const struct lora_launch *launch = job->launch;
    const struct cpu_kernels *kernels = job->b->kernels;
    const struct shrink_item *item = &job->items[chunk];
    const struct lora_segment *segment = &launch->segments[item->segment];
    struct panel_scratch *scratch = cpu_thread_scratch(job->b, thread);
    struct image image = {job->b, launch->layer, segment->pages};
    struct row_groups groups = cpu_row_groups(kernels, segment->token_count);
    bool bf16 = job->b->dtype == DTYPE_BF16;
    int rank = segment_rank(launch, item->segment, item->target);
    int64_t matrix = segment->a_offset[launch->target[item->target].module];
    int piece = PIECE_WORDS * (bf16 ? 2 : 1), row = LORA_TARGETS_MAX * LORA_RANK_MAX;
    int ranks = min_int(PANEL, rank - item->rank_first);
    for (int at = 0; at < launch->in; at += piece) {
        int ahead = min_int(piece, launch->in - at - piece);
        if (ahead > 0)
            prefetch_panel(&image, matrix, launch->in, item->rank_first, ranks, at + piece, ahead);
        int words = make_panel(&image, scratch, matrix, launch->in, item->rank_first, ranks, at,
                               min_int(piece, launch->in - at));
        for (int group = item->group_first; group < item->group_end; group++) {
            int rows = group_rows(&groups, group, segment->token_count);
            size_t before = (size_t)(bf16 && kernels->packs_pairs ? at / 2 : at) *
                            kernels->tile_rows[rows] * sizeof(float);
            struct cpu_tile tile = {
                .x = job->packed + job->packed_at[item->segment] +
                     (size_t)group * group_bytes(&groups, launch->in) + before,
                .w = scratch->words, .k_stride = PANEL, .k = words, .rows = rows, .panels = 1,
                .add = at > 0,
                .y = launch->v + (size_t)(segment->v_first + group * groups.rows) * (size_t)row +
                     item->target * LORA_RANK_MAX + item->rank_first,
                .y_stride = (size_t)row};
            if (bf16) kernels->tile_bf16(&tile);
            else kernels->tile_f32(&tile);
        }
    }
}

// Lists the items; with items == NULL only counts them.
static int list_items(const struct shrink_job *job, struct shrink_item *items) {
    const struct lora_launch *launch = job->launch;
    int count = 0;
    for (int s = 0; s < launch->segment_count; s++) {
        if (!segment_works(launch, s)) continue;
        struct row_groups groups = cpu_row_groups(job->b->kernels,
                                                  launch->segments[s].token_count);
        for (int target = 0; target < launch->target_count; target++)
            for (int rank = 0; rank < segment_rank(launch, s, target); rank += PANEL)
                for (int g = 0; g < groups.count; g += GROUPS_AN_ITEM, count++)
                    if (items)
                        items[count] = (struct shrink_item){
                            s, target, rank, g, min_int(g + GROUPS_AN_ITEM, groups.count)};
    }
    return count;
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
    int count = list_items(&job, NULL), segments = launch->segment_count;
    if (count == 0) return;
    size_t item_bytes = round_up((size_t)count * sizeof *job.items, 64);
    char *lists = cpu_scratch(b, SCRATCH_ITEMS, item_bytes + (size_t)segments * sizeof(size_t));
    job.items = (struct shrink_item *)(void *)lists;
    job.packed_at = (size_t *)(void *)(lists + item_bytes);
    list_items(&job, job.items);

    size_t bytes = 0, elements = 0;
    for (int s = 0; s < segments; s++) {
        job.packed_at[s] = bytes;
        if (!segment_works(launch, s)) continue;
        int tokens = launch->segments[s].token_count;
        struct row_groups groups = cpu_row_groups(b->kernels, tokens);
        bytes += (size_t)groups.count * group_bytes(&groups, launch->in);
        elements += (size_t)tokens * (size_t)launch->in;
    }
    job.packed = cpu_scratch(b, SCRATCH_PACKED_X, bytes);
    cpu_threads_scratch(b, sizeof(struct panel_scratch));
    if (elements <= PACK_INLINE_MAX)
        for (int s = 0; s < segments; s++) pack_segment(&job, s, 0);
    else cpu_threads_run(b->threads, pack_segment, &job, segments);
    cpu_threads_run(b->threads, shrink_chunk, &job, count);
}

// ------------------------------------------------------------------ expand

struct expand_job {
    struct backend *b;
    const struct lora_launch *launch;
    int chunk_first[LORA_TARGETS_MAX + 1]; // chunks of each target
    int columns[LORA_TARGETS_MAX];         // of a chunk, a multiple of PANEL
};

// Columns [first, end) of one target for one segment: the unit that a thread works on.
struct expand_part {
    int segment, target, first, end;
};

// The part behind `part` in the chunk that ends at column chunk_end: more columns, or the next
// segment from column chunk_first on. false: there is none. A part has at most as many columns as
// EXPAND_PANEL_ROWS allows for its rank; part->segment == -1 stands before the first.
static bool expand_next(const struct expand_job *job, int chunk_first, int chunk_end,
                        struct expand_part *part) {
    const struct lora_launch *launch = job->launch;
    part->first = part->end;
    if (part->segment < 0 || part->first == chunk_end) {
        part->first = chunk_first;
        do
            if (++part->segment >= launch->segment_count) return false;
        while (segment_rank(launch, part->segment, part->target) == 0 ||
               launch->segments[part->segment].token_count == 0);
    }
    int rank = segment_rank(launch, part->segment, part->target);
    int columns = max_int(1, EXPAND_PANEL_ROWS / (rank + (rank & 1))) * PANEL;
    part->end = min_int(part->first + columns, chunk_end);
    return true;
}

// Asks for panel `panel` of a part, as far as there is one.
static void expand_prefetch(const struct expand_job *job, const struct expand_part *part,
                            int panel) {
    const struct lora_launch *launch = job->launch;
    int column = part->first + panel * PANEL;
    if (column >= part->end) return;
    const struct lora_segment *segment = &launch->segments[part->segment];
    struct image image = {job->b, launch->layer, segment->pages};
    int rank = segment_rank(launch, part->segment, part->target);
    prefetch_panel(&image, segment->b_offset[launch->target[part->target].module], rank, column,
                   min_int(PANEL, part->end - column), 0, rank);
}

// y[segment's tokens, the part's columns] += weight * v B^T; meanwhile asks for what `next`, if any,
// begins with.
static void expand_columns(const struct expand_job *job, struct panel_scratch *scratch,
                           const struct expand_part *part, const struct expand_part *next) {
    const struct lora_launch *launch = job->launch;
    const struct cpu_kernels *kernels = job->b->kernels;
    const struct lora_segment *segment = &launch->segments[part->segment];
    struct image image = {job->b, launch->layer, segment->pages};
    int target = part->target, first = part->first, end = part->end;
    int rank = segment_rank(launch, part->segment, target), row = LORA_TARGETS_MAX * LORA_RANK_MAX;
    int panels = (end - first + PANEL - 1) / PANEL, rank_even = rank + (rank & 1);
    size_t panel_elements = (size_t)rank_even * PANEL;
    int64_t matrix = segment->b_offset[launch->target[target].module];
    int ahead = max_int(1, AHEAD_BYTES / (int)(panel_elements * job->b->shape.elem_bytes));
    for (int p = 0; p < panels; p++) {
        int column = first + p * PANEL;
        if (p + ahead < panels) expand_prefetch(job, part, p + ahead);
        else if (next) expand_prefetch(job, next, p + ahead - max_int(panels, ahead));
        int words = make_panel(&image, scratch, matrix, rank, column,
                               min_int(PANEL, end - column), 0, rank);
        float *wide = scratch->wide + (size_t)p * panel_elements;
        if (job->b->dtype == DTYPE_BF16) kernels->widen_panel(wide, scratch->words, words);
        else memcpy(wide, scratch->words, (size_t)words * PANEL * sizeof *wide);
    }
    struct row_groups groups = cpu_row_groups(kernels, segment->token_count);
    size_t stride = (size_t)launch->target[target].stride;
    for (int group = 0; group < groups.count; group++) {
        int rows = group_rows(&groups, group, segment->token_count), token = group * groups.rows;
        kernels->pack_f32(scratch->v,
                          launch->v + (size_t)(segment->v_first + token) * (size_t)row +
                              target * LORA_RANK_MAX,
                          (size_t)row, rows, rank);
        float *y = (float *)launch->target[target].y +
                   (size_t)(segment->token_first + token) * stride;
        for (int p = 0, step; p < panels; p += step) {
            step = min_int(kernels->tile_panels[rows], panels - p);
            if (step == 3) step = 2;
            struct cpu_tile tile = {
                .x = scratch->v, .w = scratch->wide + (size_t)p * panel_elements,
                .panel_stride = panel_elements, .k_stride = PANEL, .k = rank, .rows = rows,
                .panels = step, .y = scratch->y, .y_stride = (size_t)(step * PANEL)};
            kernels->tile_f32(&tile);
            int column = first + p * PANEL, count = min_int(step * PANEL, end - column);
            for (int r = 0; r < rows; r++)
                kernels->scale_add(y + (size_t)r * stride + column, 1.0f,
                                   scratch->y + r * step * PANEL, segment->weight, count);
        }
    }
}

static void expand_chunk(void *context, int chunk, int thread) {
    const struct expand_job *job = context;
    const struct lora_launch *launch = job->launch;
    struct panel_scratch *scratch = cpu_thread_scratch(job->b, thread);
    int target = 0;
    while (chunk >= job->chunk_first[target + 1]) target++;
    int first = (chunk - job->chunk_first[target]) * job->columns[target];
    int end = min_int(first + job->columns[target], launch->target[target].out);
    struct expand_part part = {.segment = -1, .target = target}, next;
    for (bool more = expand_next(job, first, end, &part); more; part = next) {
        next = part;
        more = expand_next(job, first, end, &next);
        expand_columns(job, scratch, &part, more ? &next : NULL);
    }
}

// Work of one output column of a target: bytes of B, and the multiplications of long segments.
static size_t column_cost(const struct expand_job *job, int target) {
    size_t cost = 0;
    for (int s = 0; s < job->launch->segment_count; s++) {
        int tokens = job->launch->segments[s].token_count;
        if (tokens == 0) continue;
        cost += (size_t)segment_rank(job->launch, s, target) *
                (job->b->shape.elem_bytes + (size_t)tokens / 4);
    }
    return cost;
}

void cpu_lora_expand(struct backend *b, const struct lora_launch *launch) {
    launch_verify(b, launch);
    struct expand_job job = {.b = b, .launch = launch};
    size_t total = 0;
    for (int target = 0; target < launch->target_count; target++)
        total += column_cost(&job, target) * (size_t)launch->target[target].out;
    if (total == 0) return;
    size_t wanted = total / (size_t)(b->thread_count * CHUNKS_A_THREAD);
    if (wanted < EXPAND_COST_MIN) wanted = EXPAND_COST_MIN;
    for (int target = 0; target < launch->target_count; target++) {
        size_t cost = column_cost(&job, target), out = (size_t)launch->target[target].out;
        size_t columns = cost ? round_up(wanted / cost + 1, PANEL) : 0;
        if (columns > out) columns = round_up(out, PANEL);
        job.columns[target] = (int)columns;
        job.chunk_first[target + 1] =
            job.chunk_first[target] + (cost ? (int)((out + columns - 1) / columns) : 0);
    }
    cpu_threads_scratch(b, sizeof(struct panel_scratch));
    cpu_threads_run(b->threads, expand_chunk, &job, job.chunk_first[launch->target_count]);
}
