// A step of a model's shape without the model: random weights for every layer, KV pages and adapters
// for every sequence, and the arrays that kernels/backend.h wants. The roofline's own; freed by
// the end of the process.
#ifndef LORAD_BENCH_ROOFLINE_RIG_H
#define LORAD_BENCH_ROOFLINE_RIG_H

#include "kernels/backend.h"

struct rig_shape {
    int layers, hidden, ffn, query_heads, kv_heads, head_size, vocabulary;
};

struct rig_layer {
    struct linear *qkv, *out, *gate_up, *down;
};

enum { RIG_RANKS_MAX = 8 };
// Which sequences share an adapter: none, all, or a half, a quarter, an eighth, ... the rest.
enum rig_sharing { RIG_DISTINCT, RIG_ONE, RIG_POWER };

struct rig_options {
    const char *model; // folder with config.json
    const char *device; // cpu or cuda
    enum dtype dtype;
    enum quantization quantization;
    int threads, context;
    int ranks[RIG_RANKS_MAX], rank_count; // of the adapters in turn; 0: none
    enum rig_sharing sharing;
    int peak_rows;     // of what measures a device's limits
    bool prefill;      // one sequence of all tokens; else one token a sequence
    bool qkvo_only;    // adapters on the attention's projections alone
    bool lora_only;    // no base weights: only lora_shrink and lora_expand can run
    int tokens_max;
};

// Everything a step needs, sized for tokens_max.
struct rig {
    struct rig_options options;
    struct rig_shape shape;
    const struct backend_ops *ops;
    struct backend *backend;
    struct rig_layer *layers;
    struct linear *head;
    float *gain, *cosines, *sines;
    float *x, *normed, *qkv, *heads, *delta, *gate_up, *gated, *logits, *v; // device memory
    int32_t *positions, *slots;
    struct attention_span *spans;
    struct lora_segment *segments, *block_segments;
    struct step step; // of these arrays
    int span_count, segment_count;
    int32_t **kv_pages, **adapter_pages; // [sequences]
    int sequences;
    int in[LORA_MODULES], out[LORA_MODULES];
};

// Says on stderr what is wrong and returns false when there is no such model or no memory.
bool rig_init(struct rig *rig, const struct rig_options *options);
// Fills spans, segments, positions, slots and `step` for a step of `tokens`.
void rig_step(struct rig *rig, int tokens);
// Pool elements of adapter number 0 in a layer, whole pages.
size_t rig_adapter_elems(struct rig *rig);

// `count` numbers as the weights have them; the caller's. Then the same into device memory.
float *rig_numbers(size_t count);
void rig_fill(struct rig *rig, float *to, size_t count);

#endif
