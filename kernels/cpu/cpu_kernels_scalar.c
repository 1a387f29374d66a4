// The inner kernels for any processor: four floats at a time, as the compiler can.
#if 1
#define VECTOR_WIDTH 4
#define KERNELS_BF16 0
#define KERNELS cpu_kernels_scalar
#define KERNELS_NAME "scalar"
#include "kernels/cpu/cpu_kernels_body.h"
#endif
