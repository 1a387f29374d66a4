// S-LoRA's synthetic workload (arXiv 2311.03285, section 7.1): which adapter, when, how long. Pure:
// the same options and seed make the same requests on every machine.
#ifndef LORAD_BENCH_WORKLOAD_H
#define LORAD_BENCH_WORKLOAD_H

#include <stddef.h>
#include <stdint.h>

struct workload_options {
    int adapters;       // 0: the base model alone
    double alpha;       // > 0; adapter = floor(adapters * x), x of density alpha x^(alpha - 1):
                        // 1 is uniform, smaller ones crowd on the first adapters
    double rate;        // arrivals a second; 0: all at once (a closed loop paces them)
    double cv;          // > 0: coefficient of variation of the gaps (gamma of shape 1 / cv^2)
    double duration_s;  // rate * duration_s requests, unless `requests` says how many
    int requests;
    int input_min, input_max, output_min, output_max; // tokens, uniform, both ends included
    uint64_t seed;
};

struct workload_request {
    double at_s;  // after the start
    int adapter;  // -1: the base model
    int input_tokens, output_tokens;
    uint64_t seed; // of the prompt's token ids
};

// *out is malloc'd, in order of at_s. Returns how many.
size_t workload_make(const struct workload_options *options, struct workload_request **out);

// The generator behind it (splitmix64), for prompts: the next 64 bits, and a double in [0, 1).
uint64_t workload_bits(uint64_t *state);
double workload_uniform(uint64_t *state);
// Gamma of the given shape > 0 and scale 1 (Marsaglia and Tsang, 2000).
double workload_gamma(uint64_t *state, double shape);

#endif
