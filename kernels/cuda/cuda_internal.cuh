// What the files of the CUDA backend share: the open backend, its scratch and metadata, and the
// operations that cuda_backend.cu puts into the table. Nobody outside kernels/cuda includes this.
//
// Activations are f32, but for what a matmul reads, which has the type of the weights and the pool,
// bf16 or f32: the CPU backend rounds the same, so that the two agree but for the order of sums.
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

// Device scratch grows to the largest step seen and stays; each area has one user at a time.
enum cuda_scratch {
    SCRATCH_SWAP, SCRATCH_PARTIALS, SCRATCH_WORKSPACE, SCRATCH_V, SCRATCH_KINDS
};

struct cuda_buffer {
    void *memory;
    size_t bytes;
};

// ------------------------------------------------------------------ a step's metadata

// Tokens of one span that a block of attention works on, for one kv head and its query heads.
struct attention_item {
    int32_t token, count; // rows of the step; token -1: nothing to do
    int32_t context;      // positions that the last of them sees
    int32_t pages;        // where its page table begins
    int32_t first, end;   // positions that the item walks; first is a multiple of PART
    int32_t partial;      // first of its partial results, in rows of all heads; -1: writes y
};

// A token whose context was cut: its partial results stand `stride` rows apart.
struct merge_item {
    int32_t token, partial, stride, parts;
};

// Up to 16 tokens of a segment, with all that kernels want to know of its adapter: no load but the
// page table's stands between an item and its weights.
struct lora_item {
    int32_t token, count; // rows of the step; token -1: nothing to do
    int32_t v_row;        // of the first token
    int32_t pages;        // where its page table begins
    float weight;
    struct {
        int32_t rank; // 0: none
        uint32_t a, b; // first elements
    } module[LORA_MODULES];
};

enum {
    PART = 256,       // positions: contexts of decodes are cut at its multiples
    NARROW_ROWS = 16, // rows of (token, query head) of an item that is cut into parts
    WIDE_ROWS = 64,   // and of one that is not
    WAVES_MAX = 64,   // segments over one token; a request mixes at most a few
};

// What decides how a step's metadata lies and how its kernels are launched. Steps with equal counts
// share a recording, so that those of a recorded step are rounded up; the surplus is filled with
// entries that say so.
struct step_counts {
    int32_t tokens, logits;
    int32_t narrow_items, wide_items, merges, partials, kv_pages;
    int32_t lora_items, lora_pages, rank_max, v_rows;
    int32_t lora_tile; // tokens of an item
    int32_t lora_modules; // a bit each: an adapter has it
    int32_t draws;     // 1: `draw` is part of the step
    int32_t marked;    // 1: `mark` is
};

// The step whose operations are queued: arrays in device memory.
struct device_step {
    struct step source; // borrowed
    struct step_counts counts;
    const int32_t *ids, *positions, *slots, *logit_rows;
    const struct draw *draws; // [logits]
    const attention_item *items; // narrow ones, then wide ones
    const merge_item *merges;
    const int32_t *kv_pages;
    const lora_item *lora_items; // wave by wave
    const int32_t *lora_pages;
    int waves, wave_first[WAVES_MAX + 1];
};

enum { RECORDINGS_MAX = 64, RECORDED_TOKENS_MAX = 256, RECORDED_SPAN_MAX = 8 };

struct recording {
    struct step_counts counts;
    cudaGraphExec_t graph; // NULL: such a step was seen once
    uint64_t used;         // 0: a free place
};

struct backend {
    enum dtype dtype;
    cudaStream_t stream;
    cudaStream_t copies; // of adapters; its own buffers, for one loader at a time
    cudaStream_t side;   // lora_shrink beside the base matmul; NULL: on the main stream
    cudaEvent_t fork, join;
    struct cuda_buffer copy_image;
    std::atomic<bool> failed; // a device error: for good
    struct pool_shape shape;
    void *pool;
    struct cuda_buffer scratch[SCRATCH_KINDS];
    struct device_step step;
    bool in_step, recording;       // between step_begin and step_end; the stream is recorded
    struct cuda_buffer step_host;  // page-locked: the step's metadata put together
    struct cuda_buffer step_device;
    bool records; // recordings are made at all
    struct recording recordings[RECORDINGS_MAX], *recorded; // recorded: of this step
    uint64_t step_number;
    cudaEvent_t *marks; // marks.cu; NULL: nobody has marked yet
    void *matmul; // cuda_linear.cu's handle
};

// Remembers and logs the first error of the device; every later one is its consequence.
void cuda_check(struct backend *b, cudaError_t error, const char *what);
// At least `bytes`; contents are lost when it has to grow. NULL when the device has no more: the
// backend has failed then, as after any device error.
void *cuda_scratch(struct backend *b, enum cuda_scratch area, size_t bytes);
// The same for a buffer whose readers are queued on `stream`.
void cuda_grow(struct backend *b, cudaStream_t stream, struct cuda_buffer *buffer, size_t bytes);

// step.cu
struct step_rows cuda_step_begin(struct backend *b, const struct step *step);
void cuda_step_end(struct backend *b);
// The step whose arrays those of `wanted` are; outside of a bracket, one of them alone.
const struct device_step *cuda_step(struct backend *b, const struct step *wanted);
// Device memory that recordings know has moved, or the pool is another: they are no longer good.
void cuda_recordings_drop(struct backend *b);
// marks.cu
void cuda_mark(struct backend *b, int number);
double cuda_mark_seconds(struct backend *b, int from, int to);
void cuda_marks_close(struct backend *b);
// step_plan.cu: counts and fills the metadata.
struct step_counts cuda_step_count(const struct backend *b, const struct step *step);
void cuda_step_fill(const struct backend *b, struct device_step *step, void *host, void *device);
size_t cuda_step_bytes(const struct step_counts *counts);

// Whether tensor cores compute attention of these heads (attention_tiles.cu).
bool cuda_attention_tiles(const struct backend *b, int query_heads);

template <typename T> paged<T> cuda_layer(const struct backend *b, int layer) {
    size_t first = (size_t)layer * (size_t)b->shape.page_count * b->shape.page_elems;
    uint32_t elems = static_cast<uint32_t>(b->shape.page_elems);
    return {static_cast<T *>(b->pool) + first, elems, divisor_of(elems)};
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
size_t cuda_linear_bytes(const struct linear *linear);
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

// draw.cu
void cuda_draw(struct backend *b, int32_t *ids, const void *logits, const struct draw *draws,
               int count, int vocabulary);

// lora.cu, attention.cu
void cuda_lora_shrink(struct backend *b, const struct lora_launch *launch);
void cuda_lora_expand(struct backend *b, const struct lora_launch *launch);
enum status cuda_check_heads(int query_heads, int kv_heads, int head_size, struct error *err);
void cuda_attention(struct backend *b, int layer, void *y, const void *qkv,
                    const struct attention_span *spans, int span_count, int query_heads);

#endif
