// The operations that touch each activation once: embed, rms_norm, RoPE with the write of K and V,
// silu_mul, gather_rows. Engine thread. Rows are independent, so a step of many rows is cut by
// rows; a small one runs on the calling thread, which is quicker than waking another.
#include "kernels/cpu/cpu_kv.h"

#include "base/verify.h"

#include <string.h>

enum { CHUNK_ELEMENTS = 16384 }; // a chunk's activations: tens of microseconds of work

struct rows_job {
    struct backend *b;
    void (*function)(const struct rows_job *job, int row, int thread);
    int rows, rows_a_chunk;
    // What the functions below take from it:
    void *y;
    float *x;
    const void *table;
    enum dtype dtype;
    const float *residual, *gain, *cosines, *sines;
    const int32_t *ids, *slots;
    float epsilon;
    int width, layer, query_heads;
};

static void run_chunk(void *context, int chunk, int thread) {
    const struct rows_job *job = context;
    int first = chunk * job->rows_a_chunk, end = min_int(first + job->rows_a_chunk, job->rows);
    for (int row = first; row < end; row++) job->function(job, row, thread);
}

static void run_rows(struct rows_job *job, int row_elements) {
    if (job->rows == 0) return;
    job->rows_a_chunk = max_int(1, CHUNK_ELEMENTS / max_int(1, row_elements));
    int chunks = divide_up(job->rows, job->rows_a_chunk);
    cpu_threads_run(job->b->threads, run_chunk, job, chunks);
}

// Where row `row` of what a matmul reads is computed as f32: in y, or in the thread's scratch.
static float *input_row(const struct rows_job *job, int row, int thread) {
    if (job->b->dtype == DTYPE_BF16) return cpu_thread_scratch(job->b, thread);
    return (float *)job->y + (size_t)row * (size_t)job->width;
}

static void write_input_row(const struct rows_job *job, int row, const float *from) {
    size_t width = (size_t)job->width;
    char *to = (char *)job->y + (size_t)row * width * dtype_bytes(job->b->dtype);
    cpu_write_input(job->b, to, from, width);
}

static void embed_row(const struct rows_job *job, int row, int thread) {
    (void)thread;
    size_t width = (size_t)job->width, at = (size_t)job->ids[row] * width;
    float *to = (float *)job->y + (size_t)row * width;
    if (job->dtype == DTYPE_F32) memcpy(to, (const float *)job->table + at, width * sizeof *to);
    else if (job->dtype == DTYPE_BF16)
        job->b->kernels->widen(to, (const uint16_t *)job->table + at, width);
    else dtype_to_f32(to, (const uint16_t *)job->table + at, job->dtype, width);
}

void cpu_embed(struct backend *b, void *y, const void *table, enum dtype dtype, const int32_t *ids,
               int tokens, int hidden) {
    struct rows_job job = {.b = b, .function = embed_row, .rows = tokens, .y = y, .table = table,
                           .dtype = dtype, .ids = ids, .width = hidden};
    run_rows(&job, hidden);
}

static void rms_norm_row(const struct rows_job *job, int row, int thread) {
    size_t at = (size_t)row * (size_t)job->width;
    float *y = input_row(job, row, thread);
    job->b->kernels->rms_norm(y, job->x + at, job->residual ? job->residual + at : NULL, job->gain,
                              job->epsilon, job->width);
    write_input_row(job, row, y);
}

void cpu_rms_norm(struct backend *b, void *y, void *x, const void *residual, const float *gain,
                  float epsilon, int tokens, int hidden) {
    struct rows_job job = {.b = b, .function = rms_norm_row, .rows = tokens, .y = y, .x = x,
                           .residual = residual, .gain = gain, .epsilon = epsilon,
                           .width = hidden};
    cpu_threads_scratch(b, (size_t)hidden * sizeof(float));
    run_rows(&job, hidden);
}

static void silu_row(const struct rows_job *job, int row, int thread) {
    const float *gate = job->x + (size_t)row * 2 * (size_t)job->width;
    float *y = input_row(job, row, thread);
    job->b->kernels->silu_mul(y, gate, gate + job->width, job->width);
    write_input_row(job, row, y);
}

void cpu_silu_mul(struct backend *b, void *y, const void *gate_up, int tokens, int ffn) {
    struct rows_job job = {.b = b, .function = silu_row, .rows = tokens, .y = y,
                           .x = (float *)gate_up, .width = ffn};
    cpu_threads_scratch(b, (size_t)ffn * sizeof(float));
    run_rows(&job, 4 * ffn);
}

static void gather_row(const struct rows_job *job, int row, int thread) {
    (void)thread;
    size_t width = (size_t)job->width;
    memcpy((float *)job->y + (size_t)row * width, job->x + (size_t)job->ids[row] * width,
           width * sizeof(float));
}

void cpu_gather_rows(struct backend *b, void *y, const void *x, const int32_t *rows, int count,
                     int hidden) {
    struct rows_job job = {.b = b, .function = gather_row, .rows = count, .y = y, .x = (float *)x,
                           .ids = rows, .width = hidden};
    run_rows(&job, hidden);
}

// ------------------------------------------------------------------ RoPE and the KV cache

static void rope_row(const struct rows_job *job, int row, int thread) {
    (void)thread;
    const struct pool_shape *shape = &job->b->shape;
    const struct cpu_kernels *kernels = job->b->kernels;
    int D = shape->head_size, K = shape->kv_heads, Q = job->query_heads;
    size_t width = (size_t)(Q + 2 * K) * (size_t)D;
    float *qkv = job->x + (size_t)row * width;
    size_t angle = (size_t)job->ids[row] * (size_t)(D / 2);
    for (int head = 0; head < Q + K; head++)
        kernels->rotate(qkv + (size_t)head * (size_t)D, job->cosines + angle, job->sines + angle,
                        D / 2);

    int32_t slot = job->slots[row];
    const float *k = qkv + (size_t)Q * (size_t)D, *v = k + (size_t)K * (size_t)D;
    cpu_kv_write_keys(job->b, job->layer, slot, k);
    // In bf16 two tokens share words: the first's row writes both, for rows may be other threads'.
    bool shares = shape->elem_bytes == 2, first = slot % 2 == 0;
    if (shares && !first && row > 0 && job->slots[row - 1] == slot - 1) return;
    bool both = shares && first && row + 1 < job->rows && job->slots[row + 1] == slot + 1;
    cpu_kv_write_values(job->b, job->layer, slot, v, both ? v + width : NULL);
}

void cpu_rope_and_kv_write(struct backend *b, int layer, void *qkv, const float *cosines,
                           const float *sines, const int32_t *positions, const int32_t *slots,
                           int tokens, int query_heads) {
    VERIFY(b->pool);
    VERIFY_OP(b->shape.head_size % 2, ==, 0);
    struct rows_job job = {.b = b, .function = rope_row, .rows = tokens, .x = qkv,
                           .cosines = cosines, .sines = sines, .ids = positions, .slots = slots,
                           .layer = layer, .query_heads = query_heads};
    run_rows(&job, (query_heads + 2 * b->shape.kv_heads) * b->shape.head_size);
}
