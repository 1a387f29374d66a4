// cuBLASLt's functions, found when the backend opens: a program that computes on the CPU neither
// needs the library (half a gigabyte) nor pays for its loading (60 MB of memory).
#ifndef LORAD_KERNELS_CUDA_CUBLASLT_CUH
#define LORAD_KERNELS_CUDA_CUBLASLT_CUH

extern "C" {
#include "base/error.h"
}

#include <cublasLt.h>

// Named as in cublasLt.h, without its prefix.
struct cublaslt {
    decltype(&cublasLtCreate) Create;
    decltype(&cublasLtDestroy) Destroy;
    decltype(&cublasLtGetStatusString) GetStatusString;
    decltype(&cublasLtGetVersion) GetVersion;
    decltype(&cublasLtMatmul) Matmul;
    decltype(&cublasLtMatmulAlgoGetHeuristic) MatmulAlgoGetHeuristic;
    decltype(&cublasLtMatmulDescCreate) MatmulDescCreate;
    decltype(&cublasLtMatmulDescDestroy) MatmulDescDestroy;
    decltype(&cublasLtMatmulDescSetAttribute) MatmulDescSetAttribute;
    decltype(&cublasLtMatmulPreferenceCreate) MatmulPreferenceCreate;
    decltype(&cublasLtMatmulPreferenceDestroy) MatmulPreferenceDestroy;
    decltype(&cublasLtMatmulPreferenceSetAttribute) MatmulPreferenceSetAttribute;
    decltype(&cublasLtMatrixLayoutCreate) MatrixLayoutCreate;
    decltype(&cublasLtMatrixLayoutDestroy) MatrixLayoutDestroy;
};

// The library stays loaded until the process ends. STATUS_UNSUPPORTED: it is not there, or it is not
// of the version that this was built for.
enum status cublaslt_load(struct cublaslt *lt, struct error *err);

#endif
