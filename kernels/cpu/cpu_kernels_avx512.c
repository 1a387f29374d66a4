// The inner kernels for AVX-512 (F, BW, VL, DQ) without bf16 arithmetic.
#if defined(__x86_64__)
#define VECTOR_WIDTH 16
#define KERNELS_BF16 0
#define KERNELS cpu_kernels_avx512
#define KERNELS_NAME "avx512"
#include "kernels/cpu/cpu_kernels_body.h"
#endif
