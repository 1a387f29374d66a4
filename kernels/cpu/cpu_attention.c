// Causal attention over the paged K and V: prefill chunks and decodes in one call. Engine thread.
//
// DESIGN. The work is cut into items: (span, kv head, block of query tokens). The query heads that
// share a kv head are rows of one matrix, so each page's K and V are read once for all of them. An
// item walks its context in parts of PART_TOKENS at fixed positions: scores by tiles over K, which
// lies in its pages as panels (cpu_kv.h), softmax of the part (maximum, exponentials, sum), then
// P V by tiles over V; parts are merged left to right by their maxima (as in arXiv 1805.02867). When
// there are fewer items than threads want, each part becomes an item of its own and the merge runs
// after; since parts and their order are the same, so are the bits, whatever else is in the step.
//
// In bf16, q and the softmax's weights are rounded to bf16 as x is for any matmul, so that pairs of
// K and of V are multiplied as they lie in the pages; sums, maxima and merging stay f32.
//
// It never reads a V slot past the end of the context: pool pages may hold anything there.
#include "kernels/cpu/cpu_kv.h"

#include "base/verify.h"

#include <math.h>
#include <string.h>

enum {
    PART_TOKENS = 256, // a multiple of PAGE_TOKENS
    BLOCK_ROWS = 56,   // query rows of an item, about
    ITEMS_A_THREAD = 2,
};

struct item {
    int span, head;
    int token_first, token_count; // query tokens, from the span's first
    int part_first, part_count;   // of the context
    size_t partial;               // where its result goes when it is only a part, in elements
};

struct attention_job {
    struct backend *b;
    int layer;
    char *y; // of the backend's dtype
    const float *qkv;
    const struct attention_span *spans;
    int Q, K, G, D, D_padded; // G query heads a kv head
    bool split;               // items are single parts
    struct item *items;
    struct item *merges; // split: what to merge, part_count results from `partial` on
    float *partials;     // per row: maximum, sum, D_padded outputs
    int rows_max;
};

// A thread's buffers, carved from its scratch.
struct buffers {
    float *q;       // groups of rows packed for tiles, scaled
    float *rows;    // one group of rows before packing
    float *values;  // V of a part, or of a page that cannot be used in place (cpu_kv.h)
    float *scores;  // [rows][PART_TOKENS]
    float *weights; // groups packed: [PART_TOKENS][R]
    float *part, *sum; // [rows][2 + D_padded]: of this part, and of those before it
};

static size_t carve(char *base, size_t *used, size_t elements, float **out) {
    if (base) *out = (float *)(void *)(base + *used);
    return *used += round_up(elements * sizeof(float), 64);
}

static size_t buffers_carve(const struct attention_job *job, char *base, struct buffers *buf) {
    size_t used = 0, rows = (size_t)job->rows_max, D = (size_t)job->D_padded;
    size_t packed_rows = rows * 2 + TILE_ROWS_MAX; // padding less than doubles a group
    carve(base, &used, packed_rows * D + 4 * TILE_ROWS_MAX, &buf->q);
    carve(base, &used, TILE_ROWS_MAX * D, &buf->rows);
    carve(base, &used, PART_TOKENS * D, &buf->values);
    carve(base, &used, rows * PART_TOKENS, &buf->scores);
    carve(base, &used, packed_rows * PART_TOKENS + 4 * TILE_ROWS_MAX, &buf->weights);
    carve(base, &used, rows * (2 + D), &buf->part);
    carve(base, &used, rows * (2 + D), &buf->sum);
    return used;
}

static size_t result_stride(const struct attention_job *job) {
    return 2 + (size_t)job->D_padded;
}

// Row r of an item: token r / G of its block, query head head * G + r % G.
static const float *query_row(const struct attention_job *job, const struct item *item, int r) {
    size_t token = (size_t)(job->spans[item->span].token_first + item->token_first + r / job->G);
    size_t head = (size_t)(item->head * job->G + r % job->G);
    return job->qkv + (token * (size_t)(job->Q + 2 * job->K) + head) * (size_t)job->D;
}

static void *output_row(const struct attention_job *job, const struct item *item, int r) {
    size_t token = (size_t)(job->spans[item->span].token_first + item->token_first + r / job->G);
    size_t head = (size_t)(item->head * job->G + r % job->G);
    size_t first = (token * (size_t)job->Q + head) * (size_t)job->D;
    return job->y + first * dtype_bytes(job->b->dtype);
}

// Context tokens that row r may see.
static int row_context(const struct attention_job *job, const struct item *item, int r) {
    const struct attention_span *span = &job->spans[item->span];
    return span->context - span->token_count + item->token_first + r / job->G + 1;
}

static void pack_queries(const struct attention_job *job, const struct item *item,
                         const struct row_groups *groups, int rows, struct buffers *buf) {
    size_t D = (size_t)job->D;
    float scale = 1.0f / sqrtf((float)job->D);
    for (int g = 0; g < groups->count; g++) {
        int count = group_rows(groups, g, rows);
        for (int r = 0; r < count; r++) {
            const float *q = query_row(job, item, g * groups->rows + r);
            job->b->kernels->scale(buf->rows + (size_t)r * D, q, scale, job->D);
        }
        cpu_pack(job->b, buf->q + (size_t)g * (size_t)groups->padded * D, buf->rows, D, count,
                 job->D);
    }
}

// ------------------------------------------------------------------ a part of the context

// Two pages' K are two panels, which lie as far apart as the pages do. With one page, its V is asked
// for meanwhile.
static struct cpu_tile keys_tile(const struct attention_job *job, const struct item *item,
                                 const int32_t *pages, int count) {
    const struct backend *b = job->b;
    const uint32_t *keys = cpu_kv_keys(b, cpu_page(b, job->layer, pages[0]), item->head);
    const uint32_t *last = cpu_kv_keys(b, cpu_page(b, job->layer, pages[count - 1]), item->head);
    return (struct cpu_tile){.w = keys, .panel_stride = last - keys, .k_stride = PANEL,
                             .k = job->D * (int)b->shape.elem_bytes / 4, .panels = count,
                             .y_stride = PART_TOKENS, .ask_bytes = count > 1 ? 0 : 64,
                             .ask = kv_head(b, cpu_page(b, job->layer, pages[0]),
                                            b->shape.kv_heads + item->head)};
}

// scores[rows][n rounded up to pages] for positions from `first` on.
static void part_scores(const struct attention_job *job, const struct item *item,
                        const struct row_groups *groups, int rows, int first, int n,
                        struct buffers *buf) {
    const int32_t *pages = job->spans[item->span].pages + first / PAGE_TOKENS;
    int most = groups->count > 1 ? min_int(2, job->b->kernels->tile_panels[groups->padded]) : 1;
    for (int page = 0, all = divide_up(n, PAGE_TOKENS), count; page < all; page += count) {
        count = min_int(most, all - page);
        struct cpu_tile tile = keys_tile(job, item, pages + page, count);
        for (int g = 0; g < groups->count; g++) {
            tile.x = buf->q + (size_t)g * (size_t)groups->padded * (size_t)job->D;
            tile.rows = group_rows(groups, g, rows);
            tile.y = buf->scores + (size_t)g * (size_t)groups->rows * PART_TOKENS +
                     page * PAGE_TOKENS;
            cpu_multiply(job->b, &tile);
        }
    }
}

// Scores -> exponentials (zero past what the row may see), maximum and sum to buf->part.
static void part_softmax(const struct attention_job *job, const struct item *item, int rows,
                         int first, int n, struct buffers *buf) {
    const struct cpu_kernels *kernels = job->b->kernels;
    for (int r = 0; r < rows; r++) {
        float *scores = buf->scores + r * PART_TOKENS;
        float *result = buf->part + (size_t)r * result_stride(job);
        int seen = min_int(row_context(job, item, r) - first, n);
        result[0] = -INFINITY;
        result[1] = 0.0f;
        if (seen > 0) {
            result[0] = kernels->maximum(scores, seen);
            result[1] = kernels->exp_sum(scores, result[0], seen);
        }
        seen = max_int(seen, 0);
        memset(scores + seen, 0, (size_t)(n - seen) * sizeof *scores);
    }
}

// V of `count` tokens from position `first` on, in rows of D_padded words: of one page in place where
// it can be, of several in the buffer.
static const uint32_t *gather_values(const struct attention_job *job, const struct item *item,
                                     int first, int count, struct buffers *buf) {
    const int32_t *pages = job->spans[item->span].pages + first / PAGE_TOKENS;
    size_t page_words = PAGE_TOKENS * job->b->shape.elem_bytes / 4 * (size_t)job->D_padded;
    uint32_t *copy = (uint32_t *)(void *)buf->values;
    for (int at = 0; at < count; at += PAGE_TOKENS, copy += page_words) {
        char *page = cpu_page(job->b, job->layer, *pages++);
        const uint32_t *values =
            cpu_kv_values(job->b, page, item->head, min_int(PAGE_TOKENS, count - at), copy);
        if (count <= PAGE_TOKENS) return values;
        if (values != copy) memcpy(copy, values, page_words * sizeof *copy);
    }
    return (const uint32_t *)(const void *)buf->values;
}

// part += weights V for one group of rows and `count` tokens from `at` of the part on.
static void multiply_values(const struct attention_job *job, const struct row_groups *groups, int g,
                            int height, const uint32_t *values, int at, int count,
                            struct buffers *buf) {
    const struct cpu_kernels *kernels = job->b->kernels;
    bool bf16 = job->b->dtype == DTYPE_BF16;
    size_t stride = result_stride(job);
    int padded = kernels->tile_rows[height], all = job->D_padded / PANEL;
    const float *weights = buf->weights + (size_t)g * (size_t)groups->padded * PART_TOKENS;
    float *y = buf->part + (size_t)g * (size_t)groups->rows * stride + 2;
    struct cpu_tile tile = {.x = weights + (bf16 && kernels->packs_pairs ? at / 2 : at) * padded,
                            .panel_stride = PANEL, .k_stride = (size_t)job->D_padded,
                            .k = bf16 ? (count + 1) / 2 : count, .rows = height,
                            .from_stride = stride, .y_stride = stride,
                            .ask = (const char *)values};
    for (int column = 0; column < all; column += tile.panels) {
        tile.panels = min_int(kernels->tile_panels[height], all - column);
        if (tile.panels == 3) tile.panels = 2;
        tile.w = values + column * PANEL;
        tile.y = y + column * PANEL;
        tile.from = at > 0 ? tile.y : NULL;
        cpu_multiply(job->b, &tile);
    }
}

// A page's V at a time where it meets one group of rows; for more, the part's is put together first.
static void part_values(const struct attention_job *job, const struct item *item,
                        const struct row_groups *groups, int rows, int first, int n,
                        struct buffers *buf) {
    for (int g = 0; g < groups->count; g++)
        cpu_pack(job->b, buf->weights + (size_t)g * (size_t)groups->padded * PART_TOKENS,
                 buf->scores + (size_t)g * (size_t)groups->rows * PART_TOKENS, PART_TOKENS,
                 group_rows(groups, g, rows), n);
    int step = groups->count > 1 ? PART_TOKENS : PAGE_TOKENS;
    for (int at = 0; at < n; at += step) {
        int count = min_int(step, n - at);
        const uint32_t *values = gather_values(job, item, first + at, count, buf);
        for (int g = 0; g < groups->count; g++)
            multiply_values(job, groups, g, group_rows(groups, g, rows), values, at, count, buf);
    }
}

// sum (maximum, sum, outputs) += part, both relative to the larger maximum.
static void merge_row(const struct attention_job *job, float *sum, const float *part) {
    if (part[0] == -INFINITY) return;
    if (sum[0] == -INFINITY) {
        memcpy(sum, part, result_stride(job) * sizeof *sum);
        return;
    }
    float top = sum[0] > part[0] ? sum[0] : part[0];
    float sum_scale = expf(sum[0] - top), part_scale = expf(part[0] - top);
    sum[0] = top;
    sum[1] = sum[1] * sum_scale + part[1] * part_scale;
    job->b->kernels->scale_add(sum + 2, sum_scale, part + 2, part_scale, job->D_padded);
}

static void write_row(const struct attention_job *job, const struct item *item, int r,
                      float *sum) {
    job->b->kernels->scale(sum + 2, sum + 2, 1.0f / sum[1], job->D);
    cpu_write_input(job->b, output_row(job, item, r), sum + 2, (size_t)job->D);
}

static void attention_chunk(void *context, int chunk, int thread) {
    const struct attention_job *job = context;
    const struct item *item = &job->items[chunk];
    int rows = item->token_count * job->G;
    const struct cpu_kernels *kernels = job->b->kernels;
    struct row_groups groups = cpu_row_groups(kernels, rows, kernels->tile_rows_alone);
    struct buffers buf = {NULL};
    buffers_carve(job, cpu_thread_scratch(job->b, thread), &buf);
    size_t stride = result_stride(job);
    pack_queries(job, item, &groups, rows, &buf);
    for (int r = 0; r < rows; r++) buf.sum[(size_t)r * stride] = -INFINITY;
    int end = row_context(job, item, rows - 1);
    for (int part = item->part_first; part < item->part_first + item->part_count; part++) {
        int first = part * PART_TOKENS, n = min_int(PART_TOKENS, end - first);
        part_scores(job, item, &groups, rows, first, n, &buf);
        part_softmax(job, item, rows, first, n, &buf);
        part_values(job, item, &groups, rows, first, n, &buf);
        if (job->split) {
            memcpy(job->partials + item->partial, buf.part, (size_t)rows * stride * sizeof(float));
            return;
        }
        for (int r = 0; r < rows; r++)
            merge_row(job, buf.sum + (size_t)r * stride, buf.part + (size_t)r * stride);
    }
    for (int r = 0; r < rows; r++) write_row(job, item, r, buf.sum + (size_t)r * stride);
}

// Split: the parts of one item, left to right, into the first one's place.
static void merge_chunk(void *context, int chunk, int thread) {
    (void)thread;
    const struct attention_job *job = context;
    const struct item *item = &job->merges[chunk];
    int rows = item->token_count * job->G;
    size_t stride = result_stride(job);
    float *first = job->partials + item->partial;
    for (int part = 1; part < item->part_count; part++)
        for (int r = 0; r < rows; r++)
            merge_row(job, first + (size_t)r * stride,
                      first + ((size_t)part * (size_t)rows + (size_t)r) * stride);
    for (int r = 0; r < rows; r++) write_row(job, item, r, first + (size_t)r * stride);
}

// ------------------------------------------------------------------ cutting the work

// Unsplit items; with items == NULL only counts them, and the parts they walk.
static int list_items(const struct attention_job *job, int span_count, struct item *items,
                      int *parts) {
    int block = max_int(1, BLOCK_ROWS / job->G), count = 0;
    *parts = 0;
    for (int s = 0; s < span_count; s++) {
        const struct attention_span *span = &job->spans[s];
        for (int token = 0; token < span->token_count; token += block) {
            struct item item = {.span = s, .token_first = token};
            item.token_count = min_int(block, span->token_count - token);
            int seen = row_context(job, &item, item.token_count * job->G - 1);
            item.part_count = divide_up(seen, PART_TOKENS);
            for (item.head = 0; item.head < job->K; item.head++, count++) {
                if (items) items[count] = item;
                *parts += item.part_count;
            }
        }
    }
    return count;
}

// Cuts the `count` items in job->items into their parts: items become merges, parts items.
static int split_items(struct attention_job *job, int count, int parts) {
    struct item *list = job->items + count;
    size_t partial = 0;
    int made = 0;
    for (int i = 0; i < count; i++) {
        struct item *whole = &job->items[i];
        whole->partial = partial;
        for (int part = 0; part < whole->part_count; part++, made++) {
            list[made] = *whole;
            list[made].part_first = part;
            list[made].part_count = 1;
            list[made].partial = partial;
            partial += (size_t)(whole->token_count * job->G) * result_stride(job);
        }
    }
    VERIFY_OP(made, ==, parts);
    job->partials = cpu_scratch(job->b, SCRATCH_PARTIALS, partial * sizeof(float));
    job->merges = job->items;
    job->items = list;
    job->split = true;
    return made;
}

void cpu_attention(struct backend *b, int layer, void *y, const void *qkv,
                   const struct attention_span *spans, int span_count, int query_heads) {
    VERIFY(b->pool);
    struct attention_job job = {.b = b, .layer = layer, .y = y, .qkv = qkv, .spans = spans,
                                .Q = query_heads, .K = b->shape.kv_heads,
                                .D = b->shape.head_size};
    VERIFY_OP(job.Q % job.K, ==, 0);
    VERIFY_OP(job.D % 2, ==, 0);
    job.G = job.Q / job.K;
    job.D_padded = (int)round_up((size_t)job.D, PANEL);
    job.rows_max = max_int(1, BLOCK_ROWS / job.G) * job.G;
    int parts, count = list_items(&job, span_count, NULL, &parts);
    if (count == 0) return;
    bool split = count < ITEMS_A_THREAD * b->thread_count && parts > count;
    size_t items = (size_t)count + (split ? (size_t)parts : 0);
    job.items = cpu_scratch(b, SCRATCH_ITEMS, items * sizeof *job.items);
    list_items(&job, span_count, job.items, &parts);
    int whole = count;
    if (split && b->thread_count > 1) count = split_items(&job, count, parts);
    struct buffers unused;
    cpu_threads_scratch(b, buffers_carve(&job, NULL, &unused));
    cpu_threads_run(b->threads, attention_chunk, &job, count);
    if (job.split) cpu_threads_run(b->threads, merge_chunk, &job, whole);
}
