// Compact weights (cpu_compact.c), included by cpu_kernels_body.h. Four words of a panel, 128 numbers
// of bf16, lie in 192 bytes: 64 of codes, the lower half of each for the first two words, and twice
// 64 of low bytes. Bytes are ordered so that interleaving low and high bytes, 16 columns' worth in
// each quarter of a vector, gives the words.

#if VECTOR_WIDTH == 16

INLINE __m512i bytes_load(const void *p) {
    return _mm512_loadu_si512(p);
}

// The high bytes of 64 codes, the lower halves of bytes; `table` is repeated four times.
INLINE __m512i high_bytes(__m512i table, __m512i codes) {
#if KERNELS_BF16
    return _mm512_permutexvar_epi8(codes, table); // by six bits, of which two change nothing
#else
    return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(0x0f)));
#endif
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

// Where a tile is: locals of it, because the compiler must take what is stored in `expanded` for any
// of the arguments.
struct compact_place {
    const uint8_t *codes;
    size_t code_stride;
    uint32_t word; // of k
    const pair_x *x;
    const struct compact_exception *exception[TILE_PANELS_MAX]; // the next ones
    __m512i table[TILE_PANELS_MAX];
    uint32_t *expanded[TILE_PANELS_MAX];
    bool keeps; // expanded
    const char *ask; // struct cpu_tile's
    uint32_t ask_bytes; // beside COMPACT_WORDS words
};

// What the tile asks for beside half a group.
INLINE void ask_beside(const struct compact_place *p, int half) {
    if (p->ask_bytes > 3 * 64) {
#pragma GCC unroll 3
        for (int line = 0; line < 3; line++) __builtin_prefetch(p->ask + (3 * half + line) * 64);
    } else {
        __builtin_prefetch(p->ask + 128 * half);
        if (half == 0) __builtin_prefetch(p->ask + 64);
    }
}

// COMPACT_WORDS words of each panel: expanded, two at a time, in registers, and multiplied at once.
INLINE void compact_group(struct compact_place *p, vf *acc, const bool has_exceptions, const int R,
                          const int C) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++, p->word += 2) {
        vu first[TILE_PANELS_MAX], second[TILE_PANELS_MAX];
        if (PANELS_OUTSIDE || p->ask) ask_beside(p, half);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            const uint8_t *from = p->codes + (size_t)c * p->code_stride;
            __m512i code = bytes_load(from), low = bytes_load(from + 64 + 64 * half);
            if (half == 1) code = _mm512_srli_epi16(code, 4);
            __m512i high = high_bytes(p->table[c], code);
            first[c] = (vu)_mm512_unpacklo_epi8(low, high);
            second[c] = (vu)_mm512_unpackhi_epi8(low, high);
            if (has_exceptions) {
                vu words[2] = {first[c], second[c]};
                put_exceptions(words, p->word, &p->exception[c]);
                first[c] = words[0], second[c] = words[1];
            }
            if (!p->keeps) continue;
            vu_store(p->expanded[c], first[c]);
            vu_store(p->expanded[c] + PANEL, second[c]);
            p->expanded[c] += 2 * PANEL;
        }
        p->x = word_products(acc, first, p->x, R, C);
        p->x = word_products(acc, second, p->x, R, C);
    }
    p->codes += COMPACT_BYTES;
    if (PANELS_OUTSIDE || p->ask) p->ask += p->ask_bytes;
}

// Without such: what lies some way ahead in the panels.
INLINE void ask_ahead(const struct compact_place *p, int group, int groups, const int C) {
    const int ahead = PREFETCH_BYTES / COMPACT_BYTES / C;
    const uint8_t *later = p->codes + ahead_at(group, ahead, groups, C) * COMPACT_BYTES;
#pragma GCC unroll 4
    for (int c = 0; c < C; c++, later += p->code_stride)
#pragma GCC unroll 4
        for (int line = 0; line < COMPACT_BYTES; line += 64) __builtin_prefetch(later + line);
}

// How many groups there are before the first that has an exception, `most` at most.
INLINE int plain_groups(const struct compact_place *p, int most, const int C) {
    uint32_t groups = (uint32_t)most;
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
        uint32_t until = (p->exception[c]->at - 2 * PANEL * p->word) / (2 * PANEL * COMPACT_WORDS);
        if (until < groups) groups = until;
    }
    return (int)groups;
}

INLINE void tile_compact_body(const struct cpu_compact_tile *t, const int R, const int C) {
    vf acc[TILE_VECTORS_MAX];
    tile_begin(t->tile, acc, R, C);
    struct compact_place place = {.codes = t->codes, .code_stride = t->code_stride,
                                  .word = t->first, .x = t->tile->x, .keeps = t->expanded,
                                  .ask = t->tile->ask,
                                  .ask_bytes = COMPACT_WORDS * t->tile->ask_bytes};
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
        place.exception[c] = t->panels[c].exceptions;
        while (place.exception[c]->at < 2 * PANEL * place.word) place.exception[c]++;
        place.table[c] =
            _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)t->panels[c].table));
        place.expanded[c] = t->expanded ? t->expanded + (size_t)c * t->expanded_stride : NULL;
    }
    const int groups = t->tile->k / COMPACT_WORDS;
    for (int g = 0; g < groups; g++) {
        for (int plain = g + plain_groups(&place, groups - g, C); g < plain; g++) {
            ask_for_sums(t->tile, g, C);
            if (!PANELS_OUTSIDE && !place.ask) ask_ahead(&place, g, groups, C);
            compact_group(&place, acc, false, R, C);
        }
        if (g < groups) compact_group(&place, acc, true, R, C);
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
