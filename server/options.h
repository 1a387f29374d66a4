// The command line of `lorad serve`, and the same options from the environment (LORAD_UPPER_CASE).
// Flags win over the environment, the environment over defaults. Read once by main.c.
#ifndef LORAD_SERVER_OPTIONS_H
#define LORAD_SERVER_OPTIONS_H

#include "base/error.h"
#include "base/log.h"
#include "server/tenants.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

enum { OPTION_ADAPTERS_MAX = 20000 };

struct options {
    const char *model, *adapter_dir, *host, *device, *dtype, *quantization, *speculation, *load_format, *served_model_name;
    const char *api_key_file, *admin_key_file, *log_level, *log_format, *state_dir, *preemption;
    char **adapters; // "NAME=SOURCE", borrowed from argv
    int adapter_count;
    struct tenant_weight *tenant_weights; // names borrowed from argv
    int tenant_weight_count;
    int port, threads, max_seqs, max_step_tokens, max_model_len, max_queue, seed, preempt_every;
    size_t pool_bytes; // 0: a quarter of free memory
    size_t host_bytes; // 0: a quarter of free memory, too
    int load_threads, load_share, prefix_cache; // prefix_cache: 0 or 1
    int drain_s, first_token_slo_ms, cluster_adapters;
    bool host_given, help;
};

// argv[0] is skipped. STATUS_INVALID: err says which option and what it takes.
MUST_CHECK enum status options_parse(int argc, char **argv, struct options *out,
                                     struct error *err);
void options_deinit(struct options *options);
void options_print_help(FILE *to);

// "4GiB", "512MiB", "64KiB", "10MB" or plain bytes.
bool option_size_parse(const char *text, size_t *bytes);

#endif
