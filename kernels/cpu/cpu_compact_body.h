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

// Puts the exceptions from *next on that lie in words [at, at + 2) of the panel where they belong. By
// value and without a call, so that neither words nor sums leave their registers for it.
INLINE void put_exceptions(vu words[2], uint32_t at, const struct compact_exception **next) {
    _Alignas(64) uint16_t numbers[4 * PANEL];
    vu_store((uint32_t *)(void *)numbers, words[0]);
    vu_store((uint32_t *)(void *)(numbers + 2 * PANEL), words[1]);
    for (; (*next)->at - 2 * PANEL * at < 4 * PANEL; (*next)++)
        numbers[(*next)->at - 2 * PANEL * at] = (*next)->bits;
    words[0] = vu_load((const uint32_t *)(const void *)numbers);
    words[1] = vu_load((const uint32_t *)(const void *)(numbers + 2 * PANEL));
}

// Words are expanded, two of each panel at a time, in registers, and multiplied at once.
INLINE void tile_compact_body(const struct cpu_compact_tile *t, const int R, const int C) {
    const __m512i nibble = _mm512_set1_epi8(0x0f);
    vf acc[TILE_VECTORS_MAX];
    tile_begin(t->tile, acc, R, C);
    const struct compact_exception *exception[TILE_PANELS_MAX];
    __m512i high_bytes[TILE_PANELS_MAX];
    const uint32_t first_word = t->first;
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
        exception[c] = t->panels[c].exceptions;
        while (exception[c]->at < 2 * PANEL * first_word) exception[c]++;
        high_bytes[c] = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)t->panels[c].table));
    }
    const pair_x *x = t->tile->x;
    const uint8_t *codes = t->codes;
    // Here, because the compiler must take what is stored in `expanded` for any of t.
    uint32_t *expanded = t->expanded;
    const size_t code_stride = t->code_stride, expanded_stride = t->expanded_stride;
    const int groups = t->tile->k / COMPACT_WORDS, ahead = PREFETCH_BYTES / COMPACT_BYTES / C;
    const char *ask = t->tile->ask;
    uint32_t asked = 0, ask_step = t->tile->ask_step;
    for (int g = 0; g < groups; g++, codes += COMPACT_BYTES) {
        ask_for_sums(t->tile, g, C);
        const uint8_t *next = codes + ahead_at(g, ahead, groups, C) * COMPACT_BYTES;
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            vu first[TILE_PANELS_MAX], second[TILE_PANELS_MAX];
            uint32_t word = (uint32_t)(g * COMPACT_WORDS + 2 * half);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) {
                const uint8_t *from = codes + (size_t)c * code_stride;
                const uint8_t *later = next + (size_t)c * code_stride;
                if (ask) {
                    asked = ask_next(ask, asked, ask_step);
                    asked = ask_next(ask, asked, ask_step);
                } else {
                    __builtin_prefetch(later + 64 + 64 * half);
                    if (half == 0) __builtin_prefetch(later);
                }
                __m512i code = bytes_load(from), low = bytes_load(from + 64 + 64 * half);
                if (half == 1) code = _mm512_srli_epi16(code, 4);
                __m512i high = _mm512_shuffle_epi8(high_bytes[c], _mm512_and_si512(code, nibble));
                first[c] = (vu)_mm512_unpacklo_epi8(low, high);
                second[c] = (vu)_mm512_unpackhi_epi8(low, high);
                if (__builtin_expect(exception[c]->at < 2 * PANEL * (first_word + word + 2), 0)) {
                    vu words[2] = {first[c], second[c]};
                    put_exceptions(words, first_word + word, &exception[c]);
                    first[c] = words[0], second[c] = words[1];
                }
                if (!expanded) continue;
                uint32_t *to = expanded + (size_t)c * expanded_stride + word * PANEL;
                vu_store(to, first[c]);
                vu_store(to + PANEL, second[c]);
            }
            x = word_products(acc, first, x, R, C);
            x = word_products(acc, second, x, R, C);
        }
    }
    tile_end(t->tile, acc, R, C);
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
    tiles_compact[tile_rows[t->tile->rows]][t->tile->panels](t);
}

#else
#define encode_compact NULL
#define multiply_compact NULL
#endif
