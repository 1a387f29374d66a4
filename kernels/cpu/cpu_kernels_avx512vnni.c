// The inner kernels for AVX-512 with VNNI, bf16 multiplied as f32: where pairs of bf16 are slower.
#if defined(__x86_64__)
#define VECTOR_WIDTH 16
#define KERNELS_BF16 0
#define KERNELS_VNNI 1
#define KERNELS cpu_kernels_avx512vnni
#define KERNELS_NAME "avx512vnni"
#include "kernels/cpu/cpu_kernels_body.h"
#endif
