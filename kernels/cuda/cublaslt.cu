// See cublaslt.cuh.
#ifndef LORAD_EMULATE
#include "kernels/cuda/cublaslt.cuh"

#include <dlfcn.h>

#define TEXT_OF(number) #number
#define LIBRARY(major) "libcublasLt.so." TEXT_OF(major)

template <typename F> static bool find(void *library, const char *name, F *function) {
    *function = reinterpret_cast<F>(dlsym(library, name));
    return *function;
}

enum status cublaslt_load(struct cublaslt *lt, struct error *err) {
    static const char *const places[] = {LIBRARY(CUBLAS_VER_MAJOR),
                                         "/usr/local/cuda/lib64/" LIBRARY(CUBLAS_VER_MAJOR)};
    void *library = NULL;
    for (const char *place : places)
        if (!library) library = dlopen(place, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return error_set(err, STATUS_UNSUPPORTED,
                         "%s is not to be found: install the CUDA %d libraries or set "
                         "LD_LIBRARY_PATH; or use --device cpu", places[0], CUBLAS_VER_MAJOR);
#define FIND(name) find(library, "cublasLt" #name, &lt->name)
    bool found = FIND(Create) && FIND(Destroy) && FIND(GetStatusString) && FIND(GetVersion) &&
                 FIND(Matmul) && FIND(MatmulAlgoGetHeuristic) && FIND(MatmulDescCreate) &&
                 FIND(MatmulDescDestroy) && FIND(MatmulDescSetAttribute) &&
                 FIND(MatmulPreferenceCreate) && FIND(MatmulPreferenceDestroy) &&
                 FIND(MatmulPreferenceSetAttribute) && FIND(MatrixLayoutCreate) &&
                 FIND(MatrixLayoutDestroy);
    if (found) return STATUS_OK;
    return error_set(err, STATUS_UNSUPPORTED, "%s lacks a function: %s", places[0], dlerror());
}
#endif
