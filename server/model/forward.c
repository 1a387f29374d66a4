// The base model's forward pass over one step's tokens, and the life of struct model.
// The engine thread calls model_queue and model_wait; model_create and model_destroy run before and
// after them.
//
// A step is a ragged batch: T tokens of several sequences laid end to end, some of them prefill
// chunks, some single decodes. Matmuls see only [T, .]; attention learns from the spans where each
// sequence begins, LoRA from the segments which adapter each run of tokens uses.
//
// It allocates nothing in a step, reads no files, knows nothing of requests, pages' owners or
// sampling. It computes logits only for the rows that are asked for.
//
// Legend: T tokens in a step, R rows of logits, H hidden, Q query heads, K kv heads, D head size,
// F ffn size, V vocabulary, L layers, r rank.
#include "server/model/model_internal.h"

#include "base/memory.h"
#include "base/verify.h"
#include "server/request.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// ------------------------------------------------------------------ LoRA launches

struct lora_target {
    enum lora_module module;
    void *y;
    int out, stride;
};

static void *columns(const struct model *m, void *rows, int first) {
    return (char *)rows + (size_t)first * m->ops->activation_bytes;
}

// Rows of a step, and the adapters over them.
struct rows {
    int first, count;
    const struct lora_segment *segments;
    int segment_count;
};

// targets' y [T, out] += B (A x [T, in]), for each adapter segment of the rows: A x before the base
// matmul of x, the rest behind it.
static struct lora_launch lora_begin(struct model *m, const struct rows *rows, int layer,
                                     const void *x, int in, int target_count,
                                     const struct lora_target *targets) {
    struct lora_launch launch = {
        .layer = layer, .x = x, .in = in, .target_count = target_count,
        .segments = rows->segments, .segment_count = rows->segment_count, .v = m->v};
    for (int i = 0; i < target_count; i++) {
        launch.target[i].module = targets[i].module;
        launch.target[i].y = targets[i].y;
        launch.target[i].out = targets[i].out;
        launch.target[i].stride = targets[i].stride;
    }
    if (rows->segment_count > 0) m->ops->lora_shrink(m->backend, &launch);
    return launch;
}

static void lora_end(struct model *m, const struct lora_launch *launch) {
    if (launch->segment_count > 0) m->ops->lora_expand(m->backend, launch);
}

// ------------------------------------------------------------------ the forward pass

// delta = attention(normed): [T, H] -> [T, H], K and V going to the pool on the way.
static void attention_block(struct model *m, const struct step *step, int T, int layer) {
    const struct backend_ops *ops = m->ops;
    const struct model_config *c = &m->config;
    const struct layer_weights *w = &m->weights.layers[layer];
    int H = c->hidden;
    int q = c->query_heads * c->head_size, kv = c->kv_heads * c->head_size;
    int stride = q + 2 * kv;
    struct rows rows = {0, T, step->segments, step->segment_count};

    struct lora_launch lora =
        lora_begin(m, &rows, layer, m->normed, H, 3,
                   (struct lora_target[]){{LORA_Q, m->qkv, q, stride},
                                          {LORA_K, columns(m, m->qkv, q), kv, stride},
                                          {LORA_V, columns(m, m->qkv, q + kv), kv, stride}});
    ops->linear(m->backend, w->qkv, m->qkv, m->normed, T); // [T, H] -> [T, (Q + 2K) D]
    lora_end(m, &lora);
    ops->rope_and_kv_write(m->backend, layer, m->qkv, m->cosines, m->sines, step->positions,
                           step->slots, T, c->query_heads);
    ops->attention(m->backend, layer, m->heads, m->qkv, step->spans, step->span_count,
                   c->query_heads);                                    // -> [T, Q D]
    lora = lora_begin(m, &rows, layer, m->heads, q, 1,
                      (struct lora_target[]){{LORA_O, m->delta, H, H}});
    ops->linear(m->backend, w->attention_out, m->delta, m->heads, T); // [T, Q D] -> [T, H]
    lora_end(m, &lora);
}

// Row `first` of [T, H] activations.
static void *activation_row(const struct model *m, void *activations, int first) {
    return columns(m, activations, first * m->config.hidden);
}

// delta = down(silu(gate(norm)) * up(norm)), norm of x + delta: [T, H] -> [T, H], for some rows.
static void ffn_rows(struct model *m, const struct rows *rows, int layer) {
    const struct backend_ops *ops = m->ops;
    const struct layer_weights *w = &m->weights.layers[layer];
    int H = m->config.hidden, F = m->config.ffn, T = rows->count;
    void *x = activation_row(m, m->x, rows->first);
    void *delta = activation_row(m, m->delta, rows->first);

    ops->rms_norm(m->backend, m->normed, x, delta, w->ffn_norm, m->config.norm_epsilon, T, H);
    struct lora_launch lora =
        lora_begin(m, rows, layer, m->normed, H, 2,
                   (struct lora_target[]){{LORA_GATE, m->gate_up, F, 2 * F},
                                          {LORA_UP, columns(m, m->gate_up, F), F, 2 * F}});
    ops->linear(m->backend, w->gate_up, m->gate_up, m->normed, T); // [T, H] -> [T, 2F]
    lora_end(m, &lora);
    ops->silu_mul(m->backend, m->gated, m->gate_up, T, F); // -> [T, F]
    lora = lora_begin(m, rows, layer, m->gated, F, 1,
                      (struct lora_target[]){{LORA_DOWN, delta, H, H}});
    ops->linear(m->backend, w->down, delta, m->gated, T); // [T, F] -> [T, H]
    lora_end(m, &lora);
}

static void ffn_block(struct model *m, const struct step *step, int T, int layer) {
    struct rows rows = {0, T, step->segments, step->segment_count};
    int count = row_block_count(m->ops, T);
    for (int block = 0; block < count; block++) {
        rows.first = row_block_first(T, count, block);
        rows.count = row_block_first(T, count, block + 1) - rows.first;
        if (count > 1) {
            rows.segments = m->block_segments;
            rows.segment_count = row_block_segments(m->block_segments, step->segments,
                                                    step->segment_count, rows.first, rows.count);
        }
        ffn_rows(m, &rows, layer);
    }
}

// What the backend trusts, checked on this side of the door.
static void step_verify(const struct model *m, const struct step *step) {
    VERIFY_OP(step->token_count, >, 0);
    VERIFY_OP(step->token_count, <=, m->tokens_max);
    VERIFY_OP(step->query_heads, ==, m->config.query_heads);
    VERIFY_OP(step->logit_count, <=, m->rows_max);
    VERIFY_OP(step->segment_count, <=, m->segments_max);
    for (int t = 0; t < step->token_count; t++) {
        VERIFY_OP(step->ids[t], >=, 0);
        VERIFY_OP(step->ids[t], <, m->config.vocabulary);
        VERIFY_OP(step->positions[t], >=, 0);
        VERIFY_OP(step->positions[t], <, m->context_max);
        VERIFY_OP(step->slots[t], >=, 0);
    }
    for (int i = 0; i < step->segment_count; i++) {
        const struct lora_segment *s = &step->segments[i];
        VERIFY_OP(s->token_first, >=, 0);
        VERIFY_OP(s->token_count, >, 0);
        VERIFY_OP(s->token_first + s->token_count, <=, step->token_count);
        VERIFY_OP(s->v_first, >=, 0);
        VERIFY_OP(s->v_first + s->token_count, <=, m->v_rows_max);
    }
    for (int i = 0; i < step->span_count; i++) {
        const struct attention_span *s = &step->spans[i];
        VERIFY_OP(s->token_first, >=, 0);
        VERIFY_OP(s->token_count, >, 0);
        VERIFY_OP(s->token_first + s->token_count, <=, step->token_count);
        VERIFY_OP(s->context, >=, s->token_count);
        VERIFY_OP(s->context, <=, m->context_max);
    }
    for (int i = 0; i < step->logit_count; i++) {
        VERIFY_OP(step->logit_rows[i], >=, 0);
        VERIFY_OP(step->logit_rows[i], <, step->token_count);
    }
}

// Queues the step's operations: T tokens, R rows of logits.
static void step_queue(struct model *m, const struct step *step, int T, int R) {
    const struct backend_ops *ops = m->ops;
    const struct model_config *c = &m->config;
    int H = c->hidden;
    float epsilon = c->norm_epsilon;
    ops->embed(m->backend, m->x, m->weights.embedding, m->dtype, step->ids, T, H); // [T, H]
    for (int l = 0; l < c->layers; l++) {
        const struct layer_weights *w = &m->weights.layers[l];
        // Each norm first adds what the block before it left in delta to the residual stream x.
        const void *residual = l > 0 ? m->delta : NULL;
        ops->rms_norm(m->backend, m->normed, m->x, residual, w->attention_norm, epsilon, T, H);
        attention_block(m, step, T, l);
        ffn_block(m, step, T, l);
    }
    if (R == 0) return; // a prefill chunk that is not its prompt's last
    // The last norm and the head run on the wanted rows alone.
    ops->gather_rows(m->backend, m->rows, m->x, step->logit_rows, R, H);           // [R, H]
    ops->gather_rows(m->backend, m->rows_delta, m->delta, step->logit_rows, R, H); // [R, H]
    ops->rms_norm(m->backend, m->normed, m->rows, m->rows_delta, m->weights.last_norm, epsilon, R,
                  H);
    ops->linear(m->backend, m->weights.head, m->logits, m->normed, R); // [R, H] -> [R, V]
    if (ops->draw && step->draws)
        ops->draw(m->backend, m->ids, m->logits, step->draws, R, c->vocabulary);
}

// Whether the backend has drawn row r's token, so that nobody wants its logits.
static bool is_drawn(const struct model *m, const struct step *step, int r) {
    return m->ops->draw && step->draws && step->draws[r].kind != DRAW_NONE;
}

// Logits of the rows from `first` on that are wanted and stand together; returns where they end.
static int rows_download(struct model *m, const struct step *step, int first) {
    int end = first + 1;
    while (end < step->logit_count && !is_drawn(m, step, end)) end++;
    size_t V = (size_t)m->config.vocabulary, a = m->ops->activation_bytes;
    size_t at = (size_t)first * V, count = (size_t)(end - first) * V;
    char *to = m->host_download ? m->host_download : (void *)m->host_logits;
    m->ops->download(m->backend, to + at * a, (char *)m->logits + at * a, count * a);
    if (m->host_download) {
        m->ops->synchronize(m->backend);
        dtype_to_f32(m->host_logits + at, to + at * a, DTYPE_BF16, count);
    }
    return end;
}

void model_queue(struct model *m, const struct step *step) {
    const struct backend_ops *ops = m->ops;
    VERIFY(!m->queued);
    step_verify(m, step);
    m->queued = step;
    struct step_rows rows = {step->token_count, step->logit_count, false};
    if (ops->step_begin) rows = ops->step_begin(m->backend, step);
    if (!rows.recorded) step_queue(m, step, rows.tokens, rows.logits);
    if (ops->step_end) ops->step_end(m->backend);
}

struct model_rows model_wait(struct model *m) {
    const struct backend_ops *ops = m->ops;
    const struct step *step = m->queued;
    VERIFY(step);
    m->queued = NULL;
    int R = step->logit_count;
    bool draws = ops->draw && step->draws;
    if (draws && R > 0)
        ops->download(m->backend, m->host_ids, m->ids, (size_t)R * sizeof *m->ids);
    for (int r = 0; r < R;) r = is_drawn(m, step, r) ? r + 1 : rows_download(m, step, r);
    ops->synchronize(m->backend);
    return (struct model_rows){m->host_logits, draws ? m->host_ids : NULL};
}

struct model_rows model_forward(struct model *m, const struct step *step) {
    model_queue(m, step);
    return model_wait(m);
}

// ------------------------------------------------------------------ RoPE tables

// The inverse frequency of pair i, in f32 step by step as the reference has it: at position 8192 a
// difference of one part in 2^24 is already visible in the logits.
static float inverse_frequency(const struct model_config *c, int i) {
    float exponent = (float)(2 * i) / (float)c->head_size;
    float frequency = 1.0f / powf((float)c->rope_theta, exponent);
    if (c->rope_scaling == ROPE_LINEAR) return frequency / (float)c->rope_factor;
    if (c->rope_scaling != ROPE_LLAMA3) return frequency;

    // Llama 3.1: long waves are stretched by the factor, short ones kept, those between blended.
    float wavelength = (float)(2.0 * M_PI) / frequency;
    float context = (float)c->rope_original_context;
    float low = (float)c->rope_low_freq_factor, high = (float)c->rope_high_freq_factor;
    float stretched = frequency / (float)c->rope_factor;
    if (wavelength > context / low) return stretched;
    if (wavelength < context / high) return frequency;
    float blend = (context / wavelength - low) / (high - low);
    return (1.0f - blend) * stretched + blend * frequency;
}

static enum status rope_tables_create(struct model *m, struct error *err) {
    int half = m->config.head_size / 2;
    size_t count = (size_t)m->context_max * (size_t)half, bytes = count * sizeof(float);
    m->cosines = m->ops->memory_create(m->backend, bytes);
    m->sines = m->ops->memory_create(m->backend, bytes);
    if (!m->cosines || !m->sines)
        return error_set(err, STATUS_NO_MEMORY,
                         "no backend memory for the RoPE tables of %d positions (2 x %zu bytes)",
                         m->context_max, bytes);
    float *cosines = mem_alloc_aligned(bytes), *sines = mem_alloc_aligned(bytes);
    for (int i = 0; i < half; i++) {
        float frequency = inverse_frequency(&m->config, i);
        for (int p = 0; p < m->context_max; p++) {
            float angle = (float)p * frequency;
            cosines[(size_t)p * (size_t)half + (size_t)i] = (float)cos(angle);
            sines[(size_t)p * (size_t)half + (size_t)i] = (float)sin(angle);
        }
    }
    m->ops->upload(m->backend, m->cosines, cosines, bytes);
    m->ops->upload(m->backend, m->sines, sines, bytes);
    m->ops->synchronize(m->backend);
    free(cosines);
    free(sines);
    return STATUS_OK;
}

// ------------------------------------------------------------------ create and destroy

static size_t carve(size_t *used, size_t bytes) {
    size_t at = *used;
    *used += (bytes + 255) & ~(size_t)255;
    return at;
}

// Where a device's results arrive: page-locked, where that is faster.
static void *host_memory(struct model *m, size_t bytes) {
    return m->ops->host_create ? m->ops->host_create(m->backend, bytes) : mem_alloc_aligned(bytes);
}

static void host_memory_free(struct model *m, void *memory) {
    if (m->ops->host_destroy && memory) m->ops->host_destroy(m->backend, memory);
    else free(memory);
}

// All activations in one block, sized for the largest step.
static enum status activations_create(struct model *m, struct error *err) {
    const struct model_config *c = &m->config;
    size_t a = m->ops->activation_bytes;
    size_t T = (size_t)m->tokens_max, R = (size_t)m->rows_max, H = (size_t)c->hidden;
    if (m->ops->step_begin) { // it may add rows
        T = (T + STEP_ROUND - 1) / STEP_ROUND * STEP_ROUND;
        R = (R + STEP_ROUND - 1) / STEP_ROUND * STEP_ROUND;
    }
    size_t q = (size_t)c->query_heads * (size_t)c->head_size;
    size_t kv = (size_t)c->kv_heads * (size_t)c->head_size, F = (size_t)c->ffn;
    size_t normed_rows = T > R ? T : R, block_rows = (size_t)row_block_rows_max(m->ops, (int)T);
    struct {
        void **pointer;
        size_t bytes, at;
    } parts[] = {
        {&m->x, T * H * a, 0},
        {&m->normed, normed_rows * H * a, 0},
        {&m->qkv, T * (q + 2 * kv) * a, 0},
        {&m->heads, T * q * a, 0},
        {&m->delta, T * H * a, 0},
        {&m->gate_up, block_rows * 2 * F * a, 0},
        {&m->gated, block_rows * F * a, 0},
        {&m->rows, R * H * a, 0},
        {&m->rows_delta, R * H * a, 0},
        {&m->logits, R * (size_t)c->vocabulary * a, 0},
        {(void **)&m->ids, R * sizeof(int32_t), 0},
        {(void **)&m->v,
         (size_t)m->v_rows_max * LORA_TARGETS_MAX * LORA_RANK_MAX * sizeof(float), 0},
    };
    size_t total = 0, count = sizeof parts / sizeof *parts;
    for (size_t i = 0; i < count; i++) parts[i].at = carve(&total, parts[i].bytes);
    m->activations = m->ops->memory_create(m->backend, total);
    if (!m->activations)
        return error_set(err, STATUS_NO_MEMORY,
                         "no backend memory for the activations of a step of %d tokens (%zu bytes)",
                         m->tokens_max, total);
    for (size_t i = 0; i < count; i++) *parts[i].pointer = (char *)m->activations + parts[i].at;

    size_t logits = R * (size_t)c->vocabulary;
    m->block_segments = mem_zalloc((size_t)m->segments_max + 1, sizeof *m->block_segments);
    m->host_logits = host_memory(m, logits * sizeof(float));
    m->host_ids = host_memory(m, R * sizeof *m->host_ids);
    if (a != sizeof(float)) m->host_download = host_memory(m, logits * a);
    if (m->host_logits && m->host_ids && (a == sizeof(float) || m->host_download)) return STATUS_OK;
    return error_set(err, STATUS_NO_MEMORY, "no host memory for %zu rows of logits (%zu bytes)", R,
                     logits * sizeof(float));
}

enum status model_create(const struct backend_ops *ops, struct backend *backend,
                         const struct model_config *config, enum dtype dtype,
                         const struct model_options *options, struct model **out,
                         struct error *err) {
    *out = NULL;
    VERIFY(dtype == DTYPE_F32 || dtype == DTYPE_BF16);
    VERIFY(ops->activation_bytes == sizeof(float) || ops->activation_bytes == 2);
    VERIFY_OP(options->tokens_max, >, 0);
    VERIFY_OP(options->sequences_max, >, 0);
    VERIFY_OP(options->segments_max, >=, 0);
    if (options->context_max < 1 || options->context_max > config->context_max)
        return error_set(err, STATUS_INVALID,
                         "a context of %d tokens was asked for; config.json allows 1 to %d "
                         "(max_position_embeddings)",
                         options->context_max, config->context_max);
    if (ops->check_heads) {
        enum status status = ops->check_heads(config->query_heads, config->kv_heads,
                                              config->head_size, err);
        if (status != STATUS_OK) return status;
    }
    struct model *m = mem_zalloc(1, sizeof *m);
    m->ops = ops;
    m->backend = backend;
    m->config = *config;
    m->dtype = dtype;
    m->tokens_max = options->tokens_max;
    m->rows_max = options->sequences_max;
    m->segments_max = options->segments_max;
    m->context_max = options->context_max;
    // Every token may be in REQUEST_ADAPTERS_MAX segments, each with its own row of v.
    m->v_rows_max = options->tokens_max * REQUEST_ADAPTERS_MAX;
    enum status status = weights_load(m, options, err);
    if (status == STATUS_OK) status = rope_tables_create(m, err);
    if (status == STATUS_OK) status = activations_create(m, err);
    if (status != STATUS_OK) {
        model_destroy(m);
        return status;
    }
    *out = m;
    return STATUS_OK;
}

void model_destroy(struct model *m) {
    if (!m) return;
    m->ops->synchronize(m->backend);
    weights_deinit(m);
    if (m->cosines) m->ops->memory_destroy(m->backend, m->cosines);
    if (m->sines) m->ops->memory_destroy(m->backend, m->sines);
    if (m->activations) m->ops->memory_destroy(m->backend, m->activations);
    free(m->block_segments);
    host_memory_free(m, m->host_logits);
    host_memory_free(m, m->host_ids);
    host_memory_free(m, m->host_download);
    free(m);
}

struct lora_geometry model_lora_geometry(const struct model_config *c, enum dtype dtype) {
    int q = c->query_heads * c->head_size, kv = c->kv_heads * c->head_size;
    return (struct lora_geometry){
        .layers = c->layers,
        .in = {[LORA_Q] = c->hidden, [LORA_K] = c->hidden, [LORA_V] = c->hidden, [LORA_O] = q,
               [LORA_GATE] = c->hidden, [LORA_UP] = c->hidden, [LORA_DOWN] = c->ffn},
        .out = {[LORA_Q] = q, [LORA_K] = kv, [LORA_V] = kv, [LORA_O] = c->hidden,
                [LORA_GATE] = c->ffn, [LORA_UP] = c->ffn, [LORA_DOWN] = c->hidden},
        .dtype = dtype,
        .rank_max = LORA_RANK_MAX,
        .page_elems = 2 * (size_t)kv * PAGE_TOKENS,
    };
}
