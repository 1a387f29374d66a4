// The published rows of S-LoRA on an A100-80G (its repository, benchmarks/paper/synthetic/slora/
// synthetic_num_adapters_a100-80_S*_slora_table.jsonl), the fit of the engine "slora" to three
// of them, and the table of all against the simulation. docs/simulator.md reads the table.
#include "sim/sim_report.h"

#include "base/verify.h"

#include <math.h>
#include <stddef.h>

struct row {
    const char *workload;
    int adapters;
    double rate, duration_s;
    double requests_per_s, ttft_s, latency_s, attained; // published; attained: first token in 6 s
    enum fitted { NOTHING, LATENCY, THROUGHPUT, LOADS } fitted; // which constant it fixes, by what
};

static const struct row rows[] = {
    // The main table.
    {"S1", 5, 10, 120, 8.046, 0.599, 20.84, 1, LATENCY},
    {"S1", 100, 10, 120, 7.992, 0.619, 21.61, 1, NOTHING},
    {"S1", 1000, 10, 120, 7.641, 1.898, 25.93, 0.921, NOTHING},
    {"S1", 2000, 10, 120, 7.607, 2.019, 26.22, 0.899, LOADS},
    {"S2", 5, 10, 120, 7.485, 2.661, 29.12, 0.765, NOTHING},
    {"S2", 100, 10, 120, 7.290, 4.212, 30.74, 0.65, NOTHING},
    {"S2", 1000, 10, 120, 6.693, 10.544, 38.10, 0.469, NOTHING},
    {"S2", 2000, 10, 120, 6.727, 10.652, 37.85, 0.448, NOTHING},
    {"S4", 2, 10, 120, 4.491, 50.538, 79.99, 0.178, THROUGHPUT},
    {"S4", 5, 10, 120, 4.430, 54.809, 82.15, 0.133, NOTHING},
    {"S4", 100, 10, 120, 4.283, 58.556, 84.73, 0.137, NOTHING},
    {"S4", 1000, 10, 120, 3.903, 72.070, 98.11, 0.123, NOTHING},
    // ..._a100-80_S2_slora.jsonl: numbers of adapters; 0 is the base model alone.
    {"S2", 0, 10, 300, 9.641, 0.923, 22.20, 1, NOTHING},
    {"S2", 1, 10, 300, 7.737, 29.311, 61.73, 0.272, NOTHING},
    {"S2", 20, 10, 300, 7.926, 25.838, 56.88, 0.283, NOTHING},
    {"S2", 50, 10, 300, 7.837, 28.192, 58.87, 0.266, NOTHING},
    {"S2", 100, 10, 300, 7.742, 30.749, 60.73, 0.22, NOTHING},
    {"S2", 200, 10, 300, 7.517, 37.242, 66.72, 0.193, NOTHING},
    // synthetic_req_rate_a100-80_S4_slora.jsonl: rates.
    {"S4", 400, 1, 300, 0.942, 0.364, 15.32, 1, NOTHING},
    {"S4", 400, 2, 300, 1.838, 0.499, 17.18, 1, NOTHING},
    {"S4", 400, 4, 300, 3.539, 0.740, 23.03, 1, NOTHING},
    {"S4", 400, 6, 300, 4.012, 60.023, 86.26, 0.102, NOTHING},
    {"S4", 400, 8, 300, 4.017, 136.525, 163.24, 0.059, NOTHING},
};
enum { ROWS = sizeof rows / sizeof *rows };

static const double WITHIN = 0.15;

static void row_options(const struct row *row, enum sim_policy policy,
                        const struct sim_engine *engine, struct sim_options *options) {
    sim_options_default(options);
    bool known = sim_workload(options, row->workload);
    VERIFY(known);
    options->policy = policy;
    options->load_blocks = policy == SIM_SLORA;
    options->engine = *engine;
    options->trace.adapters = row->adapters;
    options->trace.rate = row->rate;
    options->trace.duration_s = row->duration_s;
}

static enum status run_row(const struct row *row, enum sim_policy policy,
                           const struct sim_engine *engine, struct sim_result *result,
                           struct error *err) {
    struct sim_options options;
    row_options(row, policy, engine, &options);
    return sim_run(&options, result, err);
}

static double off(double simulated, double published) {
    return (simulated - published) / published;
}

static json_t *row_json(const struct row *row, const struct sim_result *slora,
                        const struct sim_result *lorad) {
    return json_pack(
        "{s:s, s:i, s:f, s:f, s:b, s:{s:f, s:f, s:f, s:f}, s:{s:f, s:f, s:f, s:f, s:f, s:I},"
        " s:{s:f, s:f, s:f, s:f, s:f, s:I}}",
        "workload", row->workload, "adapters", row->adapters, "rate", row->rate, "duration_s",
        row->duration_s, "fitted", row->fitted != NOTHING, "published", "requests_per_s",
        row->requests_per_s, "ttft_mean_s", row->ttft_s, "latency_mean_s", row->latency_s,
        "slo_attained", row->attained, "slora_policy", "requests_per_s", slora->requests_per_s,
        "ttft_mean_s", slora->ttft_mean_s, "latency_mean_s", slora->latency_mean_s, "slo_attained",
        slora->slo_attained, "hit_rate", slora->hit_rate, "loads", (json_int_t)slora->loads,
        "lorad_policy", "requests_per_s", lorad->requests_per_s, "ttft_mean_s", lorad->ttft_mean_s,
        "latency_mean_s", lorad->latency_mean_s, "slo_attained", lorad->slo_attained, "hit_rate",
        lorad->hit_rate, "loads", (json_int_t)lorad->loads);
}

static void print_row(FILE *out, const struct row *row, const struct sim_result *slora,
                      const struct sim_result *lorad) {
    fprintf(
        out,
        "%s %5d %3.0f %6.2f %6.2f %+5.1f%%%s %6.2f %6.2f  %6.2f %6.2f %+5.1f%% %4.0f %4.0f | %5.2f "
        "%6.2f %6.2f %4.0f\n",
        row->workload, row->adapters, row->rate, row->requests_per_s, slora->requests_per_s,
        100 * off(slora->requests_per_s, row->requests_per_s), row->fitted ? "*" : " ", row->ttft_s,
        slora->ttft_mean_s, row->latency_s, slora->latency_mean_s,
        100 * off(slora->latency_mean_s, row->latency_s), 100 * row->attained,
        100 * slora->slo_attained, lorad->requests_per_s, lorad->ttft_mean_s, lorad->latency_mean_s,
        100 * lorad->slo_attained);
}

static void print_head(FILE *out) {
    fprintf(out,
            "Simulation, not measurement. A100-80G, 12 rows of 120 s, then 11 of 300 s.\n"
            "* fitted: latency of S1 n=5, throughput of S4 n=2 and of S1 n=2000; all else is "
            "predicted.\n"
            "               throughput req/s     first token s  latency s             in 6 s %% |"
            " ours: req/s, first\n"
            "        n rate publ.   sim.    off    publ.   sim.   publ.   sim.    off publ sim.  |"
            " token, latency, in 6 s\n");
}

// S1 offered more than either policy can serve: what the published load hides in its tail.
static enum status saturate(FILE *out, json_t *list, struct error *err) {
    static const int adapters[] = {5, 2000, 100000};
    static struct sim_result result[2];
    double first[2] = {0, 0};
    fprintf(out, "S1 at 14 req/s for 600 s, which neither serves:\n"
                 "        n   S-LoRA's policy req/s    ours req/s  gain\n");
    for (int i = 0; i < 3; i++) {
        for (int policy = 0; policy < 2; policy++) {
            const struct row row = {
                .workload = "S1", .adapters = adapters[i], .rate = 14, .duration_s = 600};
            struct sim_options options;
            row_options(&row, policy ? SIM_LORAD : SIM_SLORA, sim_engine_find("slora"), &options);
            enum status status = sim_run(&options, &result[policy], err);
            if (status != STATUS_OK) return status;
            if (i == 0) first[policy] = result[policy].requests_per_s;
        }
        double slora = result[0].requests_per_s, lorad = result[1].requests_per_s;
        fprintf(out, "S1 %6d  %5.2f (%+5.1f%% against 5)  %5.2f (%+5.1f%%)  %+5.1f%%\n",
                adapters[i], slora, 100 * off(slora, first[0]), lorad, 100 * off(lorad, first[1]),
                100 * off(lorad, slora));
        json_array_append_new(list, json_pack("{s:i, s:f, s:f}", "adapters", adapters[i],
                                              "slora_policy_requests_per_s", slora,
                                              "lorad_policy_requests_per_s", lorad));
    }
    return STATUS_OK;
}

enum status sim_reproduce(FILE *out, const char *json_path, bool *within, struct error *err) {
    static struct sim_result slora[ROWS], lorad[ROWS];
    const struct sim_engine *engine = sim_engine_find("slora");
    json_t *list = json_array(), *saturated = json_array();
    enum status status = STATUS_OK;
    double largest = 0;
    print_head(out);
    for (int i = 0; i < ROWS && status == STATUS_OK; i++) {
        status = run_row(&rows[i], SIM_SLORA, engine, &slora[i], err);
        if (status == STATUS_OK) status = run_row(&rows[i], SIM_LORAD, engine, &lorad[i], err);
        if (status != STATUS_OK) break;
        print_row(out, &rows[i], &slora[i], &lorad[i]);
        json_array_append_new(list, row_json(&rows[i], &slora[i], &lorad[i]));
        if (!rows[i].fitted)
            largest = fmax(largest, fabs(off(slora[i].requests_per_s, rows[i].requests_per_s)));
    }
    *within = status == STATUS_OK && largest <= WITHIN;
    if (status == STATUS_OK) {
        fprintf(out, "largest error of a predicted throughput: %.1f%% (goal: %.0f%%)\n",
                100 * largest, 100 * WITHIN);
        fprintf(out,
                "S1 from 5 to 2000 adapters: published %+.1f%%, S-LoRA's policy simulated "
                "%+.1f%%, ours %+.1f%%\n",
                100 * off(rows[3].requests_per_s, rows[0].requests_per_s),
                100 * off(slora[3].requests_per_s, slora[0].requests_per_s),
                100 * off(lorad[3].requests_per_s, lorad[0].requests_per_s));
    }
    if (status == STATUS_OK) status = saturate(out, saturated, err);
    if (status == STATUS_OK && json_path) {
        json_t *value = json_pack(
            "{s:s, s:s, s:f, s:O, s:O}", "kind", "simulation, not a measurement", "command",
            "lorad-sim --reproduce slora", "largest_predicted_throughput_error", largest, "rows",
            list, "saturated", saturated);
        status = sim_write_json(json_path, value, err);
        json_decref(value);
    }
    json_decref(list);
    json_decref(saturated);
    return status;
}

// Squared relative errors of the figures that fix the two base constants (loads false) or the cost
// of a load (true). The former rows load next to nothing, so that the two fits are independent.
static enum status fit_error(const struct sim_engine *engine, bool loads, double *error,
                             struct error *err) {
    static struct sim_result result;
    *error = 0;
    for (int i = 0; i < ROWS; i++) {
        if (rows[i].fitted == NOTHING || (rows[i].fitted == LOADS) != loads) continue;
        enum status status = run_row(&rows[i], SIM_SLORA, engine, &result, err);
        if (status != STATUS_OK) return status;
        double miss = rows[i].fitted == LATENCY
                          ? off(result.latency_mean_s, rows[i].latency_s)
                          : off(result.requests_per_s, rows[i].requests_per_s);
        *error += miss * miss;
    }
    return STATUS_OK;
}

static enum status fit_base(struct sim_engine *best, struct error *err) {
    struct sim_engine engine = *best;
    double best_error = INFINITY, error;
    for (int percent = 40; percent <= 100; percent += 2)
        for (int ms = 0; ms <= 40; ms += 2) {
            engine.efficiency = percent / 100.0;
            engine.step_s = ms / 1000.0;
            enum status status = fit_error(&engine, false, &error, err);
            if (status != STATUS_OK) return status;
            if (error >= best_error) continue;
            best_error = error;
            *best = engine;
        }
    return STATUS_OK;
}

static enum status fit_loads(struct sim_engine *best, struct error *err) {
    struct sim_engine engine = *best;
    double best_error = INFINITY, error;
    for (int us = 0; us <= 1000; us += 20) {
        engine.load_layer_s = us / 1e6;
        enum status status = fit_error(&engine, true, &error, err);
        if (status != STATUS_OK) return status;
        if (error >= best_error) continue;
        best_error = error;
        *best = engine;
    }
    return STATUS_OK;
}

enum status sim_fit(FILE *out, struct error *err) {
    struct sim_engine engine = *sim_engine_find("slora");
    enum status status = fit_base(&engine, err);
    if (status == STATUS_OK) status = fit_loads(&engine, err);
    if (status == STATUS_OK)
        fprintf(out, "efficiency %.2f, step %.0f ms, load %.0f us a layer\n", engine.efficiency,
                1e3 * engine.step_s, 1e6 * engine.load_layer_s);
    return status;
}
