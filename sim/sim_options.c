// Defaults, and the published workloads by name.
#include "sim/sim.h"

#include <string.h>

void sim_options_default(struct sim_options *options) {
    *options = (struct sim_options){.policy = SIM_LORAD,
                                    .engine = *sim_engine_find("slora"),
                                    .device = sim_device_find("a100-80g"),
                                    .modules = SIM_QKVO,
                                    .sequences_max = 1000,
                                    .step_tokens_max = 2048,
                                    .prefetch = 0,
                                    .keep_idle = true,
                                    .slo_s = 6};
    (void)sim_workload(options, "S1");
}

bool sim_workload(struct sim_options *options, const char *name) {
    static const struct {
        const char *name, *model;
        int ranks[SIM_RANKS_MAX], rank_count, pool_tokens;
    } workloads[] = { // ranks in the order in which the benchmark numbers its adapters
        {"S1", "llama-7b", {8}, 1, 125000},
        {"S2", "llama-7b", {64, 32, 16, 8}, 4, 125000},
        {"S4", "llama-13b", {64, 32, 16}, 3, 65000},
    };
    for (size_t i = 0; i < sizeof workloads / sizeof *workloads; i++) {
        if (strcmp(name, workloads[i].name) != 0) continue;
        options->model = sim_model_find(workloads[i].model);
        memcpy(options->ranks, workloads[i].ranks, sizeof options->ranks);
        options->rank_count = workloads[i].rank_count;
        options->pool_tokens = workloads[i].pool_tokens;
        options->trace = (struct trace_options){.adapters = 100,
                                                .alpha = 1,
                                                .rate = 10,
                                                .cv = 1,
                                                .duration_s = 120,
                                                .input_min = 8,
                                                .input_end = 512,
                                                .output_min = 8,
                                                .output_end = 512,
                                                .seed = 42};
        return true;
    }
    return false;
}
