// Reads config.json and generation_config.json of a Llama-architecture model into struct
// model_config. Called once at start, on the main thread, before anything is allocated.
//
// It refuses rather than guesses: an architecture, activation, bias, rope type or quantization that
// forward.c does not compute is an error that names config.json and the field, because ignoring it
// would serve wrong answers. Both spellings of the rope fields are read: transformers 4 writes
// "rope_theta" and "rope_scaling", transformers 5 writes "rope_parameters".
#include "server/model/config.h"

#include "base/file.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    CONFIG_BYTES_MAX = 1 << 20,
    LAYERS_MAX = 1024,
    HIDDEN_MAX = 1 << 16,
    HEADS_MAX = 1024,
    HEAD_SIZE_MAX = 256,
    FFN_MAX = 1 << 20,
    VOCABULARY_MAX = 1 << 22,
    CONTEXT_MAX = 1 << 24,
    MISTRAL_KV_HEADS = 8,  // what MistralConfig means when the field is absent
    MISTRAL_WINDOW = 4096, // likewise
};

static const char config_name[] = "config.json";
static const char generation_name[] = "generation_config.json";

// STATUS_NOT_FOUND when the folder has no such file. The caller releases *root.
static enum status load_object(const char *folder, const char *name, json_t **root,
                               struct error *err) {
    char *path = path_join(folder, name), *text = NULL;
    size_t bytes = 0;
    enum status status = file_read_all(path, CONFIG_BYTES_MAX, &text, &bytes, err);
    free(path);
    if (status != STATUS_OK) return status;
    json_error_t parse;
    *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &parse);
    free(text);
    if (!*root)
        return error_set(err, STATUS_INVALID, "%s: not JSON: line %d: %.120s", name, parse.line,
                         parse.text);
    if (json_is_object(*root)) return STATUS_OK;
    json_decref(*root);
    *root = NULL;
    return error_set(err, STATUS_INVALID, "%s: must be a JSON object", name);
}

// The field, or NULL when it is absent or null.
static const json_t *field(const json_t *object, const char *name) {
    const json_t *value = json_object_get(object, name);
    return json_is_null(value) ? NULL : value;
}

// An integer in [low, high]; `fallback` when absent, unless that is below `low`: then required.
static enum status read_int(const json_t *object, const char *name, int low, int high,
                            int fallback, int *out, struct error *err) {
    const json_t *value = field(object, name);
    if (!value && fallback >= low) {
        *out = fallback;
        return STATUS_OK;
    }
    if (!value)
        return error_set(err, STATUS_INVALID, "%s: \"%s\" is missing", config_name, name);
    json_int_t number = json_integer_value(value);
    if (!json_is_integer(value) || number < low || number > high)
        return error_set(err, STATUS_INVALID, "%s: \"%s\" must be an integer from %d to %d",
                         config_name, name, low, high);
    *out = (int)number;
    return STATUS_OK;
}

// A finite number above zero; `fallback` when absent, unless that is 0: then required.
static enum status read_positive(const json_t *object, const char *name, double fallback,
                                 double *out, struct error *err) {
    const json_t *value = field(object, name);
    if (!value && fallback > 0) {
        *out = fallback;
        return STATUS_OK;
    }
    if (!value)
        return error_set(err, STATUS_INVALID, "%s: \"%s\" is missing", config_name, name);
    double number = json_number_value(value);
    if (!json_is_number(value) || !isfinite(number) || number <= 0)
        return error_set(err, STATUS_INVALID, "%s: \"%s\" must be a finite number above 0",
                         config_name, name);
    *out = number;
    return STATUS_OK;
}

static enum status read_bool(const json_t *object, const char *name, bool fallback, bool *out,
                             struct error *err) {
    const json_t *value = field(object, name);
    if (value && !json_is_boolean(value))
        return error_set(err, STATUS_INVALID, "%s: \"%s\" must be true or false", config_name,
                         name);
    *out = value ? json_is_true(value) : fallback;
    return STATUS_OK;
}

static enum status read_architecture(const json_t *root, bool *mistral, struct error *err) {
    const json_t *list = field(root, "architectures");
    const json_t *first = json_array_get(list, 0);
    if (!json_is_array(list) || json_array_size(list) != 1 || !json_is_string(first))
        return error_set(err, STATUS_INVALID,
                         "%s: \"architectures\" must be [\"LlamaForCausalLM\"] or "
                         "[\"MistralForCausalLM\"]",
                         config_name);
    const char *name = json_string_value(first);
    *mistral = strcmp(name, "MistralForCausalLM") == 0;
    if (*mistral || strcmp(name, "LlamaForCausalLM") == 0) return STATUS_OK;
    return error_set(err, STATUS_UNSUPPORTED,
                     "%s: \"architectures\": %.80s is not supported, only LlamaForCausalLM and "
                     "MistralForCausalLM are",
                     config_name, name);
}

// What would change the arithmetic in ways that forward.c does not do.
static enum status refuse_unsupported(const json_t *root, bool mistral, int context,
                                      struct error *err) {
    static const char *const biases[] = {"attention_bias", "mlp_bias"};
    for (size_t i = 0; i < sizeof biases / sizeof *biases; i++) {
        bool bias = false;
        enum status status = read_bool(root, biases[i], false, &bias, err);
        if (status != STATUS_OK) return status;
        if (bias)
            return error_set(err, STATUS_UNSUPPORTED,
                             "%s: \"%s\" is true; linear layers with a bias are not supported",
                             config_name, biases[i]);
    }
    const json_t *act = field(root, "hidden_act");
    if (act && (!json_is_string(act) || strcmp(json_string_value(act), "silu") != 0))
        return error_set(err, STATUS_UNSUPPORTED,
                         "%s: \"hidden_act\" must be \"silu\", not \"%.60s\"", config_name,
                         json_is_string(act) ? json_string_value(act) : "(not a string)");
    const json_t *partial = field(root, "partial_rotary_factor");
    if (!partial) partial = field(field(root, "rope_parameters"), "partial_rotary_factor");
    if (partial && json_number_value(partial) != 1.0)
        return error_set(err, STATUS_UNSUPPORTED, "%s: \"partial_rotary_factor\" must be 1",
                         config_name);
    if (!mistral) return STATUS_OK;
    // A window at least as long as the context masks nothing.
    const json_t *window = json_object_get(root, "sliding_window");
    json_int_t width = window ? json_integer_value(window) : MISTRAL_WINDOW;
    if ((!window || !json_is_null(window)) && width < context)
        return error_set(err, STATUS_UNSUPPORTED,
                         "%s: \"sliding_window\" must be null: sliding-window attention is not "
                         "supported",
                         config_name);
    return STATUS_OK;
}

static bool text_is(const json_t *object, const char *name, const char *text, bool absent) {
    const json_t *value = field(object, name);
    return value ? json_is_string(value) && strcmp(json_string_value(value), text) == 0 : absent;
}

// quantization_config: GPTQ's and AWQ's, as AutoGPTQ, GPTQModel and AutoAWQ write them.
static enum status read_packing(const json_t *root, struct packing *out, struct error *err) {
    const json_t *object = field(root, "quantization_config");
    *out = (struct packing){0};
    if (!object) return STATUS_OK;
    bool gptq = text_is(object, "quant_method", "gptq", false);
    if (!gptq && !text_is(object, "quant_method", "awq", false))
        return error_set(err, STATUS_UNSUPPORTED, "%s: \"quantization_config\": \"quant_method\" must "
                         "be \"gptq\" or \"awq\"", config_name);
    enum status status = read_int(object, "bits", 4, 8, -1, &out->bits, err);
    if (!status) status = read_int(object, "group_size", -1, 1 << 20, 128, &out->group, err);
    if (status) return error_prefix(err, "\"quantization_config\"");
    bool v1 = text_is(object, "checkpoint_format", "gptq", true);
    bool known = gptq ? (out->bits == 4 || out->bits == 8) &&
                            (v1 || text_is(object, "checkpoint_format", "gptq_v2", false)) &&
                            json_object_size(field(object, "dynamic")) == 0
                      : out->bits == 4 && text_is(object, "version", "gemm", true);
    if (!known || out->group == 0)
        return error_set(err, STATUS_UNSUPPORTED, "%s: \"quantization_config\": GPTQ of 4 or 8 bits "
                         "(formats gptq and gptq_v2, one setting for all layers) and AWQ of 4 bits "
                         "(version gemm) are supported", config_name);
    out->method = gptq ? PACKING_GPTQ : PACKING_AWQ;
    out->zero_offset = gptq && v1;
    return STATUS_OK;
}

static enum status read_shape(const json_t *root, bool mistral, struct model_config *out,
                              struct error *err) {
    enum status status = read_int(root, "hidden_size", 1, HIDDEN_MAX, -1, &out->hidden, err);
    if (status == STATUS_OK)
        status = read_int(root, "num_hidden_layers", 1, LAYERS_MAX, -1, &out->layers, err);
    if (status == STATUS_OK)
        status = read_int(root, "num_attention_heads", 1, HEADS_MAX, -1, &out->query_heads, err);
    if (status == STATUS_OK)
        status = read_int(root, "num_key_value_heads", 1, HEADS_MAX,
                          mistral ? MISTRAL_KV_HEADS : out->query_heads, &out->kv_heads, err);
    if (status == STATUS_OK)
        status = read_int(root, "intermediate_size", 1, FFN_MAX, -1, &out->ffn, err);
    if (status == STATUS_OK)
        status = read_int(root, "vocab_size", 1, VOCABULARY_MAX, -1, &out->vocabulary, err);
    if (status == STATUS_OK)
        status = read_int(root, "max_position_embeddings", 1, CONTEXT_MAX, -1, &out->context_max,
                          err);
    if (status == STATUS_OK && out->query_heads % out->kv_heads != 0)
        status = error_set(err, STATUS_INVALID,
                           "%s: \"num_key_value_heads\" (%d) must divide "
                           "\"num_attention_heads\" (%d)",
                           config_name, out->kv_heads, out->query_heads);
    if (status != STATUS_OK) return status;

    if (!field(root, "head_dim") && out->hidden % out->query_heads != 0)
        return error_set(err, STATUS_INVALID,
                         "%s: \"num_attention_heads\" (%d) must divide \"hidden_size\" (%d) when "
                         "there is no \"head_dim\"",
                         config_name, out->query_heads, out->hidden);
    int head_size = out->hidden / out->query_heads;
    status = read_int(root, "head_dim", 0, 1 << 30, head_size, &out->head_size, err);
    if (status != STATUS_OK) return status;
    if (out->head_size < 2 || out->head_size > HEAD_SIZE_MAX || out->head_size % 2 != 0)
        return error_set(err, STATUS_INVALID,
                         "%s: \"head_dim\" (or hidden_size / num_attention_heads) is %d; it must "
                         "be even and from 2 to %d",
                         config_name, out->head_size, HEAD_SIZE_MAX);
    return STATUS_OK;
}

static enum status read_rope_type(const json_t *rope, enum rope_scaling *out, struct error *err) {
    const json_t *type = field(rope, "rope_type");
    if (!type) type = field(rope, "type");
    if (!type && field(rope, "factor"))
        return error_set(err, STATUS_INVALID,
                         "%s: \"rope_type\" is missing beside \"factor\"", config_name);
    const char *name = type ? json_string_value(type) : "default";
    if (name && strcmp(name, "default") == 0)
        *out = ROPE_DEFAULT;
    else if (name && strcmp(name, "linear") == 0)
        *out = ROPE_LINEAR;
    else if (name && strcmp(name, "llama3") == 0)
        *out = ROPE_LLAMA3;
    else
        return error_set(err, STATUS_UNSUPPORTED,
                         "%s: \"rope_type\" must be \"default\", \"linear\" or \"llama3\", not "
                         "\"%.60s\"",
                         config_name, name ? name : "(not a string)");
    return STATUS_OK;
}

static enum status read_rope(const json_t *root, struct model_config *out, struct error *err) {
    const json_t *rope = field(root, "rope_parameters");
    const char *rope_name = "rope_parameters";
    if (!rope) {
        rope = field(root, "rope_scaling");
        rope_name = "rope_scaling";
    }
    if (rope && !json_is_object(rope))
        return error_set(err, STATUS_INVALID, "%s: \"%s\" must be an object or null", config_name,
                         rope_name);
    const json_t *holder = field(rope, "rope_theta") ? rope : root;
    enum status status = read_positive(holder, "rope_theta", 10000.0, &out->rope_theta, err);
    out->rope_scaling = ROPE_DEFAULT;
    out->rope_factor = 1.0;
    if (status == STATUS_OK && rope) status = read_rope_type(rope, &out->rope_scaling, err);
    if (status == STATUS_OK && out->rope_scaling != ROPE_DEFAULT)
        status = read_positive(rope, "factor", 0, &out->rope_factor, err);
    if (status == STATUS_OK && out->rope_factor < 1.0)
        status = error_set(err, STATUS_INVALID, "%s: \"%s\": \"factor\" must be at least 1",
                           config_name, rope_name);
    if (status != STATUS_OK || out->rope_scaling != ROPE_LLAMA3) return status;

    status = read_positive(rope, "low_freq_factor", 0, &out->rope_low_freq_factor, err);
    if (status == STATUS_OK)
        status = read_positive(rope, "high_freq_factor", 0, &out->rope_high_freq_factor, err);
    if (status == STATUS_OK)
        status = read_int(rope, "original_max_position_embeddings", 1, CONTEXT_MAX, -1,
                          &out->rope_original_context, err);
    if (status == STATUS_OK && out->rope_high_freq_factor <= out->rope_low_freq_factor)
        status = error_set(err, STATUS_INVALID,
                           "%s: \"high_freq_factor\" must be above \"low_freq_factor\"",
                           config_name);
    return status;
}

static enum status read_dtype(const json_t *root, struct model_config *out, struct error *err) {
    static const struct {
        const char *name;
        enum dtype dtype;
    } names[] = {{"bfloat16", DTYPE_BF16}, {"float16", DTYPE_F16}, {"float32", DTYPE_F32}};
    const json_t *value = field(root, "dtype");
    if (!value) value = field(root, "torch_dtype");
    out->stored_dtype = DTYPE_BF16;
    if (!value) return STATUS_OK;
    const char *text = json_string_value(value);
    for (size_t i = 0; text && i < sizeof names / sizeof *names; i++) {
        if (strcmp(text, names[i].name) != 0) continue;
        out->stored_dtype = names[i].dtype;
        return STATUS_OK;
    }
    return error_set(err, STATUS_UNSUPPORTED,
                     "%s: \"torch_dtype\" must be \"bfloat16\", \"float16\" or \"float32\", not "
                     "\"%.60s\"",
                     config_name, text ? text : "(not a string)");
}

static enum status read_token_id(const json_t *value, const char *file, const char *name,
                                 int vocabulary, int *out, struct error *err) {
    json_int_t id = json_integer_value(value);
    if (!json_is_integer(value) || id < 0 || id >= vocabulary)
        return error_set(err, STATUS_INVALID,
                         "%s: \"%s\" must be a token id from 0 to %d (vocab_size - 1)", file,
                         name, vocabulary - 1);
    *out = (int)id;
    return STATUS_OK;
}

// An id, a list of ids, or nothing, which leaves what was read before.
static enum status read_eos(const json_t *root, const char *file, struct model_config *out,
                            struct error *err) {
    const json_t *value = field(root, "eos_token_id");
    if (!value) return STATUS_OK;
    size_t count = json_is_array(value) ? json_array_size(value) : 1;
    if (count > EOS_IDS_MAX)
        return error_set(err, STATUS_INVALID, "%s: \"eos_token_id\" has %zu ids; at most %d", file,
                         count, EOS_IDS_MAX);
    for (size_t i = 0; i < count; i++) {
        const json_t *id = json_is_array(value) ? json_array_get(value, i) : value;
        enum status status =
            read_token_id(id, file, "eos_token_id", out->vocabulary, &out->eos_ids[i], err);
        if (status != STATUS_OK) return status;
    }
    out->eos_count = (int)count;
    return STATUS_OK;
}

static enum status read_config(const json_t *root, struct model_config *out, struct error *err) {
    bool mistral = false;
    enum status status = read_architecture(root, &mistral, err);
    if (status == STATUS_OK) status = read_shape(root, mistral, out, err);
    if (status == STATUS_OK) status = refuse_unsupported(root, mistral, out->context_max, err);
    if (status == STATUS_OK) status = read_packing(root, &out->packing, err);
    if (status == STATUS_OK) status = read_rope(root, out, err);
    if (status == STATUS_OK) status = read_dtype(root, out, err);
    double epsilon = 0;
    if (status == STATUS_OK) status = read_positive(root, "rms_norm_eps", 1e-6, &epsilon, err);
    out->norm_epsilon = (float)epsilon;
    if (status == STATUS_OK && epsilon > 1)
        status = error_set(err, STATUS_INVALID, "%s: \"rms_norm_eps\" must be at most 1",
                           config_name);
    if (status == STATUS_OK)
        status = read_bool(root, "tie_word_embeddings", false, &out->tied_embeddings, err);
    out->bos_id = -1;
    const json_t *bos = field(root, "bos_token_id");
    if (status == STATUS_OK && bos)
        status = read_token_id(bos, config_name, "bos_token_id", out->vocabulary, &out->bos_id,
                               err);
    if (status == STATUS_OK) status = read_eos(root, config_name, out, err);
    return status;
}

enum status model_config_load(const char *folder, struct model_config *out, struct error *err) {
    *out = (struct model_config){0};
    json_t *root = NULL;
    enum status status = load_object(folder, config_name, &root, err);
    if (status != STATUS_OK) return status;
    status = read_config(root, out, err);
    json_decref(root);
    if (status != STATUS_OK) return status;

    root = NULL;
    status = load_object(folder, generation_name, &root, err);
    if (status == STATUS_NOT_FOUND) {
        error_clear(err);
        return STATUS_OK;
    }
    if (status == STATUS_OK) status = read_eos(root, generation_name, out, err);
    json_decref(root);
    return status;
}
