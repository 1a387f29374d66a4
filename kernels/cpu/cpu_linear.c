// Base matmuls: y[T, out] = x[T, in] W^T. Weights are packed once into panels of 16 columns, in the
// backend's dtype; that copy serves every T, in the order of cpu_panels.c. Engine thread
// (linear_create: whoever loads weights).
#include "kernels/cpu/cpu_compact.h"
#include "kernels/cpu/cpu_internal.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdlib.h>

// Of a many-token matmul: 16 KiB of each for a piece of k, half a megabyte in the second-level
// cache. The more there are, the fewer times the rows' x comes from further away. For one group of
// rows with panels outside only sums are kept, of 8 rows.
enum { BLOCK_PANELS = 32, STREAM_BLOCK_PANELS = 256 };

struct linear {
    int out, in;
    int panels;
    int words; // of k: elements of f32, pairs of bf16
    uint32_t *panel; // for each PIECE_WORDS of words, or what is left of them, [panels][words][PANEL]
    struct compact *compact;    // one of these instead of panels
    struct dnnl_linear *dnnl;
    struct quant_linear *quant;
};

// ------------------------------------------------------------------ packing weights

// Words [first, first + count), a piece, of a panel that is not compact.
static uint32_t *panel_at(const struct linear *l, int panel, int first, int count) {
    return l->panel + piece_words(l->panels, panel, first, count) * PANEL;
}

struct pack_job {
    const struct cpu_kernels *kernels;
    struct linear *linear;
    const char *weights;
    enum dtype from, to;
};

// One panel: 16 rows of W converted where needed, then transposed, then made compact.
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
    uint32_t *panel = mem_alloc_aligned(words * PANEL * sizeof *panel);
    job->kernels->transpose(panel, rows, l->words);
    if (l->compact) cpu_compact_pack(l->compact, chunk, panel);
    for (int at = 0; !l->compact && at < l->words; at += PIECE_WORDS) {
        int count = min_int(PIECE_WORDS, l->words - at);
        memcpy(panel_at(l, chunk, at, count), panel + at * PANEL,
               (size_t)count * PANEL * sizeof *panel);
    }
    free(panel);
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

// Whether weights are worth it is known when they have been packed.
static bool create_compact(struct backend *b, const struct pack_job *job) {
    struct linear *l = job->linear;
    if (!b->compact || !cpu_compact_can(l->out, l->in)) return false;
    l->compact = cpu_compact_create(b->kernels, l->panels, l->words);
    if (!l->compact) return false;
    cpu_threads_run(b->threads, pack_panel, (void *)job, l->panels);
    if (cpu_compact_fits(l->compact)) return true;
    cpu_compact_destroy(l->compact);
    l->compact = NULL;
    return false;
}

enum status cpu_linear_create(struct backend *b, const void *weights, enum dtype dtype, int out,
                              int in, struct linear **result, struct error *err) {
    *result = NULL;
    VERIFY(out > 0 && in > 0);
    VERIFY(dtype != DTYPE_OTHER);
    struct linear *l = mem_zalloc(1, sizeof *l);
    l->out = out;
    l->in = in;
    l->panels = divide_up(out, PANEL);
    l->words = b->dtype == DTYPE_BF16 ? (in + 1) / 2 : in;
    if (b->quantization != QUANT_NONE || b->dnnl) {
        enum status status = b->dnnl ? create_dnnl(b, weights, dtype, l, err)
                                     : cpu_quant_create(b, weights, dtype, out, in, &l->quant, err);
        if (status == STATUS_OK) *result = l;
        else free(l);
        return status;
    }
    struct pack_job job = {b->kernels, l, weights, dtype, b->dtype};
    *result = l;
    if (create_compact(b, &job)) return STATUS_OK;
    size_t bytes = (size_t)l->panels * (size_t)l->words * PANEL * sizeof *l->panel;
    l->panel = cpu_memory(bytes);
    if (!l->panel) {
        free(l);
        *result = NULL;
        return error_set(err, STATUS_NO_MEMORY, "no memory for %d x %d weights (%zu bytes)", out,
                         in, bytes);
    }
    cpu_threads_run(b->threads, pack_panel, &job, l->panels);
    return STATUS_OK;
}

void cpu_linear_destroy(struct backend *b, struct linear *linear) {
    (void)b;
    if (!linear) return;
    if (linear->dnnl) cpu_dnnl_linear_destroy(linear->dnnl);
    cpu_quant_destroy(linear->quant);
    cpu_compact_destroy(linear->compact);
    free(linear->panel);
    free(linear);
}

size_t cpu_linear_bytes(const struct linear *l) {
    if (l->dnnl) return cpu_dnnl_linear_bytes(l->dnnl);
    if (l->quant) return cpu_quant_bytes(l->quant);
    if (l->compact) return cpu_compact_bytes(l->compact);
    return (size_t)l->panels * (size_t)l->words * PANEL * sizeof *l->panel;
}

// ------------------------------------------------------------------ the matmul

struct linear_job {
    struct panel_job panels; // first
    const struct linear *linear;
};

static void pack_group(const struct panel_job *panels, int group, int thread) {
    (void)thread;
    const struct cpu_kernels *kernels = panels->b->kernels;
    const void *x = group_input(panels, group);
    char *to = group_packed(panels, group);
    int rows = group_rows(&panels->groups, group, panels->tokens);
    if (panels->b->dtype == DTYPE_BF16)
        kernels->pack_bf16(to, x, (size_t)panels->in, rows, panels->in);
    else kernels->pack_f32(to, x, (size_t)panels->in, rows, panels->in);
}

// A thread's scratch: sums of its chunk with panels outside, then panels of compact weights that group 0
// has expanded for the others, each [PIECE_WORDS][PANEL].
static size_t sums_bytes(const struct panel_job *panels) {
    size_t rows = (size_t)(panels->groups.count * panels->groups.padded);
    return panels->outside ? rows * (size_t)panels->block * PANEL * sizeof(float) : 0;
}

static size_t expanded_bytes(const struct linear_job *job) {
    int slots = job->panels.outside ? 2 : BLOCK_PANELS; // a tile's, or a block's
    return job->linear->compact ? (size_t)slots * PIECE_WORDS * PANEL * sizeof(uint32_t) : 0;
}

static uint32_t *expanded(const struct panel_job *panels, const struct panel_part *part) {
    int slot = panels->outside ? 0 : part->panel % BLOCK_PANELS;
    char *scratch = cpu_thread_scratch(panels->b, part->thread);
    return (uint32_t *)(void *)(scratch + sums_bytes(panels)) + (size_t)slot * PIECE_WORDS * PANEL;
}

// Sums of these panels' tiles, a group's behind the other's, after those of the panels before: between
// pieces of k they are kept there, because rows of y lie so far apart that they share few sets of a
// cache.
static float *tile_sums(const struct panel_job *panels, const struct panel_part *part) {
    int panels_before = part->panel - part->chunk_begin;
    VERIFY_OP(panels_before + part->panels, <=, panels->block);
    size_t rows = (size_t)(panels->groups.padded * panels->groups.count);
    return (float *)cpu_thread_scratch(panels->b, part->thread) +
           (size_t)(panels_before * PANEL) * rows;
}

// While these panels meet all groups, the next ones' weights are asked for, a share beside each group.
// Returns the bytes of a share.
static size_t ask_for_next(const struct linear_job *job, const struct panel_part *part,
                           struct cpu_tile *tile) {
    const struct linear *l = job->linear;
    tile->ask = job->panels.packed; // something that is there
    if (part->next_panel < 0) return 0;
    int groups = job->panels.groups.count;
    int count = min_int(PIECE_WORDS, l->words - part->next_first);
    int bytes = l->compact ? COMPACT_BYTES / COMPACT_WORDS : PANEL * (int)sizeof *l->panel;
    tile->ask = l->compact ? cpu_compact_codes(l->compact, part->next_panel, part->next_first, count)
                           : (const char *)panel_at(l, part->next_panel, part->next_first, count);
    tile->ask_bytes = (uint32_t)divide_up(part->panels * bytes, groups);
    return (size_t)(part->panels * part->count * bytes / groups);
}

static struct cpu_tile weights_tile(const struct linear_job *job, const struct panel_part *part) {
    const struct linear *l = job->linear;
    return (struct cpu_tile){
        .w = l->compact ? expanded(&job->panels, part)
                        : panel_at(l, part->panel, part->first, part->count),
        .panel_stride = (l->compact ? PIECE_WORDS : part->count) * PANEL,
        .k_stride = PANEL,
        .k = part->count,
    };
}

static void take_group(const struct panel_job *panels, const struct panel_part *part, int group,
                       struct cpu_tile *tile) {
    const struct row_groups *groups = &panels->groups;
    bool whole = group + 1 < groups->count;
    tile->rows = whole ? groups->rows : group_rows(groups, group, panels->tokens);
    int padded = whole ? groups->padded : panels->b->kernels->tile_rows[tile->rows];
    tile->x = group_packed(panels, group) +
              (size_t)(part->first * padded) * cpu_word_units(panels->b) * sizeof(float);
    tile->panels = part->panels;
}

// What group 0 expands of compact weights the others use.
static void multiply_tile(const struct linear_job *job, const struct panel_part *part, int group,
                          struct cpu_tile *tile) {
    const struct linear *l = job->linear;
    if (l->compact && group == 0)
        cpu_compact_multiply(l->compact, tile, part->panel, part->first,
                             job->panels.groups.count > 1 ? expanded(&job->panels, part) : NULL,
                             (size_t)tile->panel_stride);
    else cpu_multiply(job->panels.b, tile);
}

// Panels inside: sums between pieces of k are kept in y.
static void multiply_group(const struct panel_job *panels, const struct panel_part *part) {
    const struct linear_job *job = (const struct linear_job *)panels;
    struct cpu_tile tile = weights_tile(job, part);
    take_group(panels, part, part->group, &tile);
    float edge[TILE_ROWS_MAX * PANEL];
    struct panel_output output = panel_output(panels, part, part->group, part->first > 0, edge);
    tile.from = part->first > 0 ? output.to : NULL;
    tile.from_stride = tile.y_stride = output.stride;
    tile.y = output.to;
    multiply_tile(job, part, part->group, &tile);
    panel_finish(panels, &output, tile.rows);
}

// Panels outside: all groups, one behind the other.
static void multiply_groups(const struct panel_job *panels, const struct panel_part *part) {
    const struct linear_job *job = (const struct linear_job *)panels;
    struct cpu_tile tile = weights_tile(job, part);
    const size_t columns = (size_t)(part->panels * PANEL), ask = ask_for_next(job, part, &tile);
    bool last = part->first + part->count == job->linear->words;
    float *sums = tile_sums(panels, part), edge[TILE_ROWS_MAX * PANEL];
    const char *next = tile.ask;
    for (int group = 0; group < panels->groups.count; group++) {
        take_group(panels, part, group, &tile);
        tile.from = part->first > 0 ? sums : NULL;
        tile.y = sums;
        tile.from_stride = tile.y_stride = columns;
        tile.ask = next;
        struct panel_output output = {NULL};
        if (last) {
            output = panel_output(panels, part, group, false, edge);
            tile.y = output.to;
            tile.y_stride = output.stride;
        }
        multiply_tile(job, part, group, &tile);
        panel_finish(panels, &output, tile.rows);
        sums += columns * (size_t)panels->groups.padded;
        next += ask;
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
    const struct cpu_kernels *kernels = b->kernels;
    struct linear_job job = {
        .panels = {.b = b, .out = linear->out, .in = linear->in, .panels = linear->panels,
                   .words = linear->words, .block = BLOCK_PANELS, .piece = PIECE_WORDS, .y = y,
                   .x = x, .tokens = tokens,
                   .groups = cpu_row_groups(kernels, tokens, kernels->tile_rows_alone),
                   .outside = kernels->panels_outside, .pack = pack_group,
                   .multiply = kernels->panels_outside ? multiply_groups : multiply_group},
        .linear = linear};
    struct panel_job *panels = &job.panels;
    if (panels->groups.count == 1) panels->block = STREAM_BLOCK_PANELS;
    cpu_threads_scratch(b, sums_bytes(panels) + expanded_bytes(&job));
    panels->packed_bytes = round_up(cpu_packed_bytes(panels->groups.padded, linear->in), 64);
    panels->packed = cpu_scratch(b, SCRATCH_PACKED_X,
                                 (size_t)panels->groups.count * panels->packed_bytes);
    cpu_panels_run(panels);
}
