// The inner kernels for AVX-512 with bf16 pairs multiplied in hardware.
#if defined(__x86_64__)
#define VECTOR_WIDTH 16
#define KERNELS_BF16 1
#define KERNELS_VNNI 1
#define KERNELS cpu_kernels_avx512bf16
#define KERNELS_NAME "avx512bf16"
#include "kernels/cpu/cpu_kernels_body.h"
#endif
