// The load generator's command line. One table names, explains and parses each option.
#include "bench/bench_internal.h"

#include "base/file.h"
#include "base/memory.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum option_id {
    O_URL, O_MODEL, O_ADAPTERS, O_PREFIX, O_BASE_ONLY, O_ALPHA, O_RATE, O_CV, O_DURATION, O_REQUESTS,
    O_CONCURRENCY, O_INPUT, O_OUTPUT, O_SEED, O_RESPECT_EOS, O_TEXT, O_VOCABULARY, O_TIMEOUT,
    O_SLO, O_KEY, O_JSON, O_REPORT, O_COMMIT, O_HELP, OPTIONS
};

static const struct {
    const char *name, *value, *help;
} rows[OPTIONS] = {
    [O_URL] = {"url", "URL", "the server (default http://127.0.0.1:8000)"},
    [O_MODEL] = {"model", "ID", "the base model's id (default: the first one without a parent)"},
    [O_ADAPTERS] = {"adapters", "N", "use the first N adapters that /v1/models lists (default: all)"},
    [O_PREFIX] = {"prefix", "TEXT", "only adapters whose ids begin with it"},
    [O_BASE_ONLY] = {"base-only", NULL, "no adapters: every request goes to the base model"},
    [O_ALPHA] = {"alpha", "A", "popularity: adapter = N x u^(1/A); 1 is uniform (default 1)"},
    [O_RATE] = {"rate", "R", "arrivals a second (default 2)"},
    [O_CV] = {"cv", "CV", "coefficient of variation of the gamma gaps (default 1: Poisson)"},
    [O_DURATION] = {"duration", "S", "seconds of arrivals (default 30)"},
    [O_REQUESTS] = {"requests", "N", "exactly N requests instead of rate x duration"},
    [O_CONCURRENCY] = {"concurrency", "N", "closed loop: always N in flight; the rate is ignored"},
    [O_INPUT] = {"input", "LO:HI", "prompt tokens, uniform (default 8:512)"},
    [O_OUTPUT] = {"output", "LO:HI", "output tokens, uniform (default 8:512)"},
    [O_SEED] = {"seed", "N", "the same seed makes the same requests (default 42)"},
    [O_RESPECT_EOS] = {"respect-eos", NULL, "do not send ignore_eos: answers may end early"},
    [O_TEXT] = {"text", NULL, "prompts as text, for servers that take no token ids"},
    [O_VOCABULARY] = {"vocabulary", "N", "prompt ids are drawn from 3..N-1 (default 256)"},
    [O_TIMEOUT] = {"timeout", "S", "for one request (default 600)"},
    [O_SLO] = {"slo", "S", "first token within S counts as attained (default 6)"},
    [O_KEY] = {"api-key-file", "FILE", "its first line is sent as the bearer token"},
    [O_JSON] = {"json", "FILE", "write the figures"},
    [O_REPORT] = {"report", "FILE", "write one HTML file with plots"},
    [O_COMMIT] = {"commit", "HASH", "of the server, recorded in the JSON"},
    [O_HELP] = {"help", NULL, "this text"},
};

static void usage(FILE *to) {
    fprintf(to, "lorad-bench [options]           load a server and measure it\n"
                "lorad-bench roofline [options]  operations against this machine's limits\n\n"
                "S-LoRA's workload (arXiv 2311.03285) against any OpenAI-compatible server:\n");
    for (int i = 0; i < OPTIONS; i++) {
        char left[40];
        snprintf(left, sizeof left, "--%s %s", rows[i].name, rows[i].value ? rows[i].value : "");
        fprintf(to, "  %-22s %s\n", left, rows[i].help);
    }
    fprintf(to, "\nExample: lorad-bench --alpha 0.5 --rate 4 --duration 60 --input 8:64 "
                "--output 8:64 \\\n             --json run.json --report run.html\n"
                "Exits 1 when any request failed.\n");
}

static bool number(const char *text, double low, double high, double *out) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= low) || !(value <= high)) return false;
    *out = value;
    return true;
}

static bool whole(const char *text, double low, double high, int *out) {
    double value;
    if (!number(text, low, high, &value) || value != (double)(int)value) return false;
    *out = (int)value;
    return true;
}

static bool range(const char *text, int *low, int *high) {
    char *end;
    long a = strtol(text, &end, 10);
    if (end == text || *end != ':') return false;
    const char *second = end + 1;
    long b = strtol(second, &end, 10);
    if (end == second || *end || a < 1 || b < a || b > 1 << 20) return false;
    *low = (int)a;
    *high = (int)b;
    return true;
}

static bool key_read(const char *path, char **authorization) {
    char *data;
    size_t bytes;
    struct error err;
    if (file_read_all(path, 65536, &data, &bytes, &err) != STATUS_OK) {
        fprintf(stderr, "lorad-bench: %s\n", err.text);
        return false;
    }
    data[strcspn(data, "\r\n")] = 0;
    size_t room = strlen(data) + 8;
    free(*authorization);
    *authorization = mem_alloc(room);
    snprintf(*authorization, room, "Bearer %s", data);
    free(data);
    return true;
}

static bool option_set(struct bench_options *o, enum option_id id, const char *value) {
    struct workload_options *w = &o->workload;
    double seed;
    switch (id) {
    case O_URL: o->url = value; return true;
    case O_MODEL: o->model = value; return true;
    case O_ADAPTERS: return whole(value, 0, 1e6, &o->adapters);
    case O_PREFIX: o->prefix = value; return true;
    case O_BASE_ONLY: o->adapters = 0; return true;
    case O_ALPHA: return number(value, 1e-3, 1e3, &w->alpha);
    case O_RATE: return number(value, 1e-6, 1e6, &w->rate);
    case O_CV: return number(value, 1e-3, 1e3, &w->cv);
    case O_DURATION: return number(value, 0.001, 1e6, &w->duration_s);
    case O_REQUESTS: return whole(value, 1, 1e7, &w->requests);
    case O_CONCURRENCY: return whole(value, 1, 10000, &o->concurrency);
    case O_INPUT: return range(value, &w->input_min, &w->input_max);
    case O_OUTPUT: return range(value, &w->output_min, &w->output_max);
    case O_SEED:
        if (!number(value, 0, 9e15, &seed)) return false;
        w->seed = (uint64_t)seed;
        return true;
    case O_RESPECT_EOS: o->ignore_eos = false; return true;
    case O_TEXT: o->text_prompts = true; return true;
    case O_VOCABULARY: return whole(value, 4, 1 << 30, &o->vocabulary);
    case O_TIMEOUT: return number(value, 0.001, 1e6, &o->timeout_s);
    case O_SLO: return number(value, 0.001, 1e6, &o->slo_s);
    case O_KEY: return key_read(value, &o->authorization);
    case O_JSON: o->json = value; return true;
    case O_REPORT: o->report = value; return true;
    case O_COMMIT: o->commit = value; return true;
    default: return false;
    }
}

static char *command_join(int argc, char **argv) {
    size_t room = 1;
    for (int i = 0; i < argc; i++) room += strlen(argv[i]) + 1;
    char *command = mem_zalloc(room, 1);
    for (int i = 0; i < argc; i++) {
        if (i > 0) strcat(command, " ");
        strcat(command, argv[i]);
    }
    return command;
}

int bench_options_parse(int argc, char **argv, struct bench_options *o) {
    *o = (struct bench_options){
        .url = "http://127.0.0.1:8000", .adapters = -1, .ignore_eos = true, .vocabulary = 256,
        .timeout_s = 600, .slo_s = 6, .commit = "", .prefix = "",
        .workload = {.alpha = 1, .rate = 2, .cv = 1, .duration_s = 30, .input_min = 8,
                     .input_max = 512, .output_min = 8, .output_max = 512, .seed = 42}};
    struct option names[OPTIONS + 1] = {{0}};
    for (int i = 0; i < OPTIONS; i++)
        names[i] = (struct option){rows[i].name, rows[i].value != NULL, NULL, i};
    o->command = command_join(argc, argv);
    for (int id; (id = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        if (id == O_HELP) {
            usage(stdout);
            return 1;
        }
        if (id == '?') return 3; // getopt has said why
        if (option_set(o, (enum option_id)id, optarg)) continue;
        fprintf(stderr, "lorad-bench: --%s %s: will not do; %s\n", rows[id].name,
                optarg ? optarg : "", rows[id].help);
        return 3;
    }
    if (optind == argc) return 0;
    fprintf(stderr, "lorad-bench: '%s' is no option; see --help\n", argv[optind]);
    return 3;
}

void bench_options_deinit(struct bench_options *o) {
    free(o->authorization);
    free(o->command);
}
