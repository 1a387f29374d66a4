// backend_cuda behind a table whose pointers may all be host memory: every operation copies its
// inputs to the device, runs, and copies what it wrote back. So tests/unit/test_backend_cpu.c, which
// reads and writes activations and pages by itself, tests a real GPU. Slow on purpose.
#include "kernels/backend.h"

#include "base/memory.h"

#include <stdlib.h>
#include <string.h>

// Host memory that the device has a copy of during one call.
struct mirror {
    void *host, *device;
    size_t bytes;
};

static const struct backend_ops *const cuda = &backend_cuda;
static struct mirror pool;
static struct pool_shape pool_shape;

static struct mirror mirror_open(struct backend *b, const void *host, size_t bytes) {
    struct mirror m = {(void *)host, cuda->memory_create(b, bytes ? bytes : 1), bytes};
    if (!m.device) abort();
    cuda->upload(b, m.device, host, bytes);
    return m;
}

// `wrote`: the host gets what the device has.
static void mirror_close(struct backend *b, struct mirror *m, bool wrote) {
    if (wrote) cuda->download(b, m->host, m->device, m->bytes);
    cuda->synchronize(b);
    if (!cuda->health(b)) abort();
    cuda->memory_destroy(b, m->device);
}

static void *host_create(struct backend *b, size_t bytes) {
    (void)b;
    return mem_zalloc(bytes, 1);
}

static void host_destroy(struct backend *b, void *memory) {
    if (memory == pool.host) {
        cuda->memory_destroy(b, pool.device);
        pool = (struct mirror){0};
    }
    free(memory);
}

static void host_copy(struct backend *b, void *to, const void *from, size_t bytes) {
    (void)b;
    memcpy(to, from, bytes);
}

static void host_pool_attach(struct backend *b, void *memory, const struct pool_shape *shape) {
    size_t elems = (size_t)shape->layers * (size_t)shape->page_count * shape->page_elems;
    pool = mirror_open(b, memory, elems * shape->elem_bytes);
    pool_shape = *shape;
    cuda->pool_attach(b, pool.device, shape);
}

static void pool_send(struct backend *b) {
    cuda->upload(b, pool.device, pool.host, pool.bytes);
}

static void pool_fetch(struct backend *b) {
    cuda->download(b, pool.host, pool.device, pool.bytes);
    cuda->synchronize(b);
}

static void host_pool_write(struct backend *b, int layer, const int32_t *pages, const void *image,
                            size_t elems) {
    pool_send(b);
    cuda->synchronize(b);
    cuda->pool_write(b, layer, pages, image, elems);
    cuda->pool_written(b);
    pool_fetch(b);
}

static void host_pool_copy(struct backend *b, int layer, const int32_t *pages, void *image,
                           size_t elems, bool to_host) {
    pool_send(b);
    cuda->pool_copy(b, layer, pages, image, elems, to_host);
    pool_fetch(b);
}

static void host_embed(struct backend *b, void *y, const void *table, enum dtype dtype,
                       const int32_t *ids, int tokens, int hidden) {
    int last = 0;
    for (int t = 0; t < tokens; t++) last = ids[t] > last ? ids[t] : last;
    struct mirror from = mirror_open(b, table, (size_t)(last + 1) * (size_t)hidden *
                                                   dtype_bytes(dtype));
    struct mirror to = mirror_open(b, y, (size_t)tokens * (size_t)hidden * sizeof(float));
    cuda->embed(b, to.device, from.device, dtype, ids, tokens, hidden);
    mirror_close(b, &to, true);
    mirror_close(b, &from, false);
}

static void host_rms_norm(struct backend *b, void *y, void *x, const void *residual,
                          const float *gain, float epsilon, int tokens, int hidden) {
    size_t bytes = (size_t)tokens * (size_t)hidden * sizeof(float);
    struct mirror to = mirror_open(b, y, bytes), from = mirror_open(b, x, bytes);
    struct mirror more = mirror_open(b, residual ? residual : x, bytes);
    struct mirror gains = mirror_open(b, gain, (size_t)hidden * sizeof(float));
    cuda->rms_norm(b, to.device, from.device, residual ? more.device : NULL, gains.device, epsilon,
                   tokens, hidden);
    mirror_close(b, &to, true);
    mirror_close(b, &from, true);
    mirror_close(b, &more, false);
    mirror_close(b, &gains, false);
}

// The shapes of linears, which the table keeps to itself.
struct known {
    const struct linear *linear;
    int out, in;
};
static struct known known[16];

static enum status host_linear_create(struct backend *b, const void *weights, enum dtype dtype,
                                      int out, int in, struct linear **result, struct error *err) {
    enum status status = cuda->linear_create(b, weights, dtype, out, in, result, err);
    for (size_t i = 0; i < 16 && status == STATUS_OK; i++)
        if (!known[i].linear) {
            known[i] = (struct known){*result, out, in};
            return status;
        }
    if (status == STATUS_OK) abort();
    return status;
}

static void host_linear_destroy(struct backend *b, struct linear *linear) {
    for (size_t i = 0; i < 16; i++)
        if (known[i].linear == linear) known[i].linear = NULL;
    cuda->linear_destroy(b, linear);
}

static void host_linear(struct backend *b, const struct linear *linear, void *y, const void *x,
                        int tokens) {
    const struct known *k = known;
    while (k->linear != linear) k++;
    struct mirror to = mirror_open(b, y, (size_t)tokens * (size_t)k->out * sizeof(float));
    struct mirror from = mirror_open(b, x, (size_t)tokens * (size_t)k->in * sizeof(float));
    cuda->linear(b, linear, to.device, from.device, tokens);
    mirror_close(b, &to, true);
    mirror_close(b, &from, false);
}

// Runs shrink or expand with x, y and v on the device. The targets' y lie in one array.
static void host_lora(struct backend *b, const struct lora_launch *launch,
                      void (*run)(struct backend *, const struct lora_launch *)) {
    int tokens = 0, rows = 0;
    for (int s = 0; s < launch->segment_count; s++) {
        const struct lora_segment *segment = &launch->segments[s];
        int end = segment->token_first + segment->token_count;
        int row = segment->v_first + segment->token_count;
        tokens = end > tokens ? end : tokens;
        rows = row > rows ? row : rows;
    }
    float *first = launch->target[0].y, *end = first;
    for (int t = 0; t < launch->target_count && tokens > 0; t++) {
        float *last = (float *)launch->target[t].y +
                      (size_t)(tokens - 1) * (size_t)launch->target[t].stride +
                      launch->target[t].out;
        end = last > end ? last : end;
    }
    struct mirror x = mirror_open(b, launch->x, (size_t)tokens * (size_t)launch->in * sizeof(float));
    struct mirror y = mirror_open(b, first, (size_t)(end - first) * sizeof(float));
    struct mirror v = mirror_open(b, launch->v, (size_t)rows * LORA_TARGETS_MAX * LORA_RANK_MAX *
                                                    sizeof(float));
    struct lora_launch moved = *launch;
    moved.x = x.device;
    moved.v = v.device;
    for (int t = 0; t < launch->target_count; t++)
        moved.target[t].y = (float *)y.device + ((float *)launch->target[t].y - first);
    pool_send(b);
    run(b, &moved);
    mirror_close(b, &y, true);
    mirror_close(b, &v, true);
    mirror_close(b, &x, false);
}

static void host_shrink(struct backend *b, const struct lora_launch *launch) {
    host_lora(b, launch, cuda->lora_shrink);
}

static void host_expand(struct backend *b, const struct lora_launch *launch) {
    host_lora(b, launch, cuda->lora_expand);
}

static size_t qkv_bytes(int tokens, int query_heads) {
    return (size_t)tokens * (size_t)(query_heads + 2 * pool_shape.kv_heads) *
           (size_t)pool_shape.head_size * sizeof(float);
}

static void host_rope(struct backend *b, int layer, void *qkv, const float *cosines,
                      const float *sines, const int32_t *positions, const int32_t *slots,
                      int tokens, int query_heads) {
    int last = 0;
    for (int t = 0; t < tokens; t++) last = positions[t] > last ? positions[t] : last;
    size_t angles = (size_t)(last + 1) * (size_t)(pool_shape.head_size / 2) * sizeof(float);
    struct mirror rows = mirror_open(b, qkv, qkv_bytes(tokens, query_heads));
    struct mirror c = mirror_open(b, cosines, angles), s = mirror_open(b, sines, angles);
    pool_send(b);
    cuda->rope_and_kv_write(b, layer, rows.device, c.device, s.device, positions, slots, tokens,
                            query_heads);
    mirror_close(b, &rows, true);
    mirror_close(b, &c, false);
    mirror_close(b, &s, false);
    pool_fetch(b);
}

static void host_attention(struct backend *b, int layer, void *y, const void *qkv,
                           const struct attention_span *spans, int span_count, int query_heads) {
    int tokens = 0;
    for (int i = 0; i < span_count; i++) {
        int end = spans[i].token_first + spans[i].token_count;
        tokens = end > tokens ? end : tokens;
    }
    size_t bytes = (size_t)tokens * (size_t)query_heads * (size_t)pool_shape.head_size;
    struct mirror to = mirror_open(b, y, bytes * sizeof(float));
    struct mirror from = mirror_open(b, qkv, qkv_bytes(tokens, query_heads));
    pool_send(b);
    cuda->attention(b, layer, to.device, from.device, spans, span_count, query_heads);
    mirror_close(b, &to, true);
    mirror_close(b, &from, false);
}

static void host_silu_mul(struct backend *b, void *y, const void *gate_up, int tokens, int ffn) {
    size_t bytes = (size_t)tokens * (size_t)ffn * sizeof(float);
    struct mirror to = mirror_open(b, y, bytes), from = mirror_open(b, gate_up, 2 * bytes);
    cuda->silu_mul(b, to.device, from.device, tokens, ffn);
    mirror_close(b, &to, true);
    mirror_close(b, &from, false);
}

static void host_gather(struct backend *b, void *y, const void *x, const int32_t *rows, int count,
                        int hidden) {
    int last = 0;
    for (int i = 0; i < count; i++) last = rows[i] > last ? rows[i] : last;
    size_t row = (size_t)hidden * sizeof(float);
    struct mirror to = mirror_open(b, y, (size_t)count * row);
    struct mirror from = mirror_open(b, x, (size_t)(last + 1) * row);
    cuda->gather_rows(b, to.device, from.device, rows, count, hidden);
    mirror_close(b, &to, true);
    mirror_close(b, &from, false);
}

static void host_draw(struct backend *b, int32_t *ids, const void *logits, const struct draw *draws,
                      int count, int vocabulary) {
    struct mirror to = mirror_open(b, ids, (size_t)count * sizeof *ids);
    struct mirror from = mirror_open(b, logits, (size_t)count * (size_t)vocabulary * sizeof(float));
    cuda->draw(b, to.device, from.device, draws, count, vocabulary);
    mirror_close(b, &to, true);
    mirror_close(b, &from, false);
}

static enum status host_open(const struct backend_options *options, struct backend **out,
                             struct error *err) {
    return cuda->open(options, out, err);
}

static void host_close(struct backend *b) {
    cuda->close(b);
}

static bool host_health(struct backend *b) {
    return cuda->health(b);
}

static void host_synchronize(struct backend *b) {
    cuda->synchronize(b);
}

const struct backend_ops backend_cuda_host;
const struct backend_ops backend_cuda_host = {
    .name = "cuda behind host memory",
    .activation_bytes = sizeof(float),
    .narrow_inputs = true,
    .open = host_open,
    .close = host_close,
    .health = host_health,
    .memory_create = host_create,
    .memory_destroy = host_destroy,
    .upload = host_copy,
    .download = host_copy,
    .synchronize = host_synchronize,
    .pool_attach = host_pool_attach,
    .pool_write = host_pool_write,
    .pool_copy = host_pool_copy,
    .linear_create = host_linear_create,
    .linear_destroy = host_linear_destroy,
    .embed = host_embed,
    .rms_norm = host_rms_norm,
    .linear = host_linear,
    .lora_shrink = host_shrink,
    .lora_expand = host_expand,
    .rope_and_kv_write = host_rope,
    .attention = host_attention,
    .silu_mul = host_silu_mul,
    .gather_rows = host_gather,
    .draw = host_draw,
};
