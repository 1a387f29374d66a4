// lorad-bench: the load generator, and under `roofline` the operations against the machine.
#include "bench/bench_internal.h"
#include "bench/roofline.h"

#include <stdio.h>
#include <string.h>

static bool reports_write(const struct bench_options *options, const struct bench_run *run,
                          const struct bench_result *result) {
    bool good = true;
    if (options->json) {
        json_t *root = bench_json(options, run, result);
        if (json_dump_file(root, options->json, JSON_INDENT(1) | JSON_REAL_PRECISION(9)) != 0) {
            fprintf(stderr, "lorad-bench: cannot write %s\n", options->json);
            good = false;
        }
        json_decref(root);
    }
    if (options->report && !bench_html(options->report, options, run, result)) {
        fprintf(stderr, "lorad-bench: cannot write %s\n", options->report);
        good = false;
    }
    return good;
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "roofline")) return roofline_main(argc - 1, argv + 1);
    struct bench_options options;
    int parsed = bench_options_parse(argc, argv, &options);
    int status = parsed - 1;
    if (parsed == 0) {
        struct bench_run run;
        status = 1;
        if (bench_run(&options, &run)) {
            struct bench_result result;
            bench_result_make(&options, &run, &result);
            bench_print(&options, &run, &result);
            if (reports_write(&options, &run, &result) && result.failed == 0) status = 0;
            bench_result_deinit(&result);
        }
        bench_run_deinit(&run);
    }
    bench_options_deinit(&options);
    return status;
}
