// Causal attention over the paged K and V: prefill chunks and decodes in one call. bf16 at usual head
// sizes goes to tensor cores (attention_tiles.cu); this is the rest: f32, and any head size.
//
// DESIGN. An item is one token of a span and one kv head; a block computes all query heads that share
// that kv head, so a page is read once for them. It walks the context in parts of PART tokens at
// fixed positions: scores (a group of lanes per position, 16-byte loads), softmax of the part, P V
// (a thread per element of the head), and merges parts left to right by their maxima (arXiv
// 1805.02867). A decode with more than one part is cut into one block a part, and a second kernel
// merges: the same sums in the same order, so bits depend neither on the batch nor on the cut.
#include "kernels/cuda/attention.cuh"

enum {
    THREADS = 128,
    WARPS = THREADS / WARP,
    HEADS_AT_ONCE = 8,   // query heads whose sums a thread keeps in registers
    HEAD_SIZE_MAX = 256,
    SHARED_BYTES_ANY = 48 << 10, // what a launch may have without asking
    SHARED_BYTES_MAX = 96 << 10, // what every card from 8.0 on gives when asked
};

// What a block keeps in shared memory, all [G] or [G][...].
struct shared_state {
    shared<float> q, scores, sum_max, sum_sum, part_max, part_sum, out, part_out;
};

__device__ __host__ static inline size_t shared_floats(const attention_shape &s) {
    return (size_t)s.G * (3 * (size_t)s.D + PART + 4);
}

__device__ static inline shared_state shared_carve(const attention_shape &s) {
    shared<float> at = dynamic_shared<float>();
    shared_state state;
    state.q = at;
    state.out = state.q + s.G * s.D;
    state.part_out = state.out + s.G * s.D;
    state.scores = state.part_out + s.G * s.D;
    state.sum_max = state.scores + s.G * PART;
    state.sum_sum = state.sum_max + s.G;
    state.part_max = state.sum_sum + s.G;
    state.part_sum = state.part_max + s.G;
    return state;
}

// ------------------------------------------------------------------ one part

// scores[g][i] of positions first + i, i < n.
template <typename T>
__device__ static void part_scores(const attention_shape &s, const paged<T> &pool, const int32_t *pages,
                                   int head, int first, int n, const shared_state &state) {
    int at_once = THREADS / s.lanes, lane = threadIdx.x % s.lanes;
    for (int begin = 0; begin < n; begin += at_once) { // the same number of rounds for every thread
        int i = begin + threadIdx.x / s.lanes, position = first + i, d = lane * EIGHT;
        float k[EIGHT] = {0};
        if (i < n && d < s.D) {
            const T *row = pool.base + (size_t)pages[position / PAGE_TOKENS] * pool.elems +
                           (size_t)(head * PAGE_TOKENS + position % PAGE_TOKENS) * (size_t)s.D;
            if (s.D % EIGHT == 0) load_eight(k, row + d);
            else
                for (int e = 0; e < EIGHT && d + e < s.D; e++) k[e] = to_float(row[d + e]);
        }
        for (int g = 0; g < s.G; g++) {
            float dot = 0.0f;
            for (int e = 0; e < EIGHT && d + e < s.D; e++) dot += state.q[g * s.D + d + e] * k[e];
            dot = group_sum(dot, s.lanes);
            if (lane == 0 && i < n) state.scores[g * PART + i] = dot;
        }
    }
}

// Scores -> exponentials below the part's maximum, with their sum. A warp a head.
__device__ static void part_softmax(const attention_shape &s, int n, const shared_state &state) {
    int lane = threadIdx.x % WARP;
    for (int g = threadIdx.x / WARP; g < s.G; g += WARPS) {
        shared<float> scores = state.scores + g * PART;
        float top = -INFINITY, sum = 0.0f;
        for (int i = lane; i < n; i += WARP) top = fmaxf(top, scores[i]);
        top = warp_max(top);
        for (int i = lane; i < n; i += WARP) {
            float weight = expf(scores[i] - top);
            scores[i] = weight;
            sum += weight;
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            state.part_max[g] = top;
            state.part_sum[g] = sum;
        }
    }
}

// part_out[g][d] = sum of weights x V. A thread an element of the head.
template <typename T>
__device__ static void part_values(const attention_shape &s, const paged<T> &pool, const int32_t *pages,
                                   int head, int first, int n, const shared_state &state) {
    for (int d = threadIdx.x; d < s.D; d += THREADS)
        for (int g0 = 0; g0 < s.G; g0 += HEADS_AT_ONCE) {
            float sums[HEADS_AT_ONCE] = {0};
            for (int i = 0; i < n; i++) {
                int position = first + i;
                size_t row = (size_t)((s.K + head) * PAGE_TOKENS + position % PAGE_TOKENS);
                float v = to_float(pool.base[(size_t)pages[position / PAGE_TOKENS] * pool.elems +
                                             row * (size_t)s.D + d]);
#pragma unroll
                for (int g = 0; g < HEADS_AT_ONCE; g++)
                    if (g0 + g < s.G) sums[g] += state.scores[(g0 + g) * PART + i] * v;
            }
#pragma unroll
            for (int g = 0; g < HEADS_AT_ONCE; g++)
                if (g0 + g < s.G) state.part_out[(g0 + g) * s.D + d] = sums[g];
        }
}

// ------------------------------------------------------------------ merging parts

// Two partial sums brought to their larger maximum; fmaf, so that no compiler's choice changes bits.
__device__ static inline float merged(float sum, float sum_max, float part, float part_max) {
    float top = fmaxf(sum_max, part_max);
    return fmaf(part, expf(part_max - top), sum * expf(sum_max - top));
}

__device__ static void part_merge(const attention_shape &s, bool first, const shared_state &state) {
    for (int i = threadIdx.x; i < s.G * s.D; i += THREADS) {
        int g = i / s.D;
        state.out[i] = first ? state.part_out[i]
                             : merged(state.out[i], state.sum_max[g], state.part_out[i],
                                      state.part_max[g]);
    }
    __syncthreads();
    for (int g = threadIdx.x; g < s.G; g += THREADS) {
        state.sum_sum[g] = first ? state.part_sum[g]
                                 : merged(state.sum_sum[g], state.sum_max[g], state.part_sum[g],
                                          state.part_max[g]);
        state.sum_max[g] = first ? state.part_max[g]
                                 : fmaxf(state.sum_max[g], state.part_max[g]);
    }
    __syncthreads();
}

// ------------------------------------------------------------------ kernels

// Grid (items, kv heads).
template <typename T>
__global__ void __launch_bounds__(THREADS)
    attention_kernel(paged<T> pool, attention_shape s, const attention_item *items, const int32_t *page_tables,
                     const float *qkv, T *y, float *partials) {
    shared_state state = shared_carve(s);
    const attention_item work = items[blockIdx.x];
    if (work.token < 0) return;
    int head = blockIdx.y;
    const int32_t *pages = page_tables + work.pages;
    size_t row = (size_t)work.token * (size_t)(s.Q + 2 * s.K);
    for (int i = threadIdx.x; i < s.G * s.D; i += THREADS)
        state.q[i] = qkv[(row + (size_t)(head * s.G)) * (size_t)s.D + i] * s.scale;
    __syncthreads();
    for (int first = work.first; first < work.end; first += PART) {
        int n = work.end - first < PART ? work.end - first : PART;
        part_scores(s, pool, pages, head, first, n, state);
        __syncthreads();
        part_softmax(s, n, state);
        __syncthreads();
        part_values(s, pool, pages, head, first, n, state);
        __syncthreads();
        part_merge(s, first == work.first, state);
    }
    for (int i = threadIdx.x; i < s.G * s.D; i += THREADS) {
        int g = i / s.D, d = i % s.D, query = head * s.G + g;
        if (work.partial < 0) {
            y[((size_t)work.token * (size_t)s.Q + (size_t)query) * (size_t)s.D + d] =
                from_float<T>(state.out[i] / state.sum_sum[g]);
            continue;
        }
        float *to = partial_row(partials, s, work.partial, query);
        to[2 + d] = state.out[i];
        if (d == 0) {
            to[0] = state.sum_max[g];
            to[1] = state.sum_sum[g];
        }
    }
}

// Grid (merges, query heads).
template <typename T>
__global__ void __launch_bounds__(THREADS)
    merge_kernel(attention_shape s, const merge_item *merges, float *partials, T *y) {
    const merge_item work = merges[blockIdx.x];
    if (work.token < 0) return;
    int head = blockIdx.y;
    const float *first = partial_row(partials, s, work.partial, head);
    for (int d = threadIdx.x; d < s.D; d += THREADS) {
        float top = first[0], sum = first[1], out = first[2 + d];
        for (int part = 1; part < work.parts; part++) {
            const float *next = partial_row(partials, s, work.partial + part * work.stride, head);
            out = merged(out, top, next[2 + d], next[0]);
            sum = merged(sum, top, next[1], next[0]);
            top = fmaxf(top, next[0]);
        }
        y[((size_t)work.token * (size_t)s.Q + (size_t)head) * (size_t)s.D + d] =
            from_float<T>(out / sum);
    }
}

// ------------------------------------------------------------------ the launch

// Asks for more shared memory than a launch has by default.
template <typename T> static void shared_allow(struct backend *b, size_t bytes) {
#ifndef LORAD_EMULATE
    if (bytes > SHARED_BYTES_ANY)
        cuda_check(b, cudaFuncSetAttribute(attention_kernel<T>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           (int)bytes), "shared memory of attention");
#endif
}

template <typename T>
static void plain_attention(struct backend *b, int layer, const attention_shape &s,
                            const struct device_step *step, T *y, const float *qkv,
                            float *partials) {
    int items = step->counts.narrow_items + step->counts.wide_items;
    if (items == 0) return;
    size_t shared = shared_floats(s) * sizeof(float);
    shared_allow<T>(b, shared);
    CUDA_LAUNCH(attention_kernel<T>, dim3((unsigned)items, (unsigned)s.K), dim3(THREADS), shared,
                b->stream, cuda_layer<T>(b, layer), s, step->items, step->kv_pages, qkv, y,
                partials);
}

template <typename T>
static void merge(struct backend *b, const attention_shape &s, const struct device_step *step, T *y,
                  float *partials) {
    if (step->counts.merges == 0) return;
    CUDA_LAUNCH(merge_kernel<T>, dim3((unsigned)step->counts.merges, (unsigned)s.Q), dim3(THREADS),
                0, b->stream, s, step->merges, partials, y);
}

enum status cuda_check_heads(int query_heads, int kv_heads, int head_size, struct error *err) {
    attention_shape s = {query_heads, kv_heads, query_heads / kv_heads, head_size, 1, 0.0f};
    size_t shared = shared_floats(s) * sizeof(float);
    if (head_size <= HEAD_SIZE_MAX && shared <= SHARED_BYTES_MAX) return STATUS_OK;
    return error_set(err, STATUS_UNSUPPORTED,
                     "the CUDA backend computes attention of heads up to %d and of %d query heads on "
                     "one kv head at %d; this model has heads of %d and %d on one; use --device cpu",
                     HEAD_SIZE_MAX,
                     (int)(SHARED_BYTES_MAX / sizeof(float) / (3 * (size_t)head_size + PART + 4)),
                     head_size, head_size, s.G);
}

void cuda_attention(struct backend *b, int layer, void *y, const void *qkv,
                    const struct attention_span *spans, int span_count, int query_heads) {
    VERIFY(b->pool);
    attention_shape s = {query_heads, b->shape.kv_heads, 0, b->shape.head_size, 1, 0.0f};
    VERIFY_OP(s.Q % s.K, ==, 0);
    VERIFY_OP(s.D, <=, HEAD_SIZE_MAX);
    s.G = s.Q / s.K;
    s.scale = 1.0f / sqrtf((float)s.D);
    while (s.lanes * EIGHT < s.D) s.lanes *= 2;
    VERIFY_OP(shared_floats(s) * sizeof(float), <=, SHARED_BYTES_MAX);
    struct step wanted = {};
    wanted.spans = spans;
    wanted.span_count = span_count;
    wanted.query_heads = query_heads;
    const struct device_step *step = cuda_step(b, &wanted);
    float *partials = (float *)cuda_scratch(
        b, SCRATCH_PARTIALS, ((size_t)step->counts.partials * (size_t)s.Q * (size_t)(s.D + 2) + 1) *
                                 sizeof(float));
    const float *from = (const float *)qkv;
    if (b->dtype == DTYPE_F32) {
        plain_attention<float>(b, layer, s, step, (float *)y, from, partials);
        merge<float>(b, s, step, (float *)y, partials);
        return;
    }
    if (cuda_attention_tiles(b, query_heads))
        attention_tiles(b, layer, s, step, (bf16 *)y, from, partials);
    else plain_attention<bf16>(b, layer, s, step, (bf16 *)y, from, partials);
    merge<bf16>(b, s, step, (bf16 *)y, partials);
}
