// What lora.cu (any type and width) and lora_tiles.cu (bf16 on tensor cores) share.
#ifndef LORAD_KERNELS_CUDA_LORA_CUH
#define LORAD_KERNELS_CUDA_LORA_CUH

#include "kernels/cuda/cuda_internal.cuh"

enum { V_ROW = LORA_TARGETS_MAX * LORA_RANK_MAX };

struct device_target {
    int module;
    float *y;
    int out, stride;
};

// One launch, on the device side.
template <typename T> struct device_launch {
    const lora_item *items;
    const int32_t *pages;
    const T *x;
    float *v; // [v_rows, V_ROW], once for each depth
    int v_rows, in;
    device_target target[LORA_TARGETS_MAX];
};

// Whether the launch's widths are those of tensor cores' tiles; bytes of v that its shrink needs.
bool lora_tiles_fit(const struct lora_launch *launch);
size_t lora_tiles_v_bytes(const struct step_counts *counts, int in);
void lora_tiles_shrink(struct backend *b, cudaStream_t stream, int layer, int target_count,
                       const struct step_counts *counts, const device_launch<bf16> &launch);
void lora_tiles_expand(struct backend *b, int layer, int target_count, int out_max,
                       const struct step_counts *counts, const device_launch<bf16> &launch,
                       int items);

#endif
