// What the files of the CPU backend share: the open backend, its scratch, and the operations that
// cpu_backend.c puts into the table. Nobody outside kernels/cpu includes this.
#ifndef LORAD_KERNELS_CPU_INTERNAL_H
#define LORAD_KERNELS_CPU_INTERNAL_H

#include "kernels/backend.h"
#include "kernels/cpu/cpu_isa.h"
#include "kernels/cpu/cpu_threads.h"

#include <string.h>

// Scratch grows to the largest step seen and stays; each area has one user at a time.
enum cpu_scratch {
    SCRATCH_PACKED_X, // activations packed for tiles
    SCRATCH_ITEMS,    // a list of work items
    SCRATCH_PARTIALS, // attention over parts of a context
    SCRATCH_THREADS,  // one part a thread
    SCRATCH_COUNT
};

struct backend {
    const struct cpu_kernels *kernels;
    struct cpu_threads *threads;
    int thread_count;
    enum dtype dtype; // of weights and pool elements
    enum quantization quantization;
    struct pool_shape shape;
    char *pool;
    struct {
        void *memory;
        size_t bytes;
    } scratch[SCRATCH_COUNT];
    size_t thread_scratch_bytes;
    struct large *large;       // mapped blocks (cpu_backend.c)
    struct dnnl_context *dnnl; // NULL: linear runs on our own tiles
    bool compact;              // bf16 weights are kept in 12 bits where they can be
};

// At least `bytes`, 64-byte aligned; the contents are lost when it has to grow.
void *cpu_scratch(struct backend *b, enum cpu_scratch area, size_t bytes);
// The same for each thread; between this call and the next, cpu_thread_scratch() gives the parts.
void cpu_threads_scratch(struct backend *b, size_t bytes_each);
void *cpu_thread_scratch(struct backend *b, int thread);
// Page-aligned (huge pages where the system gives them), not zeroed: whoever fills it in, with all
// threads, makes its pages; released with free().
void *cpu_memory(size_t bytes);

static inline size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

static inline int divide_up(int n, int by) {
    return (n + by - 1) / by;
}

static inline int min_int(int a, int b) {
    return a < b ? a : b;
}

static inline int max_int(int a, int b) {
    return a > b ? a : b;
}

// T rows cut into groups of equal height (the last may be lower), each packed for one tile.
struct row_groups {
    int count, rows; // groups; rows in all but the last
    int padded;      // rows a group is packed for
};
// `alone`: so many are not cut.
struct row_groups cpu_row_groups(const struct cpu_kernels *kernels, int rows, int alone);

static inline int group_rows(const struct row_groups *groups, int group, int total) {
    return min_int(groups->rows, total - group * groups->rows);
}

// Rows of f32 packed for a tile, rounded to the backend's dtype; and that tile.
static inline void cpu_pack(const struct backend *b, void *to, const float *x, size_t stride,
                            int rows, int k) {
    (b->dtype == DTYPE_BF16 ? b->kernels->pack_rounded : b->kernels->pack_f32)(to, x, stride, rows,
                                                                              k);
}

// `n` elements of what matmuls read, made of f32: the same, or bf16.
static inline void cpu_write_input(const struct backend *b, void *to, const float *from, size_t n) {
    if (b->dtype == DTYPE_BF16) b->kernels->narrow(to, from, n);
    else if (to != from) memcpy(to, from, n * sizeof *from);
}

static inline void cpu_multiply(const struct backend *b, const struct cpu_tile *tile) {
    (b->dtype == DTYPE_BF16 ? b->kernels->tile_bf16 : b->kernels->tile_f32)(tile);
}

// 4-byte units of packed x a word of k and a row: bf16 pairs may be packed as two floats.
static inline size_t cpu_word_units(const struct backend *b) {
    return b->dtype == DTYPE_BF16 && !b->kernels->packs_pairs ? 2 : 1;
}

// Base weights lie in the order in which cpu_panels.c walks them: words [first, first + count) of k, a
// piece, of all panels, then the next piece. Where this panel's part of a piece begins, in words.
enum { PIECE_WORDS = 256 };
static inline size_t piece_words(int panels, int panel, int first, int count) {
    return (size_t)first * (size_t)panels + (size_t)panel * (size_t)count;
}

// A tile's part of a matmul: y[rows of a group, columns of the panels] over words [first,
// first + count) of k, adding to what the words before gave. With panels outside it is of all groups,
// else of one; group 0 comes first, on the same thread as those after it.
struct panel_part {
    int thread, chunk_begin; // the chunk's first panel
    int chunk_next;          // and that of the thread's next chunk; -1: unknown
    int group, panel, panels;
    int first, count;
    int next_panel, next_first; // with panels outside: what follows the last group. -1: nothing
};

// A base matmul y[T, out] = x[T, in] W^T over panels of 16 columns (cpu_panels.c); who fills this in
// knows what weights and packed x look like.
struct panel_job {
    struct backend *b;
    int out, in, panels, words; // words of k
    int block; // panels of a chunk, even, at most: of several groups, or with panels outside
    int piece;                  // words of k that all panels of a chunk use before the next
    bool outside;               // a tile's panels meet all groups before the next (cpu_panels.c)
    float *y;
    const char *x; // of the backend's dtype
    int tokens;
    struct row_groups groups;
    char *packed;       // x, one row group every packed_bytes
    size_t packed_bytes;
    void (*pack)(const struct panel_job *job, int group, int thread);
    void (*multiply)(const struct panel_job *job, const struct panel_part *part);
    int at_once, chunks; // cpu_panels_run's own: panels of a tile; parts of the work
};
void cpu_panels_run(struct panel_job *job);

static inline const void *group_input(const struct panel_job *job, int group) {
    size_t first = (size_t)group * (size_t)job->groups.rows * (size_t)job->in;
    return job->x + first * dtype_bytes(job->b->dtype);
}

static inline char *group_packed(const struct panel_job *job, int group) {
    return job->packed + (size_t)group * job->packed_bytes;
}

// Where a tile puts its sums: y, or `edge` when the last columns are not there. `adds`: to what is
// there.
struct panel_output {
    float *y, *to;
    size_t stride;
    int columns; // of the edge that are there
};
static inline struct panel_output panel_output(const struct panel_job *job,
                                               const struct panel_part *part, int group, bool adds,
                                               float *edge) {
    size_t out = (size_t)job->out;
    float *y = job->y + (size_t)(group * job->groups.rows) * out + part->panel * PANEL;
    int columns = job->out - part->panel * PANEL;
    int rows = group_rows(&job->groups, group, job->tokens);
    if (columns >= part->panels * PANEL) return (struct panel_output){y, y, out, 0};
    for (int r = 0; adds && r < rows; r++)
        memcpy(edge + r * PANEL, y + (size_t)r * out, (size_t)columns * sizeof *y);
    return (struct panel_output){y, edge, PANEL, columns};
}

static inline void panel_finish(const struct panel_job *job, const struct panel_output *output,
                                int rows) {
    for (int r = 0; output->columns > 0 && r < rows; r++)
        memcpy(output->y + (size_t)r * (size_t)job->out, output->to + r * PANEL,
               (size_t)output->columns * sizeof(float));
}

// The first element of page `page` in layer `layer`.
static inline char *cpu_page(const struct backend *b, int layer, int32_t page) {
    size_t index = (size_t)layer * (size_t)b->shape.page_count + (size_t)page;
    return b->pool + index * b->shape.page_elems * b->shape.elem_bytes;
}

// Weights in 8 or 4 bits (cpu_quant.c).
struct quant_linear;
MUST_CHECK enum status cpu_quant_create(struct backend *b, const void *weights, enum dtype dtype,
                                        int out, int in, struct quant_linear **result,
                                        struct error *err);
void cpu_quant_destroy(struct quant_linear *linear);
size_t cpu_quant_bytes(const struct quant_linear *linear);
void cpu_quant_linear(struct backend *b, const struct quant_linear *linear, float *y,
                      const void *x, int tokens);

// oneDNN's matmul in place of our tiles (cpu_dnnl.c).
struct dnnl_context;
MUST_CHECK enum status cpu_dnnl_open(int threads, enum dtype dtype, struct dnnl_context **out,
                                     struct error *err);
void cpu_dnnl_close(struct dnnl_context *context);
struct dnnl_linear;
// weights [out, in] of the backend's dtype.
MUST_CHECK enum status cpu_dnnl_linear_create(struct dnnl_context *context, const void *weights,
                                              int out, int in, struct dnnl_linear **result,
                                              struct error *err);
void cpu_dnnl_linear_destroy(struct dnnl_linear *linear);
size_t cpu_dnnl_linear_bytes(const struct dnnl_linear *linear);
void cpu_dnnl_linear(const struct backend *b, const struct dnnl_linear *linear, float *y,
                     const void *x, int tokens);

// Operations; see kernels/backend.h.
enum status cpu_linear_create(struct backend *b, const void *weights, enum dtype dtype, int out,
                              int in, struct linear **result, struct error *err);
void cpu_linear_destroy(struct backend *b, struct linear *linear);
size_t cpu_linear_bytes(const struct linear *linear);
void cpu_linear(struct backend *b, const struct linear *linear, void *y, const void *x,
                int tokens);
void cpu_lora_shrink(struct backend *b, const struct lora_launch *launch);
void cpu_lora_expand(struct backend *b, const struct lora_launch *launch);
void cpu_attention(struct backend *b, int layer, void *y, const void *qkv,
                   const struct attention_span *spans, int span_count, int query_heads);
void cpu_embed(struct backend *b, void *y, const void *table, enum dtype dtype, const int32_t *ids,
               int tokens, int hidden);
void cpu_rms_norm(struct backend *b, void *y, void *x, const void *residual, const float *gain,
                  float epsilon, int tokens, int hidden);
void cpu_rope_and_kv_write(struct backend *b, int layer, void *qkv, const float *cosines,
                           const float *sines, const int32_t *positions, const int32_t *slots,
                           int tokens, int query_heads);
void cpu_silu_mul(struct backend *b, void *y, const void *gate_up, int tokens, int ffn);
void cpu_gather_rows(struct backend *b, void *y, const void *x, const int32_t *rows, int count,
                     int hidden);

#endif
