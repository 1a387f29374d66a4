// Base matmuls: y[T, out] = x[T, in] W^T. Weights are packed once into panels of 16 columns, in the
// backend's dtype; that copy serves every T. Engine thread (linear_create: whoever loads weights).
//
// DESIGN. Up to tile_rows_max tokens fit one tile: each panel streams past once, at memory speed,
// while all rows' accumulators stay in registers. More tokens are cut into groups; a block of
// panels and a piece of k that fit the second-level cache are then used for every group before
// moving on. Each output is one accumulator over ascending k in both cases (kept in y between
// pieces of k), so a token's result has the same bits alone and in any batch.
#include "kernels/cpu/cpu_internal.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdlib.h>
#include <string.h>

enum {
    BLOCK_PANELS = 8,         // of a many-token matmul
    PIECE_WORDS = 256,        // of k: 16 KiB of each panel
    PACK_INLINE_MAX = 65536,  // elements of x the caller packs alone
    CHUNKS_A_THREAD = 6,      // work is claimed in so many parts, so that a slow thread holds
                              // nobody back
};

struct linear {
    int out, in;
    int panels;
    int words; // of k: elements of f32, pairs of bf16
    uint32_t *panel; // [panels][words][PANEL]
    struct dnnl_linear *dnnl;   // these two instead of panels
    struct quant_linear *quant;
};

// ------------------------------------------------------------------ packing weights

struct pack_job {
    const struct cpu_kernels *kernels;
    struct linear *linear;
    const char *weights;
    enum dtype from, to;
};

// One panel: 16 rows of W converted where needed, then transposed.
static void pack_panel(void *context, int chunk, int thread) {
    (void)thread;
    const struct pack_job *job = context;
    const struct linear *l = job->linear;
    size_t in = (size_t)l->in, words = (size_t)l->words;
    uint32_t *converted = mem_zalloc(PANEL * words, sizeof *converted);
    const uint32_t *rows[PANEL] = {NULL};
    for (int i = 0; i < PANEL; i++) {
        int row = chunk * PANEL + i;
        if (row >= l->out) continue;
        const char *from = job->weights + (size_t)row * in * dtype_bytes(job->from);
        uint32_t *to = converted + (size_t)i * words;
        if (job->from == job->to) memcpy(to, from, in * dtype_bytes(job->to));
        else dtype_convert(to, job->to, from, job->from, in);
        rows[i] = to;
    }
    job->kernels->transpose(l->panel + (size_t)chunk * words * PANEL, rows, l->words);
    free(converted);
}

// oneDNN wants plain weights of the backend's type.
static enum status create_dnnl(struct backend *b, const void *weights, enum dtype dtype,
                               struct linear *l, struct error *err) {
    size_t count = (size_t)l->out * (size_t)l->in;
    void *converted = NULL;
    if (dtype != b->dtype) {
        converted = mem_alloc_aligned(count * dtype_bytes(b->dtype));
        dtype_convert(converted, b->dtype, weights, dtype, count);
    }
    enum status status = cpu_dnnl_linear_create(b->dnnl, converted ? converted : weights, l->out,
                                                l->in, &l->dnnl, err);
    free(converted);
    return status;
}

enum status cpu_linear_create(struct backend *b, const void *weights, enum dtype dtype, int out,
                              int in, struct linear **result, struct error *err) {
    *result = NULL;
    VERIFY(out > 0 && in > 0);
    VERIFY(dtype != DTYPE_OTHER);
    struct linear *l = mem_zalloc(1, sizeof *l);
    l->out = out;
    l->in = in;
    l->panels = (out + PANEL - 1) / PANEL;
    l->words = b->dtype == DTYPE_BF16 ? (in + 1) / 2 : in;
    if (b->quantization != QUANT_NONE || b->dnnl) {
        enum status status = b->dnnl ? create_dnnl(b, weights, dtype, l, err)
                                     : cpu_quant_create(b, weights, dtype, out, in, &l->quant, err);
        if (status == STATUS_OK) *result = l;
        else free(l);
        return status;
    }
    size_t bytes = (size_t)l->panels * (size_t)l->words * PANEL * sizeof *l->panel;
    l->panel = cpu_memory(bytes);
    if (!l->panel) {
        free(l);
        return error_set(err, STATUS_NO_MEMORY, "no memory for %d x %d weights (%zu bytes)", out,
                         in, bytes);
    }
    struct pack_job job = {b->kernels, l, weights, dtype, b->dtype};
    cpu_threads_run(b->threads, pack_panel, &job, l->panels);
    *result = l;
    return STATUS_OK;
}

void cpu_linear_destroy(struct backend *b, struct linear *linear) {
    (void)b;
    if (!linear) return;
    if (linear->dnnl) cpu_dnnl_linear_destroy(linear->dnnl);
    cpu_quant_destroy(linear->quant);
    free(linear->panel);
    free(linear);
}

// ------------------------------------------------------------------ the matmul

struct linear_job {
    struct backend *b;
    const struct linear *linear;
    float *y;
    const float *x;
    int tokens;
    struct row_groups groups;
    char *packed; // one group every packed_bytes
    size_t packed_bytes;
    size_t x_words; // 4-byte units of packed x a word of k and a row
    int panels_a_chunk;
};

static void pack_group(void *context, int group, int thread) {
    (void)thread;
    const struct linear_job *job = context;
    const struct cpu_kernels *kernels = job->b->kernels;
    size_t in = (size_t)job->linear->in;
    const float *x = job->x + (size_t)group * (size_t)job->groups.rows * in;
    int rows = group_rows(&job->groups, group, job->tokens);
    char *to = job->packed + (size_t)group * job->packed_bytes;
    if (job->b->dtype == DTYPE_BF16) kernels->pack_bf16(to, x, in, rows, job->linear->in);
    else kernels->pack_f32(to, x, in, rows, job->linear->in);
}

static const char *group_x(const struct linear_job *job, int group, int first_word, int padded) {
    return job->packed + (size_t)group * job->packed_bytes +
           (size_t)first_word * job->x_words * (size_t)padded * sizeof(float);
}

// y[rows of the group, columns of the panels] over words [first, first + count) of k.
static void multiply(const struct linear_job *job, int group, int panel, int panels, int first,
                     int count) {
    const struct linear *l = job->linear;
    const struct cpu_kernels *kernels = job->b->kernels;
    int rows = group_rows(&job->groups, group, job->tokens);
    int column = panel * PANEL;
    float edge[TILE_ROWS_MAX * PANEL];
    bool partial = column + panels * PANEL > l->out;
    float *y = job->y + (size_t)group * (size_t)job->groups.rows * (size_t)l->out + column;
    struct cpu_tile tile = {
        .x = group_x(job, group, first, kernels->tile_rows[rows]),
        .w = l->panel + ((size_t)panel * (size_t)l->words + (size_t)first) * PANEL,
        .panel_stride = (size_t)l->words * PANEL,
        .k_stride = PANEL,
        .k = count,
        .rows = rows,
        .panels = panels,
        .add = first > 0,
        .y = partial ? edge : y,
        .y_stride = partial ? PANEL : (size_t)l->out,
    };
    if (job->b->dtype == DTYPE_BF16) kernels->tile_bf16(&tile);
    else kernels->tile_f32(&tile);
    if (!partial) return;
    for (int r = 0; r < rows; r++)
        memcpy(y + (size_t)r * (size_t)l->out, edge + r * PANEL,
               (size_t)(l->out - column) * sizeof *y);
}

// A chunk when all tokens are one group.
static void stream_panels(void *context, int chunk, int thread) {
    (void)thread;
    const struct linear_job *job = context;
    const struct linear *l = job->linear;
    int whole = l->out / PANEL, at_once = job->b->kernels->tile_panels[job->tokens];
    int first = chunk * job->panels_a_chunk, end = min_int(first + job->panels_a_chunk, l->panels);
    for (int panel = first, step; panel < end; panel += step) {
        step = min_int(at_once, max_int(1, min_int(end, whole) - panel));
        if (step == 3) step = 2;
        multiply(job, 0, panel, step, 0, l->words);
    }
}

// A chunk when there are several groups.
static void block_panels(void *context, int chunk, int thread) {
    (void)thread;
    const struct linear_job *job = context;
    const struct linear *l = job->linear;
    int first = chunk * BLOCK_PANELS, end = min_int(first + BLOCK_PANELS, l->panels);
    int at_once = min_int(2, job->b->kernels->tile_panels[job->groups.padded]);
    if (end * PANEL > l->out) { // the partial panel has no room in y between pieces
        end--;
        for (int group = 0; group < job->groups.count; group++)
            multiply(job, group, end, 1, 0, l->words);
    }
    for (int at = 0; at < l->words; at += PIECE_WORDS)
        for (int group = 0; group < job->groups.count; group++)
            for (int panel = first, step; panel < end; panel += step) {
                step = min_int(at_once, end - panel);
                multiply(job, group, panel, step, at, min_int(PIECE_WORDS, l->words - at));
            }
}

void cpu_linear(struct backend *b, const struct linear *linear, void *y, const void *x,
                int tokens) {
    if (tokens == 0) return;
    if (linear->dnnl) {
        cpu_dnnl_linear(b, linear->dnnl, y, x, tokens);
        return;
    }
    if (linear->quant) {
        cpu_quant_linear(b, linear->quant, y, x, tokens);
        return;
    }
    struct linear_job job = {.b = b, .linear = linear, .y = y, .x = x, .tokens = tokens};
    job.groups = cpu_row_groups(b->kernels, tokens);
    job.packed_bytes = round_up(cpu_packed_bytes(job.groups.padded, linear->in), 64);
    job.x_words = b->dtype == DTYPE_BF16 && !b->kernels->packs_pairs ? 2 : 1;
    job.packed = cpu_scratch(b, SCRATCH_PACKED_X, (size_t)job.groups.count * job.packed_bytes);
    if ((size_t)tokens * (size_t)linear->in <= PACK_INLINE_MAX)
        for (int group = 0; group < job.groups.count; group++) pack_group(&job, group, 0);
    else cpu_threads_run(b->threads, pack_group, &job, job.groups.count);

    if (job.groups.count > 1) {
        int chunks = (linear->panels + BLOCK_PANELS - 1) / BLOCK_PANELS;
        cpu_threads_run(b->threads, block_panels, &job, chunks);
        return;
    }
    job.panels_a_chunk = max_int(1, linear->panels / (b->thread_count * CHUNKS_A_THREAD));
    job.panels_a_chunk = (int)round_up((size_t)job.panels_a_chunk, TILE_PANELS_MAX);
    cpu_threads_run(b->threads, stream_panels, &job,
                    (linear->panels + job.panels_a_chunk - 1) / job.panels_a_chunk);
}
