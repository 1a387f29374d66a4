// Names -> backends. The one place that knows which ones were built.
#include "kernels/backend.h"

#include <string.h>

const struct backend_ops *backend_find(const char *name) {
    if (strcmp(name, "cpu") == 0) return &backend_cpu;
#ifdef LORAD_CUDA_BUILT
    if (strcmp(name, "cuda") == 0) return &backend_cuda;
#endif
    return NULL;
}
