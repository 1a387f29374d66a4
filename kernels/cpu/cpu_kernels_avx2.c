// The inner kernels for AVX2 with FMA; kernels/cpu/cpu_isa.c chooses them at run time.
#if defined(__x86_64__)
#define VECTOR_WIDTH 8
#define KERNELS_BF16 0
#define KERNELS cpu_kernels_avx2
#define KERNELS_NAME "avx2"
#include "kernels/cpu/cpu_kernels_body.h"
#endif
