// The base matmul by oneDNN (2.x C API), for processors whose matrix units it knows and our tiles
// do not (AMX), or when LORAD_CPU_LINEAR=onednn asks for it. Called by cpu_linear.c, engine thread.
//
// Weights are reordered once into the layout that oneDNN prefers for TUNED_ROWS tokens, and every
// other number of tokens uses that copy. A primitive is made once for each matrix shape and number
// of rows: a step's T is cut into pieces of at most PIECE_ROWS, a multiple of 64 and a rest, so
// that there are few. Unlike our own tiles, oneDNN does not promise the same bits for every T.
#ifndef LORAD_NO_DNNL
#include "kernels/cpu/cpu_internal.h"

#include "base/memory.h"
#include "base/verify.h"

#include <dnnl.h>
#include <omp.h>
#include <stdlib.h>

enum { TUNED_ROWS = 64, PIECE_ROWS = 512, SLOTS = 64 + PIECE_ROWS / 64 };

struct shape {
    struct shape *next;
    int out, in;
    dnnl_memory_desc_t weights;
    dnnl_primitive_t primitives[SLOTS];
    size_t scratchpad_bytes[SLOTS];
};

struct dnnl_context {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    dnnl_primitive_attr_t attributes; // scratchpad is ours
    enum dtype dtype;
    struct shape *shapes;
    void *scratchpad;
    size_t scratchpad_bytes;
};

struct dnnl_linear {
    struct dnnl_context *context;
    struct shape *shape;
    dnnl_memory_t weights;
    void *memory;
};

static enum status check(dnnl_status_t status, const char *what, struct error *err) {
    if (status == dnnl_success) return STATUS_OK;
    return error_set(err, status == dnnl_out_of_memory ? STATUS_NO_MEMORY : STATUS_DEVICE,
                     "oneDNN: %s failed with status %d", what, (int)status);
}

// Within a step nothing can be reported, and nothing can fail that did not fail at load.
static void must(dnnl_status_t status) {
    VERIFY_OP(status, ==, dnnl_success);
}

static dnnl_data_type_t data_type(const struct dnnl_context *context) {
    return context->dtype == DTYPE_BF16 ? dnnl_bf16 : dnnl_f32;
}

enum status cpu_dnnl_open(int threads, enum dtype dtype, struct dnnl_context **out,
                          struct error *err) {
    struct dnnl_context *context = mem_zalloc(1, sizeof *context);
    context->dtype = dtype;
    omp_set_num_threads(threads);
    enum status status = check(dnnl_engine_create(&context->engine, dnnl_cpu, 0), "engine", err);
    if (status == STATUS_OK)
        status = check(dnnl_stream_create(&context->stream, context->engine,
                                          dnnl_stream_default_flags),
                       "stream", err);
    if (status == STATUS_OK)
        status = check(dnnl_primitive_attr_create(&context->attributes), "attributes", err);
    if (status == STATUS_OK)
        status = check(dnnl_primitive_attr_set_scratchpad_mode(context->attributes,
                                                               dnnl_scratchpad_mode_user),
                       "scratchpad mode", err);
    if (status != STATUS_OK) {
        cpu_dnnl_close(context);
        return status;
    }
    *out = context;
    return STATUS_OK;
}

void cpu_dnnl_close(struct dnnl_context *context) {
    if (!context) return;
    for (struct shape *shape = context->shapes, *next; shape; shape = next) {
        next = shape->next;
        for (int i = 0; i < SLOTS; i++)
            if (shape->primitives[i]) dnnl_primitive_destroy(shape->primitives[i]);
        free(shape);
    }
    if (context->attributes) dnnl_primitive_attr_destroy(context->attributes);
    if (context->stream) dnnl_stream_destroy(context->stream);
    if (context->engine) dnnl_engine_destroy(context->engine);
    free(context->scratchpad);
    free(context);
}

// y[rows, out] f32 = x[rows, in] times weights as [in, out] in the layout `weights`.
static dnnl_status_t matmul_describe(struct dnnl_context *context, int rows, int out, int in,
                                     const dnnl_memory_desc_t *weights,
                                     dnnl_primitive_desc_t *result) {
    dnnl_memory_desc_t x, y;
    dnnl_matmul_desc_t matmul;
    dnnl_dims_t x_dims = {rows, in}, y_dims = {rows, out};
    must(dnnl_memory_desc_init_by_tag(&x, 2, x_dims, data_type(context), dnnl_ab));
    must(dnnl_memory_desc_init_by_tag(&y, 2, y_dims, dnnl_f32, dnnl_ab));
    must(dnnl_matmul_desc_init(&matmul, &x, weights, NULL, &y));
    return dnnl_primitive_desc_create(result, &matmul, context->attributes, context->engine, NULL);
}

static enum status shape_find(struct dnnl_context *context, int out, int in, struct shape **result,
                              struct error *err) {
    for (*result = context->shapes; *result; *result = (*result)->next)
        if ((*result)->out == out && (*result)->in == in) return STATUS_OK;
    dnnl_memory_desc_t any;
    dnnl_dims_t dims = {in, out};
    must(dnnl_memory_desc_init_by_tag(&any, 2, dims, data_type(context), dnnl_format_tag_any));
    dnnl_primitive_desc_t description;
    enum status status = check(matmul_describe(context, TUNED_ROWS, out, in, &any, &description),
                               "matmul", err);
    if (status != STATUS_OK) return status;
    struct shape *shape = mem_zalloc(1, sizeof *shape);
    *shape = (struct shape){.next = context->shapes, .out = out, .in = in};
    shape->weights = *dnnl_primitive_desc_query_md(description, dnnl_query_weights_md, 0);
    dnnl_primitive_desc_destroy(description);
    *result = context->shapes = shape;
    return STATUS_OK;
}

static enum status reorder(struct dnnl_context *context, const dnnl_memory_desc_t *from_layout,
                           const void *from, dnnl_memory_t to, const dnnl_memory_desc_t *to_layout,
                           struct error *err) {
    dnnl_memory_t source;
    dnnl_primitive_desc_t description;
    dnnl_primitive_t primitive;
    must(dnnl_memory_create(&source, from_layout, context->engine, (void *)from));
    enum status status =
        check(dnnl_reorder_primitive_desc_create(&description, from_layout, context->engine,
                                                 to_layout, context->engine, NULL),
              "reorder of weights", err);
    if (status == STATUS_OK) {
        must(dnnl_primitive_create(&primitive, description));
        dnnl_exec_arg_t arguments[] = {{DNNL_ARG_FROM, source}, {DNNL_ARG_TO, to}};
        must(dnnl_primitive_execute(primitive, context->stream, 2, arguments));
        must(dnnl_stream_wait(context->stream));
        dnnl_primitive_destroy(primitive);
        dnnl_primitive_desc_destroy(description);
    }
    dnnl_memory_destroy(source);
    return status;
}

enum status cpu_dnnl_linear_create(struct dnnl_context *context, const void *weights, int out,
                                   int in, struct dnnl_linear **result, struct error *err) {
    struct dnnl_linear *linear = mem_zalloc(1, sizeof *linear);
    linear->context = context;
    enum status status = shape_find(context, out, in, &linear->shape, err);
    if (status == STATUS_OK) {
        size_t bytes = dnnl_memory_desc_get_size(&linear->shape->weights);
        linear->memory = cpu_memory(bytes);
        if (!linear->memory)
            status = error_set(err, STATUS_NO_MEMORY, "no memory for %d x %d weights (%zu bytes)",
                               out, in, bytes);
    }
    if (status == STATUS_OK) {
        must(dnnl_memory_create(&linear->weights, &linear->shape->weights, context->engine,
                                linear->memory));
        dnnl_memory_desc_t plain; // [out, in] read as [in, out]
        dnnl_dims_t dims = {in, out};
        must(dnnl_memory_desc_init_by_tag(&plain, 2, dims, data_type(context), dnnl_ba));
        status = reorder(context, &plain, weights, linear->weights, &linear->shape->weights, err);
    }
    if (status != STATUS_OK) {
        cpu_dnnl_linear_destroy(linear);
        return status;
    }
    *result = linear;
    return STATUS_OK;
}

void cpu_dnnl_linear_destroy(struct dnnl_linear *linear) {
    if (linear->weights) dnnl_memory_destroy(linear->weights);
    free(linear->memory);
    free(linear);
}

size_t cpu_dnnl_linear_bytes(const struct dnnl_linear *linear) {
    return dnnl_memory_desc_get_size(&linear->shape->weights);
}

static dnnl_primitive_t primitive_for(struct dnnl_context *context, struct shape *shape, int rows,
                                      int slot) {
    if (shape->primitives[slot]) return shape->primitives[slot];
    dnnl_primitive_desc_t description;
    must(matmul_describe(context, rows, shape->out, shape->in, &shape->weights, &description));
    must(dnnl_primitive_create(&shape->primitives[slot], description));
    const dnnl_memory_desc_t *scratchpad =
        dnnl_primitive_desc_query_md(description, dnnl_query_scratchpad_md, 0);
    shape->scratchpad_bytes[slot] = scratchpad ? dnnl_memory_desc_get_size(scratchpad) : 0;
    dnnl_primitive_desc_destroy(description);
    return shape->primitives[slot];
}

static dnnl_memory_t wrap(struct dnnl_context *context, dnnl_data_type_t type, dnnl_dim_t rows,
                          dnnl_dim_t columns, const void *memory) {
    dnnl_memory_desc_t layout;
    dnnl_dims_t dims = {rows, columns};
    dnnl_memory_t result;
    must(dnnl_memory_desc_init_by_tag(&layout, 2, dims, type, dnnl_ab));
    must(dnnl_memory_create(&result, &layout, context->engine, (void *)memory));
    return result;
}

// x is in the backend's dtype.
static void multiply_piece(const struct dnnl_linear *linear, float *y, const void *x, int rows) {
    struct dnnl_context *context = linear->context;
    struct shape *shape = linear->shape;
    int slot = rows < 64 ? rows : 63 + rows / 64;
    dnnl_primitive_t primitive = primitive_for(context, shape, rows, slot);
    size_t bytes = shape->scratchpad_bytes[slot];
    if (context->scratchpad_bytes < bytes) {
        free(context->scratchpad);
        context->scratchpad = mem_alloc_aligned(bytes);
        context->scratchpad_bytes = bytes;
    }
    dnnl_memory_t from = wrap(context, data_type(context), rows, shape->in, x);
    dnnl_memory_t to = wrap(context, dnnl_f32, rows, shape->out, y);
    dnnl_memory_t scratchpad = NULL;
    dnnl_memory_desc_t layout;
    dnnl_dims_t dims = {(dnnl_dim_t)bytes};
    must(dnnl_memory_desc_init_by_tag(&layout, 1, dims, dnnl_u8, dnnl_a));
    must(dnnl_memory_create(&scratchpad, &layout, context->engine, context->scratchpad));
    dnnl_exec_arg_t arguments[] = {{DNNL_ARG_SRC, from},
                                   {DNNL_ARG_WEIGHTS, linear->weights},
                                   {DNNL_ARG_DST, to},
                                   {DNNL_ARG_SCRATCHPAD, scratchpad}};
    must(dnnl_primitive_execute(primitive, context->stream, 4, arguments));
    must(dnnl_stream_wait(context->stream));
    dnnl_memory_destroy(from);
    dnnl_memory_destroy(to);
    dnnl_memory_destroy(scratchpad);
}

void cpu_dnnl_linear(const struct backend *b, const struct dnnl_linear *linear, float *y,
                     const void *x, int tokens) {
    size_t in = (size_t)linear->shape->in, out = (size_t)linear->shape->out;
    const char *from = x;
    omp_set_num_threads(b->thread_count); // for whichever thread calls
    for (int rows; tokens > 0; tokens -= rows) {
        rows = tokens >= PIECE_ROWS ? PIECE_ROWS : tokens >= 64 ? tokens / 64 * 64 : tokens;
        multiply_piece(linear, y, from, rows);
        y += (size_t)rows * out;
        from += (size_t)rows * in * dtype_bytes(b->dtype);
    }
}

#endif
