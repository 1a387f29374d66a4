// Quantised base weights on the CPU: every instruction set against sums in double, the bound on what
// rounding may change, and the same bits for a row alone and in any batch.
#include "kernels/backend.h"

#include "base/memory.h"
#include "rows_alike.h"

#include <math.h>
#include <string.h>

static const struct backend_ops *const ops = &backend_cpu;
static const struct setup {
    const char *isa;
    enum dtype dtype;
    int threads;
    enum quantization quantization;
} setups[] = {
    {"scalar", DTYPE_F32, 2, QUANT_INT8},      {"scalar", DTYPE_BF16, 1, QUANT_INT4},
    {"avx2", DTYPE_BF16, 1, QUANT_INT8},       {"avx2", DTYPE_F32, 2, QUANT_INT4},
    {"avx512", DTYPE_F32, 1, QUANT_INT8},      {"avx512", DTYPE_BF16, 2, QUANT_INT4},
    {"avx512vnni", DTYPE_BF16, 2, QUANT_INT8}, {"avx512vnni", DTYPE_F32, 1, QUANT_INT4},
    {"avx512bf16", DTYPE_BF16, 2, QUANT_INT8}, {"avx512bf16", DTYPE_F32, 1, QUANT_INT4},
};
enum { SETUPS = sizeof setups / sizeof *setups, GROUP_INT4 = 128 };

static uint64_t random_state;

static float random_float(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (float)(random_state >> 33) / 1073741824.0f - 1.0f;
}

// A few are much larger than the rest, as trained weights and activations have them.
static float *random_floats(size_t count) {
    float *values = mem_alloc_aligned(count * sizeof *values);
    for (size_t i = 0; i < count; i++) values[i] = random_float() * (i % 97 == 5 ? 20.0f : 1.0f);
    return values;
}

// NULL when this processor lacks the instruction set.
static struct backend *open_setup(const struct setup *setup) {
    setenv("LORAD_CPU_ISA", setup->isa, 1);
    struct backend_options options = {setup->threads, setup->dtype, setup->quantization};
    struct backend *b = NULL;
    struct error err = {0};
    enum status status = ops->open(&options, &b, &err);
    if (status == STATUS_UNSUPPORTED && strcmp(setup->isa, "scalar") != 0) return NULL;
    if (status != STATUS_OK) fail_msg("%s", err.text);
    random_state = 42;
    return b;
}

// x as a matmul reads it; x itself is rounded to that.
static void *input_of(enum dtype dtype, float *x, size_t count) {
    void *input = mem_alloc(count * dtype_bytes(dtype));
    dtype_convert(input, dtype, x, DTYPE_F32, count);
    dtype_to_f32(x, input, dtype, count);
    return input;
}

static void multiply(struct backend *b, enum dtype dtype, const struct linear *linear, float *y,
                     float *x, int tokens, int in) {
    void *input = input_of(dtype, x, (size_t)tokens * (size_t)in);
    ops->linear(b, linear, y, input, tokens);
    free(input);
}

struct matrix {
    int out, in;
    enum dtype dtype;
    float *stored; // [out, in]
    float *read;   // [out, in] as the multiplication has them, found out column by column
    struct linear *linear;
};

// Multiplying with unit vectors gives the rounded weights: 32767 times each, exactly scaled back.
static struct matrix matrix_of(struct backend *b, enum dtype dtype, int out, int in,
                               const float *weights) {
    size_t count = (size_t)out * (size_t)in;
    struct matrix m = {out, in, dtype, mem_alloc(count * sizeof(float)),
                       mem_alloc(count * sizeof(float)), NULL};
    memcpy(m.stored, weights, count * sizeof *weights);
    struct error err = {0};
    if (ops->linear_create(b, m.stored, DTYPE_F32, out, in, &m.linear, &err) != STATUS_OK)
        fail_msg("%s", err.text);
    float *x = mem_zalloc((size_t)in, sizeof *x), *y = mem_alloc((size_t)out * sizeof *y);
    for (int k = 0; k < in; k++) {
        x[k] = 1.0f;
        multiply(b, dtype, m.linear, y, x, 1, in);
        x[k] = 0.0f;
        for (int o = 0; o < out; o++) m.read[(size_t)o * (size_t)in + (size_t)k] = y[o];
    }
    free(x);
    free(y);
    return m;
}

static struct matrix matrix_create(struct backend *b, enum dtype dtype, int out, int in) {
    float *weights = random_floats((size_t)out * (size_t)in);
    struct matrix m = matrix_of(b, dtype, out, in, weights);
    free(weights);
    return m;
}

static void matrix_destroy(struct backend *b, struct matrix *m) {
    ops->linear_destroy(b, m->linear);
    free(m->stored);
    free(m->read);
}

// Rounding to nearest moves no weight by more than half a step: a 254th of the row's range (twice
// its largest magnitude) with 8 bits, a 15th of its group's range, zero included, with 4, whose zero
// is itself rounded.
static void check_rounding(const struct matrix *m, enum quantization quantization) {
    for (int o = 0; o < m->out; o++) {
        const float *row = m->stored + (size_t)o * (size_t)m->in;
        int group = quantization == QUANT_INT4 ? GROUP_INT4 : m->in;
        for (int first = 0; first < m->in; first += group) {
            float least = 0, most = 0, moved = 0, size = 0;
            int end = first + group < m->in ? first + group : m->in;
            for (int k = first; k < end; k++) {
                least = fminf(least, row[k]);
                most = fmaxf(most, row[k]);
                size = fmaxf(size, fabsf(row[k]));
                moved = fmaxf(moved, fabsf(row[k] - m->read[(size_t)o * (size_t)m->in + (size_t)k]));
            }
            float step = quantization == QUANT_INT8 ? 2 * size / 254 : (most - least) / 15;
            float bound = quantization == QUANT_INT8 ? step / 2 : step;
            if (moved > bound * 1.001f)
                fail_msg("row %d, from %d: a weight moved by %g of %g", o, first, (double)moved,
                         (double)bound);
            assert_true(end - first < 8 || moved > step / 100); // it is rounded at all
        }
    }
}

static void check_products(struct backend *b, const struct matrix *m, int tokens) {
    size_t in = (size_t)m->in, out = (size_t)m->out;
    float *x = random_floats((size_t)tokens * in), *y = random_floats((size_t)tokens * out + 1);
    y[(size_t)tokens * out] = 7.0f;
    multiply(b, m->dtype, m->linear, y, x, tokens, m->in);
    for (size_t t = 0; t < (size_t)tokens; t++)
        for (size_t o = 0; o < out; o++) {
            double sum = 0, size = 0, weights = 0, most = 0;
            for (size_t i = 0; i < in; i++) {
                double product = (double)x[t * in + i] * (double)m->read[o * in + i];
                sum += product;
                size += fabs(product);
                weights += fabs((double)m->read[o * in + i]);
                most = fmax(most, fabs((double)x[t * in + i]));
            }
            double bound = 2e-5 * size + weights * most / 32767 / 2 + 1e-6;
            if (fabs((double)y[t * out + o] - sum) > bound)
                fail_msg("%d x %d, %d tokens: [%zu, %zu] is %g, expected %g", m->out, m->in, tokens,
                         t, o, (double)y[t * out + o], sum);
        }
    assert_true(y[(size_t)tokens * out] == 7.0f); // nothing is written past the end
    free(x);
    free(y);
}

static void test_products(void **state) {
    (void)state;
    static const int shapes[][2] = {{1, 1}, {16, 130}, {17, 33}, {100, 512}, {70, 1031}, {40, 515}};
    static const int tokens[] = {1, 2, 3, 5, 13, 16, 28, 29, 57};
    for (int s = 0; s < SETUPS; s++) {
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            struct matrix m = matrix_create(b, setups[s].dtype, shapes[i][0], shapes[i][1]);
            check_rounding(&m, setups[s].quantization);
            for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++)
                check_products(b, &m, tokens[t]);
            matrix_destroy(b, &m);
        }
        ops->close(b);
    }
}

static void test_rows_invariant(void **state) {
    (void)state;
    enum { ROWS = 60, OUT = 150, IN = 1100 };
    for (int s = 0; s < SETUPS; s++) {
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        struct matrix m = matrix_create(b, setups[s].dtype, OUT, IN);
        float *x = random_floats(ROWS * IN);
        void *input = input_of(setups[s].dtype, x, ROWS * IN);
        expect_rows_alike(ops, b, m.linear, input, ROWS, OUT, IN, dtype_bytes(setups[s].dtype));
        free(input);
        free(x);
        matrix_destroy(b, &m);
        ops->close(b);
    }
}

// Weights that lie on a grid of sixteen steps in groups of 128, 64 or 32, as quantised checkpoints have
// them, stay what they are; zeros from 1 to 16, scales of eleven bits.
static void test_grids_are_kept(void **state) {
    (void)state;
    enum { OUT = 40, IN = 640 };
    static float weights[OUT * IN];
    for (int s = 0; s < SETUPS; s++) {
        if (setups[s].quantization != QUANT_INT4) continue;
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        for (int group = 32; group <= 128; group *= 2) {
            for (int i = 0; i < OUT * IN; i += group) {
                float scale = (float)(1024 + (int)(random_float() * 512)) / 65536.0f;
                int zero = 1 + (int)(fabsf(random_float()) * 15.9f);
                for (int k = i; k < i + group; k++)
                    weights[k] = scale * (float)((int)(fabsf(random_float()) * 15.99f) - zero);
            }
            struct matrix m = matrix_of(b, setups[s].dtype, OUT, IN, weights);
            for (int i = 0; i < OUT * IN; i++)
                if (fabsf(m.read[i] - weights[i]) > 1e-5f * fabsf(weights[i]) + 1e-7f)
                    fail_msg("groups of %d: weight %d was %g and is %g", group, i,
                             (double)weights[i], (double)m.read[i]);
            matrix_destroy(b, &m);
        }
        ops->close(b);
    }
}

// The largest numbers do not overflow the integers; nothing and what is no number stay what they are.
static void test_extremes(void **state) {
    (void)state;
    enum { OUT = 20, IN = 1400 };
    static float weights[OUT * IN], x[4 * IN], y[4 * OUT];
    for (int s = 0; s < SETUPS; s++) {
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        for (int i = 0; i < OUT * IN; i++) weights[i] = i / IN == 3 ? 0.0f : i / IN % 2 ? -2.0f : 2.0f;
        for (int i = 0; i < IN; i++) {
            x[i] = 3.0f;
            x[IN + i] = 0.0f;
            x[2 * IN + i] = i == 700 ? NAN : 1.0f;
            x[3 * IN + i] = i == 701 ? -INFINITY : 1.0f;
        }
        struct linear *linear;
        struct error err = {0};
        assert_int_equal(ops->linear_create(b, weights, DTYPE_F32, OUT, IN, &linear, &err),
                         STATUS_OK);
        multiply(b, setups[s].dtype, linear, y, x, 4, IN);
        for (int o = 0; o < OUT; o++) {
            double expected = o == 3 ? 0 : (o % 2 ? -6.0 : 6.0) * IN;
            assert_true(fabs((double)y[o] - expected) <= fabs(expected) * 1e-4);
            assert_true(y[OUT + o] == 0.0f);
            assert_true(isnan(y[2 * OUT + o]) && isnan(y[3 * OUT + o]));
        }
        ops->linear_destroy(b, linear);
        ops->close(b);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_rows_invariant),
        cmocka_unit_test(test_grids_are_kept),
        cmocka_unit_test(test_extremes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
