// Base matmuls with weights in 8 or 4 bits: half, or a bit over a quarter, of the bytes of bf16.
//
// DESIGN. Weights are rounded to nearest as they are loaded. 8 bits: symmetric, each output row by
// its largest magnitude. 4 bits: groups along k, each from its least to its largest number; weights
// that lie on such a grid already, as those of GPTQ and AWQ checkpoints do, stay what they are.
// x goes to 16 bits, row by row, so that unlike with x in 8 bits no feature is so much larger than
// the others that they vanish beside it (Dettmers et al., LLM.int8(), 2208.07339, keep such columns
// in 16 bits for that reason); what is lost is lost in the weights. Sums over a group are exact
// integers: 256 pairs of 127 x 32767 still fit 31 bits.
//
// The order is that of cpu_panels.c, whose pieces of k are whole groups of either kind.
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
    MANY_WORDS = 256,       // of k at a time, when there are several groups of rows
    BLOCK_PANELS = 16,      // of a many-token matmul: 8 KiB of each for a piece of k
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
    *scale = *zero = 0.0f;
    if (least == 0.0f && most == 0.0f) return true;
    for (int multiple = 1; multiple <= 7 && most > least; multiple++) {
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

// From the least to the largest of the numbers and zero, in fifteen steps.
static void fit_range(const float *row, int count, float *scale, float *zero) {
    float least = 0.0f, most = 0.0f;
    for (int k = 0; k < count; k++) {
        least = fminf(least, row[k]);
        most = fmaxf(most, row[k]);
    }
    *scale = (most - least) / 15.0f;
    *zero = *scale > 0.0f ? rintf(-least / *scale) : 0.0f;
}

static void round_int4(const struct quant_linear *l, int panel, int column, const float *row) {
    uint8_t *to = l->panel + (size_t)panel * l->panel_bytes + 2 * column;
    for (int g = 0; g < l->groups; g++) {
        int first = g * 2 * l->group_words, end = min_int(first + 2 * l->group_words, l->in);
        float scale, zero;
        if (!find_grid(row + first, end - first, &scale, &zero))
            fit_range(row + first, end - first, &scale, &zero);
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
    memset(l->panel + (size_t)chunk * l->panel_bytes, 0, l->panel_bytes);
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
    l->panels = divide_up(out, PANEL);
    l->four = b->quantization == QUANT_INT4;
    l->group_words = GROUP_WORDS_INT8;
    if (l->four) {
        float *row = mem_alloc((size_t)in * sizeof *row);
        dtype_to_f32(row, weights, dtype, (size_t)in);
        l->group_words = find_group(row, in) / 2;
        free(row);
    }
    l->words = (in + 1) / 2;
    l->groups = divide_up(l->words, l->group_words);
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

size_t cpu_quant_bytes(const struct quant_linear *l) {
    size_t scales = (size_t)l->panels * (size_t)l->groups * PANEL * sizeof(float);
    return (size_t)l->panels * l->panel_bytes + (l->four ? 2 : 1) * scales;
}

// ------------------------------------------------------------------ the matmul

struct multiply_job {
    struct panel_job panels; // first; of its packed x a group has also scales and sums
    const struct quant_linear *linear;
    size_t scales_at, sums_at;
};

static float *group_scales(const struct multiply_job *job, int group) {
    return (float *)(void *)(group_packed(&job->panels, group) + job->scales_at);
}

static float *group_sums(const struct multiply_job *job, int group) {
    return (float *)(void *)(group_packed(&job->panels, group) + job->sums_at);
}

static void pack_group(const struct panel_job *panels, int group, int thread) {
    const struct multiply_job *job = (const struct multiply_job *)panels;
    const struct quant_linear *l = job->linear;
    struct backend *b = panels->b;
    int rows = group_rows(&panels->groups, group, panels->tokens);
    const float *x = group_input(panels, group);
    if (b->dtype == DTYPE_BF16) {
        float *wide = cpu_thread_scratch(b, thread);
        b->kernels->widen(wide, (const uint16_t *)(const void *)x, (size_t)rows * (size_t)l->in);
        x = wide;
    }
    b->kernels->pack_quant(group_packed(panels, group), group_scales(job, group),
                           l->four ? group_sums(job, group) : NULL, x, (size_t)l->in, rows, l->in,
                           l->group_words);
}

static void multiply(const struct panel_job *panels, const struct panel_part *part) {
    int group = part->group, panel = part->panel, first = part->first;
    const struct multiply_job *job = (const struct multiply_job *)panels;
    const struct quant_linear *l = job->linear;
    int rows = group_rows(&panels->groups, group, panels->tokens);
    size_t padded = panels->b->kernels->tile_rows[rows], quant = (size_t)(first / l->group_words);
    size_t scale = ((size_t)panel * (size_t)l->groups + quant) * PANEL;
    size_t word_bytes = l->four ? PANEL : 2 * PANEL;
    float edge[TILE_ROWS_MAX * PANEL];
    struct panel_output output = panel_output(panels, part, group, first > 0, edge);
    struct cpu_quant_tile tile = {
        .x = group_packed(panels, group) + (size_t)first * padded * sizeof(uint32_t),
        .w = l->panel + (size_t)panel * l->panel_bytes + (size_t)first * word_bytes,
        .scales = l->scales + scale,
        .zeros = l->four ? l->zeros + scale : NULL,
        .x_scales = group_scales(job, group),
        .x_sums = group_sums(job, group) + quant * padded,
        .panel_stride = l->panel_bytes,
        .scale_stride = (size_t)l->groups * PANEL,
        .words = part->count,
        .group_words = l->group_words,
        .rows = rows,
        .panels = part->panels,
        .add = first > 0,
        .last = first + part->count == l->words,
        .y = output.to,
        .y_stride = output.stride,
    };
    panels->b->kernels->tile_quant(&tile, l->four);
    panel_finish(panels, &output, rows);
}

void cpu_quant_linear(struct backend *b, const struct quant_linear *linear, float *y,
                      const void *x, int tokens) {
    struct multiply_job job = {
        .panels = {.b = b, .out = linear->out, .in = linear->in, .panels = linear->panels,
                   .words = linear->words, .block = BLOCK_PANELS, .y = y, .x = x, .tokens = tokens,
                   .groups = cpu_row_groups(b->kernels, tokens, b->kernels->tile_rows_max),
                   .pack = pack_group, .multiply = multiply},
        .linear = linear};
    struct panel_job *panels = &job.panels;
    panels->piece = panels->groups.count > 1 ? MANY_WORDS : linear->words;
    size_t floats = (size_t)panels->groups.padded * sizeof(float);
    job.scales_at = round_up(cpu_packed_bytes(panels->groups.padded, linear->in), 64);
    job.sums_at = job.scales_at + round_up(floats, 64);
    panels->packed_bytes = job.sums_at + round_up((size_t)linear->groups * floats, 64);
    panels->packed = cpu_scratch(b, SCRATCH_PACKED_X,
                                 (size_t)panels->groups.count * panels->packed_bytes);
    cpu_threads_scratch(b, (size_t)linear->in * floats); // a group's x, widened
    cpu_panels_run(panels);
}
