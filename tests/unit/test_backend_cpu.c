// Every operation of the CPU backend against a plain double-precision computation, for each
// instruction set the machine has, f32 and bf16, one and two threads, our own matmul and oneDNN's;
// then what a batch must not change: a row's bits. Shapes are random but the seed is fixed.
//
// In bf16 the reference rounds what the backend rounds (weights, pool elements, x of a matmul), so
// that the tolerances bound accumulation alone (attention's say what else they allow for).
#include "base/memory.h"
#include "kernels/backend.h"
#include "rows_alike.h"
#include "server/sampler.h"
#if !defined LORAD_EMULATE && !defined LORAD_GPU
#include "kernels/cpu/cpu_threads.h"
#endif

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

struct setup {
    const char *isa;
    enum dtype dtype;
    int threads;
    const char *linear;
};

#ifdef LORAD_GPU // the same tests on a GPU: bench/gpu/smoke.sh
extern const struct backend_ops backend_cuda_host;
static const struct setup setups[] = {{"gpu", DTYPE_F32, 1, "cublas"},
                                      {"gpu", DTYPE_BF16, 1, "cublas"}};
static const struct backend_ops *const ops = &backend_cuda_host;
#elif defined LORAD_EMULATE // and of the CUDA backend emulated: tests/emulation
extern uint64_t emulate_seed;
static const struct setup setups[] = {{"emulated", DTYPE_F32, 1, "own"},
                                      {"emulated", DTYPE_BF16, 1, "own"}};
static const struct backend_ops *const ops = &backend_cuda;
#else
static const struct setup setups[] = {
    {"scalar", DTYPE_F32, 1, "own"},        {"scalar", DTYPE_BF16, 2, "own"},
    {"avx2", DTYPE_F32, 2, "own"},          {"avx2", DTYPE_BF16, 1, "own"},
    {"avx512", DTYPE_F32, 1, "own"},        {"avx512", DTYPE_BF16, 2, "own"},
    {"avx512bf16", DTYPE_F32, 2, "own"},    {"avx512bf16", DTYPE_BF16, 1, "own"},
    {"avx512bf16", DTYPE_BF16, 2, "own"},   {"scalar", DTYPE_F32, 2, "onednn"},
    {"avx512bf16", DTYPE_BF16, 2, "onednn"},
};
static const struct backend_ops *const ops = &backend_cpu;
#endif
enum { SETUPS = sizeof setups / sizeof *setups };
static uint64_t random_state;

static uint32_t random_bits(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33);
}

static int random_between(int low, int high) {
    return low + (int)(random_bits() % (uint32_t)(high - low + 1));
}

static float random_float(void) {
    return (float)random_bits() / 1073741824.0f - 1.0f;
}

static float *random_floats(size_t count) {
    float *values = mem_alloc_aligned(count * sizeof *values);
    for (size_t i = 0; i < count; i++) values[i] = random_float();
    return values;
}

// NULL when this processor lacks the instruction set.
static struct backend *open_setup(const struct setup *setup) {
    const char *only = getenv("LORAD_TEST_SETUP"); // bench/check.py: one instruction set, one thread
    if (only && (strcmp(only, setup->isa) != 0 || setup->threads > 1)) return NULL;
    setenv("LORAD_CPU_ISA", setup->isa, 1);
    setenv("LORAD_CPU_LINEAR", setup->linear, 1);
    struct backend_options options = {.threads = setup->threads, .dtype = setup->dtype};
    struct backend *b = NULL;
    struct error err = {0};
    enum status status = ops->open(&options, &b, &err);
#ifndef LORAD_GPU // there, nothing may be passed over
    if (status == STATUS_UNSUPPORTED && strcmp(setup->isa, "scalar") != 0) return NULL;
#endif
    if (status != STATUS_OK) fail_msg("%s", err.text);
    random_state = 42;
#ifdef LORAD_EMULATE
    random_state += emulate_seed; // another order of threads, other shapes
#endif
    return b;
}

static double rounded(float value, enum dtype dtype) {
    return (double)(dtype == DTYPE_BF16 ? bf16_to_f32(f32_to_bf16(value)) : value);
}

static void expect_near(double actual, double expected, double tolerance, const char *what,
                        size_t index) {
    if (fabs(actual - expected) <= tolerance) return;
    fail_msg("%s[%zu] is %.9g, expected %.9g within %.3g", what, index, actual, expected,
             tolerance);
}

// What a matmul or LoRA reads, made of `x`: in the type that the backend wants it in.
static size_t input_bytes(const struct setup *setup) {
    return ops->narrow_inputs && setup->dtype == DTYPE_BF16 ? 2 : 4;
}

static void *input_of(const struct setup *setup, const float *x, size_t count) {
    void *input = mem_alloc(count * sizeof *x + 1);
    dtype_convert(input, input_bytes(setup) == 2 ? DTYPE_BF16 : DTYPE_F32, x, DTYPE_F32, count);
    return input;
}

// What an operation wrote for a matmul to read, as floats; how far rounding may have moved a value.
static float input_back(const struct setup *setup, float *y, size_t count) {
    bool narrow = input_bytes(setup) == 2;
    for (size_t i = count; narrow && i-- > 0;) y[i] = bf16_to_f32(((const uint16_t *)y)[i]);
    return narrow ? 1.0f / 256 : 0;
}

// ------------------------------------------------------------------ linear

struct matrix {
    int out, in;
    float *values;  // [out, in] as the reference sees them
    struct linear *linear;
};

static struct matrix matrix_create(struct backend *b, int out, int in, enum dtype stored,
                                   enum dtype dtype) {
    size_t count = (size_t)out * (size_t)in;
    struct matrix m = {.out = out, .in = in, .values = random_floats(count)};
    void *bytes = mem_alloc(count * 4);
    dtype_convert(bytes, stored, m.values, DTYPE_F32, count);
    dtype_to_f32(m.values, bytes, stored, count);
    for (size_t i = 0; i < count; i++) m.values[i] = (float)rounded(m.values[i], dtype);
    struct error err = {0};
    if (ops->linear_create(b, bytes, stored, out, in, &m.linear, &err) != STATUS_OK)
        fail_msg("%s", err.text);
    free(bytes);
    return m;
}

static void matrix_destroy(struct backend *b, struct matrix *m) {
    ops->linear_destroy(b, m->linear);
    free(m->values);
}

static void linear_check(struct backend *b, const struct setup *setup, const struct matrix *m,
                         int tokens) {
    size_t in = (size_t)m->in, out = (size_t)m->out;
    float *x = random_floats((size_t)tokens * in), *y = random_floats((size_t)tokens * out + 1);
    y[(size_t)tokens * out] = 7.0f;
    void *input = input_of(setup, x, (size_t)tokens * in);
    ops->linear(b, m->linear, y, input, tokens);
    ops->synchronize(b);
    free(input);
    for (size_t t = 0; t < (size_t)tokens; t++)
        for (size_t o = 0; o < out; o++) {
            double sum = 0, size = 0;
            for (size_t i = 0; i < in; i++) {
                double product = rounded(x[t * in + i], setup->dtype) * m->values[o * in + i];
                sum += product;
                size += fabs(product);
            }
            expect_near(y[t * out + o], sum, 1e-5 * size + 1e-6, "linear", t * out + o);
        }
    assert_true(y[(size_t)tokens * out] == 7.0f); // nothing is written past the end
    free(x);
    free(y);
}

static void test_linear(void **state) {
    (void)state;
    static const struct {
        int out, in;
        enum dtype stored;
    } shapes[] = {{1, 1, DTYPE_F32},     {16, 16, DTYPE_BF16},  {17, 33, DTYPE_F16},
                  {100, 64, DTYPE_BF16}, {160, 600, DTYPE_F32}, {255, 1031, DTYPE_F16}};
    static const int tokens[] = {1, 2, 3, 5, 7, 13, 16, 28, 29, 57, 65};
    for (int s = 0; s < SETUPS; s++) {
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            struct matrix m = matrix_create(b, shapes[i].out, shapes[i].in, shapes[i].stored,
                                            setups[s].dtype);
            for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++)
                linear_check(b, &setups[s], &m, tokens[t]);
            matrix_destroy(b, &m);
        }
        ops->close(b);
    }
}

// A row has the same bits alone, at any place and in any batch: our own tiles promise it.
static void test_linear_rows_invariant(void **state) {
    (void)state;
    enum { ROWS = 80, OUT = 150, IN = 1100 };
    for (int s = 0; s < SETUPS; s++) {
        if (strcmp(setups[s].linear, "own") != 0) continue;
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        struct matrix m = matrix_create(b, OUT, IN, DTYPE_F32, setups[s].dtype);
        float *x = random_floats(ROWS * IN);
        void *input = input_of(&setups[s], x, ROWS * IN);
        expect_rows_alike(ops, b, m.linear, input, ROWS, OUT, IN, input_bytes(&setups[s]));
        free(input);
        free(x);
        matrix_destroy(b, &m);
        ops->close(b);
    }
}

// ------------------------------------------------------------------ rows of activations

static void test_rms_norm_and_silu(void **state) {
    (void)state;
    static const int widths[] = {1, 15, 16, 64, 100, 2048};
    for (int s = 0; s < SETUPS; s++) {
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
            size_t n = (size_t)widths[w], T = 19;
            float *x = random_floats(T * n), *residual = random_floats(T * n);
            float *before = mem_alloc(T * n * sizeof *before);
            float *gain = random_floats(n), *y = random_floats(T * n);
            memcpy(before, x, T * n * sizeof *x);
            bool with = w % 2 == 0;
            ops->rms_norm(b, y, x, with ? residual : NULL, gain, 1e-5f, (int)T, (int)n);
            ops->synchronize(b);
            double off = (double)input_back(&setups[s], y, T * n);
            for (size_t t = 0; t < T; t++) {
                double squares = 0;
                for (size_t i = t * n; i < (t + 1) * n; i++) {
                    double sum = (double)before[i] + (with ? (double)residual[i] : 0.0);
                    expect_near(x[i], sum, 1e-6, "x + residual", i);
                    squares += sum * sum;
                }
                double scale = 1 / sqrt(squares / (double)n + 1e-5);
                for (size_t i = 0; i < n; i++) {
                    double expected = x[t * n + i] * scale * gain[i];
                    expect_near(y[t * n + i], expected, 1e-5 + off * fabs(expected), "rms_norm", i);
                }
            }
            float *gate_up = random_floats(T * 2 * n);
            for (size_t i = 0; i < T * 2 * n; i++) gate_up[i] *= i % 3 ? 5.0f : 100.0f;
            ops->silu_mul(b, y, gate_up, (int)T, (int)n);
            ops->synchronize(b);
            input_back(&setups[s], y, T * n);
            for (size_t t = 0; t < T; t++)
                for (size_t i = 0; i < n; i++) {
                    double gate = gate_up[t * 2 * n + i], up = gate_up[t * 2 * n + n + i];
                    double expected = gate / (1 + exp(-gate)) * up;
                    expect_near(y[t * n + i], expected, (1e-6 + off) * fabs(expected) + 1e-30,
                                "silu", i);
                }
            free(x);
            free(residual);
            free(before);
            free(gain);
            free(y);
            free(gate_up);
        }
        ops->close(b);
    }
}

static void test_embed_and_gather(void **state) {
    (void)state;
    enum { V = 37, H = 83, T = 50 };
    int32_t ids[T];
    for (int s = 0; s < SETUPS; s++) {
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        float *table = random_floats(V * H), *y = random_floats(T * H), *z = random_floats(T * H);
        void *stored = ops->memory_create(b, V * H * 4);
        for (int dtype = DTYPE_F32; dtype <= DTYPE_F16; dtype++) {
            uint8_t bytes[V * H * 4];
            dtype_convert(bytes, (enum dtype)dtype, table, DTYPE_F32, V * H);
            ops->upload(b, stored, bytes, V * H * dtype_bytes((enum dtype)dtype));
            for (int t = 0; t < T; t++) ids[t] = random_between(0, V - 1);
            int32_t others[T];
            for (int t = 0; t < T; t++) others[t] = (ids[t] + 1) % V;
            ops->embed(b, y, stored, (enum dtype)dtype, ids, T, H);
            ops->embed(b, z, stored, (enum dtype)dtype, others, T, H); // nobody waits in between
            ops->synchronize(b);
            float expected[V * H];
            dtype_to_f32(expected, bytes, (enum dtype)dtype, V * H);
            for (int t = 0; t < T; t++)
                assert_memory_equal(y + t * H, expected + ids[t] * H, H * sizeof *y);
            for (int t = 0; t < T; t++)
                assert_memory_equal(z + t * H, expected + others[t] * H, H * sizeof *z);
            for (int t = 0; t < T; t++) ids[t] = random_between(0, T - 1);
            ops->gather_rows(b, z, y, ids, T, H);
            ops->synchronize(b);
            for (int t = 0; t < T; t++)
                assert_memory_equal(z + t * H, y + ids[t] * H, H * sizeof *y);
        }
        ops->memory_destroy(b, stored);
        free(table);
        free(y);
        free(z);
        ops->close(b);
    }
}

// ------------------------------------------------------------------ draws

enum { DRAW_ROWS = 24 };

// A row of some shape: smooth, full of ties, nearly all one, with what is no number.
static void draw_row_fill(float *row, int vocabulary, int shape) {
    for (int i = 0; i < vocabulary; i++) {
        float value = random_float();
        if (shape % 6 == 0) row[i] = value * 20;
        else if (shape % 6 == 1) row[i] = (float)random_between(0, 3);
        else if (shape % 6 == 2) row[i] = i == vocabulary / 2 ? 60 : value * 10;
        else if (shape % 6 == 3) row[i] = 1;
        else if (shape % 6 == 4) row[i] = i % 3 ? value * 5 : i % 2 ? NAN : -INFINITY;
        else row[i] = shape == 5 ? NAN : shape == 11 ? -INFINITY : value * 200;
    }
    if (shape == 17) row[vocabulary - 1] = INFINITY;
}

// Whatever a request asks for: the token is the one that the server's sampler draws of the same row.
static void draw_check(struct backend *b, int vocabulary, struct sampler_scratch *scratch) {
    struct sampling sampling[DRAW_ROWS];
    struct draw draws[DRAW_ROWS];
    int32_t expected[DRAW_ROWS], ids[DRAW_ROWS];
    float *logits = random_floats((size_t)DRAW_ROWS * (size_t)vocabulary);
    for (int r = 0; r < DRAW_ROWS; r++) {
        float *row = logits + (size_t)r * (size_t)vocabulary;
        draw_row_fill(row, vocabulary, r);
        sampling[r] = (struct sampling){
            .temperature = random_between(0, 3) ? 0.3f + (random_float() + 1) : 0,
            .top_k = random_between(0, 2) ? random_between(1, vocabulary + 3) : 0,
            .top_p = random_between(0, 2) ? (random_float() + 1) / 2 + 1e-6f : 1,
            .min_p = random_between(0, 2) ? 0 : (random_float() + 1) / 4,
            .repetition_penalty = 1, .logprobs = -1};
        struct sampler_input input = {.logits = row, .vocabulary = vocabulary,
                                      .sampling = &sampling[r], .seed = random_bits(),
                                      .position = (uint64_t)r};
        struct sampler_result result;
        sampler_sample(&input, scratch, &result);
        expected[r] = result.token;
        assert_true(sampler_draws_plainly(&input));
        draws[r] = sampler_draw(&input);
        ids[r] = -7;
    }
    draws[3].kind = DRAW_NONE;
    expected[3] = -7;
    ops->draw(b, ids, logits, draws, DRAW_ROWS, vocabulary);
    ops->synchronize(b);
    for (int r = 0; r < DRAW_ROWS; r++)
        if (ids[r] != expected[r])
            fail_msg("vocabulary %d, row %d: %d, the server draws %d (temperature %g, top_k %d, "
                     "top_p %g, min_p %g)", vocabulary, r, ids[r], expected[r],
                     (double)sampling[r].temperature, sampling[r].top_k, (double)sampling[r].top_p,
                     (double)sampling[r].min_p);
    free(logits);
}

static void test_draw(void **state) {
    (void)state;
    static const int vocabularies[] = {1, 2, 31, 500, 1500};
    if (!ops->draw) return; // the host draws
    struct backend *b = open_setup(&setups[0]);
    for (size_t v = 0; v < sizeof vocabularies / sizeof *vocabularies; v++) {
        struct sampler_scratch *scratch = sampler_scratch_create(vocabularies[v]);
        for (int round = 0; round < 4; round++) draw_check(b, vocabularies[v], scratch);
        sampler_scratch_destroy(scratch);
    }
    ops->close(b);
}

// ------------------------------------------------------------------ the pool

struct pool_rig {
    struct pool_shape shape;
    void *pool;
    enum dtype dtype;
    int32_t free_pages[4096]; // shuffled
    int free_count;
};

// Every element is NaN at first: an operation that uses what nobody wrote shows it.
static void pool_rig_init(struct pool_rig *rig, struct backend *b, enum dtype dtype, int kv_heads,
                          int head_size, int layers, int pages) {
    size_t page_elems = 2 * (size_t)kv_heads * PAGE_TOKENS * (size_t)head_size;
    *rig = (struct pool_rig){.shape = {layers, pages, kv_heads, head_size, page_elems,
                                       dtype_bytes(dtype)},
                             .dtype = dtype, .free_count = pages};
    size_t bytes = (size_t)layers * (size_t)pages * page_elems * dtype_bytes(dtype);
    rig->pool = ops->memory_create(b, bytes);
    assert_non_null(rig->pool);
    ops->synchronize(b);
    memset(rig->pool, 0xff, bytes);
    ops->pool_attach(b, rig->pool, &rig->shape);
    for (int i = 0; i < pages; i++) rig->free_pages[i] = i;
    for (int i = pages - 1; i > 0; i--) {
        int j = random_between(0, i);
        int32_t page = rig->free_pages[i];
        rig->free_pages[i] = rig->free_pages[j];
        rig->free_pages[j] = page;
    }
}

static int32_t *pages_take(struct pool_rig *rig, int count) {
    assert_true(rig->free_count >= count);
    rig->free_count -= count;
    int32_t *pages = mem_alloc((size_t)(count + 1) * sizeof *pages);
    memcpy(pages, rig->free_pages + rig->free_count, (size_t)count * sizeof *pages);
    pages[count] = 0x7fffffff; // whoever follows it leaves the pool
    return pages;
}

static float pool_element(const struct pool_rig *rig, int layer, int32_t page, size_t element) {
    size_t at = ((size_t)layer * (size_t)rig->shape.page_count + (size_t)page) *
                    rig->shape.page_elems + element;
    return rig->dtype == DTYPE_F32 ? ((const float *)rig->pool)[at]
                                   : bf16_to_f32(((const uint16_t *)rig->pool)[at]);
}

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

// Rotates and writes every token of the contexts; the step's tokens stay in rig->qkv, rotated.
static void attention_rig_write(struct attention_rig *rig, struct backend *b) {
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
        ops->rope_and_kv_write(b, LAYER, copy, rig->cosines, rig->sines, positions, slots,
                               span->context, rig->c->query_heads);
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

// K and V as the pool holds them, in double, checked against RoPE on the way.
static void reference_cache(const struct attention_rig *rig, int s, int kv_head, double *k,
                            double *v) {
    const struct attention_case *c = rig->c;
    int D = c->head_size, width = (c->query_heads + 2 * c->kv_heads) * D;
    bool bf16 = rig->pool.dtype == DTYPE_BF16;
    for (int p = 0; p < rig->spans[s].context; p++)
        for (int i = 0; i < D; i++) {
            int32_t page = rig->spans[s].pages[p / PAGE_TOKENS];
            size_t in_head = (size_t)(p % PAGE_TOKENS * D + i);
            size_t k_at = (size_t)(kv_head * PAGE_TOKENS * D) + in_head;
            size_t v_at = (size_t)((c->kv_heads + kv_head) * PAGE_TOKENS * D) + in_head;
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
    attention_rig_write(&rig, b);
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

#if !defined LORAD_EMULATE && !defined LORAD_GPU
// ------------------------------------------------------------------ opening, and the threads

static void test_open_refuses(void **state) {
    (void)state;
    static const struct {
        const char *isa, *linear;
        struct backend_options options;
        enum status status;
        const char *says;
    } cases[] = {
        {"mmx", "own", {1, DTYPE_F32, 0}, STATUS_INVALID, "mmx"},
        {"scalar", "mkl", {1, DTYPE_F32, 0}, STATUS_INVALID, "mkl"},
        {"scalar", "own", {1, DTYPE_F16, 0}, STATUS_UNSUPPORTED, "f16"},
        {"scalar", "own", {-1, DTYPE_F32, 0}, STATUS_INVALID, "-1 threads"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        setenv("LORAD_CPU_ISA", cases[i].isa, 1);
        setenv("LORAD_CPU_LINEAR", cases[i].linear, 1);
        struct backend *b = NULL;
        struct error err = {0};
        assert_int_equal(ops->open(&cases[i].options, &b, &err), cases[i].status);
        assert_null(b);
        assert_non_null(strstr(err.text, cases[i].says));
    }
}

static void count_chunk(void *context, int chunk, int thread) {
    atomic_int *counts = context;
    (void)thread;
    atomic_fetch_add(&counts[chunk], 1);
}

// Every chunk of every job runs once, and no job's chunk runs in another's time.
static void test_threads(void **state) {
    (void)state;
    static const int thread_counts[] = {1, 2, 5};
    static atomic_int counts[64];
    for (size_t i = 0; i < sizeof thread_counts / sizeof *thread_counts; i++) {
        struct cpu_threads *threads = cpu_threads_create(thread_counts[i]);
        assert_int_equal(cpu_threads_count(threads), thread_counts[i]);
        for (int job = 0; job < 3000; job++) {
            int chunks = job % 64;
            cpu_threads_run(threads, count_chunk, counts, chunks);
            for (int c = 0; c < 64; c++)
                if (atomic_exchange(&counts[c], 0) != (c < chunks))
                    fail_msg("job %d, chunk %d of %d", job, c, chunks);
        }
        cpu_threads_destroy(threads);
    }
}

#endif

int main(void) {
#ifdef LORAD_EMULATE
    const char *seed = getenv("EMULATE_SEED"); // another order of the threads
    if (seed) emulate_seed = strtoull(seed, NULL, 10);
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear),
        cmocka_unit_test(test_linear_rows_invariant),
        cmocka_unit_test(test_rms_norm_and_silu),
        cmocka_unit_test(test_embed_and_gather),
        cmocka_unit_test(test_draw),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_pool_many_pages),
        cmocka_unit_test(test_lora),
#if !defined LORAD_EMULATE && !defined LORAD_GPU
        cmocka_unit_test(test_open_refuses),
        cmocka_unit_test(test_threads),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
