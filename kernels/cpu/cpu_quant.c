// Base matmuls with weights in 8 or 4 bits: half, or a bit over a quarter, of the bytes of bf16.
//
// DESIGN. Weights are rounded to nearest as they are loaded. 8 bits: symmetric, each output row by
// its largest magnitude. 4 bits: groups along k, each from its least to its largest number; weights
// that lie on such a grid already, as those of GPTQ and AWQ checkpoints do, stay what they are. x goes to 16 bits, row by row, so that unlike with x in 8 bits no feature is so much
// larger than the others that they vanish beside it (Dettmers et al., LLM.int8(), 2208.07339, keep
// such columns in 16 bits for that reason); what is lost is lost in the weights. Sums over a group
// are exact integers: 256 pairs of 127 x 32767 still fit 31 bits.
//
// The loops are those of cpu_linear.c: few rows stream the panels past once; many take a block of
// panels and a piece of k that fit the second-level cache for all rows. A row's bits do not depend
// on which.
#include "kernels/cpu/cpu_internal.h"

#include "base/memory.h"
#include "base/verify.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    GROUP_WORDS_INT8 = 256, // pairs of k after which integers become floats
    GROUP_INT4_MAX = 128,   // elements
    GROUP_INT4_MIN = 32,
    BLOCK_PANELS = 16,      // of a many-token matmul
    PIECE_WORDS = 256,      // of k: whole groups of either kind
    PACK_INLINE_MAX = 65536,
    CHUNKS_A_THREAD = 6,
};

struct quant_linear {
    int out, in, panels;
    bool four;
    int words, groups, group_words;
    size_t panel_bytes;
    uint8_t *panel;        // [panels][panel_bytes]
    float *scales, *zeros; // [panels][groups][PANEL]
};

// ------------------------------------------------------------------ rounding weights

struct quant_job {
    struct quant_linear *linear;
    const char *weights;
    enum dtype dtype;
};

static void round_int8(const struct quant_linear *l, int panel, int column, const float *row) {
    float most = 0.0f;
    for (int k = 0; k < l->in; k++) most = fmaxf(most, fabsf(row[k]));
    float scale = most / 127.0f;
    for (int g = 0; g < l->groups; g++)
        l->scales[((size_t)panel * (size_t)l->groups + (size_t)g) * PANEL + (size_t)column] = scale;
    uint8_t *to = l->panel + (size_t)panel * l->panel_bytes + 2 * column;
    for (int k = 0; k < l->in; k++) {
        float value = scale > 0.0f ? rintf(row[k] / scale) : 0.0f;
        to[k / 2 * 2 * PANEL + k % 2] = (uint8_t)(int8_t)fminf(fmaxf(value, -127.0f), 127.0f);
    }
}

// Whether `count` numbers are scale * m, the m whole and not more than 15 apart; then which. One of
// them is likely to be a small multiple.
static bool find_grid(const float *row, int count, float *scale, float *zero) {
    float least = INFINITY, most = -INFINITY, smallest = INFINITY;
    for (int k = 0; k < count; k++) {
        least = fminf(least, row[k]);
        most = fmaxf(most, row[k]);
        if (row[k] != 0.0f) smallest = fminf(smallest, fabsf(row[k]));
    }
    for (int multiple = 1; multiple <= 7 && most > least; multiple++) { // so some is not zero
        float step = smallest / (float)multiple;
        bool fits = most - least < 15.01f * step;
        for (int k = 0; fits && k < count; k++) {
            float place = row[k] / step;
            fits = fabsf(place - rintf(place)) < 1e-3f;
        }
        if (!fits) continue;
        *scale = step;
        *zero = rintf(-least / step);
        return true;
    }
    return false;
}

// The largest group in which the first row lies on grids; GROUP_INT4_MAX when there is none.
static int find_group(const float *row, int in) {
    for (int group = GROUP_INT4_MAX; group >= GROUP_INT4_MIN; group /= 2) {
        bool fits = true;
        float scale, zero;
        for (int k = 0; fits && k < in; k += group)
            fits = find_grid(row + k, min_int(group, in - k), &scale, &zero);
        if (fits) return group;
    }
    return GROUP_INT4_MAX;
}

static void round_int4(const struct quant_linear *l, int panel, int column, const float *row) {
    uint8_t *to = l->panel + (size_t)panel * l->panel_bytes + 2 * column;
    for (int g = 0; g < l->groups; g++) {
        int first = g * 2 * l->group_words, end = min_int(first + 2 * l->group_words, l->in);
        float least = 0.0f, most = 0.0f, scale, zero;
        for (int k = first; k < end; k++) {
            least = fminf(least, row[k]);
            most = fmaxf(most, row[k]);
        }
        if (!find_grid(row + first, end - first, &scale, &zero)) {
            scale = (most - least) / 15.0f;
            zero = scale > 0.0f ? rintf(-least / scale) : 0.0f;
        }
        size_t at = ((size_t)panel * (size_t)l->groups + (size_t)g) * PANEL + (size_t)column;
        l->scales[at] = scale;
        l->zeros[at] = -zero * scale;
        for (int k = first; k < end; k++) {
            float value = scale > 0.0f ? rintf(row[k] / scale) + zero : 0.0f;
            int number = (int)fminf(fmaxf(value, 0.0f), 15.0f);
            to[k / 4 * 2 * PANEL + k % 2] |= (uint8_t)(number << (k % 4 < 2 ? 0 : 4));
        }
    }
}

static void round_panel(void *context, int chunk, int thread) {
    (void)thread;
    const struct quant_job *job = context;
    const struct quant_linear *l = job->linear;
    size_t in = (size_t)l->in;
    float *row = mem_alloc(in * sizeof *row);
    for (int column = 0; column < PANEL && chunk * PANEL + column < l->out; column++) {
        size_t at = (size_t)(chunk * PANEL + column) * in * dtype_bytes(job->dtype);
        dtype_to_f32(row, job->weights + at, job->dtype, in);
        (l->four ? round_int4 : round_int8)(l, chunk, column, row);
    }
    free(row);
}

enum status cpu_quant_create(struct backend *b, const void *weights, enum dtype dtype, int out,
                             int in, struct quant_linear **result, struct error *err) {
    struct quant_linear *l = mem_zalloc(1, sizeof *l);
    l->out = out;
    l->in = in;
    l->panels = (out + PANEL - 1) / PANEL;
    l->four = b->quantization == QUANT_INT4;
    l->group_words = GROUP_WORDS_INT8;
    if (l->four) {
        float *row = mem_alloc((size_t)in * sizeof *row);
        dtype_to_f32(row, weights, dtype, (size_t)in);
        l->group_words = find_group(row, in) / 2;
        free(row);
    }
    l->words = (in + 1) / 2;
    l->groups = (l->words + l->group_words - 1) / l->group_words;
    l->panel_bytes = (l->four ? (size_t)(l->words + 1) / 2 : (size_t)l->words) * 2 * PANEL;
    size_t scales = (size_t)l->panels * (size_t)l->groups * PANEL;
    l->panel = cpu_memory((size_t)l->panels * l->panel_bytes);
    l->scales = mem_zalloc(scales, sizeof *l->scales);
    if (l->four) l->zeros = mem_zalloc(scales, sizeof *l->zeros);
    if (!l->panel) {
        cpu_quant_destroy(l);
        return error_set(err, STATUS_NO_MEMORY, "no memory for %d x %d quantised weights", out, in);
    }
    struct quant_job job = {l, weights, dtype};
    cpu_threads_run(b->threads, round_panel, &job, l->panels);
    *result = l;
    return STATUS_OK;
}

void cpu_quant_destroy(struct quant_linear *linear) {
    if (!linear) return;
    free(linear->panel);
    free(linear->scales);
    free(linear->zeros);
    free(linear);
}

// ------------------------------------------------------------------ the matmul

struct multiply_job {
    struct backend *b;
    const struct quant_linear *linear;
    float *y;
    const float *x;
    int tokens, panels_a_chunk;
    struct row_groups groups;
    char *packed; // one row group every group_bytes: x, its scales, its sums
    size_t group_bytes, scales_at, sums_at;
};

static char *row_group(const struct multiply_job *job, int group) {
    return job->packed + (size_t)group * job->group_bytes;
}

static void pack_group(void *context, int group, int thread) {
    (void)thread;
    const struct multiply_job *job = context;
    const struct quant_linear *l = job->linear;
    size_t in = (size_t)l->in;
    char *to = row_group(job, group);
    job->b->kernels->pack_quant(to, (float *)(void *)(to + job->scales_at),
                                l->four ? (float *)(void *)(to + job->sums_at) : NULL,
                                job->x + (size_t)group * (size_t)job->groups.rows * in, in,
                                group_rows(&job->groups, group, job->tokens), l->in,
                                l->group_words);
}

// y[rows of the group, columns of the panels] over words [first, first + count) of k.
static void multiply(const struct multiply_job *job, int group, int panel, int panels, int first,
                     int count) {
    const struct quant_linear *l = job->linear;
    int rows = group_rows(&job->groups, group, job->tokens), column = panel * PANEL;
    size_t padded = job->b->kernels->tile_rows[rows], quant = (size_t)(first / l->group_words);
    size_t scale = ((size_t)panel * (size_t)l->groups + quant) * PANEL;
    const char *x = row_group(job, group);
    float edge[TILE_ROWS_MAX * PANEL];
    bool partial = column + panels * PANEL > l->out;
    float *y = job->y + (size_t)group * (size_t)job->groups.rows * (size_t)l->out + column;
    struct cpu_quant_tile tile = {
        .x = x + (size_t)first * padded * sizeof(uint32_t),
        .w = l->panel + (size_t)panel * l->panel_bytes + (size_t)first * (l->four ? PANEL : 2 * PANEL),
        .scales = l->scales + scale,
        .zeros = l->four ? l->zeros + scale : NULL,
        .x_scales = (const float *)(const void *)(x + job->scales_at),
        .x_sums = (const float *)(const void *)(x + job->sums_at) + quant * padded,
        .panel_stride = l->panel_bytes,
        .scale_stride = (size_t)l->groups * PANEL,
        .words = count,
        .group_words = l->group_words,
        .rows = rows,
        .panels = panels,
        .add = first > 0,
        .last = first + count == l->words,
        .y = partial ? edge : y,
        .y_stride = partial ? PANEL : (size_t)l->out,
    };
    job->b->kernels->tile_quant(&tile, l->four);
    for (int r = 0; partial && r < rows; r++)
        memcpy(y + (size_t)r * (size_t)l->out, edge + r * PANEL,
               (size_t)(l->out - column) * sizeof *y);
}

// A chunk when all tokens are one group.
static void stream_panels(void *context, int chunk, int thread) {
    (void)thread;
    const struct multiply_job *job = context;
    const struct quant_linear *l = job->linear;
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
    const struct multiply_job *job = context;
    const struct quant_linear *l = job->linear;
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

void cpu_quant_linear(struct backend *b, const struct quant_linear *linear, float *y,
                      const float *x, int tokens) {
    struct multiply_job job = {.b = b, .linear = linear, .y = y, .x = x, .tokens = tokens};
    job.groups = cpu_row_groups(b->kernels, tokens);
    size_t padded = (size_t)job.groups.padded;
    job.scales_at = round_up(cpu_packed_bytes(job.groups.padded, linear->in), 64);
    job.sums_at = job.scales_at + round_up(padded * sizeof(float), 64);
    job.group_bytes = job.sums_at + round_up((size_t)linear->groups * padded * sizeof(float), 64);
    job.packed = cpu_scratch(b, SCRATCH_PACKED_X, (size_t)job.groups.count * job.group_bytes);
    if ((size_t)tokens * (size_t)linear->in <= PACK_INLINE_MAX)
        for (int group = 0; group < job.groups.count; group++) pack_group(&job, group, 0);
    else cpu_threads_run(b->threads, pack_group, &job, job.groups.count);
    if (job.groups.count > 1) {
        cpu_threads_run(b->threads, block_panels, &job,
                        (linear->panels + BLOCK_PANELS - 1) / BLOCK_PANELS);
        return;
    }
    job.panels_a_chunk = max_int(1, linear->panels / (b->thread_count * CHUNKS_A_THREAD));
    job.panels_a_chunk = (int)round_up((size_t)job.panels_a_chunk, TILE_PANELS_MAX);
    cpu_threads_run(b->threads, stream_panels, &job,
                    (linear->panels + job.panels_a_chunk - 1) / job.panels_a_chunk);
}
