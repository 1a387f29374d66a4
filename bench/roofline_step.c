// One step of the rig, operation by operation; how long each takes. See roofline_internal.h.
#include "bench/roofline_internal.h"

#include "base/file.h"
#include "base/memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const operation_names[OPERATIONS] = {
    "rms_norm", "linear qkv", "rope + kv write", "attention", "linear o", "linear gate+up",
    "silu_mul", "linear down", "lora shrink", "lora expand", "linear head"};

// ------------------------------------------------------------------ a step

struct target {
    enum lora_module module;
    float *y;
    int stride;
};

// False: not wanted; else `end` follows.
static bool begin(const struct step_watch *watch, enum operation operation) {
    if (!(watch->wanted >> operation & 1)) return false;
    if (watch->begin) watch->begin(watch->context, operation);
    return true;
}

static void end(const struct step_watch *watch, enum operation operation) {
    if (watch->end) watch->end(watch->context, operation);
}

struct segments {
    const struct lora_segment *of;
    int count;
};

static void lora_run(struct rig *rig, int layer, const float *x, struct segments segments,
                     const struct target *targets, int count, const struct step_watch *watch) {
    if (rig->options.rank_count == 0) return;
    struct lora_launch launch = {.layer = layer, .x = x, .in = rig->in[targets[0].module],
                                 .target_count = count, .segments = segments.of,
                                 .segment_count = segments.count, .v = rig->v};
    for (int i = 0; i < count; i++) {
        launch.target[i].module = targets[i].module;
        launch.target[i].y = targets[i].y;
        launch.target[i].out = rig->out[targets[i].module];
        launch.target[i].stride = targets[i].stride;
    }
    if (begin(watch, OP_SHRINK)) {
        rig->ops->lora_shrink(rig->backend, &launch);
        end(watch, OP_SHRINK);
    }
    if (begin(watch, OP_EXPAND)) {
        rig->ops->lora_expand(rig->backend, &launch);
        end(watch, OP_EXPAND);
    }
}

static void linear_run(struct rig *rig, const struct linear *weights, float *y, const float *x,
                       int T, const struct step_watch *watch, enum operation operation) {
    if (!begin(watch, operation)) return;
    rig->ops->linear(rig->backend, weights, y, x, T);
    end(watch, operation);
}

static void norm_run(struct rig *rig, int first, int T, const struct step_watch *watch) {
    if (!begin(watch, OP_NORM)) return;
    float *x = rig->x + (size_t)first * (size_t)rig->shape.hidden;
    rig->ops->rms_norm(rig->backend, rig->normed, x, NULL, rig->gain, 1e-5f, T, rig->shape.hidden);
    end(watch, OP_NORM);
}

static void attention_run(struct rig *rig, int layer, int T, const struct step_watch *watch) {
    int query_heads = rig->shape.query_heads;
    if (begin(watch, OP_ROPE)) {
        rig->ops->rope_and_kv_write(rig->backend, layer, rig->qkv, rig->cosines, rig->sines,
                                    rig->positions, rig->slots, T, query_heads);
        end(watch, OP_ROPE);
    }
    if (begin(watch, OP_ATTENTION)) {
        rig->ops->attention(rig->backend, layer, rig->heads, rig->qkv, rig->spans,
                            rig->span_count, query_heads);
        end(watch, OP_ATTENTION);
    }
}

static void ffn_run(struct rig *rig, int l, int first, int T, struct segments segments,
                    const struct step_watch *watch) {
    const struct rig_shape *s = &rig->shape;
    const struct rig_layer *w = &rig->layers[l];
    float *delta = rig->delta + (size_t)first * (size_t)s->hidden;
    norm_run(rig, first, T, watch);
    linear_run(rig, w->gate_up, rig->gate_up, rig->normed, T, watch, OP_GATE_UP);
    lora_run(rig, l, rig->normed, segments,
             (struct target[]){{LORA_GATE, rig->gate_up, 2 * s->ffn},
                               {LORA_UP, rig->gate_up + s->ffn, 2 * s->ffn}}, 2, watch);
    if (begin(watch, OP_SILU)) {
        rig->ops->silu_mul(rig->backend, rig->gated, rig->gate_up, T, s->ffn);
        end(watch, OP_SILU);
    }
    linear_run(rig, w->down, delta, rig->gated, T, watch, OP_DOWN);
    lora_run(rig, l, rig->gated, segments, (struct target[]){{LORA_DOWN, delta, s->hidden}}, 1,
             watch);
}

static void layer_run(struct rig *rig, int l, int T, const struct step_watch *watch) {
    const struct rig_shape *s = &rig->shape;
    const struct rig_layer *w = &rig->layers[l];
    int q = s->query_heads * s->head_size, kv = s->kv_heads * s->head_size, stride = q + 2 * kv;
    struct segments all = {rig->segments, rig->segment_count}, some = {rig->block_segments, 0};
    norm_run(rig, 0, T, watch);
    linear_run(rig, w->qkv, rig->qkv, rig->normed, T, watch, OP_QKV);
    lora_run(rig, l, rig->normed, all, (struct target[]){{LORA_Q, rig->qkv, stride},
             {LORA_K, rig->qkv + q, stride}, {LORA_V, rig->qkv + q + kv, stride}}, 3, watch);
    attention_run(rig, l, T, watch);
    linear_run(rig, w->out, rig->delta, rig->heads, T, watch, OP_OUT);
    lora_run(rig, l, rig->heads, all, (struct target[]){{LORA_O, rig->delta, s->hidden}}, 1, watch);
    int count = row_block_count(rig->ops, T);
    for (int block = 0; block < count; block++) {
        int first = row_block_first(T, count, block);
        int rows = row_block_first(T, count, block + 1) - first;
        some.count = row_block_segments(rig->block_segments, all.of, all.count, first, rows);
        ffn_run(rig, l, first, rows, count == 1 ? all : some, watch);
    }
}

int logit_rows(const struct rig *rig, int T) {
    return rig->options.prefill ? 1 : T;
}

void step_run(struct rig *rig, int T, const struct step_watch *watch) {
    const struct backend_ops *ops = rig->ops;
    struct step_rows rows = {T, logit_rows(rig, T), false};
    if (ops->step_begin) rows = ops->step_begin(rig->backend, &rig->step);
    if (!rows.recorded) {
        for (int l = 0; l < rig->shape.layers; l++) layer_run(rig, l, rows.tokens, watch);
        linear_run(rig, rig->head, rig->logits, rig->normed, logit_rows(rig, T), watch, OP_HEAD);
    }
    if (ops->step_end) ops->step_end(rig->backend);
}

// ------------------------------------------------------------------ times

// Seconds of the fastest of `rounds` steps that run the wanted operations without waiting in between,
// after `unused` ones.
static double step_seconds(struct rig *rig, int T, unsigned wanted, int unused, int rounds) {
    struct step_watch watch = {.wanted = wanted};
    double best = 0;
    for (int round = -unused; round < rounds; round++) {
        double begin = clock_seconds();
        step_run(rig, T, &watch);
        rig->ops->synchronize(rig->backend);
        double seconds = clock_seconds() - begin;
        if (round >= 0 && (best == 0 || seconds < best)) best = seconds;
    }
    return best;
}

// A device is waited for once for all layers of an operation: a wait takes longer than many of them.
static void device_measure(struct rig *rig, int T, int rounds, struct step_cost *cost) {
    for (int i = 0; i < OPERATIONS; i++) {
        bool is_lora = i == OP_SHRINK || i == OP_EXPAND;
        if (is_lora ? rig->options.rank_count == 0 : rig->options.lora_only) continue;
        cost->of[i].seconds = step_seconds(rig, T, 1u << i, 1, rounds);
    }
    if (rig->options.lora_only) return;
    rig->step.repeats = true; // the third step is the first that comes from a recording
    cost->whole_seconds = step_seconds(rig, T, ~0u, 2, rounds);
}

// Operations that are done when they return, one by one.
struct stopwatch {
    double since, seconds[OPERATIONS];
};

static void stopwatch_start(void *context, enum operation operation) {
    (void)operation;
    ((struct stopwatch *)context)->since = clock_seconds();
}

static void stopwatch_stop(void *context, enum operation operation) {
    struct stopwatch *watch = context;
    watch->seconds[operation] += clock_seconds() - watch->since;
}

void step_measure(struct rig *rig, int T, int rounds, struct step_cost *cost) {
    rig_step(rig, T);
    if (!rig->ops->computes_on_host) {
        device_measure(rig, T, rounds, cost);
        return;
    }
    double best = 0;
    for (int round = 0; round <= rounds; round++) { // the first one warms up
        struct stopwatch watch = {0};
        double total = 0;
        step_run(rig, T, &(struct step_watch){~0u, stopwatch_start, stopwatch_stop, &watch});
        for (int i = 0; i < OPERATIONS; i++) total += watch.seconds[i];
        if (round == 0 || (best > 0 && total >= best)) continue;
        best = total;
        for (int i = 0; i < OPERATIONS; i++) cost->of[i].seconds = watch.seconds[i];
    }
}

// ------------------------------------------------------------------ limits

// What a device reaches on big things, through operations that every backend has: bytes read and
// written by silu_mul, operations of one matmul. Lower bounds of its true limits.
struct machine_peak device_peak(struct rig *rig) {
    enum { ROUNDS = 5 };
    int rows = rig->options.peak_rows, width = 2 * rows, ffn = 6 * rows;
    size_t elements = (size_t)rows * (size_t)ffn;
    const struct backend_ops *ops = rig->ops;
    struct backend *b = rig->backend;
    struct machine_peak peak = {.has_bf16 = rig->options.dtype == DTYPE_BF16};
    size_t written = ops->narrow_inputs ? dtype_bytes(rig->options.dtype) : sizeof(float);
    float *from = ops->memory_create(b, 2 * elements * sizeof(float));
    float *to = ops->memory_create(b, elements * sizeof(float));
    float *weights = rig_numbers((size_t)width * (size_t)width);
    struct linear *linear = NULL;
    struct error err;
    if (!from || !to || ops->linear_create(b, weights, DTYPE_F32, width, width, &linear, &err)) {
        fprintf(stderr, "lorad-bench roofline: no memory to measure the device's limits\n");
        exit(1);
    }
    rig_fill(rig, from, 2 * elements); // a multiplication of zeros is faster than one of numbers
    for (int round = 0; round <= ROUNDS; round++) { // the first one warms up
        double begin = clock_seconds();
        ops->silu_mul(b, to, from, rows, ffn);
        ops->synchronize(b);
        double middle = clock_seconds(), copy = middle - begin;
        ops->linear(b, linear, to, from, rows);
        ops->synchronize(b);
        double multiply = clock_seconds() - middle;
        double bytes = (2.0 * sizeof(float) + (double)written) * (double)elements;
        double flops = 2.0 * rows * width * width;
        if (round == 0) continue;
        if (bytes / copy > peak.read_bytes_per_s) peak.read_bytes_per_s = bytes / copy;
        if (flops / multiply > peak.bf16_flops_per_s) peak.bf16_flops_per_s = flops / multiply;
    }
    peak.f32_flops_per_s = peak.bf16_flops_per_s; // of the type that was asked for
    ops->linear_destroy(b, linear);
    ops->memory_destroy(b, from);
    ops->memory_destroy(b, to);
    free(weights);
    return peak;
}

double adapter_copy_seconds(struct rig *rig, double *bytes) {
    enum { ROUNDS = 5 };
    const struct backend_ops *ops = rig->ops;
    struct backend *b = rig->backend;
    size_t elems = rig_adapter_elems(rig), layer = elems * dtype_bytes(rig->options.dtype);
    size_t all = layer * (size_t)rig->shape.layers;
    char *image = ops->host_create ? ops->host_create(b, all) : mem_alloc_aligned(all);
    if (!image) return 0;
    memset(image, 1, all);
    double best = 0;
    for (int round = 0; round < ROUNDS; round++) {
        double begin = clock_seconds();
        for (int l = 0; l < rig->shape.layers; l++)
            ops->pool_write(b, l, rig->adapter_pages[0], image + layer * (size_t)l, elems);
        if (ops->pool_written) ops->pool_written(b);
        double seconds = clock_seconds() - begin;
        if (best == 0 || seconds < best) best = seconds;
    }
    if (ops->host_destroy) ops->host_destroy(b, image);
    else free(image);
    *bytes = (double)all;
    return best;
}
