// The simulator: a trace of requests through a scheduler, a page pool and a cost model, with no
// model and no device. One call of sim_run is one simulated server; the same options give the same
// result to the last bit. One thread.
//
// A request's life: ARRIVES -> waits -> runs (-> preempted -> waits) -> FINISHED, or -> ABORTED
// while it waits. Each has exactly one end, which sim_run asserts.
#ifndef LORAD_SIM_SIM_H
#define LORAD_SIM_SIM_H

#include "base/error.h"
#include "pager/eviction.h"
#include "sim/sim_cost.h"
#include "sim/sim_trace.h"

#include <stdint.h>

enum sim_policy {
    SIM_LORAD, // server/scheduler.c over pager/pool.c and pager/residency.c
    SIM_SLORA, // the rules of S-LoRA's released router over the same pager
};

enum { SIM_RANKS_MAX = 8 };

struct sim_options {
    enum sim_policy policy;
    const struct sim_model *model;
    const struct sim_device *device;
    struct sim_engine engine;
    struct trace_options trace;
    int ranks[SIM_RANKS_MAX], rank_count; // adapter i has rank ranks[i % rank_count]
    enum sim_modules modules;
    int pool_tokens;     // the pool's size in tokens of KV; 0: what the device's memory leaves
    int sequences_max;   // that run at once
    int step_tokens_max; // SIM_LORAD: budget of a step
    bool load_blocks;    // a cold adapter is copied before the step, not beside it
    int prefetch;        // SIM_LORAD: waiting requests whose adapters are copied ahead
    enum eviction_policy eviction; // of idle adapters
    bool keep_idle;      // SIM_LORAD: idle adapters stay until their pages are wanted
    double slo_s;        // first token
    bool early_abort;    // drop who waits when wait + 0.5 s reaches the SLO
    int preempt_every;   // SIM_LORAD: preempt the newest every so many steps; 0: only when short
    bool check;          // walk every page in every step
};

struct sim_sample { // pages by owner at one moment
    double time_s;
    int free, kv, adapter, cached;
    int running, waiting;
};

enum { SIM_SAMPLES_MAX = 400 };

struct sim_result {
    int requests, finished, aborted;
    double total_s, busy_s;           // until the last end; of it, in steps
    double requests_per_s, tokens_per_s; // finished requests and their output over total_s
    double ttft_mean_s, ttft_p50_s, ttft_p90_s, ttft_p99_s; // of those that finished
    double latency_mean_s, per_token_mean_s; // latency; latency / output tokens, mean over requests
    double slo_attained;              // fraction of all requests
    double hit_rate;                  // adapters resident when their request came
    uint64_t loads, evictions, bytes_moved;
    uint64_t steps, preemptions;
    uint64_t prompt_tokens, output_tokens; // of those that finished
    uint64_t computed_tokens;         // in steps, recomputed ones too
    double linear_s, attention_s, lora_s, waiting_copy_s; // of busy_s
    double running_mean;              // sequences running, mean over steps
    int page_count, page_tokens;
    uint64_t digest;                  // of every request's times, to compare two runs
    int sample_count;
    struct sim_sample samples[SIM_SAMPLES_MAX];
};

void sim_options_default(struct sim_options *options);
// S-LoRA's settings by name: S1, S2, S4; false when unknown. Sets model, ranks and trace.
bool sim_workload(struct sim_options *options, const char *name);
// STATUS_INVALID: options that do not fit each other, or a request that can never fit the pool.
MUST_CHECK enum status sim_run(const struct sim_options *options, struct sim_result *result,
                               struct error *err);

#endif
