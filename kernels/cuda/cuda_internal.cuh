// What the files of the CUDA backend share: the open backend, its scratch and metadata, and the
// operations that cuda_backend.cu puts into the table. Nobody outside kernels/cuda includes this.
//
// Activations are f32. Weights and pool elements are bf16 or f32; a matmul of bf16 reads x rounded
// to bf16, as the CPU backend does, so that the two agree but for the order of sums.
#ifndef LORAD_KERNELS_CUDA_INTERNAL_CUH
#define LORAD_KERNELS_CUDA_INTERNAL_CUH

extern "C" {
#include "base/dtype.h"
#include "base/error.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/verify.h"
}
#include "kernels/backend.h"
#include "kernels/cuda/primitives.cuh"

#include <atomic>
#include <stdlib.h>
#include <string.h>

// Small arrays of a step that kernels read. Each kind has one place in device memory.
enum cuda_meta {
    META_IDS, META_POSITIONS, META_SLOTS, META_ROWS, META_ATTENTION, META_PAGES,
    META_LORA_QKV, META_LORA_O, META_LORA_GATE_UP, META_LORA_DOWN, META_KINDS
};

// Device scratch grows to the largest step seen and stays; each area has one user at a time.
enum cuda_scratch { SCRATCH_X, SCRATCH_SWAP, SCRATCH_PARTIALS, SCRATCH_WORKSPACE, SCRATCH_KINDS };

struct cuda_buffer {
    void *memory;
    size_t bytes;
};

struct backend {
    enum dtype dtype;
    cudaStream_t stream;
    cudaStream_t copies; // of adapters; its own buffers, for one loader at a time
    struct cuda_buffer copy_image, copy_pages;
    std::atomic<bool> failed; // a device error: for good
    struct pool_shape shape;
    void *pool;
    struct cuda_buffer scratch[SCRATCH_KINDS];
    struct {
        struct cuda_buffer device;
        struct cuda_buffer host; // what is on the device, to tell whether it must be sent again
        size_t bytes;
    } meta[META_KINDS];
    struct cuda_buffer draft; // host: where metadata is put together
    void *matmul;             // cuda_linear.cu's handle
};

// Remembers and logs the first error of the device; every later one is its consequence.
void cuda_check(struct backend *b, cudaError_t error, const char *what);
// At least `bytes`; contents are lost when it has to grow. NULL when the device has no more: the
// backend has failed then, as after any device error.
void *cuda_scratch(struct backend *b, enum cuda_scratch area, size_t bytes);
// The same for a buffer whose readers are queued on `stream`.
void cuda_grow(struct backend *b, cudaStream_t stream, struct cuda_buffer *buffer, size_t bytes);
// Puts `bytes` of host memory where kernels queued from now on can read them. Sends nothing when
// the same is there already, as it is for every layer of a step but the first.
const void *cuda_meta(struct backend *b, enum cuda_meta kind, const void *data, size_t bytes);
// Host memory to put metadata together in; valid until the next call.
void *cuda_draft(struct backend *b, size_t bytes);

template <typename T> paged<T> cuda_layer(const struct backend *b, int layer) {
    size_t first = (size_t)layer * (size_t)b->shape.page_count * b->shape.page_elems;
    return {static_cast<T *>(b->pool) + first, static_cast<uint32_t>(b->shape.page_elems)};
}

static inline unsigned cuda_blocks(size_t count, size_t each) {
    return static_cast<unsigned>((count + each - 1) / each);
}

// cuda_linear.cu
enum status cuda_matmul_open(struct backend *b, struct error *err);
void cuda_matmul_close(struct backend *b);
enum status cuda_linear_create(struct backend *b, const void *weights, enum dtype dtype, int out,
                               int in, struct linear **result, struct error *err);
void cuda_linear_destroy(struct backend *b, struct linear *linear);
void cuda_linear(struct backend *b, const struct linear *linear, void *y, const void *x,
                 int tokens);

// elementwise.cu
void cuda_embed(struct backend *b, void *y, const void *table, enum dtype dtype, const int32_t *ids,
                int tokens, int hidden);
void cuda_rms_norm(struct backend *b, void *y, void *x, const void *residual, const float *gain,
                   float epsilon, int tokens, int hidden);
void cuda_rope_and_kv_write(struct backend *b, int layer, void *qkv, const float *cosines,
                            const float *sines, const int32_t *positions, const int32_t *slots,
                            int tokens, int query_heads);
void cuda_silu_mul(struct backend *b, void *y, const void *gate_up, int tokens, int ffn);
void cuda_gather_rows(struct backend *b, void *y, const void *x, const int32_t *rows, int count,
                      int hidden);
void cuda_pool_write(struct backend *b, int layer, const int32_t *pages, const void *image,
                     size_t elems);
void cuda_pool_written(struct backend *b);
void cuda_pool_copy(struct backend *b, int layer, const int32_t *pages, void *image, size_t elems,
                    bool to_host);
// x -> bf16, for the base matmul.
void cuda_narrow(struct backend *b, bf16 *to, const float *from, size_t count);

// lora.cu, attention.cu
void cuda_lora_shrink(struct backend *b, const struct lora_launch *launch);
void cuda_lora_expand(struct backend *b, const struct lora_launch *launch);
enum status cuda_check_heads(int query_heads, int kv_heads, int head_size, struct error *err);
void cuda_attention(struct backend *b, int layer, void *y, const void *qkv,
                    const struct attention_span *spans, int span_count, int query_heads);

#endif
