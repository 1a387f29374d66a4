// The cost model of sim_cost.h. Groups of work follow each other in a step (attention needs what
// the matmuls made), so that the slower of bytes and operations is taken for each group and the
// groups are added; inside a group copies from memory hide behind arithmetic or the reverse.
#include "sim/sim_cost.h"

#include <string.h>

static const struct sim_model models[] = {
    {"llama-7b", 32, 4096, 32, 32, 128, 11008, 32000, 2},
    {"llama-13b", 40, 5120, 40, 40, 128, 13824, 32000, 2},
    {"llama-160m", 12, 768, 12, 12, 64, 3072, 32000, 2},
};

// A100 SXM 80 GB, H100 SXM, H200 SXM data sheets (dense bf16); copies at 80% of PCIe 4.0 x16 and
// 5.0 x16. `cpu`: a Zen 4 machine with two cores, as measured; its copy,
// memory to memory, is a guess.
static const struct sim_device devices[] = {
    {"a100-80g", 2039e9, 312e12, 80e9, 25e9},
    {"h100", 3350e9, 989e12, 80e9, 50e9},
    {"h200", 4800e9, 989e12, 141e9, 50e9},
    {"cpu", 32.7e9, 448e9, 24e9, 10e9},
};

// roofline: the bound of the hardware. slora: docs/simulator.md says which constants are fitted.
static const struct sim_engine engines[] = {
    {.name = "roofline", .efficiency = 1, .lora_efficiency = 1, .load_copies = 1},
    {.name = "slora",
     .efficiency = 0.76,
     .step_s = 0.018,
     .lora_efficiency = 0.574,
     .lora_op_s = 60.7e-6,
     .lora_per_token = true,
     .load_copies = 2,
     .load_layer_s = 420e-6},
};

#define COUNT(table) (sizeof(table) / sizeof *(table))

#define FIND(table, wanted)                                                                        \
    for (size_t i = 0; i < COUNT(table); i++)                                                      \
        if (strcmp((table)[i].name, wanted) == 0) return &(table)[i];                              \
    return NULL

const struct sim_model *sim_model_find(const char *name) {
    FIND(models, name);
}

const struct sim_device *sim_device_find(const char *name) {
    FIND(devices, name);
}

const struct sim_engine *sim_engine_find(const char *name) {
    FIND(engines, name);
}

const char *sim_model_names(void) {
    return "llama-7b llama-13b llama-160m";
}

const char *sim_device_names(void) {
    return "a100-80g h100 h200 cpu";
}

const char *sim_engine_names(void) {
    return "roofline slora";
}

static double layer_weights(const struct sim_model *model) {
    double h = model->hidden, q = (double)model->query_heads * model->head_size;
    double k = (double)model->kv_heads * model->head_size;
    return h * q + 2 * h * k + q * h + 3 * h * model->ffn;
}

static double head_weights(const struct sim_model *model) {
    return (double)model->hidden * model->vocab;
}

double sim_weight_bytes(const struct sim_model *model) {
    double gains = (2.0 * model->layers + 1) * model->hidden; // of the norms
    return (layer_weights(model) * model->layers + head_weights(model) + gains) *
           model->elem_bytes;
}

double sim_kv_bytes(const struct sim_model *model) {
    return 2.0 * model->kv_heads * model->head_size * model->layers * model->elem_bytes;
}

double sim_lora_dims(const struct sim_model *model, enum sim_modules modules) {
    double h = model->hidden, q = (double)model->query_heads * model->head_size;
    double k = (double)model->kv_heads * model->head_size;
    double dims = (h + q) + 2 * (h + k) + (q + h);
    return modules == SIM_ALL ? dims + 3 * (h + model->ffn) : dims;
}

double sim_adapter_bytes(const struct sim_model *model, enum sim_modules modules, int rank) {
    return rank * sim_lora_dims(model, modules) * model->layers * model->elem_bytes;
}

double sim_load_s(const struct sim_model *model, const struct sim_device *device,
                  const struct sim_engine *engine, double bytes) {
    return engine->load_copies * bytes / device->copy_bytes_per_s +
           engine->load_layer_s * model->layers;
}

static double max_double(double a, double b) {
    return a > b ? a : b;
}

struct sim_cost sim_cost_of(const struct sim_model *model, const struct sim_device *device,
                            const struct sim_engine *engine, const struct sim_step *step) {
    struct sim_cost cost = {0};
    double bytes_per_s = device->bytes_per_s * engine->efficiency;
    double flops_per_s = device->flops_per_s * engine->efficiency;
    double flops = 2 * step->tokens * layer_weights(model) * model->layers +
                   2 * step->rows * head_weights(model);
    cost.linear_s = max_double(sim_weight_bytes(model) / bytes_per_s, flops / flops_per_s);

    double pair_flops = 4.0 * model->query_heads * model->head_size * model->layers;
    cost.attention_s = max_double(step->kv_tokens * sim_kv_bytes(model) / bytes_per_s,
                                  step->attention_pairs * pair_flops / flops_per_s);
    if (step->lora_token_rank > 0) {
        double dims = sim_lora_dims(model, step->modules) * model->layers;
        int operations = (step->modules == SIM_ALL ? 7 : 4) * model->layers;
        double bytes = step->lora_read_rank * dims * model->elem_bytes;
        cost.lora_s = engine->lora_op_s * operations +
                      max_double(bytes / (device->bytes_per_s * engine->lora_efficiency),
                                 2 * step->lora_token_rank * dims / flops_per_s);
    }
    cost.total_s = engine->step_s + cost.linear_s + cost.attention_s + cost.lora_s;
    return cost;
}
