// The generator of sim_trace.h. All arrays are drawn one after another (adapters, prompts, outputs,
// intervals), as the benchmark draws them.
#include "sim/sim_trace.h"

#include "base/memory.h"
#include "base/verify.h"
#include "bench/workload.h"

#include <math.h>
#include <stdlib.h>

enum { MT_WORDS = 624, MT_SHIFT = 397 };

void trace_random_seed(struct trace_random *random, uint32_t seed) {
    random->state[0] = seed;
    for (uint32_t i = 1; i < MT_WORDS; i++) {
        uint32_t previous = random->state[i - 1];
        random->state[i] = 1812433253u * (previous ^ (previous >> 30)) + i;
    }
    random->at = MT_WORDS;
    random->has_gauss = 0;
}

static void refill(struct trace_random *random) {
    uint32_t *s = random->state;
    for (int i = 0; i < MT_WORDS; i++) {
        uint32_t y = (s[i] & 0x80000000u) | (s[(i + 1) % MT_WORDS] & 0x7fffffffu);
        s[i] = s[(i + MT_SHIFT) % MT_WORDS] ^ (y >> 1) ^ (y & 1 ? 0x9908b0dfu : 0);
    }
    random->at = 0;
}

uint32_t trace_random_u32(struct trace_random *random) {
    if (random->at == MT_WORDS) refill(random);
    uint32_t y = random->state[random->at++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

// [0, 1) with 53 bits.
static double uniform(struct trace_random *random) {
    uint32_t high = trace_random_u32(random) >> 5, low = trace_random_u32(random) >> 6;
    return (high * 67108864.0 + low) / 9007199254740992.0;
}

static double exponential(struct trace_random *random) {
    return -log(1.0 - uniform(random));
}

// Polar method (Marsaglia and Bray, 1964).
static double gauss(struct trace_random *random) {
    if (random->has_gauss) {
        random->has_gauss = 0;
        return random->gauss_kept;
    }
    double x, y, r;
    do {
        x = 2.0 * uniform(random) - 1.0;
        y = 2.0 * uniform(random) - 1.0;
        r = x * x + y * y;
    } while (r >= 1.0 || r == 0.0);
    double factor = sqrt(-2.0 * log(r) / r);
    random->gauss_kept = factor * x;
    random->has_gauss = 1;
    return factor * y;
}

// Shape 1: exponential; below 1: Ahrens and Dieter (1974); above: Marsaglia and Tsang (2000).
double trace_random_gamma(struct trace_random *random, double shape) {
    if (shape == 1.0) return exponential(random);
    if (shape < 1.0)
        for (;;) {
            double u = uniform(random), v = exponential(random);
            if (u <= 1.0 - shape) {
                double x = pow(u, 1.0 / shape);
                if (x <= v) return x;
            } else {
                double y = -log((1.0 - u) / shape);
                double x = pow(1.0 - shape + shape * y, 1.0 / shape);
                if (x <= v + y) return x;
            }
        }
    double b = shape - 1.0 / 3.0, c = 1.0 / sqrt(9.0 * b);
    for (;;) {
        double x, v;
        do {
            x = gauss(random);
            v = 1.0 + c * x;
        } while (v <= 0.0);
        v = v * v * v;
        double u = uniform(random);
        if (u < 1.0 - 0.0331 * (x * x) * (x * x)) return b * v;
        if (log(u) < 0.5 * x * x + b * (1.0 - v + log(v))) return b * v;
    }
}

// [low, end): bits under the smallest mask that covers the range, drawn again when too large.
static int between(struct trace_random *random, int low, int end) {
    uint32_t range = (uint32_t)(end - low - 1), mask = range, value;
    if (range == 0) return low;
    for (int shift = 1; shift < 32; shift *= 2) mask |= mask >> shift;
    do value = trace_random_u32(random) & mask;
    while (value > range);
    return low + (int)value;
}

static struct trace bench_trace(const struct trace_options *options) {
    struct workload_options wanted = {.adapters = options->adapters,
                                      .alpha = options->alpha,
                                      .rate = options->rate,
                                      .cv = options->cv,
                                      .duration_s = options->duration_s,
                                      .input_min = options->input_min,
                                      .input_max = options->input_end - 1,
                                      .output_min = options->output_min,
                                      .output_max = options->output_end - 1,
                                      .seed = options->seed};
    struct workload_request *made;
    struct trace trace = {.count = (int)workload_make(&wanted, &made)};
    trace.requests = mem_zalloc((size_t)trace.count + 1, sizeof *trace.requests);
    for (int i = 0; i < trace.count; i++)
        trace.requests[i] = (struct trace_request){.arrival_s = made[i].at_s,
                                                   .adapter = made[i].adapter,
                                                   .prompt_tokens = made[i].input_tokens,
                                                   .output_tokens = made[i].output_tokens};
    free(made);
    return trace;
}

struct trace trace_create(const struct trace_options *options) {
    VERIFY(options->rate > 0 && options->duration_s > 0 && options->cv > 0 && options->alpha > 0);
    VERIFY_OP(options->input_min, >, 0);
    VERIFY_OP(options->input_end, >, options->input_min);
    VERIFY_OP(options->output_min, >, 0);
    VERIFY_OP(options->output_end, >, options->output_min);
    if (options->generator == TRACE_BENCH) return bench_trace(options);
    struct trace trace = {.count = (int)(options->rate * options->duration_s)};
    trace.requests = mem_zalloc((size_t)trace.count + 1, sizeof *trace.requests);
    struct trace_random random;
    trace_random_seed(&random, options->seed);
    int adapters = options->adapters > 0 ? options->adapters : 1;
    for (int i = 0; i < trace.count; i++) {
        // 1 - exp(-e) is one uniform draw by way of an exponential; kept for its rounding.
        double draw = pow(1.0 - exp(-exponential(&random)), 1.0 / options->alpha);
        int adapter = (int)(draw * adapters);
        if (adapter >= adapters) adapter = adapters - 1;
        trace.requests[i].adapter = options->adapters > 0 ? adapter : -1;
    }
    for (int i = 0; i < trace.count; i++)
        trace.requests[i].prompt_tokens = between(&random, options->input_min, options->input_end);
    for (int i = 0; i < trace.count; i++)
        trace.requests[i].output_tokens =
            between(&random, options->output_min, options->output_end);
    double shape = 1 / (options->cv * options->cv);
    double scale = options->cv * options->cv / options->rate, now_s = 0;
    for (int i = 0; i < trace.count; i++) {
        now_s += trace_random_gamma(&random, shape) * scale;
        trace.requests[i].arrival_s = now_s;
    }
    return trace;
}

void trace_destroy(struct trace *trace) {
    free(trace->requests);
    *trace = (struct trace){0};
}
