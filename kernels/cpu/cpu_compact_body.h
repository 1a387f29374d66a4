// Compact weights (cpu_compact.c), included by cpu_kernels_body.h. Four words of a panel, 128 numbers
// of bf16, lie in 192 bytes: 64 of codes, the lower half of each for the first two words, and twice
// 64 of low bytes. Bytes are ordered so that interleaving low and high bytes, 16 columns' worth in
// each quarter of a vector, gives the words.

#if VECTOR_WIDTH == 16

INLINE __m512i bytes_load(const void *p) {
    return _mm512_loadu_si512(p);
}

// The codes of 64 high bytes; those that have none are set in *missing.
INLINE __m512i compact_codes(__m512i high, const uint8_t table[COMPACT_CODES], uint64_t *missing) {
    __m512i codes = _mm512_setzero_si512();
    uint64_t found = 0;
    for (int i = 0; i < COMPACT_CODES; i++) {
        __mmask64 equal = _mm512_cmpeq_epi8_mask(high, _mm512_set1_epi8((char)table[i]));
        codes = _mm512_mask_blend_epi8(equal, codes, _mm512_set1_epi8((char)i));
        found |= equal;
    }
    *missing = ~found;
    return codes;
}

static void encode_compact(uint8_t *to, uint64_t missing[2], const uint32_t *words,
                           const uint8_t table[COMPACT_CODES]) {
    const __m512i low = _mm512_set1_epi16(0x00ff);
    __m512i codes[2];
    for (int i = 0; i < 2; i++) {
        __m512i a = bytes_load(words + 2 * i * PANEL), b = bytes_load(words + (2 * i + 1) * PANEL);
        __m512i low_bytes = _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low));
        __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
        _mm512_storeu_si512(to + 64 + 64 * i, low_bytes);
        codes[i] = compact_codes(high, table, &missing[i]);
    }
    _mm512_storeu_si512(to, _mm512_or_si512(codes[0], _mm512_slli_epi16(codes[1], 4)));
}

// Four words of a panel -> to[4][PANEL].
INLINE void expand_group(uint32_t *to, const uint8_t *from, const uint8_t table[COMPACT_CODES]) {
    const __m512i high_bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table));
    const __m512i nibble = _mm512_set1_epi8(0x0f);
    __m512i codes = bytes_load(from);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++, codes = _mm512_srli_epi16(codes, 4)) {
        __m512i low = bytes_load(from + 64 + 64 * i);
        __m512i high = _mm512_shuffle_epi8(high_bytes, _mm512_and_si512(codes, nibble));
        _mm512_storeu_si512(to + 2 * i * PANEL, _mm512_unpacklo_epi8(low, high));
        _mm512_storeu_si512(to + (2 * i + 1) * PANEL, _mm512_unpackhi_epi8(low, high));
    }
}

// Each group is expanded just before it is multiplied, so that memory is read meanwhile.
INLINE void tile_compact_body(const struct cpu_compact_tile *t, const int R, const int C) {
    enum { GROUP = COMPACT_WORDS * PANEL, NUMBERS = 2 * GROUP };
    vf acc[TILE_VECTORS_MAX];
    tile_begin(&t->tile, acc, R, C);
    _Alignas(64) uint32_t own[TILE_PANELS_MAX * GROUP];
    uint32_t *words = t->expanded ? t->expanded : own;
    size_t stride = t->expanded ? t->expanded_stride : GROUP, step = t->expanded ? GROUP : 0;
    uint32_t number = 2 * PANEL * t->first;
    const struct compact_exception *exception[TILE_PANELS_MAX];
    for (int c = 0; c < C; c++) {
        exception[c] = t->panels[c].exceptions;
        while (exception[c]->at < number) exception[c]++;
    }
    const pair_x *x = t->tile.x;
    const uint8_t *codes = t->codes;
    for (int k = 0; k < t->tile.k; k += COMPACT_WORDS, codes += COMPACT_BYTES, number += NUMBERS) {
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            const uint8_t *from = codes + (size_t)c * t->code_stride;
            uint32_t *to = words + (size_t)c * stride;
#pragma GCC unroll 3
            for (int line = 0; line < COMPACT_BYTES; line += 64)
                __builtin_prefetch(from + PREFETCH_BYTES / C + line);
            expand_group(to, from, t->panels[c].table);
            for (; exception[c]->at - number < NUMBERS; exception[c]++)
                memcpy((char *)to + 2 * (exception[c]->at - number), &exception[c]->bits, 2);
        }
#pragma GCC unroll 1
        for (int i = 0; i < COMPACT_WORDS; i++)
            x = word_products(acc, words + i * PANEL, stride, x, R, C);
        words += step;
    }
    tile_end(&t->tile, acc, R, C);
}

#define TILE_COMPACT_FUNCTIONS(R, C)                                                               \
    static __attribute__((noinline)) void tile_compact_##R##_##C(                                  \
        const struct cpu_compact_tile *t) {                                                        \
        tile_compact_body(t, R, C);                                                                \
    }
TILE_LIST(TILE_COMPACT_FUNCTIONS)

typedef void compact_tile_function(const struct cpu_compact_tile *t);
#define TILE_COMPACT_ENTRY(R, C) [R][C] = tile_compact_##R##_##C,
static compact_tile_function *const tiles_compact[TILE_ROWS_MAX + 1][TILE_PANELS_MAX + 1] = {
    TILE_LIST(TILE_COMPACT_ENTRY)};

static void multiply_compact(const struct cpu_compact_tile *t) {
    tiles_compact[tile_rows[t->tile.rows]][t->tile.panels](t);
}

#else
#define encode_compact NULL
#define multiply_compact NULL
#endif
