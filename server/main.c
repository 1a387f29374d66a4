// The composition root: options -> model, engine, registry, api -> serve. It owns every part,
// creates them in order, destroys them in reverse, and is the one place that exits.
#include "api/api.h"
#include "base/file.h"
#include "base/log.h"
#include "base/memory.h"
#include "server/engine.h"
#include "server/options.h"
#include "server/registry.h"
#include "server/store.h"
#include "server/text/chat_template.h"

#include <dirent.h>
#include <limits.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct program {
    struct options options;
    char *base_id;
    struct model_config config;
    enum dtype dtype;
    int context_max;
    bool dummy;
    const struct backend_ops *ops;
    struct backend *backend;
    struct model *model;
    struct tokenizer *tokenizer;
    struct chat_template *chat_template; // NULL: the model has none
    struct registry *registry;
    struct store *store;
    struct metrics *metrics;
    struct api *api;
    struct engine *engine;
    struct adapter **restored; // from the store, one reference each, while the others register
    int restored_count;
};

static size_t free_memory_bytes(void) {
    unsigned long long kib = 0;
    char line[256];
    FILE *file = fopen("/proc/meminfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "MemAvailable: %llu", &kib) == 1) break;
    if (file) fclose(file);
    return (size_t)kib << 10;
}

static enum dtype choose_dtype(const struct program *p, const struct backend_ops *ops) {
    if (strcmp(p->options.dtype, "f32") == 0) return DTYPE_F32;
    if (strcmp(p->options.dtype, "bf16") == 0) return DTYPE_BF16;
    // Every card that the CUDA backend opens multiplies bf16.
    if (!ops->computes_on_host && p->config.stored_dtype != DTYPE_F32) return DTYPE_BF16;
#ifdef __x86_64__
    __builtin_cpu_init();
    // With AVX-512 weights of bf16 are read in 12 bits.
    if (p->config.stored_dtype != DTYPE_F32 && __builtin_cpu_supports("avx512bw")) return DTYPE_BF16;
#endif
    return DTYPE_F32;
}

static enum quantization choose_quantization(const struct program *p) {
    const char *wanted = p->options.quantization;
    if (strcmp(wanted, "int8") == 0) return QUANT_INT8;
    if (strcmp(wanted, "int4") == 0) return QUANT_INT4;
    bool packed = strcmp(wanted, "auto") == 0 && p->config.packing.bits == 4;
    return packed && p->ops->computes_on_host ? QUANT_INT4 : QUANT_NONE;
}

// The folder's own name, unless --served-model-name says otherwise.
static char *choose_base_id(const struct options *o) {
    if (o->served_model_name) return mem_strdup(o->served_model_name);
    char *path = realpath(o->model, NULL);
    const char *slash = path ? strrchr(path, '/') : NULL;
    char *id = mem_strdup(slash && slash[1] ? slash + 1 : "base");
    free(path);
    return id;
}

// ------------------------------------------------------------------ what is served

static enum status open_chosen(struct program *p, struct error *err) {
    p->dtype = choose_dtype(p, p->ops);
    struct backend_options options = {.threads = p->options.threads, .dtype = p->dtype,
                                      .quantization = choose_quantization(p)};
    return p->ops->open(&options, &p->backend, err);
}

// "auto" takes the GPU where this build has CUDA and one opens, and says why when it does not.
static enum status open_backend(struct program *p, struct error *err) {
    const char *device = p->options.device;
    bool automatic = strcmp(device, "auto") == 0;
    p->ops = backend_find(automatic ? "cuda" : device);
    if (!p->ops && !automatic)
        return error_set(err, STATUS_UNSUPPORTED, "--device %s: this build has no such backend; "
                         "use --device cpu, or build with LORAD_CUDA=ON where nvcc is", device);
    if (p->ops) {
        enum status status = open_chosen(p, err);
        if (status == STATUS_OK) return status;
        if (!automatic) return error_prefix(err, "--device %s", device);
        log_event(LOG_INFO, "cpu_chosen", "%s", err->text);
        error_clear(err);
    }
    p->ops = backend_find("cpu");
    return open_chosen(p, err);
}

static enum status load_model(struct program *p, struct error *err) {
    const struct options *o = &p->options;
    p->dummy = strcmp(o->load_format, "dummy") == 0;
    enum status status = model_config_load(o->model, &p->config, err);
    if (status) return status;
    p->context_max = o->max_model_len ? o->max_model_len : p->config.context_max;
    if ((status = open_backend(p, err))) return status;
    log_event(LOG_INFO, "model_loading", "folder=%s backend=%s dtype=%s quantization=%s", o->model,
              p->ops->name, dtype_name(p->dtype), o->quantization);
    double begin_s = clock_seconds();
    struct model_options options = {.folder = o->model,
                                    .dummy = p->dummy,
                                    .seed = (uint64_t)o->seed,
                                    .tokens_max = o->max_step_tokens,
                                    .sequences_max = o->max_seqs,
                                    .segments_max = o->max_seqs * REQUEST_ADAPTERS_MAX,
                                    .context_max = p->context_max};
    status = model_create(p->ops, p->backend, &p->config, p->dtype, &options, &p->model, err);
    if (status) return status;
    log_event(LOG_INFO, "model_loaded", "seconds=%.2f", clock_seconds() - begin_s);
    status = tokenizer_load(o->model, p->config.vocabulary, &p->tokenizer, err);
    if (status == STATUS_NOT_FOUND && p->dummy) {
        log_event(LOG_INFO, "no_tokenizer", "prompts must be token ids");
        return STATUS_OK;
    }
    if (status) return error_prefix(err, "%.200s", o->model);
    // Without one, or with one that is not understood, there are completions still.
    struct error own = {0};
    status = chat_template_load(o->model, &p->chat_template, &own);
    if (status) log_event(status == STATUS_NOT_FOUND ? LOG_INFO : LOG_WARN, "no_chats", "%s", own.text);
    return STATUS_OK;
}

// What a device has left once the model is there, but for a tenth that steps' scratch may take; a
// quarter of the host's free memory where the host is the device.
static size_t default_pool_bytes(const struct program *p) {
    size_t device = p->ops->memory_free ? p->ops->memory_free(p->backend) : 0;
    return device > 0 ? device / 10 * 9 : free_memory_bytes() / 4;
}

static enum status create_engine(struct program *p, struct error *err) {
    const struct options *o = &p->options;
    size_t pool_bytes = o->pool_bytes ? o->pool_bytes : default_pool_bytes(p);
    struct engine_options options = {.sequences_max = o->max_seqs,
                                     .step_tokens_max = o->max_step_tokens,
                                     .queue_max = o->max_queue,
                                     .context_max = p->context_max,
                                     .pool_bytes = pool_bytes,
                                     .host_bytes = o->host_bytes ? o->host_bytes
                                                                 : free_memory_bytes() / 4,
                                     .first_token_slo_s = o->first_token_slo_ms / 1000.0,
                                     .clusters_max = o->cluster_adapters,
                                     .preemption = strcmp(o->preemption, "swap") == 0
                                                       ? PREEMPTION_SWAP
                                                   : strcmp(o->preemption, "recompute") == 0
                                                       ? PREEMPTION_RECOMPUTE
                                                       : PREEMPTION_AUTO,
                                     .load_threads = o->load_threads,
                                     .load_share = o->load_share / 100.0,
                                     .speculation = strcmp(o->speculation, "off") == 0
                                                        ? SPECULATION_OFF
                                                    : strcmp(o->speculation, "always") == 0
                                                        ? SPECULATION_ALWAYS
                                                        : SPECULATION_AUTO,
                                     .prefix_cache = o->prefix_cache,
                                     .tenant_weights = o->tenant_weights,
                                     .tenant_weight_count = o->tenant_weight_count,
                                     .preempt_every = o->preempt_every,
                                     .wake = api_wake,
                                     .wake_context = p->api};
    p->metrics = mem_zalloc(1, sizeof *p->metrics);
    enum status status = engine_create(p->ops, p->backend, p->model, &p->config, p->dtype,
                                       p->tokenizer, p->metrics, &options, &p->engine, err);
    if (status == STATUS_OK)
        log_event(LOG_INFO, "pool", "bytes=%zu pages=%d", pool_bytes,
                  atomic_load(&p->metrics->pages_total));
    return status;
}

// ------------------------------------------------------------------ adapters named at start

// What was loaded at run time came later than this command line: it keeps its name.
static bool restored(struct program *p, const char *name) {
    for (int i = 0; i < p->restored_count; i++)
        if (strcmp(p->restored[i]->name, name) == 0) return true;
    return false;
}

static enum status register_adapter(struct program *p, const char *name, const char *source,
                                    struct error *err) {
    struct adapter *adapter = NULL;
    enum status status = registry_check_name(p->registry, name, err);
    if (!status && restored(p, name)) return STATUS_OK;
    if (!status) status = registry_begin(p->registry, name, false, err);
    if (!status) {
        if (adapter_is_dummy(source) && !p->dummy)
            status = error_set(err, STATUS_FORBIDDEN, "dummy: adapters need --load-format dummy");
        else
            status =
                adapter_open(engine_lora_geometry(p->engine), name, -1, source, &adapter, err);
        registry_commit(p->registry, name, adapter);
    }
    return status ? error_prefix(err, "adapter '%.60s' from %.120s", name, source) : status;
}

static enum status register_named(struct program *p, struct error *err) {
    enum status status = STATUS_OK;
    for (int i = 0; i < p->options.adapter_count && !status; i++) {
        const char *text = p->options.adapters[i], *equals = strchr(text, '=');
        char *name = mem_strndup(text, (size_t)(equals - text));
        status = register_adapter(p, name, equals + 1, err);
        free(name);
        if ((i + 1) % 1000 == 0) log_event(LOG_INFO, "adapters_loading", "registered=%d", i + 1);
    }
    return status;
}

static enum status register_folder(struct program *p, struct error *err) {
    const char *folder = p->options.adapter_dir;
    if (!folder) return STATUS_OK;
    struct dirent **list;
    int count = scandir(folder, &list, NULL, alphasort), registered = 0;
    if (count < 0)
        return error_set(err, STATUS_NOT_FOUND, "--adapter-dir %.200s cannot be read", folder);
    enum status status = STATUS_OK;
    for (int i = 0; i < count; i++) {
        char *path = path_join(folder, list[i]->d_name);
        char *config = path_join(path, "adapter_config.json");
        if (!status && list[i]->d_name[0] != '.' && access(config, F_OK) == 0) {
            status = register_adapter(p, list[i]->d_name, path, err);
            registered += !status;
        }
        free(config);
        free(path);
        free(list[i]);
    }
    free(list);
    if (!status)
        log_event(LOG_INFO, "adapters_registered", "folder=%s count=%d", folder, registered);
    return status;
}

static enum status register_all(struct program *p, struct error *err) {
    enum status status = api_restore(p->api, err);
    if (status) return status;
    p->restored_count = registry_list(p->registry, &p->restored);
    if (!(status = register_named(p, err))) status = register_folder(p, err);
    for (int i = 0; i < p->restored_count; i++) adapter_unref(p->restored[i]);
    free(p->restored);
    p->restored = NULL;
    p->restored_count = 0;
    return status;
}

// ------------------------------------------------------------------ life

static enum status create(struct program *p, struct error *err) {
    const struct options *o = &p->options;
    p->base_id = choose_base_id(o);
    p->registry = registry_create(p->base_id);
    enum status status = o->state_dir ? store_open(o->state_dir, &p->store, err) : STATUS_OK;
    if (status || (status = load_model(p, err))) return status;
    // The address is taken before the adapters load; what arrives meanwhile waits in the backlog.
    struct api_setup setup = {.options = o,
                              .config = &p->config,
                              .tokenizer = p->tokenizer,
                              .chat_template = p->chat_template,
                              .registry = p->registry,
                              .store = p->store,
                              .base_id = p->base_id,
                              .context_max = p->context_max,
                              .dummy = p->dummy};
    if ((status = api_create(&setup, &p->api, err)) || (status = create_engine(p, err)))
        return status;
    api_set_engine(p->api, p->engine, p->metrics);
    if ((status = register_all(p, err))) return status;
    return engine_start(p->engine, err);
}

static void destroy(struct program *p) {
    engine_destroy(p->engine);
    api_destroy(p->api);
    registry_destroy(p->registry);
    store_close(p->store);
    model_destroy(p->model);
    p->ops->close(p->backend);
    chat_template_destroy(p->chat_template);
    tokenizer_destroy(p->tokenizer);
    free(p->metrics);
    free(p->base_id);
    options_deinit(&p->options);
}

static int fail(const struct error *err) {
    fprintf(stderr, "lorad: %s\n", err->text);
    return 1;
}

static int serve(int argc, char **argv) {
    struct program p = {0};
    struct error err = {0};
    if (options_parse(argc, argv, &p.options, &err)) return fail(&err);
    if (p.options.help) {
        options_print_help(stdout);
        return 0;
    }
    enum log_level level = LOG_INFO;
    (void)log_level_parse(p.options.log_level, &level);
    log_configure(level, strcmp(p.options.log_format, "json") == 0);
    // Weights are mapped one by one, not cut out of a heap that loading has stretched: else the gaps
    // that their alignment leaves there stay resident.
    (void)mallopt(M_MMAP_THRESHOLD, 4 << 20);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); // a file over its limit is a failed write, not the end
    if (create(&p, &err)) return fail(&err); // the process ends: nothing to give back
    if (!p.options.api_key_file && !p.options.host_given)
        log_event(LOG_INFO, "no_api_keys", "listening on loopback only; --api-key-file and --host "
                  "open it to others");
    bool v6 = strchr(p.options.host, ':') != NULL;
    printf("listening on http://%s%s%s:%d\n", v6 ? "[" : "", p.options.host, v6 ? "]" : "",
           api_port(p.api));
    fflush(stdout);
    int code = api_run(p.api);
    log_event(LOG_INFO, "stopped", "exit=%d", code);
    destroy(&p);
    return code;
}

int main(int argc, char **argv) {
    const char *command = argc > 1 ? argv[1] : "help";
    if (strcmp(command, "serve") == 0) return serve(argc - 1, argv + 1);
    if (strcmp(command, "--version") == 0 || strcmp(command, "version") == 0) {
        puts("lorad 0.1.0");
        return 0;
    }
    if (strcmp(command, "help") != 0 && strcmp(command, "--help") != 0) {
        fprintf(stderr, "lorad: unknown command '%.60s'; lorad serve --help says what there is\n",
                command);
        return 2;
    }
    options_print_help(stdout);
    return 0;
}
