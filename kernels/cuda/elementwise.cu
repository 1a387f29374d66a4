// Operations over rows of activations, and writes into pages. Memory-bound; each reads what it needs
// once. A block works on one row, or a thread on one element.
#include "kernels/cuda/cuda_internal.cuh"

enum { ROW_THREADS = 256, FLAT_THREADS = 256 };

__device__ static inline size_t flat_index() {
    return (size_t)blockIdx.x * blockDim.x + threadIdx.x;
}

// ------------------------------------------------------------------ embed, gather

template <typename T>
__global__ void embed_kernel(float *y, const T *table, const int32_t *ids, int hidden,
                             size_t count) {
    size_t i = flat_index();
    if (i >= count) return;
    size_t token = i / (size_t)hidden;
    y[i] = to_float(table[(size_t)ids[token] * (size_t)hidden + i % (size_t)hidden]);
}

void cuda_embed(struct backend *b, void *y, const void *table, enum dtype dtype, const int32_t *ids,
                int tokens, int hidden) {
    struct step wanted = {};
    wanted.ids = ids;
    wanted.token_count = tokens;
    const int32_t *on_device = cuda_step(b, &wanted)->ids;
    size_t count = (size_t)tokens * (size_t)hidden;
    dim3 grid(cuda_blocks(count, FLAT_THREADS)), block(FLAT_THREADS);
    float *to = (float *)y;
    if (dtype == DTYPE_F32)
        CUDA_LAUNCH(embed_kernel<float>, grid, block, 0, b->stream, to, (const float *)table,
                    on_device, hidden, count);
    else if (dtype == DTYPE_BF16)
        CUDA_LAUNCH(embed_kernel<bf16>, grid, block, 0, b->stream, to, (const bf16 *)table,
                    on_device, hidden, count);
    else
        CUDA_LAUNCH(embed_kernel<f16>, grid, block, 0, b->stream, to, (const f16 *)table,
                    on_device, hidden, count);
}

__global__ void gather_kernel(float *y, const float *x, const int32_t *rows, int hidden,
                              size_t count) {
    size_t i = flat_index();
    if (i >= count) return;
    y[i] = x[(size_t)rows[i / (size_t)hidden] * (size_t)hidden + i % (size_t)hidden];
}

void cuda_gather_rows(struct backend *b, void *y, const void *x, const int32_t *rows, int count,
                      int hidden) {
    struct step wanted = {};
    wanted.logit_rows = rows;
    wanted.logit_count = count;
    const int32_t *on_device = cuda_step(b, &wanted)->logit_rows;
    size_t elements = (size_t)count * (size_t)hidden;
    CUDA_LAUNCH(gather_kernel, dim3(cuda_blocks(elements, FLAT_THREADS)), dim3(FLAT_THREADS), 0,
                b->stream, (float *)y, (const float *)x, on_device, hidden, elements);
}

// ------------------------------------------------------------------ rms_norm, silu

// The sum over the block; every thread has it.
__device__ static inline float block_sum(float value) {
    shared<float> warps = dynamic_shared<float>(); // [ROW_THREADS / WARP]
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = value;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < ROW_THREADS / WARP; i++) sum += warps[i];
    return sum;
}

template <typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    rms_norm_kernel(T *y, float *x, const float *residual, const float *gain, float epsilon,
                    int hidden) {
    size_t row = (size_t)blockIdx.x * (size_t)hidden;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < hidden; i += ROW_THREADS) {
        float value = x[row + i];
        if (residual) x[row + i] = value += residual[row + i];
        squares += value * value;
    }
    float scale = 1.0f / sqrtf(block_sum(squares) / (float)hidden + epsilon);
    for (int i = threadIdx.x; i < hidden; i += ROW_THREADS)
        y[row + i] = from_float<T>(x[row + i] * scale * gain[i]);
}

template <typename T>
static void rms_norm(struct backend *b, void *y, void *x, const void *residual, const float *gain,
                     float epsilon, int tokens, int hidden) {
    CUDA_LAUNCH(rms_norm_kernel<T>, dim3((unsigned)tokens), dim3(ROW_THREADS),
                ROW_THREADS / WARP * sizeof(float), b->stream, (T *)y, (float *)x,
                (const float *)residual, gain, epsilon, hidden);
}

void cuda_rms_norm(struct backend *b, void *y, void *x, const void *residual, const float *gain,
                   float epsilon, int tokens, int hidden) {
    auto run = b->dtype == DTYPE_BF16 ? rms_norm<bf16> : rms_norm<float>;
    run(b, y, x, residual, gain, epsilon, tokens, hidden);
}

template <typename T>
__global__ void silu_kernel(T *y, const float *gate_up, int ffn, size_t count) {
    size_t i = flat_index();
    if (i >= count) return;
    size_t row = i / (size_t)ffn, column = i % (size_t)ffn;
    float gate = gate_up[row * 2 * (size_t)ffn + column];
    float up = gate_up[row * 2 * (size_t)ffn + (size_t)ffn + column];
    y[i] = from_float<T>(gate / (1.0f + expf(-gate)) * up);
}

void cuda_silu_mul(struct backend *b, void *y, const void *gate_up, int tokens, int ffn) {
    size_t count = (size_t)tokens * (size_t)ffn;
    dim3 grid(cuda_blocks(count, FLAT_THREADS)), block(FLAT_THREADS);
    if (b->dtype == DTYPE_BF16)
        CUDA_LAUNCH(silu_kernel<bf16>, grid, block, 0, b->stream, (bf16 *)y, (const float *)gate_up,
                    ffn, count);
    else
        CUDA_LAUNCH(silu_kernel<float>, grid, block, 0, b->stream, (float *)y,
                    (const float *)gate_up, ffn, count);
}

// ------------------------------------------------------------------ RoPE and the KV write

// Block (token, head); heads: Q of q, then K of k, then K of v. Thread i has the pair i, i + D/2.
template <typename T>
__global__ void rope_kernel(paged<T> pool, float *qkv, const float *cosines, const float *sines,
                            const int32_t *positions, const int32_t *slots, int Q, int K, int D) {
    int token = blockIdx.x, head = blockIdx.y, half = D / 2;
    float *at = qkv + ((size_t)token * (size_t)(Q + 2 * K) + (size_t)head) * (size_t)D;
    size_t angles = (size_t)positions[token] * (size_t)half;
    int slot = slots[token];
    // K[K][PAGE_TOKENS][D] then V[K][PAGE_TOKENS][D]: the heads behind q in their order
    T *cache = pool.base + (size_t)(slot / PAGE_TOKENS) * pool.elems +
               (size_t)((head - Q) * PAGE_TOKENS + slot % PAGE_TOKENS) * (size_t)D;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        float first = at[i], second = at[i + half];
        if (head < Q + K) {
            float cosine = cosines[angles + i], sine = sines[angles + i];
            float turned = first * cosine - second * sine;
            second = second * cosine + first * sine;
            first = turned;
            at[i] = first;
            at[i + half] = second;
        }
        if (head >= Q && slot >= 0) {
            cache[i] = from_float<T>(first);
            cache[i + half] = from_float<T>(second);
        }
    }
}

void cuda_rope_and_kv_write(struct backend *b, int layer, void *qkv, const float *cosines,
                            const float *sines, const int32_t *positions, const int32_t *slots,
                            int tokens, int query_heads) {
    struct step wanted = {};
    wanted.positions = positions;
    wanted.slots = slots;
    wanted.token_count = tokens;
    const struct device_step *step = cuda_step(b, &wanted);
    const int32_t *at = step->positions, *to = step->slots;
    int K = b->shape.kv_heads, D = b->shape.head_size;
    dim3 grid((unsigned)tokens, (unsigned)(query_heads + 2 * K));
    dim3 block(cuda_blocks((size_t)(D / 2), WARP) * WARP);
    if (b->dtype == DTYPE_BF16)
        CUDA_LAUNCH(rope_kernel<bf16>, grid, block, 0, b->stream, cuda_layer<bf16>(b, layer),
                    (float *)qkv, cosines, sines, at, to, query_heads, K, D);
    else
        CUDA_LAUNCH(rope_kernel<float>, grid, block, 0, b->stream, cuda_layer<float>(b, layer),
                    (float *)qkv, cosines, sines, at, to, query_heads, K, D);
}

// ------------------------------------------------------------------ an adapter's image into pages

// Page numbers as an argument of the launch: no copy of a table comes before it.
struct page_list {
    enum { COUNT = 960 }; // arguments have 4 KiB
    int32_t page[COUNT];
};

template <typename T> struct __align__(16) eight_of {
    T element[EIGHT];
};

// Eight elements a thread: none of them lies in another page than the first.
template <typename T, bool GATHERS>
__global__ void pages_kernel(paged<T> pool, T *image, const __grid_constant__ page_list pages,
                             size_t elems) {
    size_t first = flat_index() * EIGHT;
    if (first >= elems) return;
    T *there = paged_at(pool, pages.page, (uint32_t)first), *here = image + first;
    T *from = GATHERS ? there : here, *to = GATHERS ? here : there;
    if (first + EIGHT <= elems)
        *reinterpret_cast<eight_of<T> *>(to) = *reinterpret_cast<const eight_of<T> *>(from);
    else
        for (size_t i = 0; first + i < elems; i++) to[i] = from[i];
}

template <typename T>
static void pool_kernels(struct backend *b, cudaStream_t stream, int layer, const int32_t *pages,
                         T *image, size_t elems, bool gathers) {
    size_t at_once = page_list::COUNT * b->shape.page_elems;
    auto kernel = gathers ? pages_kernel<T, true> : pages_kernel<T, false>;
    for (size_t at = 0; at < elems; at += at_once, pages += page_list::COUNT) {
        size_t count = elems - at < at_once ? elems - at : at_once;
        page_list list;
        memcpy(list.page, pages,
               (count + b->shape.page_elems - 1) / b->shape.page_elems * sizeof *pages);
        CUDA_LAUNCH(kernel, dim3(cuda_blocks(count, EIGHT * FLAT_THREADS)), dim3(FLAT_THREADS), 0,
                    stream, cuda_layer<T>(b, layer), image + at, list, count);
    }
}

// Between pages and `staged`, contiguous in device memory.
static void pool_move(struct backend *b, cudaStream_t stream, int layer, const int32_t *pages,
                      void *staged, size_t elems, bool gathers) {
    if (b->dtype == DTYPE_BF16)
        pool_kernels<bf16>(b, stream, layer, pages, (bf16 *)staged, elems, gathers);
    else pool_kernels<float>(b, stream, layer, pages, (float *)staged, elems, gathers);
}

void cuda_pool_write(struct backend *b, int layer, const int32_t *pages, const void *image,
                     size_t elems) {
    if (elems == 0) return;
    size_t bytes = elems * b->shape.elem_bytes;
    cuda_grow(b, b->copies, &b->copy_image, bytes);
    cuda_check(b, cudaMemcpyAsync(b->copy_image.memory, image, bytes, cudaMemcpyHostToDevice,
                                  b->copies), "copy of an adapter");
    pool_move(b, b->copies, layer, pages, b->copy_image.memory, elems, false);
}

void cuda_pool_written(struct backend *b) {
    cuda_check(b, cudaStreamSynchronize(b->copies), "copies of adapters");
}

void cuda_pool_copy(struct backend *b, int layer, const int32_t *pages, void *image, size_t elems,
                    bool to_host) {
    if (elems == 0) return;
    size_t bytes = elems * b->shape.elem_bytes;
    void *staged = cuda_scratch(b, SCRATCH_SWAP, bytes);
    if (!to_host)
        cuda_check(b, cudaMemcpyAsync(staged, image, bytes, cudaMemcpyHostToDevice, b->stream),
                   "KV from the host");
    pool_move(b, b->stream, layer, pages, staged, elems, to_host);
    if (to_host)
        cuda_check(b, cudaMemcpyAsync(image, staged, bytes, cudaMemcpyDeviceToHost, b->stream),
                   "KV to the host");
}
