// LoRA on tensor cores, for bf16 and widths of whole panels (lora.cu has the rest, and says what a
// segment, an item and a wave are). Adapters go from their pages to the registers of tensor cores.
//
// DESIGN. An item is up to 16 tokens of a segment: the rows of a tile, whatever their number, so that
// a decode and a prefill run the same code and give a token the same bits. Both are bound by the
// bytes of A and B while items have few tokens.
// Shrink: a block has one item, one module, 16 ranks and DEPTH of x's elements; its warps share the
// depth out, 64 at a time, and add up in shared memory. Each block leaves a partial v.
// Expand: a block adds up the partial v; each of its warps has one panel of 64 columns, splits v in
// two bf16, so that 16 of its 24 bits count, and multiplies with the panel's ranks.
//
// Bytes in flight: shrink 4 loads of 16 bytes a lane for A, twice; 64 decodes of rank 16 on q, k, v of
// a 7B are 384 blocks of 8 warps. Expand 4 loads a lane and 16 ranks, the next 16 meanwhile.
#include "kernels/cuda/lora.cuh"
#include "kernels/cuda/tiles.cuh"

enum {
    DEPTH = 2048, // elements of x in a shrink block
    RANKS = 16,   // of a shrink block: two tiles of 8 columns
    SHRINK_WARPS = 8,
    WARP_DEPTH = 2 * ROWS_DEPTH, // that a warp takes at once: a whole line of a row of A
    EXPAND_WARPS = 4,            // panels of a block
};

// Rows of y begin at multiples of 16 bytes, too.
bool lora_tiles_fit(const struct lora_launch *launch) {
    if (launch->in % WARP_DEPTH != 0) return false;
    for (int t = 0; t < launch->target_count; t++)
        if (launch->target[t].out % LORA_PANEL != 0 || launch->target[t].stride % 4 != 0 ||
            (uintptr_t)launch->target[t].y % 16 != 0)
            return false;
    return true;
}

static int depths_of(int in) {
    return (in + DEPTH - 1) / DEPTH;
}

// Partial v of one depth: rows of V_ROW.
__device__ static inline float *v_row(const device_launch<bf16> &launch, int depth, int row,
                                      int target) {
    return launch.v + ((size_t)depth * (size_t)launch.v_rows + (size_t)row) * V_ROW +
           target * LORA_RANK_MAX;
}

// ------------------------------------------------------------------ shrink

// What a lane takes of A's rows (two tiles of ranks) and x's rows (r and r + 8) at once.
struct shrink_load {
    words4 a[2][2], x_low[2], x_high[2];
};

// Every load is under way before the first is waited for. Rows that are not there are read as row 0:
// their products are nobody's.
__device__ static inline void shrink_take(shrink_load *to, const paged<bf16> &pool,
                                          const int32_t *pages, const uint32_t row[2],
                                          const bf16 *x_low, const bf16 *x_high, uint32_t k) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int tile = 0; tile < 2; tile++)
            to->a[half][tile] = load_words(paged_at(pool, pages, row[tile] + k + half * ROWS_DEPTH));
#pragma unroll
    for (int half = 0; half < 2; half++) {
        to->x_low[half] = load_words(x_low + k + half * ROWS_DEPTH);
        to->x_high[half] = load_words(x_high + k + half * ROWS_DEPTH);
    }
}

// Grid (items, modules, depths x ranks / RANKS).
__global__ void __launch_bounds__(SHRINK_WARPS *WARP)
    shrink_tiles_kernel(paged<bf16> pool, const __grid_constant__ device_launch<bf16> launch,
                        int depths) {
    const lora_item *work = &launch.items[blockIdx.x];
    int token = work->token, count = work->count, module = launch.target[blockIdx.y].module;
    int rank = work->module[module].rank;
    int depth = blockIdx.z % depths, rank_first = blockIdx.z / depths * RANKS;
    if (token < 0 || rank_first >= rank) return; // the whole block
    const int32_t *pages = launch.pages + work->pages;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, r = lane / 4, c = lane % 4;
    uint32_t in = (uint32_t)launch.in, row[2];
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
        int at = rank_first + tile * 8 + r;
        row[tile] = work->module[module].a + (uint32_t)(at < rank ? at : 0) * in +
                    (uint32_t)(c * EIGHT);
    }
    const bf16 *x_low = launch.x + (size_t)(token + (r < count ? r : 0)) * in + c * EIGHT;
    const bf16 *x_high = launch.x + (size_t)(token + (r + 8 < count ? r + 8 : 0)) * in + c * EIGHT;
    float sums[2][4] = {{0}};
    uint32_t end = (uint32_t)(depth + 1) * DEPTH < in ? (uint32_t)(depth + 1) * DEPTH : in;
#pragma unroll 2
    for (uint32_t k = (uint32_t)(depth * DEPTH + warp * WARP_DEPTH); k < end;
         k += SHRINK_WARPS * WARP_DEPTH) {
        shrink_load at;
        shrink_take(&at, pool, pages, row, x_low, x_high, k);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int tile = 0; tile < 2; tile++)
                multiply_rows(sums[tile], at.x_low[half], at.x_high[half], at.a[half][tile]);
    }
    shared<float> parts = dynamic_shared<float>(); // [SHRINK_WARPS][TILE_ROWS][RANKS]
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            parts[(warp * TILE_ROWS + r + i / 2 * 8) * RANKS + tile * 8 + 2 * c + i % 2] =
                sums[tile][i];
    __syncthreads();
    int sum_row = threadIdx.x / RANKS, sum_rank = threadIdx.x % RANKS; // a thread an element
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < SHRINK_WARPS; w++)
        sum += parts[(w * TILE_ROWS + sum_row) * RANKS + sum_rank];
    if (sum_row < count && rank_first + sum_rank < rank)
        v_row(launch, depth, work->v_row + sum_row, blockIdx.y)[rank_first + sum_rank] = sum;
}

// ------------------------------------------------------------------ expand

// v of the item's tokens, all depths added up in their order: [TILE_ROWS][stride] in shared memory,
// zero where there is none. The block's threads share it out.
__device__ static inline void gather_v(shared<float> to, int stride,
                                       const device_launch<bf16> &launch, const lora_item *work,
                                       int rank, int depths) {
    size_t depth_stride = (size_t)launch.v_rows * V_ROW;
    for (int i = threadIdx.x; i < work->count * stride; i += EXPAND_WARPS * WARP) {
        int t = i / stride, at = i % stride;
        float sum = 0.0f;
        const float *from = v_row(launch, 0, work->v_row + t, blockIdx.y) + at;
        for (int depth = 0; depth < depths && at < rank; depth++, from += depth_stride)
            sum += *from;
        to[i] = sum;
    }
}

// Both values as two bf16 each: what the first does not hold is in the second.
__device__ static inline void split(uint32_t *big, uint32_t *small, float low, float high) {
    *big = pack(low, high);
    *small = pack(low - bits_to_float(*big << 16), high - bits_to_float(*big & 0xffff0000u));
}

// A lane's part of 16 ranks of a panel that begins at element b. Ranks that are not there are read as
// the first: their v is zero.
__device__ static inline void take_ranks(words4 rows[4], const paged<bf16> &pool,
                                         const int32_t *pages, uint32_t b, int first, int rank) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = first + columns_row(lane, i);
        uint32_t e = b + (uint32_t)((row < rank ? row : 0) * LORA_PANEL + lane / 4 * EIGHT);
        rows[i] = load_words(paged_at(pool, pages, e));
    }
}

// Grid (items, modules, columns / (EXPAND_WARPS x 64)).
__global__ void __launch_bounds__(EXPAND_WARPS *WARP)
    expand_tiles_kernel(paged<bf16> pool, const __grid_constant__ device_launch<bf16> launch,
                        int depths) {
    const lora_item *work = &launch.items[blockIdx.x];
    const device_target &target = launch.target[blockIdx.y];
    int token = work->token, count = work->count, rank = work->module[target.module].rank;
    int panels = blockIdx.z * EXPAND_WARPS * LORA_PANEL; // the block's first column
    if (token < 0 || rank == 0 || panels >= target.out) return; // the whole block
    const int32_t *pages = launch.pages + work->pages;
    int lane = threadIdx.x % WARP, r = lane / 4, c = lane % 4;
    int panel = panels + (int)(threadIdx.x / WARP) * LORA_PANEL;
    float weight = work->weight;
    bool works = panel < target.out, low = r < count, high = r + 8 < count;
    uint32_t b = work->module[target.module].b + (uint32_t)((works ? panel : panels) * rank);
    shared<float> v = dynamic_shared<float>();
    int stride = (rank + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    float sums[COLUMNS_TILES][4] = {{0}};
    words4 rows[4], next[4];
    take_ranks(rows, pool, pages, b, 0, rank); // on their way while v is added up
    gather_v(v, stride, launch, work, rank, depths);
    __syncthreads();
    for (int first = 0; first < rank; first += TILE_ROWS) {
        if (first + TILE_ROWS < rank) take_ranks(next, pool, pages, b, first + TILE_ROWS, rank);
        uint32_t big[4], small[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = (i % 2 ? high : low) ? r + i % 2 * 8 : 0;
            int at = row * stride + first + 2 * c + i / 2 * 8;
            split(&big[i], &small[i], v[at], v[at + 1]);
        }
        multiply_columns(sums, big, rows);
        multiply_columns(sums, small, rows);
#pragma unroll
        for (int i = 0; i < 4; i++) rows[i] = next[i];
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (!works || !(half ? high : low)) continue;
        float *y = target.y + (size_t)(token + r + 8 * half) * (size_t)target.stride + panel +
                   columns_first(lane);
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            float4 *at = reinterpret_cast<float4 *>(y + i), four = *at;
            four.x += weight * columns_of(sums, half, i);
            four.y += weight * columns_of(sums, half, i + 1);
            four.z += weight * columns_of(sums, half, i + 2);
            four.w += weight * columns_of(sums, half, i + 3);
            *at = four;
        }
    }
}

// ------------------------------------------------------------------ launchers

size_t lora_tiles_v_bytes(const struct step_counts *n, int in) {
    return (size_t)depths_of(in) * (size_t)n->v_rows * V_ROW * sizeof(float);
}

void lora_tiles_shrink(struct backend *b, cudaStream_t stream, int layer, int target_count,
                       const struct step_counts *n, const device_launch<bf16> &launch) {
    int depths = depths_of(launch.in);
    dim3 grid((unsigned)n->lora_items, (unsigned)target_count,
              cuda_blocks((size_t)n->rank_max, RANKS) * (unsigned)depths);
    CUDA_LAUNCH(shrink_tiles_kernel, grid, dim3(SHRINK_WARPS * WARP),
                SHRINK_WARPS * TILE_ROWS * RANKS * sizeof(float), stream,
                cuda_layer<bf16>(b, layer), launch, depths);
}

void lora_tiles_expand(struct backend *b, int layer, int target_count, int out_max,
                       const struct step_counts *n, const device_launch<bf16> &launch, int items) {
    dim3 grid((unsigned)items, (unsigned)target_count,
              cuda_blocks((size_t)out_max, EXPAND_WARPS * LORA_PANEL));
    size_t shared = (size_t)(n->rank_max + TILE_ROWS) / TILE_ROWS * TILE_ROWS * TILE_ROWS *
                    sizeof(float);
    CUDA_LAUNCH(expand_tiles_kernel, grid, dim3(EXPAND_WARPS * WARP), shared, b->stream,
                cuda_layer<bf16>(b, layer), launch, depths_of(launch.in));
}
