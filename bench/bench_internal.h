// What the load generator's files share: options, what one run recorded, and its three reports.
//
//   bench_main.c     subcommands, --help
//   bench_options.c  the command line
//   bench_run.c      sends the requests of workload.c through client.c and records what comes back
//   bench_report.c   the record as text and JSON;  bench_html.c  as one HTML file
#ifndef LORAD_BENCH_BENCH_INTERNAL_H
#define LORAD_BENCH_BENCH_INTERNAL_H

#include "bench/stats.h"
#include "bench/workload.h"

#include <jansson.h>
#include <stdbool.h>

struct bench_options {
    const char *url, *model; // model: the base's id; NULL = the first without a parent
    struct workload_options workload;
    int adapters;    // -1: all that the server lists
    const char *prefix; // of the ids of those that count
    int concurrency; // 0: open loop
    bool ignore_eos, text_prompts;
    int vocabulary;  // prompt ids are drawn below it
    double timeout_s, slo_s;
    char *authorization; // owned
    const char *json, *report, *commit;
    char *command; // as typed; owned
};

// 0: go on; otherwise exit with status - 1. Says what is wrong.
int bench_options_parse(int argc, char **argv, struct bench_options *options);
void bench_options_deinit(struct bench_options *options);

struct bench_request {
    double sent_s, first_s, last_s, end_s; // since the start; 0 = never
    int status;      // of HTTP; 0 = no whole answer
    bool failed;
    int tokens, prompt_tokens; // as the server's usage has them
};

struct bench_moment { // one sample of the timeline
    double at_s;
    int running, waiting;  // with a first token; sent and without one
    double tokens_per_s;   // since the moment before
};

struct bench_error {
    char *text; // owned
    int count;
};

struct bench_run {
    struct workload_request *workload;
    struct bench_request *requests;
    size_t count;
    char **adapters; // names, by workload index
    int adapter_count;
    char *base;
    struct samples itl_s;
    struct bench_moment *moments;
    size_t moment_count, moment_room;
    struct bench_error *errors;
    size_t error_count;
    double wall_s;
    time_t began;
};

// false: the server cannot be used; says why on stderr.
bool bench_run(const struct bench_options *options, struct bench_run *run);
void bench_run_deinit(struct bench_run *run);

struct bench_adapter { // one adapter's part
    const char *name;
    int requests;
    double served, wanted, ttft_sum_s;
    int answered;
};
struct bench_result {
    struct summary ttft_s, tpot_s, itl_s, e2e_s;
    size_t completed, failed;
    double requests_per_s, output_tokens_per_s, total_tokens_per_s, slo_share;
    double jain, ttft_min_s, ttft_max_s; // between adapters
    struct bench_adapter *adapters;      // [adapter_count], most requested first
    int adapter_count;
    struct samples ttft, e2e; // sorted, for the CDFs
};
void bench_result_make(const struct bench_options *options, struct bench_run *run,
                       struct bench_result *result);
void bench_result_deinit(struct bench_result *result);
void bench_print(const struct bench_options *options, const struct bench_run *run,
                 const struct bench_result *result);
json_t *bench_json(const struct bench_options *options, const struct bench_run *run,
                   const struct bench_result *result);
bool bench_html(const char *path, const struct bench_options *options,
                const struct bench_run *run, const struct bench_result *result);

#endif
