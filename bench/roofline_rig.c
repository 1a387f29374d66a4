// The rig of roofline_rig.h. Weights are packed one matrix at a time from one host buffer.
#include "bench/roofline_rig.h"

#include "base/file.h"
#include "base/memory.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ------------------------------------------------------------------ config.json

static int json_int(const json_t *root, const char *key, int otherwise) {
    const json_t *value = json_object_get(root, key);
    return json_is_integer(value) ? (int)json_integer_value(value) : otherwise;
}

static bool shape_read(const char *folder, struct rig_shape *s) {
    char *path = path_join(folder, "config.json");
    json_error_t error;
    json_t *root = json_load_file(path, 0, &error);
    if (!root) {
        fprintf(stderr, "lorad-bench roofline: %s: %s\n", path, error.text);
        free(path);
        return false;
    }
    s->layers = json_int(root, "num_hidden_layers", 0);
    s->hidden = json_int(root, "hidden_size", 0);
    s->ffn = json_int(root, "intermediate_size", 0);
    s->query_heads = json_int(root, "num_attention_heads", 0);
    s->kv_heads = json_int(root, "num_key_value_heads", s->query_heads);
    s->vocabulary = json_int(root, "vocab_size", 0);
    s->head_size = json_int(root, "head_dim",
                            s->query_heads > 0 ? s->hidden / s->query_heads : 0);
    json_decref(root);
    bool good = s->layers > 0 && s->hidden > 0 && s->ffn > 0 && s->query_heads > 0 &&
                s->kv_heads > 0 && s->vocabulary > 0 && s->head_size > 0;
    if (!good) fprintf(stderr, "lorad-bench roofline: %s: not a Llama-shaped config\n", path);
    free(path);
    return good;
}

// ------------------------------------------------------------------ the rig

static void *block(struct rig *rig, size_t elements, size_t bytes_each) {
    void *memory = rig->ops->memory_create(rig->backend, elements * bytes_each);
    if (!memory) {
        fprintf(stderr, "lorad-bench roofline: no memory\n");
        exit(1);
    }
    return memory;
}

// Small numbers, all different enough that no shortcut helps.
static void fill(void *to, enum dtype dtype, size_t count) {
    uint32_t state = 12345;
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        float value = ((float)(state >> 8) / (float)(1 << 24) - 0.5f) * 0.05f;
        if (dtype == DTYPE_F32) ((float *)to)[i] = value;
        else ((uint16_t *)to)[i] = f32_to_bf16(value);
    }
}

static void fill_device(struct rig *rig, float *to, size_t count) {
    float *values = mem_alloc(count * sizeof *values);
    fill(values, DTYPE_F32, count);
    rig->ops->upload(rig->backend, to, values, count * sizeof *values);
    rig->ops->synchronize(rig->backend);
    free(values);
}

static struct linear *linear_make(struct rig *rig, const void *weights, int out, int in) {
    struct linear *linear;
    struct error err;
    if (rig->ops->linear_create(rig->backend, weights, rig->options.dtype, out, in, &linear, &err) !=
        STATUS_OK) {
        fprintf(stderr, "lorad-bench roofline: %s\n", err.text);
        exit(1);
    }
    return linear;
}

static void weights_make(struct rig *rig) {
    const struct rig_shape *s = &rig->shape;
    int q = s->query_heads * s->head_size, kv = s->kv_heads * s->head_size;
    size_t most = (size_t)s->hidden * (size_t)(s->vocabulary > 2 * s->ffn ? s->vocabulary
                                                                           : 2 * s->ffn);
    void *weights = mem_alloc(most * dtype_bytes(rig->options.dtype));
    fill(weights, rig->options.dtype, most);
    rig->layers = mem_zalloc((size_t)s->layers, sizeof *rig->layers);
    for (int l = 0; l < s->layers; l++)
        rig->layers[l] = (struct rig_layer){
            linear_make(rig, weights, q + 2 * kv, s->hidden), linear_make(rig, weights, s->hidden, q),
            linear_make(rig, weights, 2 * s->ffn, s->hidden),
            linear_make(rig, weights, s->hidden, s->ffn)};
    rig->head = linear_make(rig, weights, s->vocabulary, s->hidden);
    free(weights);
}

static void activations_make(struct rig *rig) {
    const struct rig_shape *s = &rig->shape;
    size_t T = ((size_t)rig->options.tokens_max + STEP_ROUND - 1) / STEP_ROUND * STEP_ROUND, H = (size_t)s->hidden, F = (size_t)s->ffn;
    size_t q = (size_t)s->query_heads * (size_t)s->head_size;
    size_t kv = (size_t)s->kv_heads * (size_t)s->head_size, V = (size_t)s->vocabulary;
    size_t half = (size_t)s->head_size / 2;
    size_t positions = (size_t)rig->options.context + T;
    rig->gain = block(rig, H, sizeof(float));
    rig->cosines = block(rig, positions * half, sizeof(float));
    rig->sines = block(rig, positions * half, sizeof(float));
    rig->x = block(rig, T * H, sizeof(float));
    rig->normed = block(rig, T * H, sizeof(float));
    rig->qkv = block(rig, T * (q + 2 * kv), sizeof(float));
    rig->heads = block(rig, T * q, sizeof(float));
    rig->delta = block(rig, T * H, sizeof(float));
    rig->gate_up = block(rig, T * 2 * F, sizeof(float));
    rig->gated = block(rig, T * F, sizeof(float));
    rig->logits = block(rig, T * V, sizeof(float));
    rig->v = block(rig, T * LORA_TARGETS_MAX * LORA_RANK_MAX, sizeof(float));
    rig->positions = mem_zalloc(T, sizeof(int32_t));
    rig->slots = mem_zalloc(T, sizeof(int32_t));
    rig->spans = mem_zalloc(T, sizeof *rig->spans);
    rig->segments = mem_zalloc(T, sizeof *rig->segments);
    fill_device(rig, rig->gain, H);
    fill_device(rig, rig->cosines, positions * half);
    fill_device(rig, rig->x, T * H);
}

// Modules side by side in one image: A then B of each, as pager/adapter.h has them.
static void adapter_shape(struct rig *rig, struct lora_segment *segment) {
    const struct rig_shape *s = &rig->shape;
    int q = s->query_heads * s->head_size, kv = s->kv_heads * s->head_size;
    int r = rig->options.rank;
    const int in[LORA_MODULES] = {s->hidden, s->hidden, s->hidden, q, s->hidden, s->hidden, s->ffn};
    const int out[LORA_MODULES] = {q, kv, kv, s->hidden, s->ffn, s->ffn, s->hidden};
    int64_t at = 0;
    for (int m = 0; m < LORA_MODULES; m++) {
        rig->in[m] = in[m];
        rig->out[m] = out[m];
        segment->rank[m] = r;
        segment->a_offset[m] = at;
        at = (at + (int64_t)r * in[m] + 7) / 8 * 8;
        segment->b_offset[m] = at;
        at = (at + (int64_t)r * out[m] + 7) / 8 * 8;
    }
    rig->layer_elems = at;
}

static size_t page_elems(const struct rig *rig) {
    return 2 * (size_t)rig->shape.kv_heads * PAGE_TOKENS * (size_t)rig->shape.head_size;
}

// Pages of an adapter in a layer.
static int rig_adapter_pages(const struct rig *rig) {
    return (int)(((size_t)rig->layer_elems + page_elems(rig) - 1) / page_elems(rig));
}

static int32_t *take_pages(int32_t *next, int count) {
    int32_t *pages = mem_zalloc((size_t)count + 1, sizeof *pages);
    for (int i = 0; i < count; i++) pages[i] = (*next)++;
    return pages;
}

static void pool_make(struct rig *rig) {
    const struct rig_shape *s = &rig->shape;
    const struct rig_options *o = &rig->options;
    size_t elems = page_elems(rig);
    struct lora_segment segment = {0};
    adapter_shape(rig, &segment);
    int tokens = o->prefill ? rig->options.tokens_max : o->context;
    int kv_pages = (tokens + PAGE_TOKENS - 1) / PAGE_TOKENS;
    int adapter_pages = rig_adapter_pages(rig);
    struct pool_shape shape = {s->layers, rig->sequences * (kv_pages + adapter_pages),
                               s->kv_heads, s->head_size, elems, dtype_bytes(o->dtype)};
    void *pool = block(rig, (size_t)shape.layers * (size_t)shape.page_count * elems,
                      shape.elem_bytes);
    rig->ops->pool_attach(rig->backend, pool, &shape);
    size_t image = (size_t)adapter_pages * elems;
    void *filling = mem_alloc((image > elems ? image : elems) * shape.elem_bytes);
    fill(filling, o->dtype, image > elems ? image : elems);
    rig->kv_pages = mem_zalloc((size_t)rig->sequences, sizeof *rig->kv_pages);
    rig->adapter_pages = mem_zalloc((size_t)rig->sequences, sizeof *rig->adapter_pages);
    int32_t next = 0;
    for (int i = 0; i < rig->sequences; i++) {
        rig->kv_pages[i] = take_pages(&next, kv_pages);
        rig->adapter_pages[i] = take_pages(&next, adapter_pages);
        for (int l = 0; l < s->layers; l++) {
            for (int p = 0; p < kv_pages; p++)
                rig->ops->pool_write(rig->backend, l, &rig->kv_pages[i][p], filling, elems);
            if (o->rank > 0)
                rig->ops->pool_write(rig->backend, l, rig->adapter_pages[i], filling,
                                (size_t)rig->layer_elems);
        }
    }
    if (rig->ops->pool_written) rig->ops->pool_written(rig->backend);
    free(filling);
}

// The step's arrays for M tokens.
void rig_step(struct rig *rig, int tokens) {
    const struct rig_options *o = &rig->options;
    int spans = o->prefill ? 1 : tokens, each = o->prefill ? tokens : 1;
    rig->span_count = spans;
    for (int i = 0; i < spans; i++) {
        int context = o->prefill ? tokens : o->context;
        rig->spans[i] = (struct attention_span){i * each, each, context, rig->kv_pages[i]};
        rig->segments[i] = (struct lora_segment){.token_first = i * each, .token_count = each,
                                                 .v_first = i * each, .weight = 1.0f,
                                                 .pages = rig->adapter_pages[i]};
        adapter_shape(rig, &rig->segments[i]);
        rig->segments[i].page_count = rig_adapter_pages(rig);
        for (int t = 0; t < each; t++) {
            int position = context - each + t;
            rig->positions[i * each + t] = position;
            rig->slots[i * each + t] =
                rig->kv_pages[i][position / PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS;
        }
    }
    rig->step = (struct step){.token_count = tokens, .query_heads = rig->shape.query_heads,
                              .positions = rig->positions, .slots = rig->slots,
                              .spans = rig->spans, .span_count = spans,
                              .segments = rig->segments,
                              .segment_count = o->rank > 0 ? spans : 0};
}

bool rig_init(struct rig *rig, const struct rig_options *options) {
    *rig = (struct rig){.options = *options, .ops = backend_find(options->device)};
    if (!rig->ops) {
        fprintf(stderr, "lorad-bench roofline: this build has no backend '%s'\n", options->device);
        return false;
    }
    if (!shape_read(options->model, &rig->shape)) return false;
    struct backend_options open = {.threads = options->threads, .dtype = options->dtype,
                                   .quantization = options->quantization};
    struct error err;
    if (rig->ops->open(&open, &rig->backend, &err) != STATUS_OK) {
        fprintf(stderr, "lorad-bench roofline: %s\n", err.text);
        return false;
    }
    rig->sequences = options->prefill ? 1 : options->tokens_max;
    weights_make(rig);
    activations_make(rig);
    pool_make(rig);
    return true;
}
