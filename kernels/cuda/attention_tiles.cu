// Attention on tensor cores, for bf16 and heads of 64 or 128 (attention.cu has the rest). K and V go
// from their pages to the registers of tensor cores: a page of 16 positions is a tile.
//
// DESIGN. A row is a token and one of the G query heads that share a kv head: row i of an item is its
// token i / G and head i % G, so that grouped heads fill a tile and K and V are read once for all.
// A warp has 16 rows, keeps their q, maximum, sum and output in registers, and walks pages: scores
// are two tiles of 8 positions, weights go from the accumulators to the next multiplication as they
// lie (the online softmax of arXiv 1805.02867, tiled as in arXiv 2307.08691).
// Narrow items (decodes and short drafts, at most 16 rows) are cut at multiples of PART positions;
// a block's warps share their pages and merge in shared memory, attention.cu's kernel merges parts.
// Wide items (prefill) have 64 rows, 16 a warp, and walk all pages they see.
//
// A row's bits depend on its own span alone: rows of a tile do not mix, and pages come in one order.
//
// Bytes in flight: all of a page, 16 loads of 16 bytes a lane at heads of 128: 8 KiB a warp.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/tiles.cuh"

enum { WARPS = 4, THREADS = WARPS * WARP };

bool cuda_attention_tiles(const struct backend *b, int query_heads) {
    int D = b->shape.head_size;
    return b->dtype == DTYPE_BF16 && (D == 64 || D == 128) &&
           query_heads / b->shape.kv_heads <= NARROW_ROWS;
}

// Rows r and r + 8 of a warp, as a lane holds them; index 0 is r.
template <int D> struct rows_state {
    words4 q[2][D / ROWS_DEPTH];
    float top[2], sum[2]; // of scores in units of log 2; sum: this lane's positions
    float out[D / COLUMNS_WIDTH][COLUMNS_TILES][4];
    int limit[2]; // positions it sees; 0: no such row
};

__device__ static inline int row_limit(const attention_item &work, const attention_shape &s,
                                       int row) {
    int t = row / s.G;
    return t < work.count ? work.context - work.count + t + 1 : 0;
}

// q [D] of a row, scaled and in bf16, in the order of ROWS (tiles.cuh).
template <int D>
__device__ static inline void load_q(words4 q[D / ROWS_DEPTH], const attention_item &work,
                                     const attention_shape &s, const float *qkv, int head, int row,
                                     bool there) {
    int t = row / s.G, g = row % s.G, c = threadIdx.x % 4;
    const float *from = qkv + ((size_t)(work.token + t) * (size_t)(s.Q + 2 * s.K) +
                               (size_t)(head * s.G + g)) * D + c * EIGHT;
    float values[D / ROWS_DEPTH][EIGHT];
#pragma unroll
    for (int i = 0; i < D / ROWS_DEPTH; i++) load_eight(values[i], from + i * ROWS_DEPTH);
#pragma unroll
    for (int i = 0; i < D / ROWS_DEPTH; i++) {
#pragma unroll
        for (int w = 0; w < 4; w++)
            q[i].word[w] = pack(values[i][2 * w] * s.scale, values[i][2 * w + 1] * s.scale);
        q[i] = kept(q[i], there);
    }
}

// Maximum and sum over the four lanes that share a row.
__device__ static inline float row_max(float value) {
    value = fmaxf(value, warp_exchange(value, 1));
    return fmaxf(value, warp_exchange(value, 2));
}

// Scores [16 rows, 8 positions] of the page's positions `half` * 8 + 0 .. 7.
template <int D>
__device__ static inline void page_scores(float scores[4], const rows_state<D> &state,
                                          const words4 k[D / ROWS_DEPTH]) {
#pragma unroll
    for (int i = 0; i < 4; i++) scores[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < D / ROWS_DEPTH; i++)
        multiply_rows(scores, state.q[0][i], state.q[1][i], k[i]);
}

// Scores of 16 positions from `first` on -> weights below the new maxima, packed for the next
// multiplication; what is summed up so far is brought to them.
template <int D>
__device__ static inline void page_softmax(uint32_t weights[4], float scores[2][4],
                                           rows_state<D> *state, int first) {
    const float log2_e = 1.4426950408889634f;
    int c = threadIdx.x % 4;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float top = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float *score = &scores[i / 2][2 * row + i % 2];
            int position = first + i / 2 * 8 + 2 * c + i % 2;
            *score = position < state->limit[row] ? *score * log2_e : -INFINITY;
            top = fmaxf(top, *score);
        }
        top = fmaxf(state->top[row], row_max(top));
        float at = top == -INFINITY ? 0.0f : top; // a row that sees none of it
        float before = exp2f(state->top[row] - at);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float *score = &scores[i / 2][2 * row + i % 2];
            *score = exp2f(*score - at);
            sum += *score;
        }
        state->top[row] = top;
        state->sum[row] = state->sum[row] * before + sum;
#pragma unroll
        for (int block = 0; block < D / COLUMNS_WIDTH; block++)
#pragma unroll
            for (int j = 0; j < COLUMNS_TILES; j++) {
                state->out[block][j][2 * row] *= before;
                state->out[block][j][2 * row + 1] *= before;
            }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) // r and r + 8 at positions 2c, then at 2c + 8
        weights[i] = pack(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1]);
}

// One page: its K and V of a head lie at `k` and `v`; its positions from `end` on are nobody's.
template <int D>
__device__ static inline void page_attend(rows_state<D> *state, const bf16 *k, const bf16 *v,
                                          int first, int end) {
    int lane = threadIdx.x % WARP, r = lane / 4, c = lane % 4;
    words4 keys[2][D / ROWS_DEPTH], values[D / COLUMNS_WIDTH][4];
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < D / ROWS_DEPTH; i++)
            keys[half][i] = load_words(k + (half * 8 + r) * D + i * ROWS_DEPTH + c * EIGHT);
#pragma unroll
    for (int block = 0; block < D / COLUMNS_WIDTH; block++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            values[block][i] =
                load_words(v + columns_row(lane, i) * D + block * COLUMNS_WIDTH + r * EIGHT);
    float scores[2][4];
    page_scores<D>(scores[0], *state, keys[0]);
    page_scores<D>(scores[1], *state, keys[1]);
    uint32_t weights[4];
    page_softmax(weights, scores, state, first);
#pragma unroll
    for (int block = 0; block < D / COLUMNS_WIDTH; block++) {
#pragma unroll
        for (int i = 0; i < 4; i++) // what nobody wrote may be no number, and zero times it none
            values[block][i] = kept(values[block][i], first + columns_row(lane, i) < end);
        multiply_columns(state->out[block], weights, values[block]);
    }
}

// Walks pages page_first, + page_step, ... of [.., end) positions.
template <int D>
__device__ static inline void pages_attend(rows_state<D> *state, const paged<bf16> &pool,
                                           const int32_t *pages, const attention_shape &s, int head,
                                           int page_first, int page_step, int end) {
    for (int page = page_first; page * PAGE_TOKENS < end; page += page_step) {
        const bf16 *base = pool.base + (size_t)pages[page] * pool.elems;
        page_attend<D>(state, base + head * PAGE_TOKENS * D, base + (s.K + head) * PAGE_TOKENS * D,
                       page * PAGE_TOKENS, end);
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
        state->sum[row] += warp_exchange(state->sum[row], 1);
        state->sum[row] += warp_exchange(state->sum[row], 2);
    }
}

template <int D>
__device__ static inline void state_init(rows_state<D> *state, const attention_item &work,
                                         const attention_shape &s, const float *qkv, int head,
                                         int row_first) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = row_first + (int)(threadIdx.x % WARP) / 4 + 8 * half;
        state->limit[half] = row_limit(work, s, row);
        state->top[half] = -INFINITY;
        state->sum[half] = 0.0f;
        load_q<D>(state->q[half], work, s, qkv, head, state->limit[half] > 0 ? row : 0,
                  state->limit[half] > 0);
    }
#pragma unroll
    for (int block = 0; block < D / COLUMNS_WIDTH; block++)
#pragma unroll
        for (int j = 0; j < COLUMNS_TILES; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) state->out[block][j][i] = 0.0f;
}

// ------------------------------------------------------------------ wide items

// Grid (items, kv heads).
template <int D>
__global__ void __launch_bounds__(THREADS)
    attention_wide_kernel(paged<bf16> pool, attention_shape s, const attention_item *items,
                          const int32_t *page_tables, const float *qkv, bf16 *y) {
    const attention_item work = items[blockIdx.x];
    int head = blockIdx.y, lane = threadIdx.x % WARP;
    int row_first = (int)(threadIdx.x / WARP) * TILE_ROWS, rows = work.count * s.G;
    if (work.token < 0 || row_first >= rows) return; // the whole warp
    rows_state<D> state;
    state_init<D>(&state, work, s, qkv, head, row_first);
    int last = row_first + TILE_ROWS < rows ? row_first + TILE_ROWS : rows;
    pages_attend<D>(&state, pool, page_tables + work.pages, s, head, 0, 1,
                    row_limit(work, s, last - 1));
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (state.limit[half] == 0) continue;
        int row = row_first + lane / 4 + 8 * half;
        bf16 *to = y + ((size_t)(work.token + row / s.G) * (size_t)s.Q +
                        (size_t)(head * s.G + row % s.G)) * D + columns_first(lane);
        float scale = 1.0f / state.sum[half];
#pragma unroll
        for (int block = 0; block < D / COLUMNS_WIDTH; block++)
#pragma unroll
            for (int i = 0; i < 16; i += EIGHT) {
                words4 eight;
#pragma unroll
                for (int w = 0; w < 4; w++)
                    eight.word[w] =
                        pack(columns_of(state.out[block], half, i + 2 * w) * scale,
                             columns_of(state.out[block], half, i + 2 * w + 1) * scale);
                *reinterpret_cast<words4 *>(to + block * COLUMNS_WIDTH + i) = eight;
            }
    }
}

// ------------------------------------------------------------------ narrow items

// What the warps of a block leave for each other.
template <int D> struct narrow_shared {
    shared<float> top, sum, out; // [WARPS][16], [WARPS][16], [WARPS][16][D]
};

template <int D> __device__ static inline narrow_shared<D> narrow_carve() {
    shared<float> at = dynamic_shared<float>();
    return {at, at + WARPS * NARROW_ROWS, at + 2 * WARPS * NARROW_ROWS};
}

template <int D> static size_t narrow_shared_bytes() {
    return (size_t)WARPS * NARROW_ROWS * (D + 2) * sizeof(float);
}

template <int D>
__device__ static inline void narrow_leave(const narrow_shared<D> &to, const rows_state<D> &state) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = warp * NARROW_ROWS + lane / 4 + 8 * half;
        if (state.limit[half] == 0) continue;
        if (lane % 4 == 0) {
            to.top[row] = state.top[half];
            to.sum[row] = state.sum[half];
        }
#pragma unroll
        for (int block = 0; block < D / COLUMNS_WIDTH; block++)
#pragma unroll
            for (int i = 0; i < 16; i++)
                to.out[row * D + block * COLUMNS_WIDTH + columns_first(lane) + i] =
                    columns_of(state.out[block], half, i);
    }
}

// Grid (items, kv heads). Maxima leave in the units of attention.cu's merge: log e.
template <int D>
__global__ void __launch_bounds__(THREADS, 2)
    attention_narrow_kernel(paged<bf16> pool, attention_shape s, const attention_item *items,
                            const int32_t *page_tables, const float *qkv, bf16 *y,
                            float *partials) {
    const attention_item work = items[blockIdx.x];
    if (work.token < 0) return;
    int head = blockIdx.y, warp = threadIdx.x / WARP;
    rows_state<D> state;
    state_init<D>(&state, work, s, qkv, head, 0);
    pages_attend<D>(&state, pool, page_tables + work.pages, s, head,
                    work.first / PAGE_TOKENS + warp, WARPS, work.end);
    narrow_shared<D> warps = narrow_carve<D>();
    narrow_leave<D>(warps, state);
    __syncthreads();
    for (int i = threadIdx.x; i < work.count * s.G * D; i += THREADS) {
        int row = i / D, d = i % D, t = row / s.G, query = head * s.G + row % s.G;
        float top = -INFINITY, sum = 0.0f, out = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, warps.top[w * NARROW_ROWS + row]);
        float at = top == -INFINITY ? 0.0f : top;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float share = exp2f(warps.top[w * NARROW_ROWS + row] - at);
            sum += share * warps.sum[w * NARROW_ROWS + row];
            out += share * warps.out[(w * NARROW_ROWS + row) * D + d];
        }
        if (work.partial < 0) {
            y[((size_t)(work.token + t) * (size_t)s.Q + (size_t)query) * D + d] =
                from_float<bf16>(out / sum);
            continue;
        }
        float *to = partial_row(partials, s, work.partial + t, query);
        to[2 + d] = out;
        if (d == 0) {
            to[0] = top * 0.6931471805599453f;
            to[1] = sum;
        }
    }
}

// ------------------------------------------------------------------ launch

template <int D>
static void launch(struct backend *b, int layer, const attention_shape &s,
                   const struct device_step *step, bf16 *y, const float *qkv, float *partials) {
    const struct step_counts *n = &step->counts;
    paged<bf16> pool = cuda_layer<bf16>(b, layer);
    if (n->narrow_items > 0)
        CUDA_LAUNCH(attention_narrow_kernel<D>, dim3((unsigned)n->narrow_items, (unsigned)s.K),
                    dim3(THREADS), narrow_shared_bytes<D>(), b->stream, pool, s, step->items,
                    step->kv_pages, qkv, y, partials);
    if (n->wide_items > 0)
        CUDA_LAUNCH(attention_wide_kernel<D>, dim3((unsigned)n->wide_items, (unsigned)s.K),
                    dim3(THREADS), 0, b->stream, pool, s, step->items + n->narrow_items,
                    step->kv_pages, qkv, y);
}

void attention_tiles(struct backend *b, int layer, const attention_shape &s,
                     const struct device_step *step, bf16 *y, const float *qkv, float *partials) {
    auto run = s.D == 64 ? launch<64> : launch<128>;
    run(b, layer, s, step, y, qkv, partials);
}
