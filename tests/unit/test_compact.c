// Compact weights (kernels/cpu/cpu_compact.c) against plain ones: what is multiplied must be the same
// number to the bit, whatever the weights look like. Passed over where the processor has no AVX-512.
#include "base/memory.h"
#include "kernels/cpu/cpu_compact.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <cmocka.h>

static uint64_t random_state = 7;

static uint32_t random_bits(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}

// About normal, as trained weights are.
static uint16_t random_weight(void) {
    float sum = 0.0f;
    for (int i = 0; i < 4; i++) sum += (float)random_bits() / 4294967296.0f - 0.5f;
    return f32_to_bf16(sum * 0.05f);
}

enum kind { NORMAL, ODD, ZEROS, NOISE, KINDS };

// [out][in]. ODD: numbers that no table of 16 high bytes holds, at corners and strewn.
static uint16_t *create_weights(enum kind kind, int out, int in) {
    static const uint16_t odd[] = {0x0000, 0x8000, 0x0001, 0x7f80, 0xff80, 0x4700, 0xc2ff,
                                   0x0080, 0x3380, 0x7f7f};
    size_t count = (size_t)out * (size_t)in;
    uint16_t *w = mem_alloc(count * sizeof *w);
    for (size_t i = 0; i < count; i++)
        w[i] = kind == ZEROS ? 0 : kind == NOISE ? (uint16_t)random_bits() : random_weight();
    if (kind != ODD) return w;
    for (size_t i = 0; i < count; i += 1 + random_bits() % 400)
        w[i] = odd[random_bits() % (sizeof odd / sizeof *odd)];
    for (int row = 0; row < out; row += 15) { // first and last of panels and of rows
        w[(size_t)row * (size_t)in] = 0x4123;
        w[(size_t)(row + 1) * (size_t)in - 1] = 0x0123;
    }
    return w;
}

static struct backend *open_as(const char *isa, const char *linear) {
    setenv("LORAD_CPU_ISA", isa, 1);
    setenv("LORAD_CPU_LINEAR", linear, 1);
    struct backend_options options = {.threads = 2, .dtype = DTYPE_BF16};
    struct backend *b = NULL;
    struct error err = {0};
    if (backend_cpu.open(&options, &b, &err) != STATUS_OK)
        assert_int_equal(err.status, STATUS_UNSUPPORTED);
    return b;
}

static const char *const sets[] = {"avx512", "avx512vnni", "avx512bf16"};
enum { SETS = sizeof sets / sizeof *sets, TOKENS_MAX = 71 };

static void expect_same(const struct backend *pair[2], const uint16_t *w, int out, int in) {
    static const int tokens[] = {1, 2, 3, 4, 7, 12, 14, 17, 28, 29, 33, TOKENS_MAX};
    struct linear *linear[2];
    struct error err;
    float *y[2];
    uint16_t *x = mem_alloc_aligned(TOKENS_MAX * (size_t)in * sizeof *x);
    for (size_t i = 0; i < TOKENS_MAX * (size_t)in; i++)
        x[i] = f32_to_bf16((float)random_bits() / 2147483648.0f - 1.0f);
    for (int i = 0; i < 2; i++) {
        struct backend *b = (struct backend *)pair[i];
        assert_int_equal(backend_cpu.linear_create(b, w, DTYPE_BF16, out, in, &linear[i], &err), STATUS_OK);
        y[i] = mem_alloc_aligned(TOKENS_MAX * (size_t)out * sizeof(float));
    }
    for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++) {
        for (int i = 0; i < 2; i++)
            backend_cpu.linear((struct backend *)pair[i], linear[i], y[i], x, tokens[t]);
        assert_memory_equal(y[0], y[1], (size_t)tokens[t] * (size_t)out * sizeof(float));
    }
    for (int i = 0; i < 2; i++) {
        backend_cpu.linear_destroy((struct backend *)pair[i], linear[i]);
        free(y[i]);
    }
    free(x);
}

static void test_same_bits_as_plain(void **state) {
    (void)state;
    static const struct {
        int out, in;
    } shapes[] = {{16, 8}, {64, 264}, {176, 1104}, {48, 2048}, {40, 64}, {32, 60}};
    for (int s = 0; s < SETS; s++) {
        struct backend *pair[2] = {open_as(sets[s], "plain"), open_as(sets[s], "own")};
        for (size_t i = 0; pair[0] && i < sizeof shapes / sizeof *shapes; i++)
            for (enum kind kind = 0; kind < KINDS; kind++) {
                uint16_t *w = create_weights(kind, shapes[i].out, shapes[i].in);
                expect_same((const struct backend **)pair, w, shapes[i].out, shapes[i].in);
                free(w);
            }
        for (int i = 0; i < 2; i++) backend_cpu.close(pair[i]);
    }
}

enum { PANELS = 4, WORDS = PIECE_WORDS + 64 };

// [PANELS][WORDS][PANEL] pairs.
static uint32_t *create_panels(enum kind kind) {
    uint16_t *w = create_weights(kind, PANELS * PANEL, 2 * WORDS);
    uint32_t *panels = mem_alloc_aligned(PANELS * WORDS * PANEL * sizeof *panels);
    for (int row = 0; row < PANELS * PANEL; row++)
        for (int k = 0; k < 2 * WORDS; k++) {
            uint32_t *pair = &panels[(row / PANEL * WORDS + k / 2) * PANEL + row % PANEL];
            uint32_t bits = w[row * 2 * WORDS + k];
            *pair = k % 2 ? *pair | bits << 16 : bits;
        }
    free(w);
    return panels;
}

static struct compact *pack_panels(const struct cpu_kernels *kernels, const uint32_t *panels) {
    struct compact *c = cpu_compact_create(kernels, PANELS, WORDS);
    assert_non_null(c);
    for (int p = 0; p < PANELS; p++) cpu_compact_pack(c, p, panels + p * WORDS * PANEL);
    return c;
}

// Every height of a tile, over both pieces of k: its sums, and what it leaves expanded.
static void check_tiles(const struct cpu_kernels *kernels, const struct compact *c,
                        const uint32_t *panels) {
    float *x = mem_alloc_aligned(cpu_packed_bytes(TILE_ROWS_MAX, 2 * WORDS));
    for (size_t i = 0; i < cpu_packed_bytes(TILE_ROWS_MAX, 2 * WORDS) / 4; i++)
        x[i] = kernels->packs_pairs ? 0.0f : bf16_to_f32(random_weight());
    if (kernels->packs_pairs)
        for (int i = 0; i < TILE_ROWS_MAX * WORDS * 2; i++) ((uint16_t *)(void *)x)[i] = random_weight();
    static uint32_t expanded[PANELS * WORDS * PANEL];
    for (int rows = 1; rows <= kernels->tile_rows_max; rows++)
        for (int first = 0; first < WORDS; first += PIECE_WORDS) {
            int count = min_int(PIECE_WORDS, WORDS - first), panel_count = kernels->tile_panels[rows];
            float y[2][TILE_ROWS_MAX * TILE_PANELS_MAX * PANEL];
            for (size_t i = 0; i < sizeof y[0] / sizeof **y; i++) y[0][i] = y[1][i] = (float)i;
            size_t stride = (size_t)panel_count * PANEL;
            struct cpu_tile tile = {.x = x, .w = panels + first * PANEL, .panel_stride = WORDS * PANEL,
                                    .k_stride = PANEL, .k = count, .rows = rows,
                                    .panels = panel_count, .from = first > 0 ? y[0] : NULL, .y = y[0],
                                    .from_stride = stride, .y_stride = stride};
            kernels->tile_bf16(&tile);
            tile.y = y[1];
            if (first > 0) tile.from = y[1];
            tile.w = NULL;
            memset(expanded, 0, sizeof expanded);
            cpu_compact_multiply(c, &tile, 0, first, first ? expanded : NULL, WORDS * PANEL);
            assert_memory_equal(y[0], y[1], sizeof y[0]);
            for (int p = 0; first && p < panel_count; p++)
                assert_memory_equal(expanded + p * WORDS * PANEL,
                                    panels + (p * WORDS + first) * PANEL,
                                    (size_t)count * PANEL * sizeof *panels);
        }
    free(x);
}

static void test_tiles(void **state) {
    (void)state;
    for (int s = 0; s < SETS; s++) {
        struct backend *b = open_as(sets[s], "own");
        if (!b) continue;
        for (enum kind kind = NORMAL; kind <= ZEROS; kind++) {
            uint32_t *panels = create_panels(kind);
            struct compact *c = pack_panels(b->kernels, panels);
            assert_true(cpu_compact_fits(c));
            check_tiles(b->kernels, c, panels);
            cpu_compact_destroy(c);
            free(panels);
        }
        backend_cpu.close(b);
    }
}

// Noise has no frequent high bytes: it stays plain.
static void test_noise_does_not_fit(void **state) {
    (void)state;
    for (int s = 0; s < SETS; s++) {
        struct backend *b = open_as(sets[s], "own");
        if (!b) continue;
        uint32_t *panels = create_panels(NOISE);
        struct compact *c = pack_panels(b->kernels, panels);
        assert_false(cpu_compact_fits(c));
        cpu_compact_destroy(c);
        free(panels);
        backend_cpu.close(b);
    }
    assert_true(cpu_compact_can(16, 8));
    assert_false(cpu_compact_can(24, 8));
    assert_false(cpu_compact_can(16, 12));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_bits_as_plain),
        cmocka_unit_test(test_tiles),
        cmocka_unit_test(test_noise_does_not_fit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
