// The inner kernels of the CPU backend, one table for each instruction set, and the choice between
// them. The same source (cpu_kernels_body.h over cpu_vector.h) is compiled once a set; everything
// that knows about pages, segments, spans or threads lies above this table and is compiled once.
//
// The centre is the tile: y[R rows, 16 columns a panel] (+)= x[R, k] * w[k, 16]. A panel is 16
// columns of a matrix with k running outwards. Base weights are stored as panels, and so is K in its
// pages. LoRA reads rows as they lie.
// Each y element is one accumulator that runs over k in ascending order, whatever R and the number
// of panels: a row's result does not depend on the rows beside it.
#ifndef LORAD_KERNELS_CPU_ISA_H
#define LORAD_KERNELS_CPU_ISA_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PANEL = 16, TILE_ROWS_MAX = 28, TILE_PANELS_MAX = 4 };
enum { COMPACT_WORDS = 4, COMPACT_BYTES = 192, COMPACT_CODES = 16 };

// How far ahead of the multiply weights are asked for, all panels together: so many cache lines in
// flight hide the latency of memory behind its bandwidth, whether they come from one panel or four.
enum { PREFETCH_BYTES = 8192 };

// One call of a tile. `rows` is what is stored; x is packed for tile_rows[rows] rows, k outermost:
// x[k][R]. Panel c begins at w + c * panel_stride, its k-th row k_stride further (both in elements
// of 4 bytes: an f32, or a pair of bf16 of two neighbouring k).
struct cpu_tile {
    const void *x, *w;
    ptrdiff_t panel_stride;
    size_t k_stride;
    int k;      // f32: elements; bf16: pairs
    int rows;   // 1..tile_rows_max
    int panels; // 1..tile_panels[rows]
    const float *from; // the sums to add to, which may be y; NULL: zero
    float *y;
    size_t from_stride, y_stride; // elements from one row to the next; panels lie side by side
    // bf16: what is asked for meanwhile, so many bytes beside each word of k, at most two lines. NULL:
    // what lies some way ahead in w; with panels_outside it should not be NULL.
    const char *ask;
    uint32_t ask_bytes;
};

// A panel of compact weights (cpu_compact.c): the high bytes that its codes stand for, and the
// numbers that have none: number `at` is half at % 32 of word at / 32.
struct compact_exception {
    uint32_t at;
    uint16_t bits;
};
struct compact_panel {
    uint8_t table[COMPACT_CODES];
    struct compact_exception *exceptions; // by ascending group of words; the last is at UINT32_MAX
};

// The tile over compact weights. What it multiplies is left in `expanded` for other rows: panel c's
// words from expanded + c * expanded_stride on. NULL: nobody else wants them.
struct cpu_compact_tile {
    const struct cpu_tile *tile; // without w and its strides; k: whole COMPACT_WORDS
    const uint8_t *codes; // panel c's begin at codes + c * code_stride bytes
    size_t code_stride;
    uint32_t first; // word of k that codes begin with
    const struct compact_panel *panels;
    uint32_t *expanded;
    size_t expanded_stride;
};

// The tile with quantised weights: y[R rows, 16 columns a panel] from x in 16 bits and w in 8 or 4. A
// panel is [words][16] pairs of neighbouring k: of int8, or, of two words at a time, of bytes with
// the first word's number in the lower half (0 to 15) and the second's in the upper. A group of
// group_words has a scale for each column, and with 4 bits what 0 stands for (zeros, already times
// the scale). Between calls that share k (add, not last) y lacks x's scale.
struct cpu_quant_tile {
    const void *x; // [words][R] pairs of int16
    const uint8_t *w;
    const float *scales, *zeros; // of a panel [groups][16]; scale_stride to the next panel
    const float *x_scales;       // [rows]
    const float *x_sums;         // [groups][R], with 4 bits
    size_t panel_stride, scale_stride; // bytes; floats
    int words, group_words;      // whole groups but for the last
    int rows, panels;            // as in struct cpu_tile
    bool add, last;
    float *y;
    size_t y_stride;
};

// LoRA's shrink: dot products of DOT_ROWS rows of A with up to dot_tokens rows of x, a piece of each
// at a time. Rows of A beyond `rows` repeat another.
enum { DOT_ROWS = 4, DOT_TOKENS_MAX = 4 };
struct cpu_dot {
    const char *a[DOT_ROWS];
    const char *a_next[DOT_ROWS]; // what the next call reads: asked for meanwhile
    const void *x;                // f32 or bf16, as A
    size_t x_stride;              // bytes
    size_t bytes;                 // of each row; a multiple of 64 but for the last piece
    int rows, tokens;
    bool first, last;             // piece of the rows
    float (*partial)[PANEL];      // [DOT_ROWS * DOT_TOKENS_MAX] kept from piece to piece
    float *v;                     // [tokens, rows], written with the last piece
    size_t v_stride;
};

// LoRA's expand: y[tokens, columns] += weight * v[tokens, rank] B[rank, columns], B one panel, for up
// to update_tokens.
struct cpu_update {
    const char *b, *b_next; // what a later call reads: asked for meanwhile
    int rank, columns, tokens;
    const float *v;
    float weight;
    float *y;
    size_t v_stride, y_stride; // elements
};

struct cpu_kernels {
    const char *name;
    int tile_rows_max;
    int tile_rows_alone;        // so many rows of a base matmul are one tile's
    // The height for more rows than that, best per multiplication; up to so many if fewer are wasted.
    int tile_rows_many, tile_rows_many_max;
    const uint8_t *tile_rows;   // [rows] -> rows the tile computes (and x is packed for)
    const uint8_t *tile_panels; // [rows] -> panels it can take at once: 1, 2 or 4
    bool panels_outside;        // base matmuls: rows meet two panels at a time (cpu_panels.c)
    bool packs_pairs;           // bf16 is packed in pairs; else widened to f32

    void (*tile_f32)(const struct cpu_tile *tile);
    void (*tile_bf16)(const struct cpu_tile *tile);

    int dot_tokens, update_tokens; // that one call takes
    void (*dot)(const struct cpu_dot *dot, bool bf16);
    void (*update)(const struct cpu_update *update, bool bf16);

    // x [rows, k] with `stride` elements a row -> packed for the tile; pack_rounded makes bf16 of f32.
    // `to` holds cpu_packed_bytes(); an odd k is filled up with a zero.
    void (*pack_f32)(void *to, const float *x, size_t stride, int rows, int k);
    void (*pack_bf16)(void *to, const uint16_t *x, size_t stride, int rows, int k);
    void (*pack_rounded)(void *to, const float *x, size_t stride, int rows, int k);

    void (*tile_quant)(const struct cpu_quant_tile *tile, bool four_bits);
    // x -> 16 bits for tile_quant, each row by its own scale[rows]; sums: NULL, or [groups][R].
    // Groups are of 32, 64 or whole times 128 elements. `to` holds cpu_packed_bytes(). A row with a
    // number that is not finite gets a NaN for its scale.
    void (*pack_quant)(void *to, float *scales, float *sums, const float *x, size_t stride,
                       int rows, int k, int group_words);

    // Compact weights (cpu_compact.c): COMPACT_WORDS words of a panel -> COMPACT_BYTES, their high
    // bytes by number in `table`; bits of `missing`: bytes that are not there. NULL: no tile
    // for them, they would be slower.
    void (*compact_encode)(uint8_t *to, uint64_t missing[2], const uint32_t *words,
                           const uint8_t table[COMPACT_CODES]);
    void (*tile_compact)(const struct cpu_compact_tile *tile);

    // 16 rows of n 4-byte words -> to[n][16]. A NULL row is zero.
    void (*transpose)(uint32_t *to, const uint32_t *const rows[PANEL], int n);
    void (*widen)(float *to, const uint16_t *from, size_t n);
    // to[i] = the pair (first[i], second[i]); n bf16 of each. second == NULL: pairs with zero.
    void (*pair_rows)(uint32_t *to, const uint16_t *first, const uint16_t *second, int n);
    void (*narrow)(uint16_t *to, const float *from, size_t n);

    void (*rms_norm)(float *y, float *x, const float *residual, const float *gain, float epsilon,
                     int n);
    void (*silu_mul)(float *y, const float *gate, const float *up, int n);
    // head[i], head[i + half] rotated by the angle whose cosine and sine are given.
    void (*rotate)(float *head, const float *cosines, const float *sines, int half);
    float (*maximum)(const float *x, int n); // n > 0
    // x[i] = exp(x[i] - shift); returns the sum.
    float (*exp_sum)(float *x, float shift, int n);
    void (*scale)(float *y, const float *x, float by, int n); // y = x by
    void (*scale_add)(float *y, float y_scale, const float *x, float x_scale, int n);
};

extern const struct cpu_kernels cpu_kernels_scalar;
#ifdef __x86_64__
extern const struct cpu_kernels cpu_kernels_avx2, cpu_kernels_avx512, cpu_kernels_avx512vnni,
    cpu_kernels_avx512bf16;
#endif

// The fastest set this processor has, or the one LORAD_CPU_ISA names.
MUST_CHECK enum status cpu_isa_choose(const struct cpu_kernels **out, struct error *err);
// Whether the processor multiplies bf16 matrices in AMX tiles, which oneDNN knows how to use.
bool cpu_isa_has_amx(void);

// Bytes of `rows` packed rows of k elements (any pack function, any instruction set).
static inline size_t cpu_packed_bytes(int padded_rows, int k) {
    return ((size_t)padded_rows * (size_t)(k + 1) + 2 * TILE_ROWS_MAX) * sizeof(float);
}

#endif
