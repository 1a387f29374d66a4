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
    REQUEST_WAVES_MAX = 64, // segments over one token; a request mixes at most a few
};

// A segment as kernels see it.
struct device_segment {
    int32_t token_first, v_first, pages_first;
    float weight;
    struct {
        int32_t rank;
        uint32_t a, b; // first elements
    } target[LORA_TARGETS_MAX];
};

struct lora_item {
    int32_t segment, first, count; // tokens, counted from the segment's first
};

struct device_target {
    float *y;
    int out, stride;
};

// One launch, on the device side.
struct device_launch {
    const device_segment *segments;
    const lora_item *items;
    const int32_t *pages;
    const float *x;
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
    shrink_kernel(paged<T> pool, device_launch launch) {
    shared<float> x = dynamic_shared<float>(); // [TILE][PIECE]
    const lora_item work = launch.items[blockIdx.z];
    const device_segment *segment = &launch.segments[work.segment];
    int target = blockIdx.y, rank = segment->target[target].rank, first = blockIdx.x * RANKS;
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
            x[i] = there ? rounded<T>(launch.x[(token + t) * (size_t)launch.in + at + k]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (rows[j] >= rank) continue;
            uint32_t row = segment->target[target].a + (uint32_t)rows[j] * (uint32_t)launch.in + at;
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
    expand_kernel(paged<T> pool, device_launch launch) {
    shared<float> v = dynamic_shared<float>(); // [TILE][LORA_RANK_MAX]
    const lora_item work = launch.items[blockIdx.z];
    const device_segment *segment = &launch.segments[work.segment];
    int module = blockIdx.y, rank = segment->target[module].rank;
    const device_target target = launch.target[module];
    if (rank == 0 || (int)blockIdx.x * COLUMNS >= target.out) return; // the whole block
    for (int i = threadIdx.x; i < TILE * LORA_RANK_MAX; i += COLUMN_THREADS) {
        int t = i / LORA_RANK_MAX, r = i % LORA_RANK_MAX;
        v[i] = t < work.count && r < rank
                   ? launch.v[(size_t)(segment->v_first + work.first + t) * V_ROW +
                              module * LORA_RANK_MAX + r]
                   : 0.0f;
    }
    __syncthreads();
    int column = blockIdx.x * COLUMNS + threadIdx.x * EIGHT;
    if (column >= target.out) return;
    const int32_t *pages = launch.pages + segment->pages_first;
    int panel = column / LORA_PANEL * LORA_PANEL;
    int width = target.out - panel < LORA_PANEL ? target.out - panel : LORA_PANEL;
    uint32_t b = segment->target[module].b + (uint32_t)(panel * rank + column - panel);
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

// ------------------------------------------------------------------ the launch's metadata

struct lora_prepared {
    device_launch launch;
    int item_count, rank_max, out_max, tile;
    int wave_first[REQUEST_WAVES_MAX + 1]; // items of each wave
    int waves;
};

static bool segment_works(const struct lora_launch *launch, const struct lora_segment *segment) {
    for (int t = 0; t < launch->target_count; t++)
        if (segment->rank[launch->target[t].module] > 0) return segment->token_count > 0;
    return false;
}

static bool overlap(const struct lora_segment *a, const struct lora_segment *b) {
    return a->token_first < b->token_first + b->token_count &&
           b->token_first < a->token_first + a->token_count;
}

// How many segments before s must be done first, one after another.
static int segment_wave(const struct lora_launch *launch, const uint8_t *waves, int s) {
    int wave = 0;
    for (int before = 0; before < s; before++)
        if (overlap(&launch->segments[before], &launch->segments[s]) && waves[before] >= wave)
            wave = waves[before] + 1;
    return wave;
}

static device_segment segment_describe(const struct lora_launch *launch,
                                       const struct lora_segment *segment, int pages_first) {
    device_segment to = {segment->token_first, segment->v_first, pages_first, segment->weight, {}};
    for (int t = 0; t < launch->target_count; t++) {
        enum lora_module module = launch->target[t].module;
        to.target[t].rank = segment->rank[module];
        to.target[t].a = (uint32_t)segment->a_offset[module];
        to.target[t].b = (uint32_t)segment->b_offset[module];
    }
    return to;
}

// Pages that the launch's modules of a segment reach.
static int segment_pages(const struct backend *b, const struct lora_launch *launch,
                         const struct lora_segment *segment) {
    int64_t end = 0;
    for (int t = 0; t < launch->target_count; t++) {
        enum lora_module module = launch->target[t].module;
        int64_t last = segment->b_offset[module] +
                       (int64_t)segment->rank[module] * launch->target[t].out;
        if (segment->rank[module] > 0 && last > end) end = last;
    }
    VERIFY_OP(end, <, INT32_MAX);
    int64_t elems = (int64_t)b->shape.page_elems;
    return (int)((end + elems - 1) / elems);
}

// Each group of modules has its own place, so that a step sends each group's metadata once.
static enum cuda_meta meta_of(enum lora_module first) {
    if (first == LORA_O) return META_LORA_O;
    if (first == LORA_DOWN) return META_LORA_DOWN;
    return first < LORA_O ? META_LORA_QKV : META_LORA_GATE_UP;
}

// Segments, items by wave, and page tables in one piece of metadata. Nothing to do: item_count 0.
static struct lora_prepared prepare(struct backend *b, const struct lora_launch *launch) {
    struct lora_prepared p = {};
    int segments = launch->segment_count, items_max = 0, pages_max = 0;
    p.tile = 1;
    for (int s = 0; s < segments; s++) {
        const struct lora_segment *segment = &launch->segments[s];
        if (!segment_works(launch, segment)) continue;
        if (segment->token_count > 1) p.tile = TILE_MAX;
        items_max += segment->token_count;
        pages_max += segment_pages(b, launch, segment);
    }
    size_t segment_bytes = (size_t)segments * sizeof(device_segment);
    size_t item_bytes = (size_t)items_max * sizeof(lora_item);
    size_t page_bytes = (size_t)pages_max * sizeof(int32_t);
    char *draft = (char *)cuda_draft(b, segment_bytes + item_bytes + page_bytes + (size_t)segments);
    device_segment *to = (device_segment *)draft;
    lora_item *items = (lora_item *)(draft + segment_bytes);
    int32_t *pages = (int32_t *)(draft + segment_bytes + item_bytes);
    uint8_t *waves = (uint8_t *)(pages + pages_max);
    int pages_used = 0;
    memset(draft, 0, segment_bytes + item_bytes);
    for (int s = 0; s < segments; s++) {
        const struct lora_segment *segment = &launch->segments[s];
        bool works = segment_works(launch, segment);
        waves[s] = works ? (uint8_t)segment_wave(launch, waves, s) : 0;
        if (!works) continue;
        VERIFY_OP(waves[s], <, REQUEST_WAVES_MAX);
        if (waves[s] >= p.waves) p.waves = waves[s] + 1;
        to[s] = segment_describe(launch, segment, pages_used);
        for (int t = 0; t < launch->target_count; t++) {
            VERIFY_OP(to[s].target[t].rank, <=, LORA_RANK_MAX);
            if (to[s].target[t].rank > p.rank_max) p.rank_max = to[s].target[t].rank;
        }
        int count = segment_pages(b, launch, segment);
        memcpy(pages + pages_used, segment->pages, (size_t)count * sizeof *pages);
        pages_used += count;
    }
    for (int wave = 0; wave < p.waves; wave++) {
        for (int s = 0; s < segments; s++) {
            const struct lora_segment *segment = &launch->segments[s];
            if (waves[s] != wave || !segment_works(launch, segment)) continue;
            for (int first = 0; first < segment->token_count; first += p.tile) {
                int left = segment->token_count - first;
                items[p.item_count++] = {s, first, left < p.tile ? left : p.tile};
            }
        }
        p.wave_first[wave + 1] = p.item_count;
    }
    if (p.item_count == 0) return p;
    const char *meta = (const char *)cuda_meta(b, meta_of(launch->target[0].module), draft,
                                               segment_bytes + item_bytes + page_bytes);
    p.launch = {(const device_segment *)meta, (const lora_item *)(meta + segment_bytes),
                (const int32_t *)(meta + segment_bytes + item_bytes), (const float *)launch->x,
                launch->v, launch->in, {}};
    for (int t = 0; t < launch->target_count; t++) {
        p.launch.target[t] = {(float *)launch->target[t].y, launch->target[t].out,
                              launch->target[t].stride};
        if (launch->target[t].out > p.out_max) p.out_max = launch->target[t].out;
    }
    return p;
}

// ------------------------------------------------------------------ launchers

enum { GRID_Z_MAX = 65535 };

template <typename T>
static void shrink(struct backend *b, const struct lora_launch *launch, const struct lora_prepared *p) {
    paged<T> pool = cuda_layer<T>(b, launch->layer);
    for (int first = 0; first < p->item_count; first += GRID_Z_MAX) {
        int count = p->item_count - first < GRID_Z_MAX ? p->item_count - first : GRID_Z_MAX;
        dim3 grid(cuda_blocks((size_t)p->rank_max, RANKS), (unsigned)launch->target_count,
                  (unsigned)count);
        dim3 block(SHRINK_WARPS * WARP);
        device_launch part = p->launch;
        part.items += first;
        size_t shared = (size_t)p->tile * PIECE * sizeof(float);
        if (p->tile == 1)
            CUDA_LAUNCH((shrink_kernel<T, 1>), grid, block, shared, b->stream, pool, part);
        else
            CUDA_LAUNCH((shrink_kernel<T, TILE_MAX>), grid, block, shared, b->stream, pool, part);
    }
}

template <typename T>
static void expand(struct backend *b, const struct lora_launch *launch, const struct lora_prepared *p,
                   int first, int end) {
    paged<T> pool = cuda_layer<T>(b, launch->layer);
    for (; first < end; first += GRID_Z_MAX) {
        int count = end - first < GRID_Z_MAX ? end - first : GRID_Z_MAX;
        dim3 grid(cuda_blocks((size_t)p->out_max, COLUMNS), (unsigned)launch->target_count,
                  (unsigned)count);
        device_launch part = p->launch;
        part.items += first;
        size_t shared = (size_t)p->tile * LORA_RANK_MAX * sizeof(float);
        if (p->tile == 1)
            CUDA_LAUNCH((expand_kernel<T, 1>), grid, dim3(COLUMN_THREADS), shared, b->stream, pool, part);
        else
            CUDA_LAUNCH((expand_kernel<T, TILE_MAX>), grid, dim3(COLUMN_THREADS), shared, b->stream,
                        pool, part);
    }
}

void cuda_lora_shrink(struct backend *b, const struct lora_launch *launch) {
    VERIFY(b->pool);
    VERIFY_OP(launch->target_count, <=, LORA_TARGETS_MAX);
    struct lora_prepared p = prepare(b, launch);
    if (p.item_count == 0) return;
    if (b->dtype == DTYPE_BF16) shrink<bf16>(b, launch, &p);
    else shrink<float>(b, launch, &p);
}

void cuda_lora_expand(struct backend *b, const struct lora_launch *launch) {
    VERIFY(b->pool);
    struct lora_prepared p = prepare(b, launch);
    if (p.item_count == 0) return;
    for (int wave = 0; wave < p.waves; wave++) {
        if (b->dtype == DTYPE_BF16)
            expand<bf16>(b, launch, &p, p.wave_first[wave], p.wave_first[wave + 1]);
        else expand<float>(b, launch, &p, p.wave_first[wave], p.wave_first[wave + 1]);
    }
}
