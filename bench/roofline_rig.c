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

float *rig_numbers(size_t count) {
    float *values = mem_alloc(count * sizeof *values);
    fill(values, DTYPE_F32, count);
    return values;
}

void rig_fill(struct rig *rig, float *to, size_t count) {
    float *values = rig_numbers(count);
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
    rig->layers = mem_zalloc((size_t)s->layers, sizeof *rig->layers);
    if (rig->options.lora_only) return;
    void *weights = mem_alloc(most * dtype_bytes(rig->options.dtype));
    fill(weights, rig->options.dtype, most);
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
    rig->block_segments = mem_zalloc(T, sizeof *rig->block_segments);
    rig_fill(rig, rig->gain, H);
    rig_fill(rig, rig->cosines, positions * half);
    rig_fill(rig, rig->x, T * H);
}

// Adapter number i's modules side by side in one image: A then B of each, as pager/adapter.h has them.
// Returns the image's elements.
static int64_t adapter_shape(struct rig *rig, int i, struct lora_segment *segment) {
    const struct rig_shape *s = &rig->shape;
    const struct rig_options *o = &rig->options;
    int q = s->query_heads * s->head_size, kv = s->kv_heads * s->head_size;
    int r = o->rank_count > 0 ? o->ranks[i % o->rank_count] : 0;
    const int in[LORA_MODULES] = {s->hidden, s->hidden, s->hidden, q, s->hidden, s->hidden, s->ffn};
    const int out[LORA_MODULES] = {q, kv, kv, s->hidden, s->ffn, s->ffn, s->hidden};
    int64_t at = 0;
    for (int m = 0; m < LORA_MODULES; m++) {
        rig->in[m] = in[m];
        rig->out[m] = out[m];
        int rank = o->qkvo_only && m > LORA_O ? 0 : r;
        segment->rank[m] = rank;
        segment->a_offset[m] = at;
        at = (at + (int64_t)rank * in[m] + 7) / 8 * 8;
        segment->b_offset[m] = at;
        at = (at + (int64_t)rank * out[m] + 7) / 8 * 8;
    }
    return at;
}

static size_t page_elems(const struct rig *rig) {
    return 2 * (size_t)rig->shape.kv_heads * PAGE_TOKENS * (size_t)rig->shape.head_size;
}

// Pages of adapter number i in a layer.
static int adapter_page_count(struct rig *rig, int i) {
    struct lora_segment segment;
    return (int)(((size_t)adapter_shape(rig, i, &segment) + page_elems(rig) - 1) / page_elems(rig));
}

size_t rig_adapter_elems(struct rig *rig) {
    return (size_t)adapter_page_count(rig, 0) * page_elems(rig);
}

// The adapter of sequence i out of `sequences`.
static int adapter_of(const struct rig *rig, int i, int sequences) {
    if (rig->options.sharing == RIG_ONE) return 0;
    if (rig->options.sharing == RIG_DISTINCT) return i;
    int adapter = 0;
    for (int end = (sequences + 1) / 2, left = sequences - end; i >= end && left > 0; adapter++) {
        int more = (left + 1) / 2;
        end += more;
        left -= more;
    }
    return adapter;
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
    int tokens = o->prefill ? rig->options.tokens_max : o->context;
    int kv_pages = (tokens + PAGE_TOKENS - 1) / PAGE_TOKENS;
    int all_pages = 0, most_pages = 1;
    for (int i = 0; i < rig->sequences; i++) {
        int pages = adapter_page_count(rig, i);
        all_pages += kv_pages + pages;
        if (pages > most_pages) most_pages = pages;
    }
    struct pool_shape shape = {s->layers, all_pages,
                               s->kv_heads, s->head_size, elems, dtype_bytes(o->dtype)};
    void *pool = block(rig, (size_t)shape.layers * (size_t)shape.page_count * elems,
                      shape.elem_bytes);
    rig->ops->pool_attach(rig->backend, pool, &shape);
    size_t most = (size_t)most_pages * elems;
    void *filling = mem_alloc(most * shape.elem_bytes);
    fill(filling, o->dtype, most);
    rig->kv_pages = mem_zalloc((size_t)rig->sequences, sizeof *rig->kv_pages);
    rig->adapter_pages = mem_zalloc((size_t)rig->sequences, sizeof *rig->adapter_pages);
    int32_t next = 0;
    for (int i = 0; i < rig->sequences; i++) {
        rig->kv_pages[i] = take_pages(&next, kv_pages);
        int pages = adapter_page_count(rig, i);
        rig->adapter_pages[i] = take_pages(&next, pages);
        for (int l = 0; l < s->layers; l++) {
            for (int p = 0; p < kv_pages; p++)
                rig->ops->pool_write(rig->backend, l, &rig->kv_pages[i][p], filling, elems);
            rig->ops->pool_write(rig->backend, l, rig->adapter_pages[i], filling,
                                 (size_t)pages * elems);
        }
    }
    if (rig->ops->pool_written) rig->ops->pool_written(rig->backend);
    free(filling);
}

// More tokens of an adapter: of the last segment, or a new one.
static void add_segment(struct rig *rig, int adapter, int token_first, int count) {
    if (rig->options.rank_count == 0) return;
    struct lora_segment *last = &rig->segments[rig->segment_count];
    if (rig->segment_count > 0 && last[-1].pages == rig->adapter_pages[adapter]) {
        last[-1].token_count += count;
        return;
    }
    *last = (struct lora_segment){.token_first = token_first, .token_count = count,
                                  .v_first = token_first, .weight = 1.0f,
                                  .pages = rig->adapter_pages[adapter],
                                  .page_count = adapter_page_count(rig, adapter)};
    adapter_shape(rig, adapter, last);
    rig->segment_count++;
}

// The step's arrays for M tokens.
void rig_step(struct rig *rig, int tokens) {
    const struct rig_options *o = &rig->options;
    int spans = o->prefill ? 1 : tokens, each = o->prefill ? tokens : 1;
    rig->span_count = spans;
    rig->segment_count = 0;
    for (int i = 0; i < spans; i++) {
        int context = o->prefill ? tokens : o->context;
        rig->spans[i] = (struct attention_span){i * each, each, context, rig->kv_pages[i]};
        add_segment(rig, adapter_of(rig, i, spans), i * each, each);
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
                              .segment_count = rig->segment_count};
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
    struct lora_segment unused;
    adapter_shape(rig, 0, &unused); // sets in and out
    weights_make(rig);
    activations_make(rig);
    pool_make(rig);
    return true;
}
