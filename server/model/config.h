// config.json of a Llama-architecture model, checked whole before anything is allocated.
#ifndef LORAD_SERVER_MODEL_CONFIG_H
#define LORAD_SERVER_MODEL_CONFIG_H

#include "base/dtype.h"
#include "base/error.h"

#include <stdbool.h>
#include <stdint.h>

enum { EOS_IDS_MAX = 8 };
enum rope_scaling { ROPE_DEFAULT, ROPE_LINEAR, ROPE_LLAMA3 };

// How the checkpoint packs its weight matrices (packed_weights.h).
enum packing_method { PACKING_NONE, PACKING_GPTQ, PACKING_AWQ };
struct packing {
    enum packing_method method;
    int bits, group; // group -1: a whole column
    int zero_offset; // what must be added to a stored zero
};

struct model_config {
    int layers, hidden, query_heads, kv_heads, head_size, ffn, vocabulary, context_max;
    float norm_epsilon;
    double rope_theta;
    enum rope_scaling rope_scaling;
    double rope_factor, rope_low_freq_factor, rope_high_freq_factor;
    int rope_original_context;
    bool tied_embeddings;
    enum dtype stored_dtype; // torch_dtype / dtype; DTYPE_BF16 when absent
    int eos_ids[EOS_IDS_MAX], eos_count; // config.json, overridden by generation_config.json
    int bos_id; // -1: none
    struct packing packing;
};

MUST_CHECK enum status model_config_load(const char *folder, struct model_config *out,
                                         struct error *err);

#endif
