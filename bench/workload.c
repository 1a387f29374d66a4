// The generator of workload.h. Every quantity has a stream of its own, so that changing the lengths
// does not change the arrivals.
#include "bench/workload.h"

#include "base/memory.h"

#include <math.h>

// Sebastiano Vigna's splitmix64.
uint64_t workload_bits(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

double workload_uniform(uint64_t *state) {
    return (double)(workload_bits(state) >> 11) * 0x1p-53;
}

// Box and Muller; the second normal is thrown away.
static double normal(uint64_t *state) {
    double radius = sqrt(-2.0 * log(1.0 - workload_uniform(state)));
    return radius * cos(2.0 * M_PI * workload_uniform(state));
}

double workload_gamma(uint64_t *state, double shape) {
    if (shape < 1.0) { // gamma(a) = gamma(a + 1) * u^(1 / a)
        double boosted = workload_gamma(state, shape + 1.0);
        return boosted * pow(1.0 - workload_uniform(state), 1.0 / shape);
    }
    double d = shape - 1.0 / 3.0, c = 1.0 / sqrt(9.0 * d);
    for (;;) {
        double x = normal(state), v = 1.0 + c * x;
        if (v <= 0.0) continue;
        v = v * v * v;
        double u = 1.0 - workload_uniform(state);
        if (log(u) < 0.5 * x * x + d - d * v + d * log(v)) return d * v;
    }
}

static int between(uint64_t *state, int low, int high) {
    return low + (int)(workload_uniform(state) * (double)(high - low + 1));
}

size_t workload_make(const struct workload_options *o, struct workload_request **out) {
    size_t count = o->requests > 0 ? (size_t)o->requests : (size_t)(o->rate * o->duration_s);
    *out = mem_zalloc(count > 0 ? count : 1, sizeof **out);
    uint64_t root = o->seed, arrivals = workload_bits(&root), adapters = workload_bits(&root);
    uint64_t lengths = workload_bits(&root), prompts = workload_bits(&root);
    double at_s = 0, shape = 1.0 / (o->cv * o->cv);
    for (size_t i = 0; i < count; i++) {
        struct workload_request *r = &(*out)[i];
        if (o->rate > 0) at_s += workload_gamma(&arrivals, shape) / shape / o->rate;
        r->at_s = at_s;
        double x = pow(workload_uniform(&adapters), 1.0 / o->alpha);
        r->adapter = o->adapters > 0 ? (int)(x * o->adapters) : -1;
        r->input_tokens = between(&lengths, o->input_min, o->input_max);
        r->output_tokens = between(&lengths, o->output_min, o->output_max);
        r->seed = workload_bits(&prompts);
    }
    return count;
}
