// How a row of logits becomes a token: one rule for the server and for backends that draw on the
// device, so that equal logits and an equal number give an equal token, whoever draws.
//
// Each token has a place, smaller for larger logits and, among equals, for lower ids; and a mass, its
// weight e^((logit - peak) / temperature) as an integer, so that sums do not depend on their order.
// Tokens are taken from the first place on: the first top_k; of those, the fewest whose mass reaches
// top_p of theirs; and of those the one at which the mass passes `uniform` of theirs. All three ask
// for the first token at which a sum, itself included, exceeds a threshold. It is found by counting
// tokens by the high bits of their places, and going on in the bin that the threshold falls into.
#ifndef LORAD_KERNELS_DRAW_H
#define LORAD_KERNELS_DRAW_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define DRAW_FUNCTION __host__ __device__ static inline
#else
#define DRAW_FUNCTION static inline
#endif

enum draw_kind { DRAW_NONE, DRAW_GREEDY, DRAW_RANDOM }; // none: the caller wants the logits

struct draw {
    enum draw_kind kind;
    int32_t top_k; // 0: all
    float inverse_temperature, top_p, min_p;
    double uniform; // in [0, 1)
};

enum {
    DRAW_ID_BITS = 24,  // a vocabulary has at most 2^24 tokens
    DRAW_BINS = 256,
    DRAW_FIRST_SHIFT = 47, // of a place's 55 bits; then 8 bits each, and 7 at last
};
static const uint64_t DRAW_NOBODY = UINT64_MAX; // the place of what cannot be drawn

// Products and sums that no compiler may fuse: the device's must be the host's.
#ifdef __CUDA_ARCH__
#define DRAW_MUL(a, b) __fmul_rn(a, b)
#define DRAW_ADD(a, b) __fadd_rn(a, b)
#else
#define DRAW_MUL(a, b) ((a) * (b))
#define DRAW_ADD(a, b) ((a) + (b))
#endif

// e^x for x <= 0 to about 2 units in the last place; 0 below -87 and for NaN. Cephes' polynomial.
DRAW_FUNCTION float draw_exp(float x) {
    float clamped = x > -87.0f ? x : -87.0f;
    // Adding 1.5 * 2^23 rounds to an integer.
    float rounded = DRAW_ADD(DRAW_MUL(clamped, 1.44269504f), 12582912.0f);
    float n = DRAW_ADD(rounded, -12582912.0f);
    float r = DRAW_ADD(clamped, DRAW_MUL(n, -0.693359375f));
    r = DRAW_ADD(r, DRAW_MUL(n, 2.12194440e-4f));
    float p = 1.9875691500e-4f;
    p = DRAW_ADD(DRAW_MUL(p, r), 1.3981999507e-3f);
    p = DRAW_ADD(DRAW_MUL(p, r), 8.3334519073e-3f);
    p = DRAW_ADD(DRAW_MUL(p, r), 4.1665795894e-2f);
    p = DRAW_ADD(DRAW_MUL(p, r), 1.6666665459e-1f);
    p = DRAW_ADD(DRAW_MUL(p, r), 5.0000001201e-1f);
    p = DRAW_ADD(DRAW_ADD(DRAW_MUL(DRAW_MUL(p, r), r), r), 1.0f);
    int32_t bits = ((int32_t)n + 127) * (1 << 23);
    float power;
    memcpy(&power, &bits, sizeof power);
    return x > -87.0f ? DRAW_MUL(p, power) : 0.0f;
}

// How far a logit lies below the peak, in units of 2^-24 of the temperature; -1: too far, or NaN.
DRAW_FUNCTION int32_t draw_depth(float logit, float peak, float inverse_temperature) {
    float depth = DRAW_MUL(DRAW_ADD(peak, -logit), inverse_temperature);
    float inside = depth < 87.0f ? depth : 0.0f;
    return depth < 87.0f ? (int32_t)(inside * 16777216.0f) : -1;
}

// The weight of a depth, below 1; 0 when it is under min_p.
DRAW_FUNCTION float draw_weight(int32_t depth, float min_p) {
    float weight = draw_exp(DRAW_MUL((float)depth, -0x1p-24f));
    return (depth >= 0) & (weight >= min_p) ? weight : 0.0f; // no branch: a loop of it is vectors
}

DRAW_FUNCTION uint64_t draw_mass(float weight) {
    return (uint64_t)(weight * 0x1p40f); // the product is exact
}

DRAW_FUNCTION uint64_t draw_place(int32_t depth, int32_t id) {
    return (uint64_t)depth << DRAW_ID_BITS | (uint64_t)id;
}

DRAW_FUNCTION int draw_next_shift(int shift) {
    return shift > 8 ? shift - 8 : 0;
}

// What the sum must exceed for a share of `total`, which is not 0.
DRAW_FUNCTION uint64_t draw_threshold(uint64_t total, double share) {
    uint64_t threshold = (uint64_t)((double)total * share);
    return threshold < total ? threshold : total - 1;
}

#endif
