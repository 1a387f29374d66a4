// Matmuls with quantised weights, included by cpu_kernels_body.h. Weights of 8 or 4 bits are widened
// to 16 bits and multiplied with x in 16 bits: sums of a group of k are exact integers, and only
// then floats.

enum { QUANT_X_MAX = 32767 };

// Twice VECTOR_WIDTH numbers of 16 bits, pairs of neighbouring k, in a vector of words.
INLINE vu widen_int8(const uint8_t *w) {
#if VECTOR_WIDTH == 16
    return (vu)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)w));
#else
    typedef int8_t narrow_row __attribute__((vector_size(2 * VECTOR_WIDTH)));
    typedef int16_t wide_row __attribute__((vector_size(4 * VECTOR_WIDTH)));
    narrow_row row;
    memcpy(&row, w, sizeof row);
    return (vu) __builtin_convertvector(row, wide_row);
#endif
}

// acc += w . x, pairs of 16-bit numbers.
INLINE vi quant_multiply(vi acc, vu w, uint32_t pair) {
    vu x = {REPEAT(pair)};
#if KERNELS_VNNI
    return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif VECTOR_WIDTH == 16
    return acc + (vi)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#else
    acc += ((vi)(w << 16) >> 16) * ((vi)(x << 16) >> 16);
    return acc + ((vi)w >> 16) * ((vi)x >> 16);
#endif
}

// acc[r][c] += row[c] . x[r]: each x is repeated once for all columns.
INLINE void quant_row_products(vi *acc, const vu *row, const uint32_t *x, const int R, const int N) {
#pragma GCC unroll 32
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) acc[r * N + c] = quant_multiply(acc[r * N + c], row[c], x[r]);
}

// Words [first, end) of k, all of one group.
INLINE void quant_group(const struct cpu_quant_tile *t, vi *acc, int first, int end, const int R,
                        const int C, const bool four) {
    const int N = C * PANEL_VECTORS, step = four ? 2 : 1;
    const vu nibbles = {REPEAT(0x000f000fu)};
    const uint32_t *x = (const uint32_t *)t->x + (size_t)first * (size_t)R;
    const uint8_t *w = t->w + (size_t)first * (four ? PANEL : 2 * PANEL);
    for (int k = first; k < end; k += step, x += step * R, w += 2 * PANEL) {
        vu both[TILE_PANELS_MAX * PANEL_VECTORS], row[TILE_PANELS_MAX * PANEL_VECTORS];
#pragma GCC unroll 16
        for (int c = 0; c < N; c++) {
            const uint8_t *from = w + (size_t)(c / PANEL_VECTORS) * t->panel_stride +
                                  c % PANEL_VECTORS * 2 * VECTOR_WIDTH;
            if (c % PANEL_VECTORS == 0) __builtin_prefetch(from + PREFETCH_BYTES / C);
            both[c] = widen_int8(from); // of 4-bit pairs the masks below keep what is wanted
            row[c] = four ? both[c] & nibbles : both[c];
        }
        quant_row_products(acc, row, x, R, N);
        if (!four) continue;
#pragma GCC unroll 16
        for (int c = 0; c < N; c++) row[c] = both[c] >> 4 & nibbles;
        quant_row_products(acc, row, x + R, R, N);
    }
}

INLINE void tile_quant_body(const struct cpu_quant_tile *t, const int R, const int C,
                            const bool four) {
    const int N = C * PANEL_VECTORS;
    vf total[TILE_VECTORS_MAX];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < N; c++)
            total[r * N + c] = t->add && r < t->rows ? vf_load(t->y + (size_t)r * t->y_stride +
                                                               c * VECTOR_WIDTH)
                                                     : vf_set(0.0f);
    for (int first = 0, group = 0; first < t->words; first += t->group_words, group++) {
        int end = first + t->group_words < t->words ? first + t->group_words : t->words;
        vi acc[TILE_VECTORS_MAX];
#pragma GCC unroll 32
        for (int i = 0; i < R * N; i++) acc[i] = (vi){0};
        quant_group(t, acc, first, end, R, C, four);
        for (int c = 0; c < N; c++) {
            size_t at = (size_t)(c / PANEL_VECTORS) * t->scale_stride + (size_t)group * PANEL +
                        (size_t)(c % PANEL_VECTORS * VECTOR_WIDTH);
            vf scale = vf_load(t->scales + at);
            vf zero = four ? vf_load(t->zeros + at) : vf_set(0.0f);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) {
                total[r * N + c] += __builtin_convertvector(acc[r * N + c], vf) * scale;
                if (four) total[r * N + c] += vf_set(t->x_sums[(size_t)group * R + r]) * zero;
            }
        }
    }
    for (int r = 0; r < R && r < t->rows; r++)
        for (int c = 0; c < N; c++) {
            vf y = total[r * N + c];
            if (t->last) y *= vf_set(t->x_scales[r]);
            vf_store(t->y + (size_t)r * t->y_stride + c * VECTOR_WIDTH, y);
        }
}

#define TILE_QUANT_FUNCTIONS(R, C)                                                                 \
    static __attribute__((noinline)) void tile_int8_##R##_##C(const struct cpu_quant_tile *t) {    \
        tile_quant_body(t, R, C, false);                                                           \
    }                                                                                              \
    static __attribute__((noinline)) void tile_int4_##R##_##C(const struct cpu_quant_tile *t) {    \
        tile_quant_body(t, R, C, true);                                                            \
    }
TILE_LIST(TILE_QUANT_FUNCTIONS)

typedef void quant_tile_function(const struct cpu_quant_tile *t);
#define TILE_INT8_ENTRY(R, C) [R][C] = tile_int8_##R##_##C,
#define TILE_INT4_ENTRY(R, C) [R][C] = tile_int4_##R##_##C,
static quant_tile_function *const tiles_int8[TILE_ROWS_MAX + 1][TILE_PANELS_MAX + 1] = {
    TILE_LIST(TILE_INT8_ENTRY)};
static quant_tile_function *const tiles_int4[TILE_ROWS_MAX + 1][TILE_PANELS_MAX + 1] = {
    TILE_LIST(TILE_INT4_ENTRY)};

static void tile_quant(const struct cpu_quant_tile *t, bool four) {
    (four ? tiles_int4 : tiles_int8)[tile_rows[t->rows]][t->panels](t);
}

// The largest magnitude's bits; a NaN's are larger than any number's.
INLINE uint32_t magnitude_max(const float *x, int n) {
    vu most = {0};
    int i = 0;
    for (; i < n; i += VECTOR_WIDTH) {
        vf v = i + VECTOR_WIDTH <= n ? vf_load(x + i) : vf_load_part(x + i, n - i);
        vu bits = (vu)v & 0x7fffffffu;
        vu more = (vu)((vi)bits > (vi)most);
        most = (bits & more) | (most & ~more);
    }
    uint32_t part[VECTOR_WIDTH], result = 0;
    vu_store(part, most);
    for (i = 0; i < VECTOR_WIDTH; i++) result = part[i] > result ? part[i] : result;
    return result;
}

// x [n] times `factor` -> 16-bit numbers.
INLINE void quant_row(int16_t *to, const float *x, float factor, int n) {
    const vf shift = vf_set(12582912.0f); // rounds to an integer in the low mantissa bits
    for (int i = 0; i < n; i += VECTOR_WIDTH) {
        int count = n - i < VECTOR_WIDTH ? n - i : VECTOR_WIDTH;
        vf v = count == VECTOR_WIDTH ? vf_load(x + i) : vf_load_part(x + i, count);
        vi rounded = (vi)(v * vf_set(factor) + shift) - (vi)shift;
        typedef int16_t narrow_row __attribute__((vector_size(2 * VECTOR_WIDTH)));
        narrow_row row = __builtin_convertvector(rounded, narrow_row);
        memcpy(to + i, &row, (size_t)count * sizeof *to);
    }
}

static void pack_quant(void *to, float *scales, float *sums, const float *x, size_t stride,
                       int rows, int k, int group_words) {
    enum { PIECE = 128 };
    const int piece = sums && 2 * group_words < PIECE ? 2 * group_words : PIECE;
    int R = tile_rows[rows];
    uint32_t *words = to;
    float factor[TILE_ROWS_MAX];
    int16_t part[TILE_ROWS_MAX][PIECE];
    for (int r = 0; r < rows; r++) {
        uint32_t bits = magnitude_max(x + (size_t)r * stride, k);
        float most;
        memcpy(&most, &bits, 4);
        bool plain = bits > 0 && bits < 0x7f800000u;
        factor[r] = plain ? QUANT_X_MAX / most : 0.0f;
        if (factor[r] > 3e38f) factor[r] = 0.0f;           // nothing but the smallest numbers
        scales[r] = bits < 0x7f800000u ? most / QUANT_X_MAX : NAN; // what is not a number spreads
    }
    if (sums) memset(sums, 0, (size_t)((k + 2 * group_words - 1) / (2 * group_words)) * (size_t)R * 4);
    for (int at = 0; at < k; at += piece) {
        int count = k - at < piece ? k - at : piece, even = count + (count & 1);
        for (int r = 0; r < rows; r++) {
            quant_row(part[r], x + (size_t)r * stride + at, factor[r], count);
            if (even > count) part[r][count] = 0;
            if (!sums) continue;
            int sum = 0;
            for (int i = 0; i < count; i++) sum += part[r][i];
            sums[(size_t)(at / (2 * group_words)) * (size_t)R + r] += (float)sum;
        }
        pack_words(words, (const uint32_t *)(const void *)part, sizeof part[0] / 4, rows, R,
                   even / 2);
        words += (size_t)(even / 2) * (size_t)R;
    }
    if (sums) memset(words, 0, (size_t)R * 4); // the other half of a last byte of int4
}
