// A backend in plain C for tests: f32, one token after the other, every sum in one fixed order. A
// token's result depends on its own sequence alone, to the last bit, so that whatever changes with
// the batch is a mistake above kernels/. Slow and simple on purpose; included by one test a program.
#ifndef LORAD_TESTS_PLAIN_BACKEND_H
#define LORAD_TESTS_PLAIN_BACKEND_H

#include "kernels/backend.h"

#include "base/memory.h"
#include "base/verify.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

struct backend {
    float *pool;
    struct pool_shape shape;
    _Atomic bool broken; // what health reports the opposite of
    long long steps;     // synchronize calls
};

struct linear {
    float *weights;
    int out, in;
};

static enum status plain_open(const struct backend_options *options, struct backend **out,
                              struct error *err) {
    (void)options, (void)err;
    *out = mem_zalloc(1, sizeof **out);
    return STATUS_OK;
}

static void plain_close(struct backend *b) {
    free(b);
}

static bool plain_health(struct backend *b) {
    return !atomic_load(&b->broken);
}

static void *plain_memory_create(struct backend *b, size_t bytes) {
    (void)b;
    return mem_zalloc(1, bytes);
}

static void plain_memory_destroy(struct backend *b, void *memory) {
    (void)b;
    free(memory);
}

static void plain_copy(struct backend *b, void *to, const void *from, size_t bytes) {
    (void)b;
    memcpy(to, from, bytes);
}

static void plain_synchronize(struct backend *b) {
    b->steps++;
}

static void plain_pool_attach(struct backend *b, void *pool, const struct pool_shape *shape) {
    VERIFY_OP(shape->elem_bytes, ==, 4);
    b->pool = pool;
    b->shape = *shape;
}

static float *plain_page(const struct backend *b, int layer, int32_t page) {
    VERIFY(page >= 0 && page < b->shape.page_count);
    size_t index = (size_t)layer * (size_t)b->shape.page_count + (size_t)page;
    return b->pool + index * b->shape.page_elems;
}

static void plain_pool_write(struct backend *b, int layer, const int32_t *pages, const void *image,
                             size_t elems) {
    for (size_t at = 0; at < elems; at += b->shape.page_elems) {
        size_t part = elems - at < b->shape.page_elems ? elems - at : b->shape.page_elems;
        memcpy(plain_page(b, layer, pages[at / b->shape.page_elems]), (const float *)image + at,
               part * sizeof(float));
    }
}

static void plain_pool_copy(struct backend *b, int layer, const int32_t *pages, void *image,
                            size_t elems, bool to_host) {
    for (size_t e = 0; e < elems; e++) {
        float *element = plain_page(b, layer, pages[e / b->shape.page_elems]) +
                         e % b->shape.page_elems, *host = (float *)image + e;
        if (to_host) *host = *element;
        else *element = *host;
    }
}

static enum status plain_linear_create(struct backend *b, const void *weights, enum dtype dtype,
                                       int out, int in, struct linear **result,
                                       struct error *err) {
    (void)b, (void)err;
    size_t count = (size_t)out * (size_t)in;
    struct linear *linear = mem_zalloc(1, sizeof *linear);
    *linear = (struct linear){mem_alloc(count * sizeof(float)), out, in};
    dtype_to_f32(linear->weights, weights, dtype, count);
    *result = linear;
    return STATUS_OK;
}

static void plain_linear_destroy(struct backend *b, struct linear *linear) {
    (void)b;
    if (linear) free(linear->weights);
    free(linear);
}

static size_t plain_linear_bytes(const struct linear *linear) {
    return (size_t)linear->out * (size_t)linear->in * sizeof(float);
}

static void plain_embed(struct backend *b, void *y, const void *table, enum dtype dtype,
                        const int32_t *ids, int tokens, int hidden) {
    (void)b;
    VERIFY_OP(dtype, ==, DTYPE_F32);
    for (int t = 0; t < tokens; t++)
        memcpy((float *)y + t * hidden, (const float *)table + ids[t] * hidden,
               (size_t)hidden * sizeof(float));
}

static void plain_rms_norm(struct backend *b, void *y_, void *x_, const void *residual,
                           const float *gain, float epsilon, int tokens, int hidden) {
    (void)b;
    for (int t = 0; t < tokens; t++) {
        float *x = (float *)x_ + t * hidden, *y = (float *)y_ + t * hidden, sum = 0;
        for (int i = 0; i < hidden; i++) {
            if (residual) x[i] += ((const float *)residual)[t * hidden + i];
            sum += x[i] * x[i];
        }
        float scale = 1.0f / sqrtf(sum / (float)hidden + epsilon);
        for (int i = 0; i < hidden; i++) y[i] = x[i] * scale * gain[i];
    }
}

static void plain_linear(struct backend *b, const struct linear *w, void *y_, const void *x_,
                         int tokens) {
    (void)b;
    for (int t = 0; t < tokens; t++)
        for (int o = 0; o < w->out; o++) {
            const float *x = (const float *)x_ + t * w->in, *row = w->weights + o * w->in;
            float sum = 0;
            for (int i = 0; i < w->in; i++) sum += x[i] * row[i];
            ((float *)y_)[t * w->out + o] = sum;
        }
}

static float plain_element(const struct backend *b, const struct lora_segment *segment, int layer,
                           int64_t at) {
    int64_t elems = (int64_t)b->shape.page_elems;
    return plain_page(b, layer, segment->pages[at / elems])[at % elems];
}

static float *plain_v(const struct lora_launch *launch, const struct lora_segment *s, int token,
                      int target) {
    return launch->v + ((s->v_first + token) * LORA_TARGETS_MAX + target) * LORA_RANK_MAX;
}

static void plain_lora_shrink(struct backend *b, const struct lora_launch *launch) {
    for (int n = 0; n < launch->segment_count; n++)
        for (int m = 0; m < launch->target_count; m++) {
            const struct lora_segment *s = &launch->segments[n];
            enum lora_module module = launch->target[m].module;
            for (int t = 0; t < s->token_count; t++)
                for (int r = 0; r < s->rank[module]; r++) {
                    const float *x =
                        (const float *)launch->x + (s->token_first + t) * launch->in;
                    float sum = 0;
                    for (int i = 0; i < launch->in; i++)
                        sum += x[i] * plain_element(b, s, launch->layer, s->a_offset[module] +
                                                    (int64_t)r * launch->in + i);
                    plain_v(launch, s, t, m)[r] = sum;
                }
        }
}

// Where B[o][r] lies among panels of LORA_PANEL columns.
static int64_t plain_b_index(int out, int rank, int o, int r) {
    int first = o / LORA_PANEL * LORA_PANEL;
    int columns = out - first < LORA_PANEL ? out - first : LORA_PANEL;
    return (int64_t)first * rank + r * columns + (o - first);
}

static void plain_lora_expand(struct backend *b, const struct lora_launch *launch) {
    for (int n = 0; n < launch->segment_count; n++)
        for (int m = 0; m < launch->target_count; m++) {
            const struct lora_segment *s = &launch->segments[n];
            enum lora_module module = launch->target[m].module;
            int rank = s->rank[module];
            for (int t = 0; rank && t < s->token_count; t++)
                for (int o = 0; o < launch->target[m].out; o++) {
                    const float *v = plain_v(launch, s, t, m);
                    float sum = 0;
                    for (int r = 0; r < rank; r++)
                        sum += v[r] * plain_element(b, s, launch->layer, s->b_offset[module] +
                                                    plain_b_index(launch->target[m].out, rank, o, r));
                    float *y = launch->target[m].y;
                    y[(s->token_first + t) * launch->target[m].stride + o] += s->weight * sum;
                }
        }
}

// Element d of the key (value: 0 or 1) of kv head h at one slot.
static float *plain_kv(const struct backend *b, int layer, int32_t slot, int value, int h) {
    int D = b->shape.head_size, K = b->shape.kv_heads;
    return plain_page(b, layer, slot / PAGE_TOKENS) +
           ((value * K + h) * PAGE_TOKENS + slot % PAGE_TOKENS) * D;
}

static void plain_rope_and_kv_write(struct backend *b, int layer, void *qkv, const float *cosines,
                                    const float *sines, const int32_t *positions,
                                    const int32_t *slots, int tokens, int query_heads) {
    int D = b->shape.head_size, K = b->shape.kv_heads, half = D / 2;
    for (int t = 0; t < tokens; t++) {
        float *row = (float *)qkv + t * (query_heads + 2 * K) * D;
        for (int h = 0; h < query_heads + K; h++)
            for (int i = 0; i < half; i++) {
                float c = cosines[positions[t] * half + i], s = sines[positions[t] * half + i];
                float x = row[h * D + i], y = row[h * D + i + half];
                row[h * D + i] = x * c - y * s;
                row[h * D + i + half] = y * c + x * s;
            }
        for (int value = 0; value < 2; value++)
            for (int h = 0; h < K; h++)
                memcpy(plain_kv(b, layer, slots[t], value, h),
                       row + (query_heads + value * K + h) * D, (size_t)D * sizeof(float));
    }
}

static void plain_attend(const struct backend *b, int layer, float *y, const float *q,
                         const int32_t *pages, int context, int h) {
    int D = b->shape.head_size;
    float scores[4096], peak = -INFINITY, sum = 0;
    VERIFY_OP(context, <=, 4096);
    for (int p = 0; p < context; p++) {
        int32_t slot = pages[p / PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS;
        const float *key = plain_kv(b, layer, slot, 0, h);
        scores[p] = 0;
        for (int i = 0; i < D; i++) scores[p] += q[i] * key[i];
        scores[p] /= sqrtf((float)D);
        if (scores[p] > peak) peak = scores[p];
    }
    for (int i = 0; i < D; i++) y[i] = 0;
    for (int p = 0; p < context; p++) {
        int32_t slot = pages[p / PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS;
        float weight = expf(scores[p] - peak);
        sum += weight;
        for (int i = 0; i < D; i++) y[i] += weight * plain_kv(b, layer, slot, 1, h)[i];
    }
    for (int i = 0; i < D; i++) y[i] /= sum;
}

static void plain_attention(struct backend *b, int layer, void *y, const void *qkv,
                            const struct attention_span *spans, int span_count, int query_heads) {
    int D = b->shape.head_size, K = b->shape.kv_heads, stride = (query_heads + 2 * K) * D;
    for (int n = 0; n < span_count; n++)
        for (int i = 0; i < spans[n].token_count; i++)
            for (int h = 0; h < query_heads; h++) {
                int t = spans[n].token_first + i;
                int context = spans[n].context - spans[n].token_count + i + 1;
                plain_attend(b, layer, (float *)y + (t * query_heads + h) * D,
                             (const float *)qkv + t * stride + h * D, spans[n].pages, context,
                             h / (query_heads / K));
            }
}

static void plain_silu_mul(struct backend *b, void *y, const void *gate_up, int tokens, int ffn) {
    (void)b;
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < ffn; i++) {
            const float *row = (const float *)gate_up + t * 2 * ffn;
            ((float *)y)[t * ffn + i] = row[i] / (1.0f + expf(-row[i])) * row[ffn + i];
        }
}

static void plain_gather_rows(struct backend *b, void *y, const void *x, const int32_t *rows,
                              int count, int hidden) {
    (void)b;
    for (int i = 0; i < count; i++)
        memcpy((float *)y + i * hidden, (const float *)x + rows[i] * hidden,
               (size_t)hidden * sizeof(float));
}

static const struct backend_ops plain_backend = {
    .name = "plain",
    .activation_bytes = sizeof(float),
    .open = plain_open,
    .close = plain_close,
    .health = plain_health,
    .memory_create = plain_memory_create,
    .memory_destroy = plain_memory_destroy,
    .upload = plain_copy,
    .download = plain_copy,
    .synchronize = plain_synchronize,
    .pool_attach = plain_pool_attach,
    .pool_write = plain_pool_write,
    .pool_copy = plain_pool_copy,
    .linear_create = plain_linear_create,
    .linear_destroy = plain_linear_destroy,
    .linear_bytes = plain_linear_bytes,
    .embed = plain_embed,
    .rms_norm = plain_rms_norm,
    .linear = plain_linear,
    .lora_shrink = plain_lora_shrink,
    .lora_expand = plain_lora_expand,
    .rope_and_kv_write = plain_rope_and_kv_write,
    .attention = plain_attention,
    .silu_mul = plain_silu_mul,
    .gather_rows = plain_gather_rows,
};

#endif
