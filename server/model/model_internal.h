// What weights.c and forward.c share: the loaded model. Nobody else includes this.
#ifndef LORAD_SERVER_MODEL_INTERNAL_H
#define LORAD_SERVER_MODEL_INTERNAL_H

#include "server/model/model.h"

// Legend: T tokens in a step, H hidden, Q query heads, K kv heads, D head size, F ffn size,
// V vocabulary, R rows of logits. Norm gains are f32 in backend memory.
struct layer_weights {
    float *attention_norm;   // [H]
    struct linear *qkv;      // [(Q + 2K) D, H]: q, k, v one below the other
    struct linear *attention_out; // [H, Q D]
    float *ffn_norm;         // [H]
    struct linear *gate_up;  // [2F, H]: gate above up
    struct linear *down;     // [H, F]
};

struct model_weights {
    void *embedding; // [V, H] in the backend's dtype
    struct layer_weights *layers;
    float *last_norm;    // [H]
    struct linear *head; // [V, H]; packed from the embedding when the two are tied
};

struct model {
    const struct backend_ops *ops;
    struct backend *backend;
    struct model_config config;
    enum dtype dtype;
    int tokens_max, rows_max, segments_max, context_max, v_rows_max;
    struct model_weights weights;

    float *cosines, *sines; // [context_max, D/2]

    // One backend allocation, carved: activations of a step, in activation_bytes each.
    void *activations;
    void *x;       // [T, H] the residual stream
    void *normed;  // [T, H]
    void *qkv;     // [T, (Q + 2K) D]
    void *heads;   // [T, Q D]
    void *delta;   // [T, H] what a block adds to x
    void *gate_up; // [T, 2F], of a block of rows (row_block_count)
    void *gated;   // [T, F], likewise
    void *rows;    // [R, H] x of the rows whose logits are wanted
    void *rows_delta; // [R, H]
    void *logits;  // [R, V]
    int32_t *ids;  // [R] tokens that the backend draws
    float *v;      // LoRA scratch [v_rows_max, LORA_TARGETS_MAX, LORA_RANK_MAX]

    struct lora_segment *block_segments; // [segments_max]
    const struct step *queued; // NULL: none; borrowed
    float *host_logits;  // [R, V]
    int32_t *host_ids;   // [R]
    void *host_download; // [R, V] activations as they come, when those are not f32
};

// Fills model->weights from the files or from the seed. On failure what was made stays for
// weights_deinit.
MUST_CHECK enum status weights_load(struct model *model, const struct model_options *options,
                                    struct error *err);
void weights_deinit(struct model *model);

#endif
