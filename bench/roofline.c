// What a step costs and what it must cost. A step of M sequences, one token each (a decode), or of
// one sequence with M tokens (--prefill), runs through kernels/backend.h as the model's forward pass
// calls it: every layer has weights of its own, so that they stream from memory, every sequence its
// own KV pages, and, with --rank, its own adapter on all seven projections.
//
// Bytes are what has to come from memory: weights, KV and adapters once a step. Activations stay in
// caches and are not counted. The limit of an operation is max(bytes / bandwidth, flops / peak).
#include "bench/roofline.h"

#include "base/file.h"
#include "base/memory.h"
#include "bench/machine_peak.h"
#include "bench/roofline_rig.h"

#include <getopt.h>
#include <jansson.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BATCHES_MAX = 16 };

enum operation {
    OP_NORM, OP_QKV, OP_ROPE, OP_ATTENTION, OP_OUT, OP_GATE_UP, OP_SILU, OP_DOWN, OP_SHRINK,
    OP_EXPAND, OP_HEAD, OPERATIONS
};
static const char *const operation_names[OPERATIONS] = {
    "rms_norm", "linear qkv", "rope + kv write", "attention", "linear o", "linear gate+up",
    "silu_mul", "linear down", "lora shrink", "lora expand", "linear head"};
static const char *const operation_colours[OPERATIONS] = {
    "#999999", "#4477aa", "#bbbbbb", "#228833", "#6699cc", "#225588", "#cccccc", "#88bbdd",
    "#ee6677", "#cc3311", "#aa3377"};

struct options {
    struct rig_options rig;
    const char *json, *svg, *commit, *machine;
    char command[512]; // as typed, cut
    int rounds;
    int batch[BATCHES_MAX], batch_count;
};

struct cost {
    double seconds, bytes, flops; // seconds: in the fastest step
};
struct step_cost {
    int tokens;
    struct cost of[OPERATIONS];
    double whole_seconds; // of a step that nobody waits in; 0: the operations' sum
};

// ------------------------------------------------------------------ options

static void usage(FILE *to) {
    fprintf(to,
            "lorad-bench roofline --model DIR [options]\n"
            "Times each operation of a step and holds it against this machine's limits.\n"
            "  --model DIR        folder with a config.json; weights are random\n"
            "  --batch 1,16,64    tokens in a step (default 1,2,4,8,16,32,64,256)\n"
            "  --prefill          one sequence of that many tokens; default: that many decodes\n"
            "  --context N        tokens each decode attends to (default 64)\n"
            "  --rank R[,R...]    each sequence on an adapter; of these ranks in turn (default 0: none)\n"
            "  --sharing distinct|one|power  an adapter each, one for all, or one for half of them,\n"
            "                     one for a quarter, and so on (default distinct)\n"
            "  --lora-only        lora_shrink and lora_expand alone, without base weights (cuda)\n"
            "  --device cpu|cuda  default cpu; on cuda the limits are measured through the backend's\n"
            "                     own operations: silu_mul over 1 GB, a matmul of 4096 x 8192 x 8192\n"
            "  --peak-rows N      the 4096 of these; the rest is in proportion\n"
            "  --dtype bf16|f32   of weights and KV (default bf16)\n"
            "  --quantization int8|int4   of the base weights (CPU)\n"
            "  --threads N        default: all cores\n"
            "  --rounds N         the best of so many steps counts (default 5)\n"
            "  --json FILE        write the figures;  --svg FILE  a breakdown of each step\n"
            "  --commit HASH      recorded in the JSON;  --machine TEXT  likewise\n");
}

// Numbers from 1 to `high`, comma-separated, at most BATCHES_MAX.
static bool list_parse(const char *text, int high, int *list, int *count) {
    *count = 0;
    for (char *end; *text; text = *end ? end + 1 : end) {
        long value = strtol(text, &end, 10);
        if (end == text || (*end && *end != ',') || value < 1 || value > high ||
            *count == BATCHES_MAX)
            return false;
        list[(*count)++] = (int)value;
    }
    return *count > 0;
}

static bool batches_parse(struct options *o, const char *text) {
    return list_parse(text, 4096, o->batch, &o->batch_count);
}

static bool number_parse(const char *text, int low, int high, int *out) {
    char *end;
    long value = strtol(text, &end, 10);
    if (end == text || *end || value < low || value > high) return false;
    *out = (int)value;
    return true;
}

static bool ranks_parse(struct rig_options *o, const char *text) {
    int ranks[BATCHES_MAX], count = 0;
    o->rank_count = 0;
    if (strcmp(text, "0") == 0) return true;
    if (!list_parse(text, LORA_RANK_MAX, ranks, &count) || count > RIG_RANKS_MAX) return false;
    memcpy(o->ranks, ranks, (size_t)count * sizeof *ranks);
    o->rank_count = count;
    return true;
}

// 0: go on; otherwise exit with status - 1.
static int options_parse(int argc, char **argv, struct options *o) {
    static const struct option names[] = {
        {"model", 1, 0, 'm'},   {"batch", 1, 0, 'b'},  {"prefill", 0, 0, 'p'},
        {"context", 1, 0, 'c'}, {"rank", 1, 0, 'r'},   {"dtype", 1, 0, 'd'},
        {"quantization", 1, 0, 'q'},
        {"threads", 1, 0, 't'}, {"rounds", 1, 0, 'n'}, {"json", 1, 0, 'j'},
        {"svg", 1, 0, 's'},     {"commit", 1, 0, 'k'}, {"device", 1, 0, 'D'},
        {"peak-rows", 1, 0, 'R'}, {"machine", 1, 0, 'M'},
        {"sharing", 1, 0, 'S'}, {"lora-only", 0, 0, 'L'},
        {"help", 0, 0, 'h'},    {0, 0, 0, 0}};
    *o = (struct options){.rig = {.device = "cpu", .dtype = DTYPE_BF16, .context = 64,
                                 .peak_rows = 4096}, .rounds = 5};
    batches_parse(o, "1,2,4,8,16,32,64,256");
    cpu_set_t set;
    o->rig.threads = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    for (int i = 0; i < argc; i++)
        snprintf(o->command + strlen(o->command), sizeof o->command - strlen(o->command), "%s%s",
                 i > 0 ? " " : "lorad-bench ", argv[i]);
    optind = 1;
    for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        bool good = true;
        switch (c) {
        case 'm': o->rig.model = optarg; break;
        case 'b': good = batches_parse(o, optarg); break;
        case 'p': o->rig.prefill = true; break;
        case 'c': good = number_parse(optarg, 1, 1 << 20, &o->rig.context); break;
        case 'r': good = ranks_parse(&o->rig, optarg); break;
        case 'L': o->rig.lora_only = true; break;
        case 'S':
            good = !strcmp(optarg, "distinct") || !strcmp(optarg, "one") || !strcmp(optarg, "power");
            o->rig.sharing = *optarg == 'd' ? RIG_DISTINCT : *optarg == 'o' ? RIG_ONE : RIG_POWER;
            break;
        case 'd':
            good = !strcmp(optarg, "bf16") || !strcmp(optarg, "f32");
            o->rig.dtype = !strcmp(optarg, "f32") ? DTYPE_F32 : DTYPE_BF16;
            break;
        case 'q':
            good = !strcmp(optarg, "int8") || !strcmp(optarg, "int4");
            o->rig.quantization = !strcmp(optarg, "int8") ? QUANT_INT8 : QUANT_INT4;
            break;
        case 't': good = number_parse(optarg, 1, 512, &o->rig.threads); break;
        case 'n': good = number_parse(optarg, 1, 1000, &o->rounds); break;
        case 'j': o->json = optarg; break;
        case 's': o->svg = optarg; break;
        case 'k': o->commit = optarg; break;
        case 'M': o->machine = optarg; break;
        case 'R': good = number_parse(optarg, 1, 1 << 16, &o->rig.peak_rows); break;
        case 'D': o->rig.device = optarg; break;
        case 'h': usage(stdout); return 1;
        default: usage(stderr); return 3;
        }
        if (!good) {
            fprintf(stderr, "lorad-bench roofline: '%s' will not do; see --help\n", optarg);
            return 3;
        }
    }
    for (int i = 0; i < o->batch_count; i++)
        if (o->batch[i] > o->rig.tokens_max) o->rig.tokens_max = o->batch[i];
    if (o->rig.lora_only && (strcmp(o->rig.device, "cpu") == 0 || o->rig.rank_count == 0)) {
        fprintf(stderr, "lorad-bench roofline: --lora-only goes with --device cuda and --rank\n");
        return 3;
    }
    if (o->rig.model && optind == argc) return 0;
    usage(stderr);
    return 3;
}

// ------------------------------------------------------------------ a step, timed

struct target {
    enum lora_module module;
    float *y;
    int stride;
};

// Which of a step's operations are run, and where their times go: `since` NULL times none.
struct lap {
    unsigned wanted; // a bit an operation
    double *since, *seconds;
};

static bool wants(const struct lap *lap, enum operation operation) {
    return lap->wanted >> operation & 1;
}

// After an operation that ran: adds what passed since the last one.
static void lap_end(const struct rig *rig, const struct lap *lap, enum operation operation) {
    if (!lap->since) return;
    rig->ops->synchronize(rig->backend);
    double now = clock_seconds();
    lap->seconds[operation] += now - *lap->since;
    *lap->since = now;
}

static void lora_run(struct rig *rig, int layer, const float *x, const struct target *targets,
                     int count, const struct lap *lap) {
    if (rig->options.rank_count == 0) return;
    struct lora_launch launch = {.layer = layer, .x = x, .in = rig->in[targets[0].module],
                                 .target_count = count, .segments = rig->segments,
                                 .segment_count = rig->segment_count, .v = rig->v};
    for (int i = 0; i < count; i++) {
        launch.target[i].module = targets[i].module;
        launch.target[i].y = targets[i].y;
        launch.target[i].out = rig->out[targets[i].module];
        launch.target[i].stride = targets[i].stride;
    }
    if (wants(lap, OP_SHRINK)) rig->ops->lora_shrink(rig->backend, &launch);
    lap_end(rig, lap, OP_SHRINK);
    if (wants(lap, OP_EXPAND)) rig->ops->lora_expand(rig->backend, &launch);
    lap_end(rig, lap, OP_EXPAND);
}

static void linear_run(struct rig *rig, const struct linear *weights, float *y, const float *x,
                       int T, const struct lap *lap, enum operation operation) {
    if (wants(lap, operation)) rig->ops->linear(rig->backend, weights, y, x, T);
    lap_end(rig, lap, operation);
}

static void norm_run(struct rig *rig, int T, const struct lap *lap) {
    if (wants(lap, OP_NORM))
        rig->ops->rms_norm(rig->backend, rig->normed, rig->x, NULL, rig->gain, 1e-5f, T,
                           rig->shape.hidden);
    lap_end(rig, lap, OP_NORM);
}

static void layer_run(struct rig *rig, int l, int T, const struct lap *lap) {
    const struct backend_ops *ops = rig->ops;
    const struct rig_shape *s = &rig->shape;
    struct backend *b = rig->backend;
    const struct rig_layer *w = &rig->layers[l];
    int q = s->query_heads * s->head_size, kv = s->kv_heads * s->head_size, stride = q + 2 * kv;
    norm_run(rig, T, lap);
    linear_run(rig, w->qkv, rig->qkv, rig->normed, T, lap, OP_QKV);
    lora_run(rig, l, rig->normed, (struct target[]){{LORA_Q, rig->qkv, stride},
             {LORA_K, rig->qkv + q, stride}, {LORA_V, rig->qkv + q + kv, stride}}, 3, lap);
    if (wants(lap, OP_ROPE))
        ops->rope_and_kv_write(b, l, rig->qkv, rig->cosines, rig->sines, rig->positions,
                               rig->slots, T, s->query_heads);
    lap_end(rig, lap, OP_ROPE);
    if (wants(lap, OP_ATTENTION))
        ops->attention(b, l, rig->heads, rig->qkv, rig->spans, rig->span_count, s->query_heads);
    lap_end(rig, lap, OP_ATTENTION);
    linear_run(rig, w->out, rig->delta, rig->heads, T, lap, OP_OUT);
    lora_run(rig, l, rig->heads, (struct target[]){{LORA_O, rig->delta, s->hidden}}, 1, lap);
    norm_run(rig, T, lap);
    linear_run(rig, w->gate_up, rig->gate_up, rig->normed, T, lap, OP_GATE_UP);
    lora_run(rig, l, rig->normed, (struct target[]){{LORA_GATE, rig->gate_up, 2 * s->ffn},
             {LORA_UP, rig->gate_up + s->ffn, 2 * s->ffn}}, 2, lap);
    if (wants(lap, OP_SILU)) ops->silu_mul(b, rig->gated, rig->gate_up, T, s->ffn);
    lap_end(rig, lap, OP_SILU);
    linear_run(rig, w->down, rig->delta, rig->gated, T, lap, OP_DOWN);
    lora_run(rig, l, rig->gated, (struct target[]){{LORA_DOWN, rig->delta, s->hidden}}, 1, lap);
}

// What a device reaches on big things, through operations that every backend has: bytes read and
// written by silu_mul, operations of one matmul. Lower bounds of its true limits.
static struct machine_peak device_peak(struct rig *rig) {
    enum { ROUNDS = 5 };
    int rows = rig->options.peak_rows, width = 2 * rows, ffn = 6 * rows;
    size_t elements = (size_t)rows * (size_t)ffn;
    const struct backend_ops *ops = rig->ops;
    struct backend *b = rig->backend;
    struct machine_peak peak = {.has_bf16 = rig->options.dtype == DTYPE_BF16};
    size_t written = ops->narrow_inputs ? dtype_bytes(rig->options.dtype) : sizeof(float);
    float *from = ops->memory_create(b, 2 * elements * sizeof(float));
    float *to = ops->memory_create(b, elements * sizeof(float));
    void *weights = mem_zalloc((size_t)width * (size_t)width, sizeof(float));
    struct linear *linear = NULL;
    struct error err;
    if (!from || !to || ops->linear_create(b, weights, DTYPE_F32, width, width, &linear, &err)) {
        fprintf(stderr, "lorad-bench roofline: no memory to measure the device's limits\n");
        exit(1);
    }
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

static int logit_rows(const struct rig *rig, int T) {
    return rig->options.prefill ? 1 : T;
}

static void step_run(struct rig *rig, int T, const struct lap *lap) {
    const struct backend_ops *ops = rig->ops;
    struct step_rows rows = {T, logit_rows(rig, T), false};
    if (ops->step_begin) rows = ops->step_begin(rig->backend, &rig->step);
    if (lap->since) {
        ops->synchronize(rig->backend);
        *lap->since = clock_seconds();
    }
    if (!rows.recorded) {
        for (int l = 0; l < rig->shape.layers; l++) layer_run(rig, l, rows.tokens, lap);
        linear_run(rig, rig->head, rig->logits, rig->normed, logit_rows(rig, T), lap, OP_HEAD);
    }
    if (ops->step_end) ops->step_end(rig->backend);
}

// Seconds of the fastest of `rounds` steps that run the wanted operations without waiting in between,
// after `unused` ones.
static double step_seconds(struct rig *rig, int T, unsigned wanted, int unused, int rounds) {
    struct lap lap = {.wanted = wanted};
    double best = 0;
    for (int round = -unused; round < rounds; round++) {
        double begin = clock_seconds();
        step_run(rig, T, &lap);
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

static void step_measure(struct rig *rig, int T, int rounds, struct step_cost *cost) {
    rig_step(rig, T);
    if (!rig->ops->computes_on_host) {
        device_measure(rig, T, rounds, cost);
        return;
    }
    double best = 0;
    for (int round = 0; round <= rounds; round++) { // the first one warms up
        double seconds[OPERATIONS] = {0}, since, total = 0;
        step_run(rig, T, &(struct lap){~0u, &since, seconds});
        for (int i = 0; i < OPERATIONS; i++) total += seconds[i];
        if (round == 0 || (best > 0 && total >= best)) continue;
        best = total;
        for (int i = 0; i < OPERATIONS; i++) cost->of[i].seconds = seconds[i];
    }
}

// ------------------------------------------------------------------ what it must cost

static void linear_add(const struct rig *rig, struct cost *cost, double out, double in, double T) {
    double bytes = (double)dtype_bytes(rig->options.dtype);
    if (rig->options.quantization == QUANT_INT8) bytes = 1;
    if (rig->options.quantization == QUANT_INT4) bytes = 0.5 + 8.0 / 128; // scales and zeros
    cost->bytes += out * in * bytes;
    cost->flops += 2 * out * in * T;
}

// For each sequence, each query attends to the positions up to its own.
static double attended(const struct rig *rig) {
    double pairs = 0;
    for (int i = 0; i < rig->span_count; i++) {
        const struct attention_span *s = &rig->spans[i];
        pairs += (double)s->token_count * (s->context - 0.5 * (s->token_count - 1));
    }
    return pairs;
}

static void lora_price(const struct rig *rig, struct step_cost *cost) {
    double elem = (double)dtype_bytes(rig->options.dtype);
    for (int i = 0; i < rig->segment_count; i++)
        for (int m = 0; m < LORA_MODULES; m++) {
            const struct lora_segment *segment = &rig->segments[i];
            double a = (double)segment->rank[m] * rig->in[m];
            double b = (double)segment->rank[m] * rig->out[m];
            cost->of[OP_SHRINK].bytes += a * elem;
            cost->of[OP_SHRINK].flops += 2 * a * segment->token_count;
            cost->of[OP_EXPAND].bytes += b * elem;
            cost->of[OP_EXPAND].flops += 2 * b * segment->token_count;
        }
}

static void step_price(const struct rig *rig, int T, struct step_cost *cost) {
    const struct rig_shape *s = &rig->shape;
    double q = (double)s->query_heads * s->head_size, kv = (double)s->kv_heads * s->head_size;
    double elem = (double)dtype_bytes(rig->options.dtype), context = 0;
    for (int i = 0; i < rig->span_count; i++) context += rig->spans[i].context;
    for (int l = 0; l < s->layers; l++) {
        linear_add(rig, &cost->of[OP_QKV], q + 2 * kv, s->hidden, T);
        linear_add(rig, &cost->of[OP_OUT], s->hidden, q, T);
        linear_add(rig, &cost->of[OP_GATE_UP], 2.0 * s->ffn, s->hidden, T);
        linear_add(rig, &cost->of[OP_DOWN], s->hidden, s->ffn, T);
        cost->of[OP_ATTENTION].bytes += context * 2 * kv * elem;
        cost->of[OP_ATTENTION].flops += 4 * attended(rig) * q;
        lora_price(rig, cost);
    }
    linear_add(rig, &cost->of[OP_HEAD], s->vocabulary, s->hidden, logit_rows(rig, T));
}

static double limit_seconds(const struct rig *rig, const struct machine_peak *peak,
                            const struct cost *cost) {
    double flops = rig->options.dtype == DTYPE_BF16 ? peak->bf16_flops_per_s
                                                    : peak->f32_flops_per_s;
    double memory = cost->bytes / peak->read_bytes_per_s, compute = cost->flops / flops;
    return memory > compute ? memory : compute;
}

// ------------------------------------------------------------------ reports

// The step as a whole: its limit is the sum of its operations' limits, since they run in turn.
static struct cost step_total(const struct rig *rig, const struct machine_peak *peak,
                              const struct step_cost *step, double *limit) {
    struct cost total = {0};
    *limit = 0;
    for (int i = 0; i < OPERATIONS; i++) {
        if (step->of[i].seconds == 0) continue; // it was not run
        total.seconds += step->of[i].seconds;
        total.bytes += step->of[i].bytes;
        total.flops += step->of[i].flops;
        *limit += limit_seconds(rig, peak, &step->of[i]);
    }
    if (step->whole_seconds > 0) total.seconds = step->whole_seconds;
    return total;
}

static void row_print(const char *name, const struct cost *cost, double limit) {
    printf("  %-16s %9.3f %9.1f %9.1f %9.3f", name, cost->seconds * 1e3,
           cost->bytes / cost->seconds / 1e9, cost->flops / cost->seconds / 1e9, limit * 1e3);
    if (limit > 0) printf(" %6.0f%%", 100 * limit / cost->seconds);
    printf("\n");
}

static json_t *row_json(const struct cost *cost, double limit) {
    return json_pack("{s:f,s:f,s:f,s:f,s:f}", "seconds", cost->seconds, "bytes", cost->bytes,
                     "flops", cost->flops, "limit_seconds", limit, "share_of_limit",
                     cost->seconds > 0 ? limit / cost->seconds : 0.0);
}

static json_t *step_report(const struct rig *rig, const struct machine_peak *peak,
                           const struct step_cost *step) {
    double limit;
    struct cost total = step_total(rig, peak, step, &limit);
    json_t *operations = json_object();
    double apart = 0; // the operations, each waited for
    printf("M = %d\n  %-16s %9s %9s %9s %9s %7s\n", step->tokens, "operation", "ms", "GB/s",
           "GFLOP/s", "limit ms", "share");
    for (int i = 0; i < OPERATIONS; i++) {
        if (step->of[i].seconds == 0) continue;
        double own = limit_seconds(rig, peak, &step->of[i]);
        apart += step->of[i].seconds;
        row_print(operation_names[i], &step->of[i], own);
        json_object_set_new(operations, operation_names[i], row_json(&step->of[i], own));
    }
    row_print("step", &total, limit);
    return json_pack("{s:i,s:o,s:f,s:o}", "tokens", step->tokens, "step", row_json(&total, limit),
                     "operations_seconds", apart, "operations", operations);
}

static json_t *report_head(const struct options *o, const struct machine_peak *peak,
                           json_t *steps) {
    static const char *const quantization[] = {"none", "int8", "int4"};
    static const char *const sharing[] = {"distinct", "one", "power"};
    int ranks = o->rig.rank_count;
    json_t *list = json_array();
    for (int i = 0; i < ranks; i++) json_array_append_new(list, json_integer(o->rig.ranks[i]));
    char cpu[200];
    machine_cpu_name(cpu, sizeof cpu);
    const char *device = o->machine ? o->machine : o->rig.device;
    json_t *root = json_pack(
        "{s:s,s:s,s:s,s:{s:s,s:s,s:i},s:{s:f,s:f,s:f},s:s,s:s,s:s,s:i,s:i,s:o,s:s,s:b,s:o}", "what",
        "operations of a step against max(bytes / bandwidth, flops / peak)", "command", o->command,
        "commit", o->commit ? o->commit : "", "machine", "cpu", cpu, "device", device, "threads", o->rig.threads, "limits",
        "read_bytes_per_s", peak->read_bytes_per_s, "f32_flops_per_s", peak->f32_flops_per_s,
        "bf16_flops_per_s", peak->bf16_flops_per_s, "model", o->rig.model, "dtype",
        dtype_name(o->rig.dtype), "quantization", quantization[o->rig.quantization], "context", o->rig.context, "rank", ranks > 0 ? o->rig.ranks[0] : 0, "ranks", list,
        "sharing", sharing[o->rig.sharing], "prefill",
        o->rig.prefill, "steps", steps);
    return root;
}

// One bar a step, as wide as its time in units of its limit, cut into operations.
static bool svg_write(const char *path, const struct rig *rig, const struct machine_peak *peak,
                      const struct step_cost *steps, int count) {
    enum { ROW = 34, LEFT = 70, SCALE = 420 };
    FILE *file = fopen(path, "w");
    if (!file) return false;
    fprintf(file, "<svg xmlns='http://www.w3.org/2000/svg' width='900' height='%d' "
                  "font-family='sans-serif' font-size='12'>\n<rect width='100%%' height='100%%' "
                  "fill='white'/>\n<text x='%d' y='18'>step time / limit; the line is the limit"
                  "</text>\n", 60 + ROW * count + 20 * ((OPERATIONS + 3) / 4), LEFT);
    for (int s = 0; s < count; s++) {
        double limit, x = LEFT;
        step_total(rig, peak, &steps[s], &limit);
        fprintf(file, "<text x='8' y='%d'>M = %d</text>\n", 48 + ROW * s, steps[s].tokens);
        for (int i = 0; i < OPERATIONS; i++) {
            double width = steps[s].of[i].seconds / limit * SCALE;
            fprintf(file, "<rect x='%.1f' y='%d' width='%.1f' height='24' fill='%s'><title>%s "
                          "%.3f ms</title></rect>\n", x, 32 + ROW * s, width,
                    operation_colours[i], operation_names[i], steps[s].of[i].seconds * 1e3);
            x += width;
        }
    }
    fprintf(file, "<line x1='%d' x2='%d' y1='26' y2='%d' stroke='black'/>\n", LEFT + SCALE,
            LEFT + SCALE, 32 + ROW * count);
    for (int i = 0; i < OPERATIONS; i++) {
        int x = LEFT + 200 * (i % 4), y = 52 + ROW * count + 20 * (i / 4);
        fprintf(file, "<rect x='%d' y='%d' width='12' height='12' fill='%s'/><text x='%d' y='%d'>"
                      "%s</text>\n", x, y - 10, operation_colours[i], x + 18, y,
                operation_names[i]);
    }
    fprintf(file, "</svg>\n");
    return fclose(file) == 0;
}

int roofline_main(int argc, char **argv) {
    struct options options;
    int parsed = options_parse(argc, argv, &options);
    if (parsed != 0) return parsed - 1;
    struct rig rig;
    bool host = strcmp(options.rig.device, "cpu") == 0;
    struct machine_peak peak = {0};
    if (host) peak = machine_peak_measure(options.rig.threads);
    if (!rig_init(&rig, &options.rig)) return 1;
    if (!host) peak = device_peak(&rig);
    printf("%s, %d threads: read %.1f GB/s, f32 %.0f GFLOP/s, bf16 %.0f GFLOP/s\n",
           options.rig.device, options.rig.threads, peak.read_bytes_per_s / 1e9, peak.f32_flops_per_s / 1e9,
           peak.bf16_flops_per_s / 1e9);
    struct step_cost steps[BATCHES_MAX] = {0};
    json_t *list = json_array();
    for (int i = 0; i < options.batch_count; i++) {
        steps[i].tokens = options.batch[i];
        step_measure(&rig, options.batch[i], options.rounds, &steps[i]);
        step_price(&rig, options.batch[i], &steps[i]);
        json_array_append_new(list, step_report(&rig, &peak, &steps[i]));
    }
    json_t *root = report_head(&options, &peak, list);
    bool good = true;
    if (options.json && json_dump_file(root, options.json, JSON_INDENT(1) | JSON_REAL_PRECISION(6)))
        good = false, fprintf(stderr, "lorad-bench roofline: cannot write %s\n", options.json);
    if (options.svg && !svg_write(options.svg, &rig, &peak, steps, options.batch_count))
        good = false, fprintf(stderr, "lorad-bench roofline: cannot write %s\n", options.svg);
    json_decref(root);
    return good ? 0 : 1;
}
