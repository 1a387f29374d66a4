// What a step must cost, and reports: a table, JSON, a picture. See roofline_internal.h.
#include "bench/roofline_internal.h"

#include <stdio.h>
#include <string.h>

static const char *const operation_colours[OPERATIONS] = {
    "#999999", "#4477aa", "#bbbbbb", "#228833", "#6699cc", "#225588", "#cccccc", "#88bbdd",
    "#ee6677", "#cc3311", "#aa3377"};

// ------------------------------------------------------------------ what it must cost

static void linear_add(const struct rig *rig, struct cost *cost, const struct linear *linear,
                       double out, double in, double T) {
    cost->bytes += (double)rig->ops->linear_bytes(linear);
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

void step_price(const struct rig *rig, int T, struct step_cost *cost) {
    const struct rig_shape *s = &rig->shape;
    double q = (double)s->query_heads * s->head_size, kv = (double)s->kv_heads * s->head_size;
    double elem = (double)dtype_bytes(rig->options.dtype), context = 0;
    for (int i = 0; i < rig->span_count; i++) context += rig->spans[i].context;
    for (int l = 0; l < s->layers; l++) {
        cost->of[OP_ATTENTION].bytes += context * 2 * kv * elem;
        cost->of[OP_ATTENTION].flops += 4 * attended(rig) * q;
        lora_price(rig, cost);
        if (!rig->head) continue; // LoRA alone
        const struct rig_layer *layer = &rig->layers[l];
        linear_add(rig, &cost->of[OP_QKV], layer->qkv, q + 2 * kv, s->hidden, T);
        linear_add(rig, &cost->of[OP_OUT], layer->out, s->hidden, q, T);
        linear_add(rig, &cost->of[OP_GATE_UP], layer->gate_up, 2.0 * s->ffn, s->hidden, T);
        linear_add(rig, &cost->of[OP_DOWN], layer->down, s->hidden, s->ffn, T);
    }
    if (rig->head)
        linear_add(rig, &cost->of[OP_HEAD], rig->head, s->vocabulary, s->hidden,
                   logit_rows(rig, T));
}

static double limit_seconds(const struct rig *rig, const struct machine_peak *peak,
                            const struct cost *cost) {
    double flops = peak->f32_flops_per_s; // bf16 may be multiplied so, too
    if (rig->options.dtype == DTYPE_BF16 && peak->bf16_flops_per_s > flops)
        flops = peak->bf16_flops_per_s;
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

json_t *step_report(const struct rig *rig, const struct machine_peak *peak,
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

json_t *roofline_json(const struct roofline_options *o, const struct machine_peak *peak,
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
bool svg_write(const char *path, const struct rig *rig, const struct machine_peak *peak,
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

