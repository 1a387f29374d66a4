// The table of options and its one parser. It checks forms and ranges of single values; main.c
// checks what they mean together.
#include "server/options.h"

#include "base/memory.h"

#include <ctype.h>
#include <limits.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum option_kind { KIND_TEXT, KIND_INT, KIND_SIZE, KIND_ADAPTER, KIND_TENANT };

struct option {
    const char *name, *argument, *fallback, *help;
    enum option_kind kind;
    size_t offset;
    long min, max;
};

#define AT(field) offsetof(struct options, field)
static const struct option table[] = {
    {"model", "DIR", NULL, "folder of the base model: config.json, safetensors, tokenizer.json",
     KIND_TEXT, AT(model), 0, 0},
    {"adapter", "NAME=DIR", NULL,
     "an adapter (PEFT folder) to register; repeat it. With --load-format dummy also\n"
     "NAME=dummy:rank=16,seed=7,modules=all (or modules=qkvo)",
     KIND_ADAPTER, 0, 0, 0},
    {"adapter-dir", "DIR", NULL,
     "register every sub-folder with an adapter_config.json; the only place that the\n"
     "admin API may load adapters from",
     KIND_TEXT, AT(adapter_dir), 0, 0},
    {"host", "ADDRESS", "127.0.0.1", "address to listen on", KIND_TEXT, AT(host), 0, 0},
    {"port", "N", "8000", "port to listen on; 0 takes any free one", KIND_INT, AT(port), 0, 65535},
    {"device", "NAME", "auto", "auto, cpu or cuda", KIND_TEXT, AT(device), 0, 0},
    {"dtype", "TYPE", "auto",
     "auto, f32 or bf16: type of weights, adapters and KV cache. auto is bf16 where the\n"
     "processor has AVX-512 and the model is not stored in f32, else f32",
     KIND_TEXT, AT(dtype), 0, 0},
    {"quantization", "TYPE", "auto",
     "none, int8 or int4 (CPU): keep the base model's matrices rounded to 8 bits (half of bf16's\n"
     "bytes, next to no loss) or to 4 (a bit over a quarter, at a cost in quality that\n"
     "bench/perplexity.py tells). auto keeps the 4 bits of GPTQ and AWQ checkpoints, which\n"
     "loses nothing, and otherwise rounds nothing. Adapters and KV cache stay as --dtype says",
     KIND_TEXT, AT(quantization), 0, 0},
    {"load-format", "FORMAT", "auto",
     "auto, or dummy: seeded random weights for any config.json, to measure without a\ncheckpoint",
     KIND_TEXT, AT(load_format), 0, 0},
    {"seed", "N", "1", "seed of dummy weights", KIND_INT, AT(seed), 0, INT_MAX},
    {"threads", "N", "0", "CPU threads; 0 takes one for each core", KIND_INT, AT(threads), 0, 1024},
    {"pool-bytes", "SIZE", "0",
     "memory for KV cache and adapters together, as 512MiB or 4GiB; 0 takes a quarter\n"
     "of the memory that is free at start, or nine tenths of what a GPU has left",
     KIND_SIZE, AT(pool_bytes), 0, 0},
    {"host-bytes", "SIZE", "0",
     "host memory for adapters that are not in the pool; those beyond it are read from disk\n"
     "again when they are asked for. 0 takes a quarter of the memory that is free at start",
     KIND_SIZE, AT(host_bytes), 0, 0},
    {"load-threads", "N", "2", "threads that read adapters and copy them into the pool", KIND_INT,
     AT(load_threads), 1, 64},
    {"load-share", "PERCENT", "10",
     "of one core: what those threads take together while steps are computed on the CPU, so\n"
     "that others' tokens keep coming; half of one when a request waits for its adapter; when\n"
     "several do, a fourth of those that run or more, they take what they need",
     KIND_INT, AT(load_share), 1, 6400},
    {"prefix-cache", "0|1", "1",
     "1 keeps computed prompts, so that requests of the same tenant and adapter with an equal\n"
     "prefix do not compute it again (as far as the pool has room)",
     KIND_INT, AT(prefix_cache), 0, 1},
    {"speculation", "WHEN", "auto",
     "guess the next tokens where a text repeats itself, and compute them in one step: right\n"
     "guesses save steps, and the output stays the same. auto guesses where it was measured to\n"
     "pay, always wherever it can, off never",
     KIND_TEXT, AT(speculation), 0, 0},
    {"max-seqs", "N", "64", "sequences that run at once", KIND_INT, AT(max_seqs), 1, 4096},
    {"max-step-tokens", "N", "512", "tokens in a step: longer prompts are prefilled in chunks",
     KIND_INT, AT(max_step_tokens), 1, 65536},
    {"max-model-len", "N", "0", "longest prompt + output; 0 takes the model's own limit", KIND_INT,
     AT(max_model_len), 0, INT_MAX},
    {"max-queue", "N", "1024", "requests that wait; more are answered with 429", KIND_INT,
     AT(max_queue), 1, 1 << 20},
    {"preemption", "HOW", "auto",
     "when pages run short, the newest sequence waits again: swap keeps what it had computed\n"
     "in host memory, recompute does not, auto does what was measured to be faster",
     KIND_TEXT, AT(preemption), 0, 0},
    {"first-token-slo-ms", "N", "0",
     "refuse (429, with Retry-After) who would wait longer than this for a first token, instead\n"
     "of serving everybody late; 0 lets all wait",
     KIND_INT, AT(first_token_slo_ms), 0, INT_MAX},
    {"cluster-adapters", "N", "0",
     "prefer requests whose adapters run already once N distinct ones run (S-LoRA's adapter\n"
     "clustering); 0 takes everybody in turn",
     KIND_INT, AT(cluster_adapters), 0, 4096},
    {"tenant-weight", "NAME=W", NULL,
     "share of a tenant against others' 1 when requests wait; repeat it. A tenant is an API\n"
     "key (key-1 is the first of --api-key-file) or, without keys, the request's \"user\"",
     KIND_TENANT, 0, 0, 0},
    {"served-model-name", "NAME", NULL, "id of the base model; default: the folder's name",
     KIND_TEXT, AT(served_model_name), 0, 0},
    {"api-key-file", "FILE", NULL, "accepted API keys, one a line; without it no key is asked for",
     KIND_TEXT, AT(api_key_file), 0, 0},
    {"admin-key-file", "FILE", NULL, "keys for loading and unloading adapters, one a line",
     KIND_TEXT, AT(admin_key_file), 0, 0},
    {"state-dir", "DIR", NULL,
     "remember here the adapters that are loaded at run time, and load them again at\n"
     "the next start; without it they last until the process ends",
     KIND_TEXT, AT(state_dir), 0, 0},
    {"drain-seconds", "N", "30", "after SIGTERM, how long running requests may go on", KIND_INT,
     AT(drain_s), 0, 86400},
    {"log-level", "LEVEL", "info", "debug, info, warn or error", KIND_TEXT, AT(log_level), 0, 0},
    {"log-format", "FORMAT", "text", "text or json (one object a line)", KIND_TEXT, AT(log_format),
     0, 0},
    {"preempt-every", "N", "0", "for tests: force a preemption every N steps", KIND_INT,
     AT(preempt_every), 0, INT_MAX},
};
enum { OPTION_COUNT = sizeof table / sizeof *table };

bool option_size_parse(const char *text, size_t *bytes) {
    static const struct {
        const char *unit;
        uint64_t factor;
    } units[] = {{"", 1}, {"B", 1}, {"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30},
                 {"TiB", 1ull << 40}, {"KB", 1000}, {"MB", 1000000}, {"GB", 1000000000}};
    if (!isdigit((unsigned char)*text)) return false;
    char *end;
    unsigned long long value = strtoull(text, &end, 10);
    for (size_t i = 0; i < sizeof units / sizeof *units; i++)
        if (strcmp(end, units[i].unit) == 0)
            return value <= SIZE_MAX / 2 && !__builtin_mul_overflow(value, units[i].factor, bytes);
    return false;
}

static enum status add_tenant_weight(struct options *o, char *value, struct error *err) {
    char *equals = strrchr(value, '='), *end = NULL;
    double weight = equals ? strtod(equals + 1, &end) : 0;
    if (!equals || equals == value || end == equals + 1 || *end || !(weight >= 0.001) ||
        !(weight <= 1000))
        return error_set(err, STATUS_INVALID, "--tenant-weight takes NAME=W with W from 0.001 to "
                         "1000, not '%.80s'", value);
    *equals = 0;
    o->tenant_weights = mem_realloc(o->tenant_weights, ((size_t)o->tenant_weight_count + 1) *
                                                           sizeof *o->tenant_weights);
    o->tenant_weights[o->tenant_weight_count++] = (struct tenant_weight){value, weight};
    return STATUS_OK;
}

static enum status set_value(struct options *o, const struct option *option, char *value,
                             struct error *err) {
    char *field = (char *)o + option->offset;
    char *end;
    if (option->kind == KIND_TEXT) {
        *(const char **)field = value;
        if (strcmp(option->name, "host") == 0) o->host_given = true;
        return STATUS_OK;
    }
    if (option->kind == KIND_ADAPTER) {
        if (!strchr(value, '=') || *value == '=')
            return error_set(err, STATUS_INVALID, "--adapter takes NAME=DIR, not '%.80s'", value);
        if (o->adapter_count == OPTION_ADAPTERS_MAX)
            return error_set(err, STATUS_INVALID, "more than %d --adapter options; put them under "
                             "one folder and use --adapter-dir", OPTION_ADAPTERS_MAX);
        o->adapters =
            mem_realloc(o->adapters, ((size_t)o->adapter_count + 1) * sizeof *o->adapters);
        o->adapters[o->adapter_count++] = value;
        return STATUS_OK;
    }
    if (option->kind == KIND_TENANT) return add_tenant_weight(o, value, err);
    if (option->kind == KIND_SIZE) {
        if (option_size_parse(value, (size_t *)field)) return STATUS_OK;
        return error_set(err, STATUS_INVALID,
                         "--%s takes a size such as 512MiB, 4GiB or plain bytes, not '%.80s'",
                         option->name, value);
    }
    long number = strtol(value, &end, 10);
    if (end == value || *end || number < option->min || number > option->max)
        return error_set(err, STATUS_INVALID, "--%s takes a whole number from %ld to %ld, not "
                         "'%.80s'", option->name, option->min, option->max, value);
    *(int *)field = (int)number;
    return STATUS_OK;
}

static char *from_environment(const struct option *option) {
    char name[64] = "LORAD_";
    size_t at = strlen(name);
    for (const char *c = option->name; *c && at + 1 < sizeof name; c++)
        name[at++] = *c == '-' ? '_' : (char)toupper((unsigned char)*c);
    name[at] = 0;
    return getenv(name);
}

static const struct option *find(const char *name, size_t length) {
    for (int i = 0; i < OPTION_COUNT; i++)
        if (strlen(table[i].name) == length && strncmp(table[i].name, name, length) == 0)
            return &table[i];
    return NULL;
}

static bool one_of(const char *value, const char *const *allowed) {
    for (; *allowed; allowed++)
        if (strcmp(value, *allowed) == 0) return true;
    return false;
}

static enum status check(const struct options *o, struct error *err) {
    if (!o->model)
        return error_set(err, STATUS_INVALID, "--model DIR is needed; lorad serve --help shows all");
    if (!one_of(o->device, (const char *const[]){"auto", "cpu", "cuda", NULL}))
        return error_set(err, STATUS_INVALID, "--device is auto, cpu or cuda");
    if (!one_of(o->dtype, (const char *const[]){"auto", "f32", "bf16", NULL}))
        return error_set(err, STATUS_INVALID, "--dtype is auto, f32 or bf16 (f16 weights are "
                         "converted)");
    if (!one_of(o->quantization, (const char *const[]){"auto", "none", "int8", "int4", NULL}))
        return error_set(err, STATUS_INVALID, "--quantization is auto, none, int8 or int4");
    if (!one_of(o->speculation, (const char *const[]){"off", "auto", "always", NULL}))
        return error_set(err, STATUS_INVALID, "--speculation is off, auto or always");
    if (!one_of(o->preemption, (const char *const[]){"auto", "swap", "recompute", NULL}))
        return error_set(err, STATUS_INVALID, "--preemption is auto, swap or recompute");
    if (!one_of(o->load_format, (const char *const[]){"auto", "dummy", NULL}))
        return error_set(err, STATUS_INVALID, "--load-format is auto or dummy");
    if (!one_of(o->log_format, (const char *const[]){"text", "json", NULL}))
        return error_set(err, STATUS_INVALID, "--log-format is text or json");
    enum log_level level;
    if (!log_level_parse(o->log_level, &level))
        return error_set(err, STATUS_INVALID, "--log-level is debug, info, warn or error");
    return STATUS_OK;
}

enum status options_parse(int argc, char **argv, struct options *o, struct error *err) {
    *o = (struct options){0};
    enum status status = STATUS_OK;
    for (int i = 0; i < OPTION_COUNT && status == STATUS_OK; i++) {
        if (table[i].fallback) status = set_value(o, &table[i], (char *)table[i].fallback, err);
        char *value = from_environment(&table[i]);
        o->host_given = false;
        if (status == STATUS_OK && value) status = set_value(o, &table[i], value, err);
    }
    for (int i = 1; i < argc && status == STATUS_OK; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            o->help = true;
            return STATUS_OK;
        }
        if (strncmp(argv[i], "--", 2) != 0)
            return error_set(err, STATUS_INVALID, "unexpected argument '%.80s'", argv[i]);
        char *equals = strchr(argv[i], '='), *name = argv[i] + 2;
        const struct option *option =
            find(name, equals ? (size_t)(equals - name) : strlen(name));
        if (!option)
            return error_set(err, STATUS_INVALID, "unknown option '%.80s'; lorad serve --help "
                             "lists all", argv[i]);
        if (!equals && i + 1 == argc)
            return error_set(err, STATUS_INVALID, "--%s needs a value: %s", option->name,
                             option->argument);
        status = set_value(o, option, equals ? equals + 1 : argv[++i], err);
    }
    return status == STATUS_OK ? check(o, err) : status;
}

void options_deinit(struct options *o) {
    free(o->adapters);
    free(o->tenant_weights);
    o->adapters = NULL;
    o->tenant_weights = NULL;
}

void options_print_help(FILE *to) {
    fputs("lorad serve: one base model and its LoRA adapters over OpenAI-compatible HTTP\n\n"
          "  lorad serve --model DIR [--adapter NAME=DIR]... [options]\n\n"
          "Name an adapter (or the base model's id) in the request's \"model\".\n"
          "Every option is also read from the environment: --max-seqs is LORAD_MAX_SEQS.\n\n",
          to);
    for (int i = 0; i < OPTION_COUNT; i++) {
        char head[64];
        snprintf(head, sizeof head, "--%s %s", table[i].name, table[i].argument);
        fprintf(to, "  %-28s", head);
        for (const char *c = table[i].help; *c; c++) {
            fputc(*c, to);
            if (*c == '\n') fprintf(to, "  %-28s", "");
        }
        if (table[i].fallback) fprintf(to, " [%s]", table[i].fallback);
        fputc('\n', to);
    }
    fputs("\nExamples\n"
          "  lorad serve --model demo/model --adapter-dir demo/adapters\n"
          "  lorad serve --model my-config --load-format dummy --adapter "
          "a=dummy:rank=16,seed=7,modules=all\n",
          to);
}
