// The inner kernels, written once over cpu_vector.h. Each cpu_kernels_SET.c defines VECTOR_WIDTH,
// KERNELS (the table's name), KERNELS_NAME, KERNELS_BF16 (1: it multiplies pairs of bf16) and, where it
// has them, KERNELS_VNNI (pairs of 16-bit integers), includes this file, and is compiled with that
// set's flags. Pure functions over plain arrays: no pages, no threads, no allocation.
#include "kernels/cpu/cpu_isa.h"
#include "kernels/cpu/cpu_vector.h"

#include <math.h>
#if KERNELS_BF16
#include <immintrin.h>
#endif

enum { PANEL_VECTORS = PANEL / VECTOR_WIDTH, TILE_VECTORS_MAX = 28 };

// ------------------------------------------------------------------ a tile's shapes

#if VECTOR_WIDTH == 16
// R * C <= 28 accumulators of 32 registers.
#define TILE_LIST(X)                                                                               \
    X(1, 1) X(1, 2) X(1, 4) X(2, 1) X(2, 2) X(2, 4) X(3, 1) X(3, 2) X(3, 4) X(4, 1) X(4, 2)        \
    X(4, 4) X(6, 1) X(6, 2) X(6, 4) X(8, 1) X(8, 2) X(12, 1) X(12, 2) X(14, 1) X(14, 2) X(16, 1)   \
    X(20, 1) X(24, 1) X(28, 1)
static const uint8_t tile_rows[] = {0,  1,  2,  3,  4,  6,  6,  8,  8,  12, 12, 12, 12, 14, 14,
                                    16, 16, 20, 20, 20, 20, 24, 24, 24, 24, 28, 28, 28, 28};
static const uint8_t tile_panels[] = {0, 4, 4, 4, 4, 4, 4, 2, 2, 2, 2, 2, 2, 2, 2,
                                      1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
#if KERNELS_BF16
// Zen: with as many loads a cycle as multiplications, eight rows by two panels keep the one busy and
// the other half free; the words of two panels that all groups of rows meet fit the first-level cache;
// and one stream from memory is faster than several beside each other.
enum { TILE_ROWS_ALONE = 8, TILE_ROWS_MANY = 8, TILE_ROWS_MANY_MAX = 8, PANELS_OUTSIDE = 1 };
#else
// Fourteen rows by two panels: 16 loads for 28 multiplications.
enum { TILE_ROWS_ALONE = 28, TILE_ROWS_MANY = 14, TILE_ROWS_MANY_MAX = 16, PANELS_OUTSIDE = 0 };
#endif
#elif VECTOR_WIDTH == 8
enum { TILE_ROWS_ALONE = 6, TILE_ROWS_MANY = 6, TILE_ROWS_MANY_MAX = 6, PANELS_OUTSIDE = 0 };
#define TILE_LIST(X)                                                                               \
    X(1, 1) X(1, 2) X(1, 4) X(2, 1) X(2, 2) X(3, 1) X(3, 2) X(4, 1) X(5, 1) X(6, 1)
static const uint8_t tile_rows[] = {0, 1, 2, 3, 4, 5, 6};
static const uint8_t tile_panels[] = {0, 4, 2, 2, 1, 1, 1};
#else
enum { TILE_ROWS_ALONE = 3, TILE_ROWS_MANY = 3, TILE_ROWS_MANY_MAX = 3, PANELS_OUTSIDE = 0 };
#define TILE_LIST(X) X(1, 1) X(1, 2) X(2, 1) X(3, 1)
static const uint8_t tile_rows[] = {0, 1, 2, 3};
static const uint8_t tile_panels[] = {0, 2, 1, 1};
#endif

// ------------------------------------------------------------------ the tile

// y += pair . pair, both of bf16; without hardware for it x comes as two floats, and one half of w at
// a time.
#if KERNELS_BF16
typedef uint32_t pair_x;
INLINE vf pair_multiply(vf acc, vu w, const pair_x *x) {
    vu repeated = (vu){REPEAT(*x)};
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)repeated);
}
#else
typedef float pair_x;
INLINE vf pair_multiply(vf acc, vu w, const pair_x *x) {
    return acc + vf_set(*x) * (vf)w;
}
#endif

// Unrolled by the compiler for constant R (rows) and C (panels): R * C * PANEL_VECTORS
// accumulators stay in registers.
INLINE void tile_begin(const struct cpu_tile *t, vf *acc, const int R, const int N) {
    const float *from = t->from ? t->from : t->y;
    const int rows = t->from ? t->rows : 0;
#pragma GCC unroll 32
    for (int r = 0; r < R; r++, from += t->from_stride)
#pragma GCC unroll 32
        for (int c = 0; c < N; c++)
            acc[r * N + c] = r < rows ? vf_load(from + c * VECTOR_WIDTH) : vf_set(0.0f);
}

// What is stored may, for all that the compiler knows, be any of the arguments: read before.
INLINE void tile_end(const struct cpu_tile *t, const vf *acc, const int R, const int N) {
    float *y = t->y;
    const size_t stride = t->y_stride;
    const int rows = t->rows;
#pragma GCC unroll 32
    for (int r = 0; r < R; r++, y += stride) {
        if (r >= rows) break;
#pragma GCC unroll 32
        for (int c = 0; c < N; c++) vf_store(y + c * VECTOR_WIDTH, acc[r * N + c]);
    }
}

// The sums of the C panels after these are asked for, a row a step of k: they lie rows apart. Panels
// outside, they lie side by side.
INLINE void ask_for_sums(const struct cpu_tile *t, int k, const int C) {
    if (PANELS_OUTSIDE || k >= t->rows) return;
    const float *y = t->y + (size_t)k * t->y_stride + C * PANEL;
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) __builtin_prefetch(y + c * PANEL, 1);
}

INLINE void tile_f32_body(const struct cpu_tile *t, const int R, const int C) {
    const int N = C * PANEL_VECTORS;
    vf acc[TILE_VECTORS_MAX];
    tile_begin(t, acc, R, N);
    const float *x = t->x, *w = t->w;
    for (int k = 0; k < t->k; k++, x += R, w += t->k_stride) {
        ask_for_sums(t, k, C);
        vf columns[TILE_PANELS_MAX * PANEL_VECTORS];
#pragma GCC unroll 32
        for (int c = 0; c < N; c++)
            columns[c] = vf_load(w + c / PANEL_VECTORS * t->panel_stride +
                                 c % PANEL_VECTORS * VECTOR_WIDTH);
#pragma GCC unroll 32
        for (int r = 0; r < R; r++)
#pragma GCC unroll 32
            for (int c = 0; c < N; c++) acc[r * N + c] += vf_set(x[r]) * columns[c];
    }
    tile_end(t, acc, R, N);
}

INLINE void row_products(vf *acc, const vu *columns, const pair_x *x, const int R, const int N) {
#pragma GCC unroll 32
    for (int r = 0; r < R; r++)
#pragma GCC unroll 32
        for (int c = 0; c < N; c++)
            acc[r * N + c] = pair_multiply(acc[r * N + c], columns[c], x + r);
}

// acc += x w for one word of k: w is C panels' rows, x as pack_bf16 and pack_rounded leave it.
INLINE const pair_x *word_products(vf *acc, const vu *w, const pair_x *x, const int R, const int N) {
#if KERNELS_BF16
    row_products(acc, w, x, R, N);
    return x + R;
#else
    vu columns[TILE_PANELS_MAX * PANEL_VECTORS];
#pragma GCC unroll 32
    for (int c = 0; c < N; c++) columns[c] = w[c] << 16;
    row_products(acc, columns, x, R, N);
#pragma GCC unroll 32
    for (int c = 0; c < N; c++) columns[c] = w[c] & 0xffff0000u;
    row_products(acc, columns, x + R, R, N);
    return x + 2 * R;
#endif
}

// Base weights' panels follow each other: from k on, what is to be asked for lies `ahead` further in
// the same panel, or, past its end, in the C panels after these.
INLINE size_t ahead_at(int k, int ahead, int count, const int C) {
    return (size_t)ahead + (k + ahead < count ? 0 : (size_t)(C - 1) * (size_t)count);
}

// Asks for so many bytes, one or two lines; returns their end.
INLINE const char *ask_for(const char *ask, uint32_t bytes) {
    __builtin_prefetch(ask);
    if (bytes > 64) __builtin_prefetch(ask + 64);
    return ask + bytes;
}

// Words of k a round of the loop: several where a word is few instructions.
enum { WORDS_UNROLLED = PANELS_OUTSIDE ? 4 : 1 };

INLINE void tile_bf16_body(const struct cpu_tile *t, const int R, const int C) {
    const int N = C * PANEL_VECTORS;
    vf acc[TILE_VECTORS_MAX];
    tile_begin(t, acc, R, N);
    const uint32_t *w = t->w;
    const pair_x *x = t->x;
    const int ahead = PREFETCH_BYTES / (PANEL * 4) / C;
    const char *ask = t->ask;
    const uint32_t ask_bytes = t->ask_bytes;
#pragma GCC unroll WORDS_UNROLLED
    for (int k = 0; k < t->k; k++, w += t->k_stride) {
        const uint32_t *next = w + ahead_at(k, ahead, t->k, C) * PANEL;
        if (PANELS_OUTSIDE || ask) ask = ask_for(ask, ask_bytes);
#pragma GCC unroll 4
        for (int c = 0; !PANELS_OUTSIDE && !ask && c < C; c++)
            __builtin_prefetch(next + c * t->panel_stride);
        ask_for_sums(t, k, C);
        vu words[TILE_PANELS_MAX * PANEL_VECTORS];
#pragma GCC unroll 32
        for (int c = 0; c < N; c++)
            words[c] = vu_load(w + c / PANEL_VECTORS * t->panel_stride +
                               c % PANEL_VECTORS * VECTOR_WIDTH);
        x = word_products(acc, words, x, R, N);
    }
    tile_end(t, acc, R, N);
}

// Each shape is its own function, so that the compiler allocates registers for it alone.
#define TILE_FUNCTIONS(R, C)                                                                       \
    static __attribute__((noinline)) void tile_f32_##R##_##C(const struct cpu_tile *t) {           \
        tile_f32_body(t, R, C);                                                                    \
    }                                                                                              \
    static __attribute__((noinline)) void tile_bf16_##R##_##C(const struct cpu_tile *t) {          \
        tile_bf16_body(t, R, C);                                                                   \
    }
TILE_LIST(TILE_FUNCTIONS)

typedef void tile_function(const struct cpu_tile *t);
#define TILE_F32_ENTRY(R, C) [R][C] = tile_f32_##R##_##C,
#define TILE_BF16_ENTRY(R, C) [R][C] = tile_bf16_##R##_##C,
static tile_function *const tiles_f32[TILE_ROWS_MAX + 1][TILE_PANELS_MAX + 1] = {
    TILE_LIST(TILE_F32_ENTRY)};
static tile_function *const tiles_bf16[TILE_ROWS_MAX + 1][TILE_PANELS_MAX + 1] = {
    TILE_LIST(TILE_BF16_ENTRY)};

static void tile_f32(const struct cpu_tile *t) {
    tiles_f32[tile_rows[t->rows]][t->panels](t);
}

static void tile_bf16(const struct cpu_tile *t) {
    tiles_bf16[tile_rows[t->rows]][t->panels](t);
}

// ------------------------------------------------------------------ LoRA

#include "kernels/cpu/cpu_lora_body.h"

// ------------------------------------------------------------------ transposition and packing

// `count` (up to the width) words of VECTOR_WIDTH rows -> columns in m.
INLINE void transpose_block(vu m[VECTOR_WIDTH], const uint32_t *const *rows, int at, int count) {
    for (int r = 0; r < VECTOR_WIDTH; r++) {
        m[r] = (vu){0};
        if (!rows[r]) continue;
        m[r] = count >= VECTOR_WIDTH ? vu_load(rows[r] + at) : vu_load_part(rows[r] + at, count);
    }
    vu_transpose(m, VECTOR_WIDTH);
}

static void transpose(uint32_t *to, const uint32_t *const rows[PANEL], int n) {
    for (int at = 0; at < n; at += VECTOR_WIDTH) {
        int count = n - at < VECTOR_WIDTH ? n - at : VECTOR_WIDTH;
        for (int c = 0; c < PANEL_VECTORS; c++) {
            vu m[VECTOR_WIDTH];
            transpose_block(m, rows + c * VECTOR_WIDTH, at, count);
            for (int i = 0; i < count; i++)
                vu_store(to + (size_t)(at + i) * PANEL + c * VECTOR_WIDTH, m[i]);
        }
    }
}

// rows (at most R, a constant power of 2) of whole vectors -> to[n][R].
INLINE void pack_power(uint32_t *to, const uint32_t *x, size_t stride, int rows, const int R,
                       int n) {
    for (int at = 0; at < n; at += VECTOR_WIDTH, to += VECTOR_WIDTH * R) {
        vu m[VECTOR_WIDTH];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            m[r] = r < rows ? vu_load(x + (size_t)r * stride + at) : (vu){0};
        vu_transpose(m, R);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) vu_store(to + r * VECTOR_WIDTH, m[r]);
    }
}

// rows (at most R) of n words -> to[n][R]. Whole vectors are stored in ascending order, so that
// what one writes past its R words the next one overwrites.
static void pack_words(uint32_t *to, const uint32_t *x, size_t stride, int rows, int R, int n) {
    if (R == 1) {
        memcpy(to, x, (size_t)n * 4);
        return;
    }
    int whole = n / VECTOR_WIDTH * VECTOR_WIDTH;
    if (R == 2) pack_power(to, x, stride, rows, 2, whole);
    else if (R == 4) pack_power(to, x, stride, rows, 4, whole);
    else if (R == 8 && VECTOR_WIDTH >= 8) pack_power(to, x, stride, rows, 8, whole);
    else whole = 0;
    if (whole == n) return;
    const uint32_t *row[TILE_ROWS_MAX + VECTOR_WIDTH] = {NULL};
    for (int r = 0; r < rows; r++) row[r] = x + (size_t)r * stride;
    int blocks = (R + VECTOR_WIDTH - 1) / VECTOR_WIDTH;
    vu m[(TILE_ROWS_MAX + VECTOR_WIDTH) / VECTOR_WIDTH + 1][VECTOR_WIDTH];
    for (int at = whole; at < n; at += VECTOR_WIDTH) {
        int count = n - at < VECTOR_WIDTH ? n - at : VECTOR_WIDTH;
        for (int b = 0; b < blocks; b++)
            transpose_block(m[b], row + b * VECTOR_WIDTH, at, count);
        for (int i = 0; i < count; i++)
            for (int b = 0; b < blocks; b++)
                vu_store(to + (size_t)(at + i) * (size_t)R + b * VECTOR_WIDTH, m[b][i]);
    }
}

static void narrow(uint16_t *to, const float *from, size_t n) {
    size_t i = 0;
    for (; i + VECTOR_WIDTH <= n; i += VECTOR_WIDTH) {
        vh half = vf_to_bf16(vf_load(from + i));
        memcpy(to + i, &half, sizeof half);
    }
    if (i == n) return;
    vh half = vf_to_bf16(vf_load_part(from + i, (int)(n - i)));
    memcpy(to + i, &half, (n - i) * sizeof *to);
}

static void widen(float *to, const uint16_t *from, size_t n) {
    size_t i = 0;
    for (; i + VECTOR_WIDTH <= n; i += VECTOR_WIDTH) vf_store(to + i, vf_from_bf16(from + i));
    for (; i < n; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, 4);
    }
}

enum { PACK_PIECE = 128 };

static void pack_f32(void *to, const float *x, size_t stride, int rows, int k) {
    pack_words(to, (const uint32_t *)(const void *)x, stride, rows, tile_rows[rows], k);
}

// One row of a piece, f32 or bf16, as the tile has it: in pairs of bf16, or as bf16 in f32.
INLINE void pack_piece(void *to, const void *from, int count, bool rounds) {
#if KERNELS_BF16
    if (rounds) narrow(to, from, (size_t)count);
    else memcpy(to, from, (size_t)count * 2);
    if (count & 1) ((uint16_t *)to)[count] = 0;
#else
    uint16_t rounded[PACK_PIECE];
    if (rounds) narrow(rounded, from, (size_t)count);
    widen(to, rounds ? rounded : from, (size_t)count);
    if (count & 1) ((float *)to)[count] = 0;
#endif
}

// Each piece of PACK_PIECE elements is put into a small buffer and transposed from there.
INLINE void pack_pieces(uint32_t *to, const char *x, size_t stride, int rows, int k, bool rounds) {
    int R = tile_rows[rows];
    size_t bytes = rounds ? 4 : 2;
    uint32_t part[TILE_ROWS_MAX][PACK_PIECE];
    for (int at = 0; at < k; at += PACK_PIECE) {
        int count = k - at < PACK_PIECE ? k - at : PACK_PIECE, even = count + (count & 1);
        for (int r = 0; r < rows; r++)
            pack_piece(part[r], x + ((size_t)r * stride + (size_t)at) * bytes, count, rounds);
        int n = KERNELS_BF16 ? even / 2 : even;
        pack_words(to, part[0], PACK_PIECE, rows, R, n);
        to += (size_t)n * (size_t)R;
    }
}

static void pack_rounded(void *to, const float *x, size_t stride, int rows, int k) {
    pack_pieces(to, (const char *)x, stride, rows, k, true);
}

static void pack_bf16(void *to, const uint16_t *x, size_t stride, int rows, int k) {
    if (KERNELS_BF16 && stride % 2 == 0 && k % 2 == 0) // pairs as they lie
        pack_words(to, (const uint32_t *)(const void *)x, stride / 2, rows, tile_rows[rows], k / 2);
    else pack_pieces(to, (const char *)x, stride, rows, k, false);
}

static void pair_rows(uint32_t *to, const uint16_t *first, const uint16_t *second, int n) {
    int i = 0;
    for (; i + VECTOR_WIDTH <= n; i += VECTOR_WIDTH) {
        vu low = (vu)vf_from_bf16(first + i) >> 16;
        vu_store(to + i, second ? low | (vu)vf_from_bf16(second + i) : low);
    }
    for (; i < n; i++) to[i] = first[i] | (second ? (uint32_t)second[i] << 16 : 0);
}

// ------------------------------------------------------------------ quantised weights

#include "kernels/cpu/cpu_quant_body.h"

// ------------------------------------------------------------------ compact weights

#include "kernels/cpu/cpu_compact_body.h"

// ------------------------------------------------------------------ rows of activations

static void rms_norm(float *y, float *x, const float *residual, const float *gain, float epsilon,
                     int n) {
    vf squares[2] = {vf_set(0.0f), vf_set(0.0f)};
    int i = 0;
    for (int lane = 0; i + VECTOR_WIDTH <= n; i += VECTOR_WIDTH, lane ^= 1) {
        vf v = vf_load(x + i);
        if (residual) {
            v += vf_load(residual + i);
            vf_store(x + i, v);
        }
        squares[lane] += v * v;
    }
    float tail = 0.0f;
    for (; i < n; i++) {
        if (residual) x[i] += residual[i];
        tail += x[i] * x[i];
    }
    float mean = (vf_sum(squares[0] + squares[1]) + tail) / (float)n;
    float scale = 1.0f / sqrtf(mean + epsilon);
    for (i = 0; i + VECTOR_WIDTH <= n; i += VECTOR_WIDTH)
        vf_store(y + i, vf_load(x + i) * vf_set(scale) * vf_load(gain + i));
    for (; i < n; i++) y[i] = x[i] * scale * gain[i];
}

INLINE vf silu_times(vf gate, vf up) {
    return gate / (vf_set(1.0f) + vf_exp(-gate)) * up;
}

// Elements of a row, and past its end of the next, that are asked for ahead: gate and up lie in the
// third-level cache, and the machine's own prefetcher does not hide how far away that is.
enum { GATE_AHEAD = 1024 };

static void silu_mul(float *y, const float *gate, const float *up, int n) {
    int i = 0;
    for (; i + VECTOR_WIDTH <= n; i += VECTOR_WIDTH) {
        __builtin_prefetch(gate + i + GATE_AHEAD);
        __builtin_prefetch(up + i + GATE_AHEAD);
        vf_store(y + i, silu_times(vf_load(gate + i), vf_load(up + i)));
    }
    if (i < n)
        vf_store_part(y + i, silu_times(vf_load_part(gate + i, n - i), vf_load_part(up + i, n - i)),
                      n - i);
}

static void rotate(float *head, const float *cosines, const float *sines, int half) {
    float *first = head, *second = head + half;
    int i = 0;
    for (; i + VECTOR_WIDTH <= half; i += VECTOR_WIDTH) {
        vf a = vf_load(first + i), b = vf_load(second + i);
        vf c = vf_load(cosines + i), s = vf_load(sines + i);
        vf_store(first + i, a * c - b * s);
        vf_store(second + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = first[i], b = second[i];
        first[i] = a * cosines[i] - b * sines[i];
        second[i] = b * cosines[i] + a * sines[i];
    }
}

static float maximum(const float *x, int n) {
    float best = x[0];
    int i = 0;
    if (n >= 4 * VECTOR_WIDTH) { // four at a time do not wait for each other
        vf wide[4];
        for (int c = 0; c < 4; c++) wide[c] = vf_load(x + c * VECTOR_WIDTH);
        for (i = 4 * VECTOR_WIDTH; i + 4 * VECTOR_WIDTH <= n; i += 4 * VECTOR_WIDTH)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++)
                wide[c] = vf_max(wide[c], vf_load(x + i + c * VECTOR_WIDTH));
        best = vf_maximum(vf_max(vf_max(wide[0], wide[1]), vf_max(wide[2], wide[3])));
    }
    for (; i + VECTOR_WIDTH <= n; i += VECTOR_WIDTH) {
        float other = vf_maximum(vf_load(x + i));
        best = other > best ? other : best;
    }
    for (; i < n; i++) best = x[i] > best ? x[i] : best;
    return best;
}

static float exp_sum(float *x, float shift, int n) {
    vf sum = vf_set(0.0f);
    int i = 0;
    for (; i + VECTOR_WIDTH <= n; i += VECTOR_WIDTH) {
        vf e = vf_exp(vf_load(x + i) - vf_set(shift));
        vf_store(x + i, e);
        sum += e;
    }
    if (i < n) {
        vf e = vf_exp(vf_load_part(x + i, n - i) - vf_set(shift));
        float part[VECTOR_WIDTH] = {0};
        vf_store_part(part, e, n - i);
        memcpy(x + i, part, (size_t)(n - i) * sizeof *x);
        sum += vf_load(part);
    }
    return vf_sum(sum);
}

static void scale(float *y, const float *x, float by, int n) {
    int i = 0;
    for (; i + VECTOR_WIDTH <= n; i += VECTOR_WIDTH) vf_store(y + i, vf_load(x + i) * vf_set(by));
    for (; i < n; i++) y[i] = x[i] * by;
}

static void scale_add(float *y, float y_scale, const float *x, float x_scale, int n) {
    int i = 0;
    for (; i + VECTOR_WIDTH <= n; i += VECTOR_WIDTH)
        vf_store(y + i, vf_load(y + i) * vf_set(y_scale) + vf_load(x + i) * vf_set(x_scale));
    for (; i < n; i++) y[i] = y[i] * y_scale + x[i] * x_scale;
}

const struct cpu_kernels KERNELS = {
    .name = KERNELS_NAME,
    .tile_rows_max = sizeof tile_rows - 1,
    .tile_rows_alone = TILE_ROWS_ALONE,
    .tile_rows_many = TILE_ROWS_MANY,
    .tile_rows_many_max = TILE_ROWS_MANY_MAX,
    .tile_rows = tile_rows,
    .tile_panels = tile_panels,
    .panels_outside = PANELS_OUTSIDE,
    .packs_pairs = KERNELS_BF16,
    .tile_f32 = tile_f32,
    .tile_bf16 = tile_bf16,
    .dot_tokens = DOT_TOKENS,
    .update_tokens = UPDATE_TOKENS,
    .dot = dot,
    .update = update,
    .tile_quant = tile_quant,
    .pack_quant = pack_quant,
    .pack_f32 = pack_f32,
    .pack_bf16 = pack_bf16,
    .pack_rounded = pack_rounded,
    .compact_encode = encode_compact,
    .tile_compact = multiply_compact,
    .transpose = transpose,
    .widen = widen,
    .pair_rows = pair_rows,
    .narrow = narrow,
    .rms_norm = rms_norm,
    .silu_mul = silu_mul,
    .rotate = rotate,
    .maximum = maximum,
    .exp_sum = exp_sum,
    .scale = scale,
    .scale_add = scale_add,
};
