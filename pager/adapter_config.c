// Reads PEFT's adapter_config.json into a table: the rank and the scale of every module of every
// layer. Called by loader threads. A setting that changes the adapter's output is either carried
// out or refused by its name; none is dropped, not even one that lorad has never heard of.
//
// Field names and matching rules are those of PEFT's LoraConfig: a name in target_modules,
// rank_pattern or alpha_pattern stands for every module whose path is that name or ends in
// "." + name; the first pattern that matches wins.
#include "pager/adapter_internal.h"

#include "base/file.h"
#include "base/memory.h"
#include "base/verify.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CONFIG "adapter_config.json"
enum { CONFIG_BYTES_MAX = 1 << 20, MODULE_PATH_MAX = 64 };

const char *const lora_module_names[LORA_MODULES] = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj",
};

// Read below, or without effect on what an adapter computes once trained.
static const char *const known_fields[] = {
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern",
    "alpha_pattern", "use_rslora", "layers_to_transform", "init_lora_weights", "bias",
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "lora_dropout", "layers_pattern", "megatron_core", "qalora_group_size",
    "eva_config", "runtime_config", "ensure_weight_tying", "alora_invocation_tokens",
};

struct reader {
    json_t *root;
    const struct lora_geometry *geometry;
    struct error *err;
};

static void module_path(char path[MODULE_PATH_MAX], int layer, int module) {
    snprintf(path, MODULE_PATH_MAX, "model.layers.%d.%s", layer, lora_module_names[module]);
}

static bool path_ends_in(const char *path, const char *name) {
    size_t path_length = strlen(path), length = strlen(name);
    if (length == 0 || length > path_length) return false;
    if (strcmp(path + path_length - length, name) != 0) return false;
    return length == path_length || path[path_length - length - 1] == '.';
}

static bool names_some_module(const struct lora_geometry *geometry, const char *name) {
    char path[MODULE_PATH_MAX];
    for (int layer = 0; layer < geometry->layers; layer++)
        for (int module = 0; module < LORA_MODULES; module++) {
            module_path(path, layer, module);
            if (path_ends_in(path, name)) return true;
        }
    return false;
}

// null, false, 0, "", [] and {} all mean that an optional setting is not used.
static bool is_off(const json_t *value) {
    return !value || json_is_null(value) || json_is_false(value) ||
           (json_is_string(value) && json_string_length(value) == 0) ||
           (json_is_number(value) && json_number_value(value) == 0) ||
           (json_is_array(value) && json_array_size(value) == 0) ||
           (json_is_object(value) && json_object_size(value) == 0);
}

static const char *why_refused(const char *field) {
    static const struct {
        const char *field, *why;
    } table[] = {
        {"use_dora", "DoRA adapters are not supported; train with use_dora=false"},
        {"modules_to_save", "whole modules saved beside the adapter are not supported"},
        {"fan_in_fan_out", "transposed weights are not supported; it must be false"},
        {"lora_bias", "a bias on lora_B is not supported; it must be false"},
        {"trainable_token_indices", "trained token embeddings are not supported"},
        {"target_parameters", "LoRA on bare parameters is not supported"},
        {"layer_replication", "replicated layers are not supported"},
        {"use_qalora", "QALoRA is not supported; it must be false"},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (strcmp(table[i].field, field) == 0) return table[i].why;
    return "lorad does not know this setting and cannot tell whether it changes the output; "
           "remove it or set it to null";
}

static enum status check_unsupported(const struct reader *r) {
    const char *field;
    json_t *value;
    json_object_foreach(r->root, field, value) {
        bool known = false;
        for (size_t i = 0; i < sizeof known_fields / sizeof *known_fields; i++)
            known |= strcmp(known_fields[i], field) == 0;
        if (!known && !is_off(value))
            return error_set(r->err, STATUS_UNSUPPORTED, CONFIG ": %.60s: %s", field,
                             why_refused(field));
    }
    json_t *type = json_object_get(r->root, "peft_type");
    if (!json_is_string(type) || strcmp(json_string_value(type), "LORA") != 0)
        return error_set(r->err, STATUS_UNSUPPORTED, CONFIG ": peft_type is %.40s; it must be "
                         "\"LORA\"", json_is_string(type) ? json_string_value(type) : "missing");
    json_t *bias = json_object_get(r->root, "bias");
    if (!is_off(bias) && (!json_is_string(bias) || strcmp(json_string_value(bias), "none") != 0))
        return error_set(r->err, STATUS_UNSUPPORTED, CONFIG ": bias is %.40s; trained biases are "
                         "not supported, it must be \"none\"",
                         json_is_string(bias) ? json_string_value(bias) : "not a string");
    // These ways to start training also change the base weights, which all adapters share here.
    json_t *start = json_object_get(r->root, "init_lora_weights");
    const char *text = json_string_value(start);
    if (start && !json_is_boolean(start) && !json_is_null(start) &&
        !(text && (!strcmp(text, "gaussian") || !strcmp(text, "eva") ||
                   !strcmp(text, "orthogonal"))))
        return error_set(r->err, STATUS_UNSUPPORTED, CONFIG ": init_lora_weights is %.40s, which "
                         "changes the base weights; convert the adapter to a plain LoRA first",
                         text ? text : "not a string");
    return STATUS_OK;
}

static enum status read_flag(const struct reader *r, const char *field, bool *out) {
    json_t *value = json_object_get(r->root, field);
    if (value && !json_is_null(value) && !json_is_boolean(value))
        return error_set(r->err, STATUS_INVALID, CONFIG ": %s must be true or false", field);
    *out = json_is_true(value);
    return STATUS_OK;
}

static enum status read_rank(const struct reader *r, const json_t *value, const char *where,
                             int *out) {
    if (!json_is_integer(value) || json_integer_value(value) < 1)
        return error_set(r->err, STATUS_INVALID, CONFIG ": %.80s must be an integer of at least 1",
                         where);
    json_int_t rank = json_integer_value(value);
    if (rank > r->geometry->rank_max)
        return error_set(r->err, STATUS_INVALID, CONFIG ": %.80s is %lld; the largest rank served "
                         "is %d", where, (long long)rank, r->geometry->rank_max);
    *out = (int)rank;
    return STATUS_OK;
}

static enum status read_alpha(const struct reader *r, const json_t *value, const char *where,
                              double *out) {
    double alpha = json_is_number(value) ? json_number_value(value) : NAN;
    if (!isfinite(alpha) || alpha <= 0)
        return error_set(r->err, STATUS_INVALID, CONFIG ": %.80s must be a number above 0", where);
    *out = alpha;
    return STATUS_OK;
}

// target_modules and exclude_modules: a list of names that all stand for some module.
static enum status check_names(const struct reader *r, const char *field, const json_t *list) {
    if (!json_is_array(list))
        return error_set(r->err, STATUS_UNSUPPORTED, CONFIG ": %s must be a list of module names"
                         " (patterns are not supported)", field);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i));
        if (!name)
            return error_set(r->err, STATUS_INVALID, CONFIG ": %s[%zu] must be a string", field, i);
        if (!names_some_module(r->geometry, name))
            return error_set(r->err, STATUS_UNSUPPORTED, CONFIG ": %s names \"%.80s\"; this model"
                             " takes q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
                             " in %d layers", field, name, r->geometry->layers);
    }
    return STATUS_OK;
}

static enum status check_targets(const struct reader *r) {
    json_t *targets = json_object_get(r->root, "target_modules");
    json_t *excluded = json_object_get(r->root, "exclude_modules");
    if (is_off(targets))
        return error_set(r->err, STATUS_INVALID, CONFIG ": target_modules is missing or empty; it "
                         "must list module names, or be \"all-linear\"");
    if (!json_is_string(targets) || strcmp(json_string_value(targets), "all-linear") != 0) {
        enum status status = check_names(r, "target_modules", targets);
        if (status != STATUS_OK) return status;
    }
    return is_off(excluded) ? STATUS_OK : check_names(r, "exclude_modules", excluded);
}

static bool list_matches(const json_t *list, const char *path) {
    for (size_t i = 0; i < json_array_size(list); i++)
        if (path_ends_in(path, json_string_value(json_array_get(list, i)))) return true;
    return false;
}

static enum status check_pattern_keys(const struct reader *r, const char *field) {
    json_t *pattern = json_object_get(r->root, field), *value;
    if (is_off(pattern)) return STATUS_OK;
    if (!json_is_object(pattern))
        return error_set(r->err, STATUS_INVALID, CONFIG ": %s must be an object", field);
    const char *key;
    char where[128];
    json_object_foreach(pattern, key, value) {
        if (!names_some_module(r->geometry, key))
            return error_set(r->err, STATUS_UNSUPPORTED, CONFIG ": %s has the key \"%.80s\", which "
                             "is not the name of a module or the end of one (regular expressions "
                             "are not supported)", field, key);
        snprintf(where, sizeof where, "%s[\"%.80s\"]", field, key);
        int rank;
        double alpha;
        enum status status = strcmp(field, "rank_pattern") == 0
                                 ? read_rank(r, value, where, &rank)
                                 : read_alpha(r, value, where, &alpha);
        if (status != STATUS_OK) return status;
    }
    return STATUS_OK;
}

static const json_t *pattern_find(const json_t *pattern, const char *path) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)pattern, key, value)
        if (path_ends_in(path, key)) return value;
    return NULL;
}

// layers_to_transform: null, one layer, or a list of layers; wanted[layer] says which.
static enum status read_layers(const struct reader *r, bool *wanted) {
    json_t *field = json_object_get(r->root, "layers_to_transform");
    bool all = !field || json_is_null(field);
    for (int layer = 0; layer < r->geometry->layers; layer++) wanted[layer] = all;
    if (all) return STATUS_OK;
    size_t count = json_is_array(field) ? json_array_size(field) : 1;
    for (size_t i = 0; i < count; i++) {
        json_t *item = json_is_array(field) ? json_array_get(field, i) : field;
        if (!json_is_integer(item) || json_integer_value(item) < 0 ||
            json_integer_value(item) >= r->geometry->layers)
            return error_set(r->err, STATUS_INVALID, CONFIG ": layers_to_transform must hold layer "
                             "numbers from 0 to %d", r->geometry->layers - 1);
        wanted[json_integer_value(item)] = true;
    }
    return STATUS_OK;
}

static enum status read_invocation(const struct reader *r, struct adapter_invocation *out) {
    json_t *list = json_object_get(r->root, "alora_invocation_tokens");
    out->count = 0;
    if (is_off(list)) return STATUS_OK;
    if (!json_is_array(list) || json_array_size(list) > INVOCATION_MAX)
        return error_set(r->err, STATUS_INVALID, CONFIG ": alora_invocation_tokens must be a list "
                         "of 1 to %d token ids", INVOCATION_MAX);
    for (size_t i = 0; i < json_array_size(list); i++) {
        json_t *id = json_array_get(list, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) > INT32_MAX)
            return error_set(r->err, STATUS_INVALID, CONFIG ": alora_invocation_tokens[%zu] must "
                             "be a token id", i);
        out->tokens[out->count++] = (int32_t)json_integer_value(id);
    }
    return STATUS_OK;
}

static enum status fill_plan(const struct reader *r, struct adapter_plan *plan) {
    int rank = 0;
    double alpha = 0;
    bool rslora = false;
    enum status status;
    if ((status = read_rank(r, json_object_get(r->root, "r"), "r", &rank)) ||
        (status = read_alpha(r, json_object_get(r->root, "lora_alpha"), "lora_alpha", &alpha)) ||
        (status = read_invocation(r, &plan->invocation)) ||
        (status = read_flag(r, "use_rslora", &rslora)) || (status = check_targets(r)) ||
        (status = check_pattern_keys(r, "rank_pattern")) ||
        (status = check_pattern_keys(r, "alpha_pattern")))
        return status;
    int layers = r->geometry->layers;
    bool *wanted = mem_zalloc((size_t)layers, sizeof *wanted);
    status = read_layers(r, wanted);
    const json_t *targets = json_object_get(r->root, "target_modules");
    const json_t *excluded = json_object_get(r->root, "exclude_modules");
    const json_t *ranks = json_object_get(r->root, "rank_pattern");
    const json_t *alphas = json_object_get(r->root, "alpha_pattern");
    for (int i = 0; status == STATUS_OK && i < layers * LORA_MODULES; i++) {
        char path[MODULE_PATH_MAX];
        module_path(path, i / LORA_MODULES, i % LORA_MODULES);
        if (!wanted[i / LORA_MODULES] || list_matches(excluded, path)) continue;
        if (json_is_array(targets) && !list_matches(targets, path)) continue;
        const json_t *own_rank = pattern_find(ranks, path);
        const json_t *own_alpha = pattern_find(alphas, path);
        struct adapter_plan_entry *entry = &plan->entry[i];
        entry->rank = own_rank ? (int)json_integer_value(own_rank) : rank;
        entry->scale = (own_alpha ? json_number_value(own_alpha) : alpha) /
                       (rslora ? sqrt(entry->rank) : entry->rank);
        VERIFY_OP(entry->rank, >, 0);
    }
    free(wanted);
    return status;
}

enum status adapter_config_load(const char *folder, const struct lora_geometry *geometry,
                                struct adapter_plan *plan, struct error *err) {
    plan->entry = NULL;
    char *path = path_join(folder, CONFIG), *text = NULL;
    size_t bytes = 0;
    enum status status = file_read_all(path, CONFIG_BYTES_MAX, &text, &bytes, err);
    free(path);
    if (status == STATUS_NOT_FOUND && access(folder, F_OK) != 0)
        return error_set(err, status, "there is no such adapter folder");
    if (status == STATUS_NOT_FOUND)
        return error_set(err, STATUS_INVALID, CONFIG ": there is no such file in the adapter's "
                         "folder");
    if (status == STATUS_TOO_LARGE)
        return error_set(err, STATUS_INVALID, CONFIG ": larger than %d bytes", CONFIG_BYTES_MAX);
    if (status != STATUS_OK) return status;
    json_error_t where;
    struct reader r = {json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &where), geometry, err};
    free(text);
    if (!r.root)
        return error_set(err, STATUS_INVALID, CONFIG ": not valid JSON: %.120s (line %d)",
                         where.text, where.line);
    if (!json_is_object(r.root))
        status = error_set(err, STATUS_INVALID, CONFIG ": must be a JSON object");
    if (status == STATUS_OK) status = check_unsupported(&r);
    if (status == STATUS_OK) {
        plan->entry = mem_zalloc((size_t)geometry->layers * LORA_MODULES, sizeof *plan->entry);
        status = fill_plan(&r, plan);
    }
    if (status != STATUS_OK) {
        free(plan->entry);
        plan->entry = NULL;
    }
    json_decref(r.root);
    return status;
}
