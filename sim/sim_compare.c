// The order of eviction on traces: ours, least recently used, and S-LoRA's discard as soon as no
// running request uses an adapter, each over a power law, a bursty one, and a pool that is small
// beside the adapters asked for. docs/simulator.md reads the table.
#include "sim/sim_report.h"

struct compared {
    const char *what;
    double alpha, cv, rate;
    int adapters, pool_tokens, input_end, output_end;
    const int *ranks;
    int rank_count;
};

static const int mixed[] = {64, 32, 16, 8}, wide[] = {8, 8, 8, 256};
static const struct compared traces[] = {
    {"power law", 0.2, 1, 12, 10000, 60000, 512, 128, mixed, 4},
    {"bursty power law", 0.2, 8, 12, 10000, 60000, 512, 128, mixed, 4},
    {"flatter power law", 0.4, 1, 12, 10000, 60000, 512, 128, mixed, 4},
    {"ranks 8 and 256", 0.2, 1, 12, 10000, 60000, 512, 128, wide, 4},
    {"small pool", 0.2, 1, 8, 10000, 20000, 256, 64, mixed, 4},
};
enum { TRACES = sizeof traces / sizeof *traces, POLICIES = 3 };
static const char *const policies[POLICIES] = {"cost", "lru", "discard"};

static void options_of(const struct compared *trace, int policy, struct sim_options *options) {
    sim_options_default(options);
    (void)sim_workload(options, "S2");
    options->pool_tokens = trace->pool_tokens;
    options->rank_count = trace->rank_count;
    for (int i = 0; i < trace->rank_count; i++) options->ranks[i] = trace->ranks[i];
    options->trace = (struct trace_options){.generator = TRACE_BENCH, .adapters = trace->adapters,
                                            .alpha = trace->alpha, .rate = trace->rate,
                                            .cv = trace->cv, .duration_s = 300, .input_min = 8,
                                            .input_end = trace->input_end, .output_min = 8,
                                            .output_end = trace->output_end, .seed = 42};
    options->eviction = policy == 1 ? EVICTION_LRU : EVICTION_COST;
    options->keep_idle = policy != 2;
    options->prefetch = 8;
}

enum status sim_compare(FILE *out, const char *json_path, struct error *err) {
    static struct sim_result result;
    json_t *rows = json_array();
    enum status status = STATUS_OK;
    fprintf(out, "| trace | eviction | hit rate | GB copied | first token s, mean | p99 | req/s |\n"
            "|---|---|---|---|---|---|---|\n");
    for (int t = 0; t < TRACES && status == STATUS_OK; t++)
        for (int p = 0; p < POLICIES && status == STATUS_OK; p++) {
            struct sim_options options;
            options_of(&traces[t], p, &options);
            if ((status = sim_run(&options, &result, err)) != STATUS_OK) break;
            fprintf(out, "| %s | %s | %.1f%% | %.1f | %.3f | %.3f | %.2f |\n", traces[t].what,
                    policies[p], 100 * result.hit_rate, (double)result.bytes_moved / 1e9,
                    result.ttft_mean_s, result.ttft_p99_s, result.requests_per_s);
            json_t *row = sim_json(&options, &result);
            json_object_del(row, "pages");
            json_object_set_new(row, "trace_name", json_string(traces[t].what));
            json_object_set_new(row, "eviction", json_string(policies[p]));
            json_array_append_new(rows, row);
        }
    json_t *root = json_pack("{s:s, s:s, s:O}", "kind", "simulation, not a measurement", "command",
                             "lorad-sim --compare eviction", "rows", rows);
    if (status == STATUS_OK && json_path) status = sim_write_json(json_path, root, err);
    json_decref(rows);
    json_decref(root);
    return status;
}
