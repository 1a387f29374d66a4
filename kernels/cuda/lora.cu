// LoRA over segments of different ranks: shrink v = A x, expand y += weight B v. Adapters are read in
// place from their pages, at their true ranks, all segments and up to three modules in one launch.
// bf16 at usual widths goes to tensor cores (lora_tiles.cu); this is the rest: f32, and any width.
//
// DESIGN. The work of a launch is a list of items: up to 16 tokens of one segment. Shrink: a block
// has one item, one module and sixteen ranks; x goes to shared memory piece by piece, each warp
// reads whole rows of A with 16-byte loads and multiplies them with TILE tokens at a time.
// Expand: a block has one item, one module and COLUMNS columns; v lies in shared memory, a thread
// reads eight columns of each of B's rows with 16-byte loads, AHEAD of them under way.
//
// A token's sums run in an order that depends on its adapter and module alone: bits do not change
// with the batch. A token in several segments gets their sums in the segments' order: segments that
// overlap go into launches after each other ("waves"); without mixing there is one.
#include "kernels/cuda/lora.cuh"

enum {
    RANKS = 16,        // of a shrink block
    SHRINK_WARPS = 8,
    PIECE = 1024,      // elements of x in shared memory at a time
    TILE_MAX = 8,      // tokens at a time, where an item has more than one
    COLUMN_THREADS = 64,
    COLUMNS = COLUMN_THREADS * EIGHT, // of an expand block
    AHEAD = 4,         // rows of B under way in an expand thread
};

// ------------------------------------------------------------------ kernels

// Adds the products of eight elements of A's row and each token's x.
template <int TILE>
__device__ static inline void multiply_eight(float *sums, const float a[EIGHT], shared<float> x) {
#pragma unroll
    for (int t = 0; t < TILE; t++)
#pragma unroll
        for (int i = 0; i < EIGHT; i++) sums[t] += a[i] * x[t * PIECE + i];
}

// v of ranks [first, first + RANKS) of one module, for `count` of the item's tokens from t0 on.
template <typename T, int TILE>
__device__ static inline void shrink_tokens(const paged<T> &pool, const device_launch<T> &launch,
                                            const lora_item &work, int target, int first, int t0,
                                            int count) {
    shared<float> x = dynamic_shared<float>(); // [TILE][PIECE]
    int module = launch.target[target].module, rank = work.module[module].rank;
    const int32_t *pages = launch.pages + work.pages;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int rows[2] = {first + warp, first + warp + SHRINK_WARPS};
    float sums[2][TILE] = {{0}};
    size_t row_first = (size_t)(work.token + t0);
    for (int at = 0; at < launch.in; at += PIECE) {
        int depth = launch.in - at < PIECE ? launch.in - at : PIECE;
        int width = (depth + EIGHT - 1) / EIGHT * EIGHT;
        for (int i = threadIdx.x; i < TILE * width; i += SHRINK_WARPS * WARP) {
            int t = i / width, k = i % width;
            bool there = t < count && k < depth;
            x[t * PIECE + k] = there ? to_float(launch.x[(row_first + t) * (size_t)launch.in + at + k]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (rows[j] >= rank) continue;
            uint32_t row = work.module[module].a + (uint32_t)rows[j] * (uint32_t)launch.in + at;
            for (int k = lane * EIGHT; k < depth; k += WARP * EIGHT) {
                float a[EIGHT];
                load_paged(a, pool, pages, row + k, row + depth);
                multiply_eight<TILE>(sums[j], a, x + k);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
        if (rows[j] >= rank) continue; // the whole warp
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            float sum = warp_sum(sums[j][t]);
            if (lane == 0 && t < count)
                launch.v[(size_t)(work.v_row + t0 + t) * V_ROW + target * LORA_RANK_MAX +
                         rows[j]] = sum;
        }
    }
}

// Grid (items, modules, ranks / RANKS).
template <typename T, int TILE>
__global__ void __launch_bounds__(SHRINK_WARPS *WARP)
    shrink_kernel(paged<T> pool, const __grid_constant__ device_launch<T> launch) {
    const lora_item work = launch.items[blockIdx.x];
    if (work.token < 0) return;
    int first = blockIdx.z * RANKS, module = launch.target[blockIdx.y].module;
    if (first >= work.module[module].rank) return; // the whole block
    for (int t = 0; t < work.count; t += TILE)
        shrink_tokens<T, TILE>(pool, launch, work, blockIdx.y, first, t,
                               work.count - t < TILE ? work.count - t : TILE);
}

// Adds the products of each token's v with eight columns, of ranks [r, r + AHEAD) below `rank`. b is
// the first of those columns in rank 0 of their panel, which has `left` more columns from there and
// `width` in all.
template <typename T, int TILE>
__device__ static inline void update_eight(float sums[TILE][EIGHT], const paged<T> &pool,
                                           const int32_t *pages, uint32_t b, uint32_t left,
                                           uint32_t width, shared<float> v, int r, int rank) {
    float rows[AHEAD][EIGHT];
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
        if (r + j >= rank) break;
        uint32_t at = b + (uint32_t)(r + j) * width;
        load_paged(rows[j], pool, pages, at, at + left);
    }
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
        if (r + j >= rank) break;
#pragma unroll
        for (int t = 0; t < TILE; t++)
#pragma unroll
            for (int i = 0; i < EIGHT; i++) sums[t][i] += rows[j][i] * v[t * LORA_RANK_MAX + r + j];
    }
}

// y's columns [column, column + EIGHT) of one module, for `count` of the item's tokens from t0 on.
// Every thread of the block calls it, those with columns beyond the last as well.
template <typename T, int TILE>
__device__ static inline void expand_tokens(const paged<T> &pool, const device_launch<T> &launch,
                                            const lora_item &work, int target_index, int column,
                                            int t0, int count) {
    shared<float> v = dynamic_shared<float>(); // [TILE][LORA_RANK_MAX]
    const device_target target = launch.target[target_index];
    int rank = work.module[target.module].rank;
    for (int i = threadIdx.x; i < TILE * rank; i += COLUMN_THREADS) {
        int t = i / rank, r = i % rank;
        v[t * LORA_RANK_MAX + r] = t < count
                                       ? launch.v[(size_t)(work.v_row + t0 + t) * V_ROW +
                                                  target_index * LORA_RANK_MAX + r]
                                       : 0.0f;
    }
    __syncthreads();
    const int32_t *pages = launch.pages + work.pages;
    int panel = column / LORA_PANEL * LORA_PANEL;
    int width = target.out - panel < LORA_PANEL ? target.out - panel : LORA_PANEL;
    uint32_t b = work.module[target.module].b + (uint32_t)(panel * rank + column - panel);
    float sums[TILE][EIGHT] = {{0}};
    for (int r = 0; r < rank && column < target.out; r += AHEAD)
        update_eight<T, TILE>(sums, pool, pages, b, (uint32_t)(width - (column - panel)),
                              (uint32_t)width, v, r, rank);
#pragma unroll
    for (int t = 0; t < TILE; t++) {
        if (t >= count) break;
        float *y = target.y + (size_t)(work.token + t0 + t) * (size_t)target.stride + column;
#pragma unroll
        for (int i = 0; i < EIGHT; i++)
            if (column + i < target.out) y[i] += work.weight * sums[t][i];
    }
}

// Grid (items, modules, columns / COLUMNS).
template <typename T, int TILE>
__global__ void __launch_bounds__(COLUMN_THREADS)
    expand_kernel(paged<T> pool, const __grid_constant__ device_launch<T> launch) {
    const lora_item work = launch.items[blockIdx.x];
    if (work.token < 0) return;
    const device_target target = launch.target[blockIdx.y];
    if (work.module[target.module].rank == 0 || (int)blockIdx.z * COLUMNS >= target.out)
        return; // the whole block
    int column = blockIdx.z * COLUMNS + threadIdx.x * EIGHT;
    for (int t = 0; t < work.count; t += TILE) {
        if (t > 0) __syncthreads(); // v of the tokens before has been read
        expand_tokens<T, TILE>(pool, launch, work, blockIdx.y, column, t,
                               work.count - t < TILE ? work.count - t : TILE);
    }
}

// ------------------------------------------------------------------ launchers

template <typename T>
static void plain_shrink(struct backend *b, cudaStream_t stream, const struct lora_launch *launch,
                         const struct step_counts *n, const device_launch<T> &to) {
    dim3 grid((unsigned)n->lora_items, (unsigned)launch->target_count,
              cuda_blocks((size_t)n->rank_max, RANKS));
    dim3 block(SHRINK_WARPS * WARP);
    paged<T> pool = cuda_layer<T>(b, launch->layer);
    size_t bytes = PIECE * sizeof(float);
    if (n->lora_tile == 1)
        CUDA_LAUNCH((shrink_kernel<T, 1>), grid, block, bytes, stream, pool, to);
    else CUDA_LAUNCH((shrink_kernel<T, TILE_MAX>), grid, block, TILE_MAX * bytes, stream, pool, to);
}

template <typename T>
static void plain_expand(struct backend *b, const struct lora_launch *launch, int tile, int out_max,
                         const device_launch<T> &to, int items) {
    dim3 grid((unsigned)items, (unsigned)launch->target_count,
              cuda_blocks((size_t)out_max, COLUMNS));
    dim3 block(COLUMN_THREADS);
    paged<T> pool = cuda_layer<T>(b, launch->layer);
    size_t bytes = LORA_RANK_MAX * sizeof(float);
    if (tile == 1) CUDA_LAUNCH((expand_kernel<T, 1>), grid, block, bytes, b->stream, pool, to);
    else
        CUDA_LAUNCH((expand_kernel<T, TILE_MAX>), grid, block, TILE_MAX * bytes, b->stream, pool,
                    to);
}

template <typename T> static bool has_tiles(const struct lora_launch *launch) {
    return sizeof(T) == sizeof(bf16) && lora_tiles_fit(launch);
}

// `launch` as kernels see it, and the step that it is part of.
template <typename T>
static device_launch<T> prepare(struct backend *b, const struct lora_launch *launch,
                                const struct device_step **step) {
    VERIFY(b->pool);
    VERIFY_OP(launch->target_count, <=, LORA_TARGETS_MAX);
    struct step wanted = {};
    wanted.segments = launch->segments;
    wanted.segment_count = launch->segment_count;
    *step = cuda_step(b, &wanted);
    const struct step_counts *n = &(*step)->counts;
    size_t v_bytes = has_tiles<T>(launch) ? lora_tiles_v_bytes(n, launch->in)
                                          : (size_t)n->v_rows * V_ROW * sizeof(float);
    float *v = (float *)cuda_scratch(b, SCRATCH_V, v_bytes);
    device_launch<T> to = {(*step)->lora_items, (*step)->lora_pages, (const T *)launch->x, v,
                           n->v_rows, launch->in, {}};
    for (int t = 0; t < launch->target_count; t++)
        to.target[t] = {launch->target[t].module, (float *)launch->target[t].y,
                        launch->target[t].out, launch->target[t].stride};
    return to;
}

// Whether an adapter of the step has one of the launch's modules.
static bool has_work(const struct step_counts *n, const struct lora_launch *launch) {
    int32_t modules = 0;
    for (int t = 0; t < launch->target_count; t++) modules |= 1 << launch->target[t].module;
    return n->lora_modules & modules;
}

template <typename T> static void shrink(struct backend *b, const struct lora_launch *launch) {
    const struct device_step *step;
    device_launch<T> to = prepare<T>(b, launch, &step);
    const struct step_counts *n = &step->counts;
    if (!has_work(n, launch)) return;
    cudaStream_t stream = b->side ? b->side : b->stream;
    if (b->side) {
        cuda_check(b, cudaEventRecord(b->fork, b->stream), "an event");
        cuda_check(b, cudaStreamWaitEvent(b->side, b->fork), "an event");
    }
    if (!has_tiles<T>(launch)) plain_shrink(b, stream, launch, n, to);
    else if constexpr (sizeof(T) == sizeof(bf16)) // f32 has no tiles
        lora_tiles_shrink(b, stream, launch->layer, launch->target_count, n, to);
    if (b->side) cuda_check(b, cudaEventRecord(b->join, b->side), "an event");
}

template <typename T> static void expand(struct backend *b, const struct lora_launch *launch) {
    const struct device_step *step;
    device_launch<T> to = prepare<T>(b, launch, &step);
    const struct step_counts *n = &step->counts;
    if (!has_work(n, launch)) return;
    const lora_item *items = to.items;
    int out_max = 0;
    for (int t = 0; t < launch->target_count; t++)
        if (launch->target[t].out > out_max) out_max = launch->target[t].out;
    if (b->side)
        cuda_check(b, cudaStreamWaitEvent(b->stream, b->join), "an event");
    for (int wave = 0; wave < step->waves; wave++) {
        int first = step->wave_first[wave], count = step->wave_first[wave + 1] - first;
        to.items = items + first;
        if (!has_tiles<T>(launch)) plain_expand(b, launch, n->lora_tile, out_max, to, count);
        else if constexpr (sizeof(T) == sizeof(bf16))
            lora_tiles_expand(b, launch->layer, launch->target_count, out_max, n, to, count);
    }
}

void cuda_lora_shrink(struct backend *b, const struct lora_launch *launch) {
    if (b->dtype == DTYPE_BF16) shrink<bf16>(b, launch);
    else shrink<float>(b, launch);
}

void cuda_lora_expand(struct backend *b, const struct lora_launch *launch) {
    if (b->dtype == DTYPE_BF16) expand<bf16>(b, launch);
    else expand<float>(b, launch);
}
