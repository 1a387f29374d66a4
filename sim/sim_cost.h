// What one step of a model costs on a device: bytes over bandwidth or operations over peak,
// whichever is longer, for each of three groups of work (base matmuls, attention, LoRA), and fixed
// times per step and per LoRA operation. No model and no device is needed. Pure functions over
// const tables; any thread.
//
// Legend: P weights of one token's matmuls, K key and value bytes of one token, r rank,
// d = sum of (in + out) over the modules that an adapter has, in one layer.
#ifndef LORAD_SIM_COST_H
#define LORAD_SIM_COST_H

#include <stdbool.h>
#include <stddef.h>

struct sim_model {
    const char *name;
    int layers, hidden, query_heads, kv_heads, head_size, ffn, vocab;
    int elem_bytes;
};

// Peaks as the data sheets give them (docs/simulator.md names each).
struct sim_device {
    const char *name;
    double bytes_per_s, flops_per_s, memory_bytes;
    double copy_bytes_per_s; // host to device, one direction, as reached in practice
};

// How an implementation falls short of the peaks. Efficiencies are fractions of the device's.
struct sim_engine {
    const char *name;
    double efficiency;      // of bandwidth and of flops, base matmuls and attention
    double step_s;          // each step, whatever is in it: launches, host work
    double lora_efficiency; // of bandwidth, in LoRA operations
    double lora_op_s;       // shrink and expand of one module of one layer, whatever is in them
    bool lora_per_token;    // decode reads an adapter once a token, not once a step
    double load_copies;     // an adapter's bytes cross the bus this many times
    double load_layer_s;    // per layer of an adapter: launches and indexing
};

enum sim_modules { SIM_QKVO, SIM_ALL };

// The work of one step.
struct sim_step {
    double tokens, rows;     // computed; of those, with logits
    double kv_tokens;        // key-value tokens read and written, summed over sequences
    double attention_pairs;  // (query, key) pairs: for a decode its context
    double lora_read_rank;   // ranks of the adapters read, summed over reads
    double lora_token_rank;  // rank of each token's adapter, summed over tokens
    enum sim_modules modules;
};

struct sim_cost {
    double linear_s, attention_s, lora_s, total_s;
};

const struct sim_model *sim_model_find(const char *name);   // NULL when unknown
const struct sim_device *sim_device_find(const char *name); // NULL when unknown
const struct sim_engine *sim_engine_find(const char *name); // NULL when unknown
// Space-separated names of each table, for --help and messages.
const char *sim_model_names(void);
const char *sim_device_names(void);
const char *sim_engine_names(void);

double sim_weight_bytes(const struct sim_model *model); // read by one step: all but the embedding
double sim_kv_bytes(const struct sim_model *model);     // K
double sim_lora_dims(const struct sim_model *model, enum sim_modules modules); // d
double sim_adapter_bytes(const struct sim_model *model, enum sim_modules modules, int rank);
double sim_load_s(const struct sim_model *model, const struct sim_device *device,
                  const struct sim_engine *engine, double bytes);
struct sim_cost sim_cost_of(const struct sim_model *model, const struct sim_device *device,
                            const struct sim_engine *engine, const struct sim_step *step);

#endif
