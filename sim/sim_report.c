// The forms in which one result leaves: text for a reader, JSON for a record, pages by owner over
// time as CSV and as one SVG picture. Nothing is computed here.
#include "sim/sim_report.h"

#include <errno.h>
#include <string.h>

static const char *policy_name(enum sim_policy policy) {
    return policy == SIM_LORAD ? "lorad" : "slora";
}

void sim_print(FILE *out, const struct sim_options *options, const struct sim_result *result) {
    const struct trace_options *trace = &options->trace;
    fprintf(out,
            "simulation: %s on %s, policy %s, engine %s; %d adapters, %.4g req/s, %.4g s, "
            "cv %.4g, alpha %.4g, seed %u\n",
            options->model->name, options->device->name, policy_name(options->policy),
            options->engine.name, trace->adapters, trace->rate, trace->duration_s, trace->cv,
            trace->alpha, trace->seed);
    fprintf(out, "pool: %d pages of %d tokens; adapter ranks", result->page_count,
            result->page_tokens);
    for (int i = 0; i < options->rank_count; i++) fprintf(out, " %d", options->ranks[i]);
    fprintf(out, " on %s\n", options->modules == SIM_ALL ? "all seven modules" : "q,k,v,o");
    fprintf(out, "requests: %d, finished %d, aborted %d, in %.2f s; running %.1f on average\n",
            result->requests, result->finished, result->aborted, result->total_s,
            result->running_mean);
    fprintf(out, "throughput: %.3f req/s, %.1f output tok/s\n", result->requests_per_s,
            result->tokens_per_s);
    fprintf(out, "first token: mean %.3f s, p50 %.3f, p90 %.3f, p99 %.3f; within %.4g s: %.1f%%\n",
            result->ttft_mean_s, result->ttft_p50_s, result->ttft_p90_s, result->ttft_p99_s,
            options->slo_s, 100 * result->slo_attained);
    fprintf(out, "latency: mean %.3f s; per output token %.1f ms\n", result->latency_mean_s,
            1e3 * result->per_token_mean_s);
    fprintf(out,
            "adapters: resident on arrival %.1f%%, %llu loads, %llu evictions, %.3f GB moved\n",
            100 * result->hit_rate, (unsigned long long)result->loads,
            (unsigned long long)result->evictions, (double)result->bytes_moved / 1e9);
    fprintf(out,
            "steps: %llu, %.1f ms each: matmuls %.1f%%, attention %.1f%%, LoRA %.1f%%, "
            "waiting for copies %.1f%%; preemptions %llu\n",
            (unsigned long long)result->steps, 1e3 * result->busy_s / (double)result->steps,
            100 * result->linear_s / result->busy_s, 100 * result->attention_s / result->busy_s,
            100 * result->lora_s / result->busy_s, 100 * result->waiting_copy_s / result->busy_s,
            (unsigned long long)result->preemptions);
}

static json_t *ranks_json(const struct sim_options *options) {
    json_t *ranks = json_array();
    for (int i = 0; i < options->rank_count; i++)
        json_array_append_new(ranks, json_integer(options->ranks[i]));
    return ranks;
}

static json_t *options_json(const struct sim_options *options) {
    const struct trace_options *trace = &options->trace;
    const struct sim_engine *engine = &options->engine;
    return json_pack(
        "{s:s, s:s, s:s, s:o, s:s, s:i, s:i, s:i, s:b, s:i, s:b, s:f, s:b,"
        " s:{s:s, s:f, s:f, s:f, s:f, s:b, s:f, s:f},"
        " s:{s:i, s:f, s:f, s:f, s:f, s:[i,i], s:[i,i], s:i, s:s}}",
        "policy", policy_name(options->policy), "model", options->model->name, "device",
        options->device->name, "ranks", ranks_json(options), "modules",
        options->modules == SIM_ALL ? "all" : "qkvo", "pool_tokens", options->pool_tokens,
        "sequences_max", options->sequences_max, "step_tokens_max", options->step_tokens_max,
        "load_blocks", options->load_blocks, "prefetch", options->prefetch, "keep_idle",
        options->keep_idle, "slo_s", options->slo_s, "early_abort", options->early_abort, "engine",
        "name", engine->name, "efficiency", engine->efficiency, "step_s", engine->step_s,
        "lora_efficiency", engine->lora_efficiency, "lora_op_s", engine->lora_op_s,
        "lora_per_token", engine->lora_per_token, "load_copies", engine->load_copies,
        "load_layer_s", engine->load_layer_s, "trace", "adapters", trace->adapters, "alpha",
        trace->alpha, "rate", trace->rate, "cv", trace->cv, "duration_s", trace->duration_s,
        "input", trace->input_min, trace->input_end, "output", trace->output_min, trace->output_end,
        "seed", (int)trace->seed, "generator",
        trace->generator == TRACE_BENCH ? "bench" : "numpy");
}

json_t *sim_json(const struct sim_options *options, const struct sim_result *result) {
    json_t *samples = json_array();
    for (int i = 0; i < result->sample_count; i++) {
        const struct sim_sample *sample = &result->samples[i];
        json_array_append_new(samples, json_pack("[f,i,i,i,i,i,i]", sample->time_s, sample->free,
                                                 sample->kv, sample->adapter, sample->cached,
                                                 sample->running, sample->waiting));
    }
    json_t *value = json_pack(
        "{s:s, s:o, s:i, s:i, s:i, s:f, s:f, s:f, s:{s:f, s:f, s:f, s:f}, s:f, s:f, s:f, s:f}",
        "kind", "simulation, not a measurement", "options", options_json(options), "requests",
        result->requests, "finished", result->finished, "aborted", result->aborted, "total_s",
        result->total_s, "requests_per_s", result->requests_per_s, "output_tokens_per_s",
        result->tokens_per_s, "ttft_s", "mean", result->ttft_mean_s, "p50", result->ttft_p50_s,
        "p90", result->ttft_p90_s, "p99", result->ttft_p99_s, "latency_mean_s",
        result->latency_mean_s, "per_output_token_mean_s", result->per_token_mean_s, "slo_attained",
        result->slo_attained, "adapter_hit_rate", result->hit_rate);
    json_t *more = json_pack(
        "{s:I, s:I, s:I, s:I, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:i, s:i, s:[s,s,s,s,s,s,s],"
        " s:o}",
        "adapter_loads", (json_int_t)result->loads, "adapter_evictions",
        (json_int_t)result->evictions, "bytes_moved", (json_int_t)result->bytes_moved, "steps",
        (json_int_t)result->steps, "preemptions", (json_int_t)result->preemptions,
        "computed_tokens", (json_int_t)result->computed_tokens, "busy_s", result->busy_s,
        "linear_s", result->linear_s, "attention_s", result->attention_s, "lora_s", result->lora_s,
        "waiting_copy_s", result->waiting_copy_s, "running_mean", result->running_mean,
        "page_count", result->page_count, "page_tokens", result->page_tokens, "pages_columns",
        "time_s", "free", "kv", "adapter", "cached", "running", "waiting", "pages", samples);
    json_object_update(value, more);
    json_decref(more);
    return value;
}

static enum status finish_file(FILE *file, const char *path, struct error *err) {
    bool failed = ferror(file) != 0;
    if (fclose(file) != 0 || failed)
        return error_set(err, STATUS_IO, "cannot write %s: %s", path, strerror(errno));
    return STATUS_OK;
}

static FILE *open_file(const char *path, struct error *err) {
    FILE *file = fopen(path, "w");
    if (!file) (void)error_set(err, STATUS_IO, "cannot open %s: %s", path, strerror(errno));
    return file;
}

enum status sim_write_json(const char *path, json_t *value, struct error *err) {
    FILE *file = open_file(path, err);
    if (!file) return STATUS_IO;
    if (json_dumpf(value, file, JSON_INDENT(1) | JSON_REAL_PRECISION(7)) == 0) fputc('\n', file);
    return finish_file(file, path, err);
}

enum status sim_write_csv(const char *path, const struct sim_result *result, struct error *err) {
    FILE *file = open_file(path, err);
    if (!file) return STATUS_IO;
    fprintf(file, "time_s,free,kv,adapter,cached,running,waiting\n");
    for (int i = 0; i < result->sample_count; i++) {
        const struct sim_sample *sample = &result->samples[i];
        fprintf(file, "%.3f,%d,%d,%d,%d,%d,%d\n", sample->time_s, sample->free, sample->kv,
                sample->adapter, sample->cached, sample->running, sample->waiting);
    }
    return finish_file(file, path, err);
}

enum { SVG_WIDTH = 720, SVG_HEIGHT = 320, SVG_MARGIN = 40 };

static int owner_pages(const struct sim_sample *sample, int owner) {
    return owner == 0 ? sample->kv : owner == 1 ? sample->adapter : sample->cached;
}

// One band from the sum below it to the sum with it.
static void svg_band(FILE *file, const struct sim_result *result, int owner, const char *colour) {
    double end_s = result->samples[result->sample_count - 1].time_s;
    double x_scale = (SVG_WIDTH - 2 * SVG_MARGIN) / (end_s > 0 ? end_s : 1);
    double y_scale = (SVG_HEIGHT - 2 * SVG_MARGIN) / (double)result->page_count;
    fprintf(file, "<polygon fill=\"%s\" points=\"", colour);
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < result->sample_count; i++) {
            const struct sim_sample *sample =
                &result->samples[pass == 0 ? i : result->sample_count - 1 - i];
            int sum = 0;
            for (int below = 0; below < owner + (pass == 0); below++)
                sum += owner_pages(sample, below);
            fprintf(file, "%.1f,%.1f ", SVG_MARGIN + sample->time_s * x_scale,
                    SVG_HEIGHT - SVG_MARGIN - sum * y_scale);
        }
    fprintf(file, "\"/>\n");
}

enum status sim_write_svg(const char *path, const struct sim_result *result, struct error *err) {
    static const char *names[] = {"KV cache", "adapters in use", "idle adapters"};
    static const char *colours[] = {"#4878a8", "#d9822b", "#e8c9a0"};
    FILE *file = open_file(path, err);
    if (!file) return STATUS_IO;
    fprintf(file,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" "
            "font-family=\"sans-serif\" font-size=\"12\">\n"
            "<rect width=\"%d\" height=\"%d\" fill=\"white\"/>\n",
            SVG_WIDTH, SVG_HEIGHT, SVG_WIDTH, SVG_HEIGHT);
    for (int owner = 0; owner < 3 && result->sample_count > 0; owner++) {
        svg_band(file, result, owner, colours[owner]);
        fprintf(file,
                "<rect x=\"%d\" y=\"12\" width=\"12\" height=\"12\" fill=\"%s\"/>"
                "<text x=\"%d\" y=\"22\">%s</text>\n",
                SVG_MARGIN + 150 * owner, colours[owner], SVG_MARGIN + 150 * owner + 16,
                names[owner]);
    }
    double end_s = result->sample_count ? result->samples[result->sample_count - 1].time_s : 0;
    fprintf(file,
            "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"none\" stroke=\"black\"/>\n"
            "<text x=\"%d\" y=\"%d\">0 s</text><text x=\"%d\" y=\"%d\" text-anchor=\"end\">"
            "%.0f s (simulated)</text>"
            "<text x=\"%d\" y=\"22\" text-anchor=\"end\">%d pages of %d tokens</text>\n</svg>\n",
            SVG_MARGIN, SVG_MARGIN, SVG_WIDTH - 2 * SVG_MARGIN, SVG_HEIGHT - 2 * SVG_MARGIN,
            SVG_MARGIN, SVG_HEIGHT - 20, SVG_WIDTH - SVG_MARGIN, SVG_HEIGHT - 20, end_s,
            SVG_WIDTH - SVG_MARGIN, result->page_count, result->page_tokens);
    return finish_file(file, path, err);
}
