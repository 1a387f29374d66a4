// LoRA over segments of different ranks: shrink v = A x, expand y += weight B v. Adapters are read in
// place from their pages, at their true ranks, all segments and up to three modules in one launch.
//
// DESIGN. The work of a launch is a list of items: up to TILE tokens of one segment. Shrink: a block
// has one item, one module and sixteen ranks; x goes to shared memory piece by piece, each warp
// reads whole rows of A with 16-byte loads and multiplies them with every token of the item.
// Expand: a block has one item, one module and COLUMNS columns; v lies in shared memory, a thread
// reads eight columns of each of B's rows with 16-byte loads, AHEAD of them under way. A decode's items have one token (TILE 1), so each element of A and B is read
// once for its token; a prefill's have eight, and A and B come back from the second-level cache.
//
// Bytes: shrink rank x in, expand out x rank elements an item and module, x and v beside them small.
// In flight for 64 decodes of rank 16, q k v: 192 blocks x 8 warps x 2 rows x 16 bytes x 32 lanes.
//
// A token's sums run in an order that depends on its adapter and module alone: bits do not change
// with the batch. A token in several segments gets their sums in the segments' order: segments that
// overlap go into launches after each other ("waves"); without mixing there is one.
#include "kernels/cuda/cuda_internal.cuh"

enum {
    RANKS = 16,        // of a shrink block
    SHRINK_WARPS = 8,
    PIECE = 1024,      // elements of x in shared memory at a time
    TILE_MAX = 8,      // tokens of an item
    COLUMN_THREADS = 64,
    COLUMNS = COLUMN_THREADS * EIGHT, // of an expand block
    AHEAD = 4,         // rows of B under way in an expand thread
    V_ROW = LORA_TARGETS_MAX * LORA_RANK_MAX,
};

struct device_target {
    int module;
    float *y;
    int out, stride;
};

// One launch, on the device side.
template <typename T> struct device_launch {
    const device_segment *segments;
    const lora_item *items;
    const int32_t *pages;
    const T *x;
    float *v;
    int in;
    device_target target[LORA_TARGETS_MAX];
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

// Grid (ranks / RANKS, modules, items).
template <typename T, int TILE>
__global__ void __launch_bounds__(SHRINK_WARPS *WARP)
    shrink_kernel(paged<T> pool, device_launch<T> launch) {
    shared<float> x = dynamic_shared<float>(); // [TILE][PIECE]
    const lora_item work = launch.items[blockIdx.z];
    if (work.segment < 0) return;
    const device_segment *segment = &launch.segments[work.segment];
    int target = blockIdx.y, module = launch.target[target].module;
    int rank = segment->module[module].rank, first = blockIdx.x * RANKS;
    if (first >= rank) return; // the whole block
    const int32_t *pages = launch.pages + segment->pages_first;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int rows[2] = {first + warp, first + warp + SHRINK_WARPS};
    float sums[2][TILE] = {{0}};
    size_t token = (size_t)(segment->token_first + work.first);
    for (int at = 0; at < launch.in; at += PIECE) {
        int count = launch.in - at < PIECE ? launch.in - at : PIECE;
        for (int i = threadIdx.x; i < TILE * PIECE; i += SHRINK_WARPS * WARP) {
            int t = i / PIECE, k = i % PIECE;
            bool there = t < work.count && k < count;
            x[i] = there ? to_float(launch.x[(token + t) * (size_t)launch.in + at + k]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (rows[j] >= rank) continue;
            uint32_t row = segment->module[module].a + (uint32_t)rows[j] * (uint32_t)launch.in + at;
            for (int k = lane * EIGHT; k < count; k += WARP * EIGHT) {
                float a[EIGHT];
                load_paged(a, pool, pages, row + k, row + count);
                multiply_eight<TILE>(sums[j], a, x + k);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            float sum = warp_sum(sums[j][t]);
            if (lane == 0 && rows[j] < rank && t < work.count)
                launch.v[(size_t)(segment->v_first + work.first + t) * V_ROW +
                         target * LORA_RANK_MAX + rows[j]] = sum;
        }
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

// Grid (columns / COLUMNS, modules, items).
template <typename T, int TILE>
__global__ void __launch_bounds__(COLUMN_THREADS)
    expand_kernel(paged<T> pool, device_launch<T> launch) {
    shared<float> v = dynamic_shared<float>(); // [TILE][LORA_RANK_MAX]
    const lora_item work = launch.items[blockIdx.z];
    if (work.segment < 0) return;
    const device_segment *segment = &launch.segments[work.segment];
    const device_target target = launch.target[blockIdx.y];
    int rank = segment->module[target.module].rank;
    if (rank == 0 || (int)blockIdx.x * COLUMNS >= target.out) return; // the whole block
    for (int i = threadIdx.x; i < TILE * LORA_RANK_MAX; i += COLUMN_THREADS) {
        int t = i / LORA_RANK_MAX, r = i % LORA_RANK_MAX;
        v[i] = t < work.count && r < rank
                   ? launch.v[(size_t)(segment->v_first + work.first + t) * V_ROW +
                              blockIdx.y * LORA_RANK_MAX + r]
                   : 0.0f;
    }
    __syncthreads();
    int column = blockIdx.x * COLUMNS + threadIdx.x * EIGHT;
    if (column >= target.out) return;
    const int32_t *pages = launch.pages + segment->pages_first;
    int panel = column / LORA_PANEL * LORA_PANEL;
    int width = target.out - panel < LORA_PANEL ? target.out - panel : LORA_PANEL;
    uint32_t b = segment->module[target.module].b + (uint32_t)(panel * rank + column - panel);
    float sums[TILE][EIGHT] = {{0}};
    for (int r = 0; r < rank; r += AHEAD)
        update_eight<T, TILE>(sums, pool, pages, b, (uint32_t)(width - (column - panel)),
                              (uint32_t)width, v, r, rank);
#pragma unroll
    for (int t = 0; t < TILE; t++) {
        if (t >= work.count) break;
        float *y = target.y + (size_t)(segment->token_first + work.first + t) *
                                  (size_t)target.stride + column;
#pragma unroll
        for (int i = 0; i < EIGHT; i++)
            if (column + i < target.out) y[i] += segment->weight * sums[t][i];
    }
}

// ------------------------------------------------------------------ launchers

enum { GRID_Z_MAX = 65535 };

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
    device_launch<T> to = {(*step)->segments, (*step)->lora_items, (*step)->lora_pages,
                           (const T *)launch->x, launch->v, launch->in, {}};
    for (int t = 0; t < launch->target_count; t++)
        to.target[t] = {launch->target[t].module, (float *)launch->target[t].y,
                        launch->target[t].out, launch->target[t].stride};
    return to;
}

template <typename T> static void shrink(struct backend *b, const struct lora_launch *launch) {
    const struct device_step *step;
    device_launch<T> to = prepare<T>(b, launch, &step);
    const struct step_counts *n = &step->counts;
    paged<T> pool = cuda_layer<T>(b, launch->layer);
    for (int left = n->lora_items; left > 0; left -= GRID_Z_MAX, to.items += GRID_Z_MAX) {
        dim3 grid(cuda_blocks((size_t)n->rank_max, RANKS), (unsigned)launch->target_count,
                  (unsigned)(left < GRID_Z_MAX ? left : GRID_Z_MAX));
        dim3 block(SHRINK_WARPS * WARP);
        size_t shared = (size_t)n->lora_tile * PIECE * sizeof(float);
        if (n->lora_tile == 1)
            CUDA_LAUNCH((shrink_kernel<T, 1>), grid, block, shared, b->stream, pool, to);
        else CUDA_LAUNCH((shrink_kernel<T, TILE_MAX>), grid, block, shared, b->stream, pool, to);
    }
}

template <typename T>
static void expand_wave(struct backend *b, const struct lora_launch *launch, device_launch<T> to,
                        int tile, int items) {
    paged<T> pool = cuda_layer<T>(b, launch->layer);
    int out_max = 0;
    for (int t = 0; t < launch->target_count; t++)
        if (launch->target[t].out > out_max) out_max = launch->target[t].out;
    for (int left = items; left > 0; left -= GRID_Z_MAX, to.items += GRID_Z_MAX) {
        dim3 grid(cuda_blocks((size_t)out_max, COLUMNS), (unsigned)launch->target_count,
                  (unsigned)(left < GRID_Z_MAX ? left : GRID_Z_MAX));
        dim3 block(COLUMN_THREADS);
        size_t shared = (size_t)tile * LORA_RANK_MAX * sizeof(float);
        if (tile == 1) CUDA_LAUNCH((expand_kernel<T, 1>), grid, block, shared, b->stream, pool, to);
        else CUDA_LAUNCH((expand_kernel<T, TILE_MAX>), grid, block, shared, b->stream, pool, to);
    }
}

template <typename T> static void expand(struct backend *b, const struct lora_launch *launch) {
    const struct device_step *step;
    device_launch<T> to = prepare<T>(b, launch, &step);
    const lora_item *items = to.items;
    for (int wave = 0; wave < step->waves; wave++) {
        to.items = items + step->wave_first[wave];
        expand_wave(b, launch, to, step->counts.lora_tile,
                    step->wave_first[wave + 1] - step->wave_first[wave]);
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
