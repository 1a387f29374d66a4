// What the parts of test_backend_cpu.c share: the setups that this program tests, random numbers, a
// pool of pages. Included by that one program, as its other parts are.
#ifndef LORAD_TESTS_BACKEND_RIG_H
#define LORAD_TESTS_BACKEND_RIG_H

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
    {"avx512", DTYPE_F32, 1, "own"},        {"avx512", DTYPE_BF16, 2, "plain"},
    {"avx512vnni", DTYPE_BF16, 2, "own"},   {"avx512bf16", DTYPE_BF16, 2, "plain"},
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

#endif
