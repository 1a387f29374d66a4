// Request traces as S-LoRA's benchmark makes them (arXiv 2311.03285, section 7.1): gamma intervals
// with a coefficient of variation, lengths uniform over ranges, adapters drawn by a power law.
//
// The draws follow NumPy's RandomState (Mersenne Twister MT19937 and its distributions) in the
// order of that benchmark, so that the same seed gives the very requests behind the published rows.
// Note that numpy's power(1) is the uniform distribution: at alpha = 1 every adapter is equally
// likely; alpha < 1 favours low indices.
//
// TRACE_BENCH draws the same distributions as lorad-bench does (bench/workload.h): the simulator
// then plays the very requests that the load generator sends for that seed.
#ifndef LORAD_SIM_TRACE_H
#define LORAD_SIM_TRACE_H

#include <stdint.h>

struct trace_request {
    double arrival_s;
    int adapter; // [0, adapters), or -1: none
    int prompt_tokens, output_tokens;
};

enum trace_generator { TRACE_NUMPY, TRACE_BENCH };

struct trace_options {
    enum trace_generator generator;
    int adapters; // 0: base model alone
    double alpha, rate, cv, duration_s;
    int input_min, input_end, output_min, output_end; // [min, end)
    uint32_t seed;
};

struct trace {
    struct trace_request *requests; // by arrival
    int count;                      // rate x duration
};

struct trace trace_create(const struct trace_options *options);
void trace_destroy(struct trace *trace);

// MT19937 (Matsumoto and Nishimura, 1998), exposed for its test.
struct trace_random {
    uint32_t state[624];
    int at;
    double gauss_kept; // the second of a pair of normals
    int has_gauss;
};
void trace_random_seed(struct trace_random *random, uint32_t seed);
uint32_t trace_random_u32(struct trace_random *random);
double trace_random_gamma(struct trace_random *random, double shape);

#endif
