// The door between the server and the hardware: one const table of operations per backend.
//
// Legend: T tokens in a step, S sequences, H hidden, Q query heads, K kv heads, D head size,
// F ffn size, V vocabulary, r rank. Matrices are row-major. Device pointers are `void *`; only the
// backend dereferences them. Activations have one type a backend chooses (`activation_bytes` each;
// the CPU backend uses f32). All calls but pool_write's and
// host memory's come from the engine thread, after open.
//
// Operations are queued in order; `synchronize` waits. On the CPU they run at once. Operations of a
// step cannot fail one by one: a device fault is sticky and `health` reports it.
#ifndef LORAD_KERNELS_BACKEND_H
#define LORAD_KERNELS_BACKEND_H

#include "base/dtype.h"
#include "base/error.h"
#include "kernels/draw.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { PAGE_TOKENS = 16, LORA_RANK_MAX = 256, LORA_TARGETS_MAX = 3, LORA_PANEL = 64 };

// In this order in every adapter image.
enum lora_module { LORA_Q, LORA_K, LORA_V, LORA_O, LORA_GATE, LORA_UP, LORA_DOWN, LORA_MODULES };

struct backend; // one open device
struct linear;  // a weight matrix [out, in] in the backend's packed form

// How base weight matrices are kept: as the dtype, or rounded to nearest in 8 bits (symmetric, a
// scale for each row) or 4 bits (a scale and a zero for each 128 of a row; for 64 or 32 where
// the numbers lie on such a grid).
enum quantization { QUANT_NONE, QUANT_INT8, QUANT_INT4 };

struct backend_options {
    int threads;        // CPU: 0 = all cores
    enum dtype dtype;   // type of weights and pool elements: DTYPE_F32 or DTYPE_BF16
    enum quantization quantization; // STATUS_UNSUPPORTED where a backend has none
};

// The pool block: layer l of page p starts at byte (l * page_count + p) * page_elems * elem_bytes.
// A KV page holds K and V of PAGE_TOKENS tokens, page_elems = 2 * K * PAGE_TOKENS * D, in whatever
// order the backend likes. Elements have the backend's dtype.
struct pool_shape {
    int layers, page_count, kv_heads, head_size;
    size_t page_elems;
    size_t elem_bytes;
};

// Tokens [token_first, token_first + token_count) of one sequence in this step. `context` counts
// the sequence's tokens in the cache including these; pages[i / PAGE_TOKENS] holds position i.
struct attention_span {
    int32_t token_first, token_count, context;
    const int32_t *pages;
};

// One adapter over consecutive tokens of the step, in pages[0, page_count). A layer image's element e
// lies at page pages[e / page_elems], offset e % page_elems, in every layer. A is [r, in]. B, with the
// scaling folded in, comes in panels of LORA_PANEL columns of y (the last may be narrower), each
// [r, columns]: both are read from end to end. rank[m] == 0: the adapter has no module m.
struct lora_segment {
    int32_t token_first, token_count;
    int32_t v_first; // first row of this segment in the scratch v
    float weight;
    const int32_t *pages;
    int32_t page_count;
    int32_t rank[LORA_MODULES];
    int64_t a_offset[LORA_MODULES], b_offset[LORA_MODULES];
};

// What one step computes: a ragged batch of T tokens, sequence behind sequence. Host memory, borrowed
// from step_begin to step_end. Adapter segments may overlap (mixing).
struct step {
    int token_count, query_heads;
    const int32_t *ids, *positions; // [T]
    const int32_t *slots;           // [T] page * PAGE_TOKENS + offset
    const struct attention_span *spans;
    int span_count;
    const struct lora_segment *segments; // v_first is filled in by the caller
    int segment_count;
    const int32_t *logit_rows; // [logit_count] tokens whose logits are wanted
    int logit_count;
    const struct draw *draws; // [logit_count] how `draw` chooses a row's token; NULL: nobody asks
    bool repeats; // steps of this shape come again: a backend may record its operations
    bool marked;  // `mark` is called in it, as in every step of its shape that says so
};

// Row counts that a step's operations are queued with, at least token_count and logit_count and at
// most those rounded up to STEP_ROUND: a backend may add rows that nobody reads.
struct step_rows {
    int tokens, logits;
    bool recorded; // nothing is to be queued: step_end runs what an equal step queued
};
enum { STEP_ROUND = 16, STEP_MARKS_MAX = 4096 };

// y[t, 0..out) += weight * B (A x[t, 0..in)) for up to three modules that read the same x.
struct lora_launch {
    int layer;
    const void *x; // [T, in] activations
    int in;
    int target_count;
    struct {
        enum lora_module module;
        void *y;         // first element of the module's columns, activations
        int out, stride; // columns written; elements from one token's row to the next
    } target[LORA_TARGETS_MAX];
    const struct lora_segment *segments;
    int segment_count;
    float *v; // scratch [sum of token_count, LORA_TARGETS_MAX, LORA_RANK_MAX]
};

struct backend_ops {
    const char *name;
    size_t activation_bytes;
    // What a matmul or lora_shrink reads (y of rms_norm, attention and silu_mul) has the dtype of the
    // weights, in room for activations.
    bool narrow_inputs;
    bool computes_on_host; // steps take the processor that everything else runs on
    int ffn_rows; // of which the FFN's activations stay in its caches; 0: no matter (row_block_count)

    MUST_CHECK enum status (*open)(const struct backend_options *options, struct backend **out,
                                   struct error *err);
    void (*close)(struct backend *b);
    // false once the device has failed for good.
    bool (*health)(struct backend *b);

    // STATUS_UNSUPPORTED: attention of this shape cannot be computed here. NULL: any can.
    MUST_CHECK enum status (*check_heads)(int query_heads, int kv_heads, int head_size,
                                          struct error *err);

    // Memory taken before serving starts; zeroed. NULL when there is none.
    void *(*memory_create)(struct backend *b, size_t bytes);
    void (*memory_destroy)(struct backend *b, void *memory);
    // Bytes that memory_create could still get. NULL, or 0: the host's memory is what counts.
    size_t (*memory_free)(struct backend *b);
    void (*upload)(struct backend *b, void *to, const void *from, size_t bytes);
    void (*download)(struct backend *b, void *to, const void *from, size_t bytes);
    void (*synchronize)(struct backend *b);

    // Sets the pool that later calls use; `pool` is from memory_create.
    void (*pool_attach)(struct backend *b, void *pool, const struct pool_shape *shape);
    // Host memory that pool_write copies from fastest (page-locked). Any thread. NULL: any is.
    void *(*host_create)(struct backend *b, size_t bytes);
    void (*host_destroy)(struct backend *b, void *memory);
    // Copies one layer's image (`elems` pool elements, contiguous on the host) into its pages,
    // beside whatever the engine thread has queued. One thread at a time, which need not be the
    // engine's; nothing queued may use those pages. Done when pool_written returns (NULL: at once).
    void (*pool_write)(struct backend *b, int layer, const int32_t *pages, const void *image,
                       size_t elems);
    void (*pool_written)(struct backend *b);
    // The engine's own copy between pages of one layer and host memory, in order with what else is
    // queued; host memory is valid, or free to change, after synchronize.
    void (*pool_copy)(struct backend *b, int layer, const int32_t *pages, void *image,
                      size_t elems, bool to_host);

    // A step's operations lie between these; the arrays that they are given are the step's. NULL:
    // the backend needs no bracket. Outside of one, each operation sends the arrays it is given.
    struct step_rows (*step_begin)(struct backend *b, const struct step *step);
    void (*step_end)(struct backend *b);
    // NULL where operations are done when they return. The device notes the time when it comes to
    // this place in its queue; 0 <= number < STEP_MARKS_MAX. Then the seconds from one mark to
    // another, after synchronize.
    void (*mark)(struct backend *b, int number);
    double (*mark_seconds)(struct backend *b, int from, int to);

    // Packs `out` x `in` weights of type `dtype` (host memory, borrowed for the call).
    MUST_CHECK enum status (*linear_create)(struct backend *b, const void *weights,
                                            enum dtype dtype, int out, int in,
                                            struct linear **result, struct error *err);
    void (*linear_destroy)(struct backend *b, struct linear *linear);
    // What it takes of memory, and what a matmul reads of it.
    size_t (*linear_bytes)(const struct linear *linear);

    // y[t] = table[ids[t]]; table [V, H] of `dtype` in device memory, ids on the host.
    void (*embed)(struct backend *b, void *y, const void *table, enum dtype dtype,
                  const int32_t *ids, int tokens, int hidden);
    // x += residual when residual is not NULL; y = x / rms(x) * gain. gain [H] f32, device memory.
    void (*rms_norm)(struct backend *b, void *y, void *x, const void *residual, const float *gain,
                     float epsilon, int tokens, int hidden);
    // y[T, out] = x[T, in] W^T. y is activations.
    void (*linear)(struct backend *b, const struct linear *weights, void *y, const void *x,
                   int tokens);
    // v = A x. It may run beside what is queued until lora_expand, which must not write x or v.
    void (*lora_shrink)(struct backend *b, const struct lora_launch *launch);
    void (*lora_expand)(struct backend *b, const struct lora_launch *launch); // y += weight B v
    // qkv [T, (Q + 2K) D]: rotates q and k in place (halves convention: element i pairs with
    // i + D/2), then writes k and v of token t to pool slot slots[t] = page * PAGE_TOKENS + offset.
    // cosines, sines: [positions, D/2] f32 device memory; positions, slots on the host.
    void (*rope_and_kv_write)(struct backend *b, int layer, void *qkv, const float *cosines,
                              const float *sines, const int32_t *positions, const int32_t *slots,
                              int tokens, int query_heads);
    // y[T, Q * D] = causal attention of q over the paged K and V; scores scaled by 1 / sqrt(D).
    void (*attention)(struct backend *b, int layer, void *y, const void *qkv,
                      const struct attention_span *spans, int span_count, int query_heads);
    // y[T, F] = silu(gate_up[t, 0..F)) * gate_up[t, F..2F)
    void (*silu_mul)(struct backend *b, void *y, const void *gate_up, int tokens, int ffn);
    // y[i] = x[rows[i]] (rows on the host): the tokens whose logits are wanted.
    void (*gather_rows)(struct backend *b, void *y, const void *x, const int32_t *rows, int count,
                        int hidden);
    // ids[i], device memory: the token of row i of logits [count, V], activations, by draws[i]
    // (kernels/draw.h; on the host); rows of DRAW_NONE are left alone. NULL: the host draws.
    void (*draw)(struct backend *b, int32_t *ids, const void *logits, const struct draw *draws,
                 int count, int vocabulary);
};

extern const struct backend_ops backend_cpu;
extern const struct backend_ops backend_cuda; // defined where LORAD_CUDA_BUILT or LORAD_EMULATE is
// The backend called "cpu" or "cuda"; NULL: this build has none of that name.
const struct backend_ops *backend_find(const char *name);

// The FFN's activations are the widest of a step: of many rows they leave the caches between two
// operations. Where a backend says so, the FFN goes over a step's rows in blocks of about ffn_rows, all
// its operations for one before the next. Rows do not depend on each other: the results are the same.
//
// Into how many blocks a step of `rows` is cut, and where one begins; behind the last: `rows`.
int row_block_count(const struct backend_ops *ops, int rows);
int row_block_first(int rows, int count, int block);
// No block of a step of up to `rows` has more.
int row_block_rows_max(const struct backend_ops *ops, int rows);
// A step's segments as rows [first, first + rows) alone have them, counted from `first`; v stays where
// it is. Returns how many; `to` has room for `count`.
int row_block_segments(struct lora_segment *to, const struct lora_segment *segments, int count,
                       int first, int rows);

#ifdef __cplusplus
}
#endif
#endif
