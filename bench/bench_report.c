// A run's record -> figures -> text and JSON. See bench_internal.h.
#include "bench/bench_internal.h"

#include "base/memory.h"
#include "bench/machine_peak.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

// ------------------------------------------------------------------ figures

static int more_requests(const void *a, const void *b) {
    return ((const struct bench_adapter *)b)->requests - ((const struct bench_adapter *)a)->requests;
}

// The base counts as one more "adapter" when requests went there.
static void adapters_make(const struct bench_run *run, struct bench_result *result) {
    int all = run->adapter_count + 1;
    struct bench_adapter *adapters = mem_zalloc((size_t)all, sizeof *adapters);
    for (int i = 0; i < all; i++)
        adapters[i].name = i < run->adapter_count ? run->adapters[i] : run->base;
    for (size_t i = 0; i < run->count; i++) {
        const struct bench_request *r = &run->requests[i];
        int index = run->workload[i].adapter;
        struct bench_adapter *a = &adapters[index < 0 ? run->adapter_count : index];
        a->requests++;
        a->wanted += run->workload[i].output_tokens;
        a->served += r->tokens;
        if (r->failed || r->first_s == 0) continue;
        a->answered++;
        a->ttft_sum_s += r->first_s - r->sent_s;
    }
    qsort(adapters, (size_t)all, sizeof *adapters, more_requests);
    while (all > 0 && adapters[all - 1].requests == 0) all--;
    result->adapters = adapters;
    result->adapter_count = all;
    double *shares = mem_zalloc((size_t)all + 1, sizeof *shares);
    for (int i = 0; i < all; i++) {
        shares[i] = adapters[i].served / adapters[i].wanted;
        if (adapters[i].answered == 0) continue;
        double mean = adapters[i].ttft_sum_s / adapters[i].answered;
        if (result->ttft_min_s == 0 || mean < result->ttft_min_s) result->ttft_min_s = mean;
        if (mean > result->ttft_max_s) result->ttft_max_s = mean;
    }
    result->jain = stats_jain(shares, (size_t)all);
    free(shares);
}

void bench_result_make(const struct bench_options *options, struct bench_run *run,
                       struct bench_result *result) {
    *result = (struct bench_result){0};
    struct samples tpot = {0};
    double output = 0, input = 0;
    size_t attained = 0;
    for (size_t i = 0; i < run->count; i++) {
        const struct bench_request *r = &run->requests[i];
        output += r->tokens;
        input += r->prompt_tokens;
        if (r->failed || r->first_s == 0) continue;
        result->completed++;
        samples_add(&result->ttft, r->first_s - r->sent_s);
        samples_add(&result->e2e, r->end_s - r->sent_s);
        if (r->tokens > 1) samples_add(&tpot, (r->last_s - r->first_s) / (r->tokens - 1));
        attained += r->first_s - r->sent_s <= options->slo_s;
    }
    result->failed = run->count - result->completed;
    result->ttft_s = samples_summary(&result->ttft);
    result->e2e_s = samples_summary(&result->e2e);
    result->tpot_s = samples_summary(&tpot);
    result->itl_s = samples_summary(&run->itl_s);
    samples_deinit(&tpot);
    result->requests_per_s = (double)result->completed / run->wall_s;
    result->output_tokens_per_s = output / run->wall_s;
    result->total_tokens_per_s = (output + input) / run->wall_s;
    result->slo_share = (double)attained / (double)run->count;
    adapters_make(run, result);
}

void bench_result_deinit(struct bench_result *result) {
    free(result->adapters);
    samples_deinit(&result->ttft);
    samples_deinit(&result->e2e);
}

// ------------------------------------------------------------------ text

static void summary_print(const char *name, const struct summary *s) {
    printf("  %-12s %10.1f %10.1f %10.1f %10.1f\n", name, s->mean * 1e3, s->p50 * 1e3, s->p90 * 1e3,
           s->p99 * 1e3);
}

void bench_print(const struct bench_options *options, const struct bench_run *run,
                 const struct bench_result *result) {
    printf("%zu requests in %.1f s: %zu completed, %zu failed\n", run->count, run->wall_s,
           result->completed, result->failed);
    printf("  %.2f requests/s, %.1f output tok/s, %.1f tok/s in all\n", result->requests_per_s,
           result->output_tokens_per_s, result->total_tokens_per_s);
    printf("  %-12s %10s %10s %10s %10s\n", "ms", "mean", "p50", "p90", "p99");
    summary_print("TTFT", &result->ttft_s);
    summary_print("TPOT", &result->tpot_s);
    summary_print("ITL", &result->itl_s);
    summary_print("end to end", &result->e2e_s);
    printf("  first token within %g s: %.1f%%\n", options->slo_s, 100 * result->slo_share);
    printf("  %d adapters asked: Jain's index of tokens served / wanted %.4f, mean TTFT %.1f to "
           "%.1f ms\n", result->adapter_count, result->jain, result->ttft_min_s * 1e3,
           result->ttft_max_s * 1e3);
    for (size_t i = 0; i < run->error_count; i++)
        printf("  error, %d times: %s\n", run->errors[i].count, run->errors[i].text);
}

// ------------------------------------------------------------------ JSON

static json_t *summary_json(const struct summary *s) {
    return json_pack("{s:i,s:f,s:f,s:f,s:f,s:f}", "count", (int)s->count, "mean", s->mean, "p50",
                     s->p50, "p90", s->p90, "p99", s->p99, "max", s->max);
}

// Each percent, from 1 to 100.
static json_t *percentiles_json(const struct samples *sorted) {
    json_t *list = json_array();
    for (int p = 1; p <= 100 && sorted->count > 0; p++)
        json_array_append_new(list, json_real(samples_percentile(sorted, p / 100.0)));
    return list;
}

static json_t *machine_json(void) {
    char cpu[200];
    machine_cpu_name(cpu, sizeof cpu);
    return json_pack("{s:s,s:i}", "cpu", cpu, "cores", (int)sysconf(_SC_NPROCESSORS_ONLN));
}

static json_t *workload_json(const struct bench_options *o) {
    const struct workload_options *w = &o->workload;
    return json_pack("{s:f,s:f,s:f,s:f,s:i,s:i,s:[ii],s:[ii],s:I,s:b}", "alpha", w->alpha, "rate",
                     w->rate, "cv", w->cv, "duration_s", w->duration_s, "requests", w->requests,
                     "concurrency", o->concurrency, "input", w->input_min, w->input_max, "output",
                     w->output_min, w->output_max, "seed", (json_int_t)w->seed, "ignore_eos",
                     o->ignore_eos);
}

json_t *bench_json(const struct bench_options *options, const struct bench_run *run,
                   const struct bench_result *result) {
    char date[32];
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime(&run->began));
    json_t *adapters = json_array(), *errors = json_array();
    for (int i = 0; i < result->adapter_count; i++) {
        const struct bench_adapter *a = &result->adapters[i];
        json_array_append_new(
            adapters, json_pack("{s:s,s:i,s:f,s:f,s:f}", "name", a->name, "requests", a->requests,
                                "tokens", a->served, "wanted", a->wanted, "ttft_mean_s",
                                a->answered ? a->ttft_sum_s / a->answered : 0.0));
    }
    for (size_t i = 0; i < run->error_count; i++)
        json_array_append_new(errors, json_pack("{s:s,s:i}", "text", run->errors[i].text, "count",
                                                run->errors[i].count));
    json_t *figures = json_pack(
        "{s:i,s:i,s:f,s:f,s:f,s:f,s:o,s:o,s:o,s:o,s:f,s:f,s:f,s:f}", "completed",
        (int)result->completed, "failed", (int)result->failed, "wall_s", run->wall_s,
        "requests_per_s", result->requests_per_s, "output_tokens_per_s",
        result->output_tokens_per_s, "total_tokens_per_s", result->total_tokens_per_s, "ttft_s",
        summary_json(&result->ttft_s), "tpot_s", summary_json(&result->tpot_s), "itl_s",
        summary_json(&result->itl_s), "e2e_s", summary_json(&result->e2e_s), "slo_s",
        options->slo_s, "slo_share", result->slo_share, "jain", result->jain, "ttft_max_of_means_s",
        result->ttft_max_s);
    return json_pack("{s:s,s:s,s:s,s:o,s:s,s:i,s:o,s:o,s:o,s:o,s:{s:o,s:o}}", "command", options->command,
                     "date", date, "commit", options->commit, "machine", machine_json(), "model",
                     run->base, "adapters", run->adapter_count, "workload", workload_json(options),
                     "figures", figures, "by_adapter", adapters, "errors", errors,
                     "percentiles", "ttft_s", percentiles_json(&result->ttft), "e2e_s",
                     percentiles_json(&result->e2e));
}
