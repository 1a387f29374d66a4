// RoPE, the KV write and attention against double precision; part of test_backend_cpu.c.
#ifndef LORAD_TESTS_BACKEND_ATTENTION_H
#define LORAD_TESTS_BACKEND_ATTENTION_H

#include "backend_rig.h"

// ------------------------------------------------------------------ RoPE and attention

struct span_case {
    int context, tokens; // the last `tokens` of the context are in the step
};

struct attention_case {
    int query_heads, kv_heads, head_size, span_count;
    struct span_case spans[5];
};

static const struct attention_case attention_cases[] = {
    {1, 1, 16, 1, {{1, 1}}},                                       // nothing but itself
    {4, 1, 64, 3, {{33, 33}, {17, 1}, {16, 5}}},                   // page edges
    {8, 8, 32, 5, {{1, 1}, {15, 1}, {16, 1}, {17, 1}, {250, 3}}},  // decodes, no groups
    {16, 2, 128, 2, {{270, 70}, {400, 1}}},                        // a part is crossed inside
    {6, 2, 80, 3, {{513, 2}, {512, 1}, {100, 100}}},               // 3 heads a group
    {3, 1, 18, 2, {{40, 9}, {300, 40}}},                           // D not a multiple of 16
    {8, 1, 256, 1, {{1030, 1}}},                                   // one long decode: split
    {32, 4, 64, 1, {{300, 130}}},                                  // blocks of a long chunk
    {32, 1, 64, 2, {{20, 3}, {270, 1}}},                           // one kv head for all
    {4, 2, 64, 4, {{600, 3}, {257, 2}, {300, 1}, {17, 8}}},        // drafts, in parts
    {3, 1, 128, 3, {{515, 5}, {256, 5}, {1, 1}}},
};

struct attention_rig {
    struct pool_rig pool;
    const struct attention_case *c;
    struct attention_span spans[5];
    float *all[5];  // [context][(Q + 2K) D]: q, k, v of every token of every span, before RoPE
    float *cosines, *sines;
    int tokens;
    float *qkv; // the step's
};

enum { ATTENTION_LAYERS = 2, LAYER = 1 };

static void attention_rig_init(struct attention_rig *rig, struct backend *b, enum dtype dtype,
                               const struct attention_case *c) {
    *rig = (struct attention_rig){.c = c};
    int D = c->head_size, width = (c->query_heads + 2 * c->kv_heads) * D;
    pool_rig_init(&rig->pool, b, dtype, c->kv_heads, D, ATTENTION_LAYERS, 160);
    size_t angles = 1100 * (size_t)(D / 2);
    rig->cosines = mem_alloc(angles * sizeof(float));
    rig->sines = mem_alloc(angles * sizeof(float));
    for (size_t i = 0; i < angles; i++) {
        double angle = (double)random_float() * 3.14;
        rig->cosines[i] = (float)cos(angle);
        rig->sines[i] = (float)sin(angle);
    }
    for (int s = 0; s < c->span_count; s++) {
        int context = c->spans[s].context, count = c->spans[s].tokens;
        int32_t *pages = pages_take(&rig->pool, (context + PAGE_TOKENS - 1) / PAGE_TOKENS);
        rig->spans[s] = (struct attention_span){rig->tokens, count, context, pages};
        rig->tokens += count;
        rig->all[s] = random_floats((size_t)context * (size_t)width);
        for (int i = 0; i < context * width; i++) rig->all[s][i] *= 1.5f;
    }
    rig->qkv = mem_zalloc((size_t)rig->tokens * (size_t)width, sizeof(float));
}

static void attention_rig_deinit(struct attention_rig *rig, struct backend *b) {
    for (int s = 0; s < rig->c->span_count; s++) {
        free((int32_t *)rig->spans[s].pages);
        free(rig->all[s]);
    }
    free(rig->cosines);
    free(rig->sines);
    free(rig->qkv);
    ops->memory_destroy(b, rig->pool.pool);
}

// The slot behind a context, in its last page, held somebody's numbers that are not finite.
static void attention_rig_spoil(struct attention_rig *rig, struct backend *b,
                                const struct attention_span *span, int width) {
    if (span->context % PAGE_TOKENS == 0) return;
    int32_t position = 0;
    int32_t slot = span->pages[span->context / PAGE_TOKENS] * PAGE_TOKENS + span->context % PAGE_TOKENS;
    float *token = mem_alloc((size_t)width * sizeof *token);
    for (int i = 0; i < width; i++) token[i] = NAN;
    ops->rope_and_kv_write(b, LAYER, token, rig->cosines, rig->sines, &position, &slot, 1,
                           rig->c->query_heads);
    ops->synchronize(b);
    free(token);
}

// Rotates and writes every token of the contexts, in steps of `a_step` tokens; the step's tokens stay
// in rig->qkv, rotated.
static void attention_rig_write(struct attention_rig *rig, struct backend *b, int a_step) {
    int width = (rig->c->query_heads + 2 * rig->c->kv_heads) * rig->c->head_size;
    for (int s = 0; s < rig->c->span_count; s++) {
        const struct attention_span *span = &rig->spans[s];
        size_t bytes = (size_t)span->context * (size_t)width * sizeof(float);
        float *copy = mem_alloc(bytes);
        int32_t positions[1100], slots[1100];
        memcpy(copy, rig->all[s], bytes);
        for (int i = 0; i < span->context; i++) {
            positions[i] = i;
            slots[i] = span->pages[i / PAGE_TOKENS] * PAGE_TOKENS + i % PAGE_TOKENS;
        }
        for (int at = 0, count; at < span->context; at += count) {
            count = span->context - at < a_step ? span->context - at : a_step;
            ops->rope_and_kv_write(b, LAYER, copy + at * width, rig->cosines, rig->sines,
                                   positions + at, slots + at, count, rig->c->query_heads);
        }
        attention_rig_spoil(rig, b, span, width);
        ops->synchronize(b);
        int first = span->context - span->token_count;
        memcpy(rig->qkv + span->token_first * width, copy + first * width,
               (size_t)(span->token_count * width) * sizeof(float));
        free(copy);
    }
}

// The reference's rotated element i of head `head` of token `position`.
static double reference_rotated(const struct attention_rig *rig, int s, int position, int head,
                                int i) {
    int D = rig->c->head_size, half = D / 2;
    int width = (rig->c->query_heads + 2 * rig->c->kv_heads) * D;
    const float *h = rig->all[s] + position * width + head * D;
    double cosine = rig->cosines[position * half + i % half];
    double sine = rig->sines[position * half + i % half];
    return i < half ? h[i] * cosine - h[i + half] * sine : h[i] * cosine + h[i - half] * sine;
}

// Where element i of K (or V) of token `token` of a page lies in its head's part: in rows, but on the
// CPU as kernels/cpu/cpu_kv.h says.
static size_t cache_place(const struct attention_rig *rig, bool is_v, int token, int i) {
    int D = rig->c->head_size;
    bool rows = strcmp(ops->name, "cpu") != 0, pairs = rig->pool.dtype == DTYPE_BF16;
    if (rows || (is_v && !pairs)) return (size_t)(token * D + i);
    if (is_v) return (size_t)((token / 2 * D + i) * 2 + token % 2);
    return pairs ? (size_t)((i / 2 * PAGE_TOKENS + token) * 2 + i % 2)
                 : (size_t)(i * PAGE_TOKENS + token);
}

// K and V as the pool holds them, in double, checked against RoPE on the way.
static void reference_cache(const struct attention_rig *rig, int s, int kv_head, double *k,
                            double *v) {
    const struct attention_case *c = rig->c;
    int D = c->head_size, width = (c->query_heads + 2 * c->kv_heads) * D;
    bool bf16 = rig->pool.dtype == DTYPE_BF16;
    for (int p = 0; p < rig->spans[s].context; p++)
        for (int i = 0; i < D; i++) {
            int32_t page = rig->spans[s].pages[p / PAGE_TOKENS];
            int token = p % PAGE_TOKENS, v_head = c->kv_heads + kv_head;
            size_t k_at = (size_t)(kv_head * PAGE_TOKENS * D) + cache_place(rig, false, token, i);
            size_t v_at = (size_t)(v_head * PAGE_TOKENS * D) + cache_place(rig, true, token, i);
            k[p * D + i] = pool_element(&rig->pool, LAYER, page, k_at);
            v[p * D + i] = pool_element(&rig->pool, LAYER, page, v_at);
            double rotated = reference_rotated(rig, s, p, c->query_heads + kv_head, i);
            double plain = rig->all[s][p * width + (c->query_heads + c->kv_heads + kv_head) * D + i];
            expect_near(k[p * D + i], rotated, bf16 ? 0.01 : 1e-6, "k in the pool", k_at);
            expect_near(v[p * D + i], plain, bf16 ? fabs(plain) / 256 : 0, "v in the pool", v_at);
        }
}

// In bf16 a backend may round q and the softmax's weights, each by a 512th at most: half of what that
// could do to a score (`off`) and to a sum of weights, since not all errors point one way.
static void reference_attention(const struct attention_rig *rig, int s, int head, const double *k,
                                const double *v, const float *y, double y_off) {
    int D = rig->c->head_size, Q = rig->c->query_heads;
    const struct attention_span *span = &rig->spans[s];
    for (int t = 0; t < span->token_count; t++) {
        int position = span->context - span->token_count + t;
        double q[256], weights[1100], top = -1e300, sum = 0, off = 0;
        bool bf16 = rig->pool.dtype == DTYPE_BF16;
        for (int i = 0; i < D; i++) q[i] = reference_rotated(rig, s, position, head, i);
        for (int p = 0; p <= position; p++) {
            double size = 0;
            weights[p] = 0;
            for (int i = 0; i < D; i++) {
                weights[p] += q[i] * k[p * D + i];
                size += fabs(q[i] * k[p * D + i]);
            }
            weights[p] /= sqrt(D);
            off = fmax(off, size / sqrt(D) / 512);
            top = weights[p] > top ? weights[p] : top;
        }
        for (int p = 0; p <= position; p++) sum += weights[p] = exp(weights[p] - top);
        for (int i = 0; i < D; i++) {
            double expected = 0, size = 0;
            for (int p = 0; p <= position; p++) {
                expected += weights[p] / sum * v[p * D + i];
                size += weights[p] / sum * fabs(v[p * D + i]);
            }
            size_t at = (size_t)(((span->token_first + t) * Q + head) * D + i);
            double tolerance = 3e-5 + (bf16 ? size * (1.0 / 512 + off) / 2 : 0) +
                               y_off * fabs(expected);
            expect_near(y[at], expected, tolerance, "attention", at);
        }
    }
}

static void attention_check(struct backend *b, const struct setup *setup,
                            const struct attention_case *c) {
    static struct attention_rig rig;
    attention_rig_init(&rig, b, setup->dtype, c);
    attention_rig_write(&rig, b, c->span_count % 2 ? 1100 : 3);
    size_t row = (size_t)(c->query_heads * c->head_size), D = (size_t)c->head_size;
    float *y = random_floats((size_t)rig.tokens * row);
    float *alone = random_floats((size_t)rig.tokens * row);
    ops->attention(b, LAYER, y, rig.qkv, rig.spans, c->span_count, c->query_heads);
    ops->synchronize(b);
    double off = (double)input_back(setup, y, (size_t)rig.tokens * row);
    double *k = mem_alloc(1100 * D * sizeof *k), *v = mem_alloc(1100 * D * sizeof *v);
    for (int s = 0; s < c->span_count; s++)
        for (int head = 0; head < c->query_heads; head++) {
            int group = c->query_heads / c->kv_heads;
            if (head % group == 0) reference_cache(&rig, s, head / group, k, v);
            reference_attention(&rig, s, head, k, v, y, off);
        }
    // Alone, a span has the same bits as in the batch.
    for (int s = 0; s < c->span_count; s++) {
        ops->attention(b, LAYER, alone, rig.qkv, &rig.spans[s], 1, c->query_heads);
        ops->synchronize(b);
        input_back(setup, alone, (size_t)rig.tokens * row);
        size_t at = (size_t)rig.spans[s].token_first * row;
        assert_memory_equal(alone + at, y + at,
                            (size_t)rig.spans[s].token_count * row * sizeof *y);
    }
    free(k);
    free(v);
    free(y);
    free(alone);
    attention_rig_deinit(&rig, b);
}

// Any heads (every other time those of tiles), contexts about the ends of pages and parts.
static struct attention_case random_attention_case(bool tiles) {
    static const int heads[] = {8, 24, 40, 96};
    int group = random_between(1, 5), kv = random_between(1, 3);
    struct attention_case c = {group * kv, kv, tiles ? 64 : heads[random_between(0, 3)],
                               random_between(1, 4), {{0}}};
    for (int s = 0; s < c.span_count; s++) {
        int about = 16 * random_between(0, 20) + random_between(-1, 1);
        c.spans[s].context = about < 1 ? 1 : about;
        int tokens = random_between(0, 1) ? 1 : random_between(1, 24);
        c.spans[s].tokens = tokens < c.spans[s].context ? tokens : c.spans[s].context;
    }
    return c;
}

static void test_attention(void **state) {
    (void)state;
    for (int s = 0; s < SETUPS; s++) {
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        for (size_t i = 0; i < sizeof attention_cases / sizeof *attention_cases; i++)
            attention_check(b, &setups[s], &attention_cases[i]);
        for (int i = 0; i < 8; i++) {
            struct attention_case c = random_attention_case(i % 2);
            attention_check(b, &setups[s], &c);
        }
        ops->close(b);
    }
}

#endif
