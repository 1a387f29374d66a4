// Fills struct model_weights: from safetensors files, or from a seed (the dummy load format).
// Called once by model_create, on the main thread.
//
// Every name, shape and type is checked before the first byte of weights is read, so that a wrong
// checkpoint fails at once. Host memory holds one matrix at a time: q, k, v are stacked into one
// [(Q + 2K) D, H] buffer, gate and up into one [2F, H], packed by the backend, and freed.
#include "server/model/dummy_weights.h"
#include "server/model/model_internal.h"
#include "server/model/packed_weights.h"

#include "base/log.h"
#include "base/memory.h"
#include "base/safetensors.h"
#include "base/verify.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_MAX_BYTES = 96, STACK_MAX = 3, UPLOAD_CHUNK_ELEMENTS = 1 << 22 };

static const char embedding_name[] = "model.embed_tokens.weight";
static const char last_norm_name[] = "model.norm.weight";
static const char head_name[] = "lm_head.weight";

// The tensors of one layer, after "model.layers.N."; columns 0 means a vector.
enum layer_tensor {
    T_Q, T_K, T_V, T_O, T_GATE, T_UP, T_DOWN, T_ATTENTION_NORM, T_FFN_NORM, LAYER_TENSORS
};
static const char *const layer_tensor_names[LAYER_TENSORS] = {
    [T_Q] = "self_attn.q_proj.weight",
    [T_K] = "self_attn.k_proj.weight",
    [T_V] = "self_attn.v_proj.weight",
    [T_O] = "self_attn.o_proj.weight",
    [T_GATE] = "mlp.gate_proj.weight",
    [T_UP] = "mlp.up_proj.weight",
    [T_DOWN] = "mlp.down_proj.weight",
    [T_ATTENTION_NORM] = "input_layernorm.weight",
    [T_FFN_NORM] = "post_attention_layernorm.weight",
};

struct tensor_spec {
    char name[NAME_MAX_BYTES];
    int rows, columns;
};

static struct tensor_spec layer_spec(const struct model_config *c, int layer,
                                     enum layer_tensor tensor) {
    int q = c->query_heads * c->head_size, kv = c->kv_heads * c->head_size;
    int rows[LAYER_TENSORS] = {q, kv, kv, c->hidden, c->ffn, c->ffn, c->hidden, c->hidden,
                               c->hidden};
    int columns[LAYER_TENSORS] = {c->hidden, c->hidden, c->hidden, q, c->hidden, c->hidden,
                                  c->ffn, 0, 0};
    struct tensor_spec spec = {.rows = rows[tensor], .columns = columns[tensor]};
    snprintf(spec.name, sizeof spec.name, "model.layers.%d.%s", layer, layer_tensor_names[tensor]);
    return spec;
}

static struct tensor_spec named_spec(const char *name, int rows, int columns) {
    struct tensor_spec spec = {.rows = rows, .columns = columns};
    snprintf(spec.name, sizeof spec.name, "%s", name);
    return spec;
}

// ------------------------------------------------------------------ checking names and shapes

static void shape_text(const struct tensor_info *info, char *text, size_t bytes) {
    size_t used = (size_t)snprintf(text, bytes, "[");
    for (int i = 0; i < info->dims && used < bytes; i++)
        used += (size_t)snprintf(text + used, bytes - used, "%s%lld", i ? ", " : "",
                                 (long long)info->shape[i]);
    if (used < bytes) snprintf(text + used, bytes - used, "]");
}

static enum status check_tensor(const struct safetensors *file, const struct tensor_spec *spec,
                                struct error *err) {
    char right[48], actual[96];
    if (spec->columns)
        snprintf(right, sizeof right, "[%d, %d]", spec->rows, spec->columns);
    else
        snprintf(right, sizeof right, "[%d]", spec->rows);
    const struct tensor_info *info = safetensors_find(file, spec->name);
    if (!info)
        return error_set(err, STATUS_INVALID,
                         "model weights: tensor %s is missing; config.json asks for shape %s",
                         spec->name, right);
    bool fits = info->dims == (spec->columns ? 2 : 1) && info->shape[0] == spec->rows &&
                (!spec->columns || info->shape[1] == spec->columns);
    shape_text(info, actual, sizeof actual);
    if (!fits)
        return error_set(err, STATUS_INVALID,
                         "model weights: tensor %s has shape %s; config.json asks for %s",
                         spec->name, actual, right);
    if (info->dtype == DTYPE_OTHER)
        return error_set(err, STATUS_UNSUPPORTED,
                         "model weights: tensor %s has type %s; only F32, F16 and BF16 are "
                         "supported",
                         spec->name, info->dtype_text);
    return STATUS_OK;
}

// A weight matrix, as it is or packed.
static enum status check_matrix(const struct safetensors *file, const struct model_config *config,
                                const struct tensor_spec *spec, struct error *err) {
    if (!packed_has(file, spec->name)) return check_tensor(file, spec, err);
    return packed_check(file, &config->packing, spec->name, spec->rows, spec->columns, err);
}

static bool ends_with(const char *text, const char *end) {
    size_t length = strlen(text), end_length = strlen(end);
    return length >= end_length && strcmp(text + length - end_length, end) == 0;
}

static bool is_expected(const char *name, const struct model_config *config) {
    if (strcmp(name, embedding_name) == 0 || strcmp(name, last_norm_name) == 0) return true;
    // A tied model may carry its head too; transformers ignores it, and so do we.
    if (strcmp(name, head_name) == 0 || packed_part(name, head_name)) return true;
    // Old checkpoints store RoPE's inverse frequencies, which follow from the config.
    if (ends_with(name, "rotary_emb.inv_freq")) return true;
    int layer = 0, prefix = 0;
    if (sscanf(name, "model.layers.%9d.%n", &layer, &prefix) != 1 || prefix == 0) return false;
    if (layer < 0 || layer >= config->layers) return false;
    for (int t = 0; t < LAYER_TENSORS; t++) {
        struct tensor_spec spec = layer_spec(config, layer, (enum layer_tensor)t);
        if (strcmp(name, spec.name) == 0 || (spec.columns && packed_part(name, spec.name)))
            return true;
    }
    return false;
}

static enum status check_all(const struct safetensors *file, const struct model_config *config,
                             struct error *err) {
    struct tensor_spec spec = named_spec(embedding_name, config->vocabulary, config->hidden);
    enum status status = check_tensor(file, &spec, err);
    for (int layer = 0; layer < config->layers && status == STATUS_OK; layer++)
        for (int t = 0; t < LAYER_TENSORS && status == STATUS_OK; t++) {
            spec = layer_spec(config, layer, (enum layer_tensor)t);
            status = spec.columns ? check_matrix(file, config, &spec, err)
                                  : check_tensor(file, &spec, err);
        }
    spec = named_spec(last_norm_name, config->hidden, 0);
    if (status == STATUS_OK) status = check_tensor(file, &spec, err);
    spec = named_spec(head_name, config->vocabulary, config->hidden);
    if (status == STATUS_OK && !config->tied_embeddings)
        status = check_matrix(file, config, &spec, err);
    for (size_t i = 0; i < safetensors_count(file) && status == STATUS_OK; i++) {
        const struct tensor_info *info = safetensors_at(file, i);
        if (is_expected(info->name, config)) continue;
        char shape[96];
        shape_text(info, shape, sizeof shape);
        status = error_set(err, STATUS_INVALID,
                           "model weights: tensor %.100s of shape %s is not part of the model that "
                           "config.json describes (%d layers)",
                           info->name, shape, config->layers);
    }
    return status;
}

// ------------------------------------------------------------------ where the numbers come from

// `file` is NULL for dummy weights.
struct source {
    const struct safetensors *file;
    const struct packing *packing;
    uint64_t seed;
    void *buffer; // of the tensors read last: memory that was never touched is slow to come by
    size_t buffer_bytes;
    size_t matrix_bytes; // of what the backend has made of the matrices so far
};

static void *source_buffer(struct source *source, size_t bytes) {
    if (source->buffer_bytes < bytes) {
        free(source->buffer);
        source->buffer = mem_alloc_aligned(bytes);
        source->buffer_bytes = bytes;
    }
    return source->buffer;
}

// The tensors of `specs` one below the other, in their own type when they agree on one, else in f32.
// All have the same number of columns. The buffer is the source's, until the next call.
static enum status read_stacked(struct source *source, const struct tensor_spec *specs,
                                int count, void **buffer, enum dtype *dtype, struct error *err) {
    VERIFY_OP(count, <=, STACK_MAX);
    const struct tensor_info *infos[STACK_MAX] = {NULL};
    size_t elements[STACK_MAX], total = 0;
    *dtype = DTYPE_BF16;
    for (int i = 0; i < count; i++) {
        elements[i] = (size_t)specs[i].rows * (size_t)(specs[i].columns ? specs[i].columns : 1);
        total += elements[i];
        if (!source->file) continue;
        infos[i] = safetensors_find(source->file, specs[i].name); // NULL: packed
        VERIFY(!infos[i] || infos[i]->elements == elements[i]);
        enum dtype own = infos[i] ? infos[i]->dtype : DTYPE_F32;
        *dtype = i == 0 || own == *dtype ? own : DTYPE_F32;
    }
    size_t element_bytes = dtype_bytes(*dtype);
    char *to = *buffer = source_buffer(source, total * element_bytes);
    enum status status = STATUS_OK;
    for (int i = 0; i < count && status == STATUS_OK; i++) {
        if (!source->file) {
            dummy_weights((uint16_t *)to, elements[i], source->seed, specs[i].name);
        } else if (!infos[i]) {
            status = packed_read(source->file, source->packing, specs[i].name, specs[i].rows,
                                 specs[i].columns, (float *)(void *)to, err);
        } else if (infos[i]->dtype == *dtype) {
            status = safetensors_read(source->file, infos[i], to, err);
        } else {
            void *raw = mem_alloc_aligned(infos[i]->bytes);
            status = safetensors_read(source->file, infos[i], raw, err);
            if (status == STATUS_OK)
                dtype_convert(to, *dtype, raw, infos[i]->dtype, elements[i]);
            free(raw);
        }
        to += elements[i] * element_bytes;
    }
    return status;
}

// ------------------------------------------------------------------ into the backend

static enum status make_linear(struct model *m, struct source *source, const void *weights,
                               enum dtype dtype, int rows, int columns, struct linear **out,
                               struct error *err) {
    enum status status =
        m->ops->linear_create(m->backend, weights, dtype, rows, columns, out, err);
    if (status == STATUS_OK) source->matrix_bytes += m->ops->linear_bytes(*out);
    return status;
}

static enum status load_linear(struct model *m, struct source *source,
                               const struct tensor_spec *specs, int count, struct linear **out,
                               struct error *err) {
    void *buffer;
    enum dtype dtype;
    enum status status = read_stacked(source, specs, count, &buffer, &dtype, err);
    if (status != STATUS_OK) return status;
    int rows = 0;
    for (int i = 0; i < count; i++) rows += specs[i].rows;
    return make_linear(m, source, buffer, dtype, rows, specs[0].columns, out, err);
}

static enum status load_gain(struct model *m, struct source *source,
                             const struct tensor_spec *spec, float **out, struct error *err) {
    size_t count = (size_t)spec->rows;
    float *gain = mem_alloc_aligned(count * sizeof *gain);
    enum status status = STATUS_OK;
    if (source->file) {
        void *raw;
        enum dtype dtype;
        status = read_stacked(source, spec, 1, &raw, &dtype, err);
        if (status == STATUS_OK) dtype_to_f32(gain, raw, dtype, count);
    } else {
        for (size_t i = 0; i < count; i++) gain[i] = 1.0f;
    }
    if (status == STATUS_OK) {
        *out = m->ops->memory_create(m->backend, count * sizeof *gain);
        if (*out)
            m->ops->upload(m->backend, *out, gain, count * sizeof *gain);
        else
            status = error_set(err, STATUS_NO_MEMORY, "no backend memory for %s", spec->name);
    }
    free(gain);
    return status;
}

// The table in the backend's dtype, and the head packed from the same bytes when they are tied.
static enum status load_embedding(struct model *m, struct source *source,
                                  struct error *err) {
    const struct model_config *c = &m->config;
    struct tensor_spec spec = named_spec(embedding_name, c->vocabulary, c->hidden);
    void *buffer;
    enum dtype dtype;
    enum status status = read_stacked(source, &spec, 1, &buffer, &dtype, err);
    if (status != STATUS_OK) return status;
    size_t count = (size_t)c->vocabulary * (size_t)c->hidden, to_bytes = dtype_bytes(m->dtype);
    char *table = m->weights.embedding = m->ops->memory_create(m->backend, count * to_bytes);
    if (!table)
        status = error_set(err, STATUS_NO_MEMORY, "no backend memory for %s", spec.name);
    void *chunk = mem_alloc_aligned(UPLOAD_CHUNK_ELEMENTS * to_bytes);
    for (size_t done = 0; done < count && status == STATUS_OK; done += UPLOAD_CHUNK_ELEMENTS) {
        size_t part = count - done < UPLOAD_CHUNK_ELEMENTS ? count - done : UPLOAD_CHUNK_ELEMENTS;
        dtype_convert(chunk, m->dtype, (char *)buffer + done * dtype_bytes(dtype), dtype, part);
        m->ops->upload(m->backend, table + done * to_bytes, chunk, part * to_bytes);
        m->ops->synchronize(m->backend); // the chunk is used again
    }
    free(chunk);
    if (status == STATUS_OK && c->tied_embeddings)
        status = make_linear(m, source, buffer, dtype, c->vocabulary, c->hidden,
                             &m->weights.head, err);
    return status;
}

static enum status load_layer(struct model *m, struct source *source, int layer,
                              struct error *err) {
    struct layer_weights *w = &m->weights.layers[layer];
    struct tensor_spec s[LAYER_TENSORS];
    for (int t = 0; t < LAYER_TENSORS; t++)
        s[t] = layer_spec(&m->config, layer, (enum layer_tensor)t);
    // Stacked tensors are neighbours in enum layer_tensor.
    enum status status = load_gain(m, source, &s[T_ATTENTION_NORM], &w->attention_norm, err);
    if (status == STATUS_OK) status = load_linear(m, source, &s[T_Q], 3, &w->qkv, err);
    if (status == STATUS_OK) status = load_linear(m, source, &s[T_O], 1, &w->attention_out, err);
    if (status == STATUS_OK) status = load_gain(m, source, &s[T_FFN_NORM], &w->ffn_norm, err);
    if (status == STATUS_OK) status = load_linear(m, source, &s[T_GATE], 2, &w->gate_up, err);
    if (status == STATUS_OK) status = load_linear(m, source, &s[T_DOWN], 1, &w->down, err);
    return status;
}

static enum status load_all(struct model *m, struct source *source, struct error *err) {
    const struct model_config *c = &m->config;
    m->weights.layers = mem_zalloc((size_t)c->layers, sizeof *m->weights.layers);
    enum status status = load_embedding(m, source, err);
    for (int layer = 0, told = 0; layer < c->layers && status == STATUS_OK; layer++) {
        status = load_layer(m, source, layer, err);
        int percent = 100 * (layer + 1) / c->layers;
        if (percent < told + 10 || percent == 100) continue;
        log_event(LOG_INFO, "model_loading", "percent=%d layers=%d/%d", percent, layer + 1,
                  c->layers);
        told = percent;
    }
    struct tensor_spec norm = named_spec(last_norm_name, c->hidden, 0);
    if (status == STATUS_OK) status = load_gain(m, source, &norm, &m->weights.last_norm, err);
    struct tensor_spec head = named_spec(head_name, c->vocabulary, c->hidden);
    if (status == STATUS_OK && !c->tied_embeddings)
        status = load_linear(m, source, &head, 1, &m->weights.head, err);
    m->ops->synchronize(m->backend);
    if (status == STATUS_OK)
        log_event(LOG_INFO, "model_loaded", "layers=%d hidden=%d vocabulary=%d matrix_bytes=%zu%s",
                  c->layers, c->hidden, c->vocabulary, source->matrix_bytes,
                  source->file ? "" : " (dummy weights)");
    return status;
}

enum status weights_load(struct model *model, const struct model_options *options,
                         struct error *err) {
    struct source source = {.seed = options->seed, .packing = &model->config.packing};
    struct safetensors *file = NULL;
    enum status status = STATUS_OK;
    if (!options->dummy) {
        status = safetensors_open_folder(options->folder, &file, err);
        if (status == STATUS_OK) status = check_all(file, &model->config, err);
        source.file = file;
    }
    if (status == STATUS_OK) status = load_all(model, &source, err);
    free(source.buffer);
    safetensors_close(file);
    return status;
}

static void linear_release(struct model *m, struct linear *linear) {
    if (linear) m->ops->linear_destroy(m->backend, linear);
}

static void memory_release(struct model *m, void *memory) {
    if (memory) m->ops->memory_destroy(m->backend, memory);
}

void weights_deinit(struct model *m) {
    for (int layer = 0; m->weights.layers && layer < m->config.layers; layer++) {
        struct layer_weights *w = &m->weights.layers[layer];
        memory_release(m, w->attention_norm);
        memory_release(m, w->ffn_norm);
        linear_release(m, w->qkv);
        linear_release(m, w->attention_out);
        linear_release(m, w->gate_up);
        linear_release(m, w->down);
    }
    free(m->weights.layers);
    memory_release(m, m->weights.embedding);
    memory_release(m, m->weights.last_norm);
    linear_release(m, m->weights.head);
    m->weights = (struct model_weights){0};
}
