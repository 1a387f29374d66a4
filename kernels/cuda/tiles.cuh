// Operands of tensor cores straight from global memory, without shared memory in between.
//
// mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16") multiplies a [16 rows, 16 deep] by
// b [16 deep, 8 columns]. Of lane l, with r = l / 4 and c = l % 4:
//   a: rows r and r + 8 at depths 2c, 2c + 1 (a[0], a[1]) and 2c + 8, 2c + 9 (a[2], a[3])
//   b: column r at depths 2c, 2c + 1 (b0) and 2c + 8, 2c + 9 (b1)
//   d: row r at columns 2c, 2c + 1 (d[0], d[1]), row r + 8 at the same (d[2], d[3])
// A sum may run over depth in any order and columns may have any names, as long as both sides agree.
// So each lane takes what 16 bytes of memory hold, and the names follow:
//
// ROWS: a matrix whose rows run along the depth (x, K, A of LoRA). Lane l has elements
// 8c .. 8c + 7 of its row, of 32: two steps of 16 deep. Words 2s and 2s + 1 of them are what step s calls
// depths 2c, 2c + 1 and 2c + 8, 2c + 9.
// COLUMNS: a matrix whose rows are depths (V, B of LoRA): 64 columns of 16 rows. Lane l has columns
// 8r .. 8r + 7 of rows 2c, 2c + 1, 2c + 8, 2c + 9. Of them, column j of each eight is a tile; d of
// tile j is then columns 16c + j and 16c + 8 + j, so that a lane ends with 16 neighbours of a row.
#ifndef LORAD_KERNELS_CUDA_TILES_CUH
#define LORAD_KERNELS_CUDA_TILES_CUH

#include "kernels/cuda/primitives.cuh"

enum {
    TILE_ROWS = 16,
    ROWS_DEPTH = 32,    // elements of a row that a warp takes at once
    COLUMNS_WIDTH = 64, // columns that it takes at once, 16 deep
    COLUMNS_TILES = 8,
};

// Eight bf16, 16 bytes.
__device__ inline words4 load_words(const bf16 *from) {
    return *reinterpret_cast<const words4 *>(from);
}

// The words, or zero. Loading all and dropping some keeps branches from between the loads.
__device__ inline words4 kept(words4 words, bool there) {
#pragma unroll
    for (int i = 0; i < 4; i++) words.word[i] = there ? words.word[i] : 0;
    return words;
}

// d += rows `low` (r) and `high` (r + 8) times the row that lane r stands for in b, over 32 deep.
__device__ inline void multiply_rows(float d[4], const words4 &low, const words4 &high,
                                     const words4 &b) {
#pragma unroll
    for (int step = 0; step < 2; step++) {
        uint32_t a[4] = {low.word[2 * step], high.word[2 * step], low.word[2 * step + 1],
                         high.word[2 * step + 1]};
        mma_16x8x16(d, a, b.word[2 * step], b.word[2 * step + 1]);
    }
}

// Element j of `low`, then of `high`.
__device__ inline uint32_t pair_of(const words4 &low, const words4 &high, int j) {
    uint32_t x = low.word[j / 2], y = high.word[j / 2];
    return j % 2 == 0 ? (x & 0xffffu) | y << 16 : x >> 16 | (y & 0xffff0000u);
}

// The four rows of 16 whose columns a lane takes.
__device__ inline int columns_row(int lane, int i) {
    return lane % 4 * 2 + i % 2 + i / 2 * 8;
}

// d[j] += a times column tile j of `rows`.
__device__ inline void multiply_columns(float d[COLUMNS_TILES][4], const uint32_t a[4],
                                        const words4 rows[4]) {
#pragma unroll
    for (int j = 0; j < COLUMNS_TILES; j++)
        mma_16x8x16(d[j], a, pair_of(rows[0], rows[1], j), pair_of(rows[2], rows[3], j));
}

// Where a lane's 16 columns begin among the 64, and the i-th of them for its row r (half 0) or r + 8.
__device__ inline int columns_first(int lane) {
    return lane % 4 * 16;
}
__device__ inline float columns_of(const float d[COLUMNS_TILES][4], int half, int i) {
    return d[i % 8][2 * half + i / 8];
}

#endif
