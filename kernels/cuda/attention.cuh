// What attention.cu (any type and head size) and attention_tiles.cu (bf16 on tensor cores) share.
#ifndef LORAD_KERNELS_CUDA_ATTENTION_CUH
#define LORAD_KERNELS_CUDA_ATTENTION_CUH

#include "kernels/cuda/cuda_internal.cuh"

struct attention_shape {
    int Q, K, G, D;
    int lanes; // a position's scores are computed by so many
    float scale;
};

// Partial results: rows of [maximum, sum, D outputs], one a query head.
__device__ static inline float *partial_row(float *partials, const attention_shape &s, int partial,
                                            int head) {
    return partials + ((size_t)partial * (size_t)s.Q + (size_t)head) * (size_t)(s.D + 2);
}

// The step's narrow and wide items.
void attention_tiles(struct backend *b, int layer, const attention_shape &s,
                     const struct device_step *step, bf16 *y, const float *qkv, float *partials);

#endif
