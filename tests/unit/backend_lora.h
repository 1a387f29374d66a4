// lora_shrink, lora_expand and copies between pages and images against double precision; part of
// test_backend_cpu.c.
#ifndef LORAD_TESTS_BACKEND_LORA_H
#define LORAD_TESTS_BACKEND_LORA_H

#include "backend_rig.h"

// ------------------------------------------------------------------ LoRA

enum { LORA_SEGMENTS_MAX = 12 };

struct lora_case {
    int in, out[LORA_TARGETS_MAX], target_count;
    int kv_heads, head_size; // of the pool: sets where pages end
    int segment_count;
    struct {
        int first, tokens, rank[LORA_TARGETS_MAX];
    } segments[LORA_SEGMENTS_MAX];
};

static const struct lora_case lora_cases[] = {
    // single tokens of many adapters, ranks mixed, a module missing, an empty segment
    {64, {64, 16, 16}, 3, 1, 16, 7,
     {{0, 1, {8, 8, 8}}, {1, 1, {1, 2, 3}}, {2, 0, {4, 4, 4}}, {2, 1, {0, 16, 0}},
      {3, 1, {256, 17, 64}}, {4, 1, {0, 0, 0}}, {5, 1, {5, 0, 100}}}},
    // odd sizes: rows straddle pages and words
    {77, {53, 19}, 2, 1, 18, 4,
     {{0, 3, {7, 9}}, {3, 2, {16, 33}}, {5, 29, {3, 1}}, {34, 1, {31, 32}}}},
    // long segments beside short ones
    {640, {300, 128}, 2, 2, 64, 3, {{0, 130, {16, 16}}, {130, 1, {64, 8}}, {131, 60, {40, 0}}}},
    // tokens in several segments, not the same ones
    {96, {200}, 1, 1, 32, 4, {{0, 9, {8}}, {0, 9, {24}}, {4, 5, {200}}, {9, 3, {16}}}},
    {2048, {2048}, 1, 4, 64, 2, {{0, 1, {16}}, {1, 16, {64}}}},
    // whole panels: tiles of tensor cores; ranks and tokens about a tile's 16, rows over page ends
    {128, {192, 64, 64}, 3, 1, 16, 6,
     {{0, 1, {8, 16, 1}}, {1, 1, {0, 17, 64}}, {2, 15, {16, 5, 0}}, {17, 16, {15, 16, 256}},
      {33, 17, {33, 1, 16}}, {50, 3, {100, 31, 32}}}},
    {64, {64}, 1, 1, 16, 2, {{0, 4096, {8}}, {4096, 1, {16}}}}, // a long prompt beside a decode
    // tokens in several segments; x in more than one depth
    {2112, {128}, 1, 1, 32, 4, {{0, 9, {8}}, {0, 20, {24}}, {4, 5, {200}}, {20, 1, {16}}}},
};

struct lora_rig {
    struct pool_rig pool;
    const struct lora_case *c;
    struct lora_segment segments[LORA_SEGMENTS_MAX];
    float *a[LORA_SEGMENTS_MAX][LORA_TARGETS_MAX], *b[LORA_SEGMENTS_MAX][LORA_TARGETS_MAX];
    int tokens, v_rows, stride;
    float *x, *y, *before, *v;
    void *input;
    struct lora_launch launch;
};

// A matrix of random values, and its place in the image.
static float *image_add(struct lora_rig *rig, char *image, size_t *used, int64_t *offset,
                        int rows, int columns) {
    size_t count = (size_t)rows * (size_t)columns;
    float *values = random_floats(count);
    *offset = (int64_t)*used;
    dtype_convert(image + *used * dtype_bytes(rig->pool.dtype), rig->pool.dtype, values, DTYPE_F32,
                  count);
    for (size_t i = 0; i < count; i++) values[i] = (float)rounded(values[i], rig->pool.dtype);
    *used = (*used + count + 7) & ~(size_t)7;
    return values;
}

// What went into pages by pool_write comes out of them, and goes in again, by pool_copy.
static void check_pool_copy(struct backend *b, const int32_t *pages, const void *image,
                            size_t bytes, size_t elems) {
    if (bytes == 0) return;
    void *back = mem_alloc_aligned(bytes);
    memset(back, 0x55, bytes);
    ops->pool_copy(b, LAYER, pages, back, elems, true);
    ops->synchronize(b);
    assert_memory_equal(back, image, bytes);
    memset(back, 0, bytes);
    ops->pool_copy(b, LAYER, pages, back, elems, false);
    ops->synchronize(b);
    memset(back, 0x55, bytes);
    ops->pool_copy(b, LAYER, pages, back, elems, true);
    ops->synchronize(b);
    for (size_t i = 0; i < bytes; i++) assert_int_equal(((char *)back)[i], 0);
    memcpy(back, image, bytes);
    ops->pool_copy(b, LAYER, pages, back, elems, false);
    ops->synchronize(b);
    free(back);
}

// More pages than a launch may name at once, the last of them not full.
static void test_pool_many_pages(void **state) {
    (void)state;
    enum { PAGES = 2000, ELEMS = (PAGES - 1) * 64 + 21 };
    for (int s = 0; s < SETUPS; s++) {
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        static struct pool_rig rig;
        pool_rig_init(&rig, b, setups[s].dtype, 1, 2, LAYER + 1, PAGES + 50);
        assert_int_equal(rig.shape.page_elems, 64);
        int32_t *pages = pages_take(&rig, PAGES);
        float *values = random_floats(ELEMS);
        size_t bytes = ELEMS * dtype_bytes(rig.dtype);
        void *image = mem_alloc_aligned(bytes);
        dtype_convert(image, rig.dtype, values, DTYPE_F32, ELEMS);
        ops->pool_write(b, LAYER, pages, image, ELEMS);
        if (ops->pool_written) ops->pool_written(b);
        for (size_t e = 0; e < ELEMS; e++) {
            double wanted = rounded(values[e], rig.dtype);
            expect_near(pool_element(&rig, LAYER, pages[e / 64], e % 64), wanted, 0, "page", e);
        }
        assert_true(isnan(pool_element(&rig, LAYER, pages[PAGES - 1], 21))); // not written
        check_pool_copy(b, pages, image, bytes, ELEMS);
        free(image);
        free(values);
        free(pages);
        ops->memory_destroy(b, rig.pool);
        ops->close(b);
    }
}

static void lora_rig_init(struct lora_rig *rig, struct backend *b, const struct setup *setup,
                          const struct lora_case *c) {
    enum dtype dtype = setup->dtype;
    *rig = (struct lora_rig){.c = c};
    pool_rig_init(&rig->pool, b, dtype, c->kv_heads, c->head_size, 2, 800);
    char *image = mem_alloc_aligned((size_t)2 << 20);
    for (int s = 0; s < c->segment_count; s++) {
        struct lora_segment *segment = &rig->segments[s];
        *segment = (struct lora_segment){.token_first = c->segments[s].first,
                                         .token_count = c->segments[s].tokens,
                                         .v_first = rig->v_rows, .weight = 0.5f + random_float()};
        rig->v_rows += c->segments[s].tokens;
        int end = c->segments[s].first + c->segments[s].tokens;
        rig->tokens = end > rig->tokens ? end : rig->tokens;
        size_t used = 0;
        for (int t = 0; t < c->target_count; t++) {
            int rank = segment->rank[t] = c->segments[s].rank[t];
            rig->a[s][t] = image_add(rig, image, &used, &segment->a_offset[t], rank, c->in);
            rig->b[s][t] = image_add(rig, image, &used, &segment->b_offset[t], rank, c->out[t]);
        }
        size_t page_elems = rig->pool.shape.page_elems;
        int32_t *pages = pages_take(&rig->pool, (int)((used + page_elems - 1) / page_elems));
        ops->pool_write(b, LAYER, pages, image, used);
        if (ops->pool_written) ops->pool_written(b);
        check_pool_copy(b, pages, image, used * dtype_bytes(dtype), used);
        segment->pages = pages;
        segment->page_count = (int32_t)((used + page_elems - 1) / page_elems);
    }
    free(image);
    for (int t = 0; t < c->target_count; t++) rig->stride += c->out[t] + 4; // columns of others
    rig->x = random_floats((size_t)rig->tokens * (size_t)c->in);
    size_t y_count = (size_t)rig->tokens * (size_t)rig->stride;
    rig->y = random_floats(y_count);
    // Others' columns are minus zero: even adding nothing to them shows.
    for (int token = 0; token < rig->tokens; token++)
        for (int t = 0, column = 0; t < c->target_count; column += c->out[t] + 4, t++)
            for (int i = 0; i < 4; i++)
                rig->y[token * rig->stride + column + c->out[t] + i] = -0.0f;
    rig->before = mem_alloc(y_count * sizeof *rig->before);
    memcpy(rig->before, rig->y, y_count * sizeof *rig->y);
    rig->v = random_floats((size_t)rig->v_rows * LORA_TARGETS_MAX * LORA_RANK_MAX);
    rig->input = input_of(setup, rig->x, (size_t)rig->tokens * (size_t)c->in);
    rig->launch = (struct lora_launch){.layer = LAYER, .x = rig->input, .in = c->in,
                                       .target_count = c->target_count,
                                       .segments = rig->segments,
                                       .segment_count = c->segment_count, .v = rig->v};
    for (int t = 0, column = 0; t < c->target_count; column += c->out[t] + 4, t++) {
        rig->launch.target[t].module = (enum lora_module)t;
        rig->launch.target[t].y = rig->y + column;
        rig->launch.target[t].out = c->out[t];
        rig->launch.target[t].stride = rig->stride;
    }
}

static void lora_rig_deinit(struct lora_rig *rig, struct backend *b) {
    for (int s = 0; s < rig->c->segment_count; s++) {
        free((int32_t *)rig->segments[s].pages);
        for (int t = 0; t < rig->c->target_count; t++) {
            free(rig->a[s][t]);
            free(rig->b[s][t]);
        }
    }
    free(rig->x);
    free(rig->input);
    free(rig->y);
    free(rig->before);
    free(rig->v);
    ops->memory_destroy(b, rig->pool.pool);
}

// Where B[o][r] lies (kernels/backend.h).
static int panel_index(int out, int rank, int o, int r) {
    int panel = o / LORA_PANEL, width = LORA_PANEL;
    if ((panel + 1) * LORA_PANEL > out) width = out - panel * LORA_PANEL;
    return panel * LORA_PANEL * rank + r * width + o % LORA_PANEL;
}

// expected += weight B A x of one token and segment; size += what rounding errors are relative to.
static void reference_lora(const struct lora_rig *rig, int s, int target, int token,
                           double *expected, double *size) {
    int rank = rig->segments[s].rank[target], in = rig->c->in, out = rig->c->out[target];
    double v[LORA_RANK_MAX], v_size[LORA_RANK_MAX];
    for (int j = 0; j < rank; j++) {
        v[j] = v_size[j] = 0;
        for (int i = 0; i < in; i++) {
            double product = rounded(rig->x[token * in + i], rig->pool.dtype) *
                             rig->a[s][target][j * in + i];
            v[j] += product;
            v_size[j] += fabs(product);
        }
    }
    for (int o = 0; o < out; o++)
        for (int j = 0; j < rank; j++) {
            double factor = rig->segments[s].weight * rig->b[s][target][panel_index(out, rank, o, j)];
            expected[o] += factor * v[j];
            size[o] += fabs(factor) * v_size[j];
        }
}

static void lora_check(struct backend *b, const struct setup *setup, const struct lora_case *c) {
    static struct lora_rig rig;
    lora_rig_init(&rig, b, setup, c);
    ops->lora_shrink(b, &rig.launch);
    ops->lora_expand(b, &rig.launch);
    ops->synchronize(b);
    double *expected = mem_alloc((size_t)rig.stride * sizeof *expected);
    double *size = mem_alloc((size_t)rig.stride * sizeof *size);
    for (int token = 0; token < rig.tokens; token++) {
        for (int i = 0; i < rig.stride; i++) {
            expected[i] = rig.before[token * rig.stride + i];
            size[i] = 0;
        }
        for (int t = 0, column = 0; t < c->target_count; column += c->out[t] + 4, t++)
            for (int s = 0; s < c->segment_count; s++) {
                int place = token - rig.segments[s].token_first;
                if (place >= 0 && place < rig.segments[s].token_count)
                    reference_lora(&rig, s, t, token, expected + column, size + column);
            }
        for (int i = 0; i < rig.stride; i++) {
            size_t at = (size_t)(token * rig.stride + i);
            double tolerance = size[i] > 0 ? 1e-5 * size[i] + 1e-6 : 0; // others are untouched
            expect_near(rig.y[at], expected[i], tolerance, "lora", at);
            if (size[i] == 0) assert_memory_equal(&rig.y[at], &rig.before[at], sizeof *rig.y);
        }
    }
    // Each segment alone, in order, gives the same bits as all at once.
    float *batch = mem_alloc((size_t)(rig.tokens * rig.stride) * sizeof *batch);
    memcpy(batch, rig.y, (size_t)(rig.tokens * rig.stride) * sizeof *batch);
    memcpy(rig.y, rig.before, (size_t)(rig.tokens * rig.stride) * sizeof *batch);
    for (int s = 0; s < c->segment_count; s++) {
        struct lora_launch alone = rig.launch;
        alone.segments = &rig.segments[s];
        alone.segment_count = 1;
        ops->lora_shrink(b, &alone);
        ops->lora_expand(b, &alone);
        ops->synchronize(b);
    }
    assert_memory_equal(batch, rig.y, (size_t)(rig.tokens * rig.stride) * sizeof *batch);
    free(batch);
    free(expected);
    free(size);
    lora_rig_deinit(&rig, b);
}

// Any widths (every other time those of whole tiles), ranks and segments, empty ones and gaps too.
static struct lora_case random_lora_case(bool whole) {
    struct lora_case c = {.kv_heads = 4, .head_size = 64, .target_count = random_between(1, 3),
                          .segment_count = random_between(1, 8)};
    c.in = whole ? 64 * random_between(1, 4) : random_between(1, 256);
    for (int t = 0; t < c.target_count; t++)
        c.out[t] = whole ? 64 * random_between(1, 4) : random_between(1, 256);
    for (int s = 0, first = 0; s < c.segment_count; s++) {
        int tokens = random_between(0, 3) ? random_between(0, 2) : random_between(3, 40);
        c.segments[s].first = first += random_between(0, 1);
        c.segments[s].tokens = tokens;
        first += tokens;
        for (int t = 0; t < c.target_count; t++)
            c.segments[s].rank[t] = random_between(0, 4) ? random_between(1, 40)
                                                         : random_between(0, LORA_RANK_MAX);
    }
    return c;
}

static bool has_tokens(const struct lora_case *c) {
    for (int s = 0; s < c->segment_count; s++)
        if (c->segments[s].tokens > 0) return true;
    return false;
}

static void test_lora(void **state) {
    (void)state;
    for (int s = 0; s < SETUPS; s++) {
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        for (size_t i = 0; i < sizeof lora_cases / sizeof *lora_cases; i++)
            lora_check(b, &setups[s], &lora_cases[i]);
        for (int i = 0; i < 12; i++) {
            struct lora_case c = random_lora_case(i % 2);
            if (has_tokens(&c)) lora_check(b, &setups[s], &c);
        }
        ops->close(b);
    }
}

#endif
