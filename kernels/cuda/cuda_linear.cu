// Base matmuls: y[T, out] = x[T, in] W^T by cuBLASLt, sums in f32. Weights lie in device memory as they
// came, [out, in] in the backend's type; x has it too.
//
// cuBLASLt counts columns first: W is its [in, out] matrix, transposed; x is [in, T]; y is [out, T].
// The algorithm for a (out, in, T) is asked for once and kept with the weights.
//
// With LORAD_EMULATE there is no cuBLASLt: a plain kernel takes its place, so that whole steps run.
#include "kernels/cuda/cuda_internal.cuh"

#ifndef LORAD_EMULATE
#include <cublasLt.h>
#endif

struct linear {
    int out, in;
    void *weights; // device memory, [out, in]
#ifndef LORAD_EMULATE
    enum { KEPT = 64 };
    struct {
        int tokens; // 0: none
        cublasLtMatmulAlgo_t algorithm;
    } kept[KEPT]; // by tokens % KEPT
#endif
};

enum status cuda_linear_create(struct backend *b, const void *weights, enum dtype dtype, int out,
                               int in, struct linear **result, struct error *err) {
    *result = NULL;
    VERIFY(out > 0 && in > 0);
    size_t count = (size_t)out * (size_t)in, bytes = count * dtype_bytes(b->dtype);
    struct linear *l = (struct linear *)mem_zalloc(1, sizeof *l);
    l->out = out;
    l->in = in;
    if (cudaMalloc(&l->weights, bytes) != cudaSuccess) {
        free(l);
        return error_set(err, STATUS_NO_MEMORY, "no device memory for %d x %d weights (%zu bytes)",
                         out, in, bytes);
    }
    void *converted = NULL;
    if (dtype != b->dtype) {
        converted = mem_alloc_aligned(bytes);
        dtype_convert(converted, b->dtype, weights, dtype, count);
    }
    cuda_check(b, cudaMemcpyAsync(l->weights, converted ? converted : weights, bytes,
                                  cudaMemcpyHostToDevice, b->stream), "copy of weights");
    cuda_check(b, cudaStreamSynchronize(b->stream), "copy of weights"); // they are borrowed
    free(converted);
    *result = l;
    return STATUS_OK;
}

void cuda_linear_destroy(struct backend *b, struct linear *linear) {
    (void)b;
    if (!linear) return;
    cudaFree(linear->weights);
    free(linear);
}

#ifdef LORAD_EMULATE

enum status cuda_matmul_open(struct backend *b, struct error *err) {
    (void)b, (void)err;
    return STATUS_OK;
}

void cuda_matmul_close(struct backend *b) {
    (void)b;
}

template <typename T>
__global__ void linear_kernel(float *y, const T *weights, const T *x, int out, int in) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= out) return;
    const T *w = weights + (size_t)column * (size_t)in;
    const T *row = x + (size_t)blockIdx.y * (size_t)in;
    float sum = 0.0f;
    for (int i = 0; i < in; i++) sum += to_float(w[i]) * to_float(row[i]);
    y[(size_t)blockIdx.y * (size_t)out + column] = sum;
}

void cuda_linear(struct backend *b, const struct linear *l, void *y, const void *x, int tokens) {
    if (tokens == 0) return;
    dim3 grid(cuda_blocks((size_t)l->out, WARP), (unsigned)tokens), block(WARP);
    if (b->dtype == DTYPE_BF16)
        CUDA_LAUNCH(linear_kernel<bf16>, grid, block, 0, b->stream, (float *)y,
                    (const bf16 *)l->weights, (const bf16 *)x, l->out, l->in);
    else
        CUDA_LAUNCH(linear_kernel<float>, grid, block, 0, b->stream, (float *)y,
                    (const float *)l->weights, (const float *)x, l->out, l->in);
}

#else

enum { WORKSPACE_BYTES = 32 << 20 }; // what cuBLAS recommends on Hopper

static bool cublas_check(struct backend *b, cublasStatus_t status) {
    if (status == CUBLAS_STATUS_SUCCESS) return true;
    cuda_check(b, cudaErrorUnknown, cublasLtGetStatusString(status));
    return false;
}

enum status cuda_matmul_open(struct backend *b, struct error *err) {
    cublasLtHandle_t handle;
    cublasStatus_t status = cublasLtCreate(&handle);
    if (status != CUBLAS_STATUS_SUCCESS)
        return error_set(err, STATUS_DEVICE, "cuBLASLt does not start: %s",
                         cublasLtGetStatusString(status));
    b->matmul = handle;
    return STATUS_OK;
}

void cuda_matmul_close(struct backend *b) {
    if (b->matmul) cublasLtDestroy((cublasLtHandle_t)b->matmul);
}

// The descriptors of one call.
struct matmul {
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t w, x, y;
};

static void matmul_describe(struct backend *b, struct matmul *m, int out, int in, int tokens) {
    cudaDataType_t type = b->dtype == DTYPE_BF16 ? CUDA_R_16BF : CUDA_R_32F;
    cublasOperation_t transposed = CUBLAS_OP_T;
    *m = {};
    cublas_check(b, cublasLtMatmulDescCreate(&m->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    cublas_check(b, cublasLtMatmulDescSetAttribute(m->operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                                   &transposed, sizeof transposed));
    cublas_check(b, cublasLtMatrixLayoutCreate(&m->w, type, (uint64_t)in, (uint64_t)out, in));
    cublas_check(b, cublasLtMatrixLayoutCreate(&m->x, type, (uint64_t)in, (uint64_t)tokens, in));
    cublas_check(b, cublasLtMatrixLayoutCreate(&m->y, CUDA_R_32F, (uint64_t)out, (uint64_t)tokens,
                                               out));
}

static void matmul_forget(struct matmul *m) {
    cublasLtMatrixLayoutDestroy(m->w);
    cublasLtMatrixLayoutDestroy(m->x);
    cublasLtMatrixLayoutDestroy(m->y);
    cublasLtMatmulDescDestroy(m->operation);
}

// The library's first choice for this shape; false when it has none.
static bool algorithm_find(struct backend *b, struct linear *l, const struct matmul *m,
                           int tokens) {
    size_t bytes = WORKSPACE_BYTES;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t found;
    int count = 0;
    if (!cublas_check(b, cublasLtMatmulPreferenceCreate(&preference))) return false;
    cublas_check(b, cublasLtMatmulPreferenceSetAttribute(
                        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes));
    bool good = cublas_check(b, cublasLtMatmulAlgoGetHeuristic(
                                    (cublasLtHandle_t)b->matmul, m->operation, m->w, m->x, m->y,
                                    m->y, preference, 1, &found, &count));
    cublasLtMatmulPreferenceDestroy(preference);
    if (!good || count == 0) return false;
    l->kept[tokens % linear::KEPT] = {tokens, found.algo};
    return true;
}

void cuda_linear(struct backend *b, const struct linear *linear, void *y, const void *x,
                 int tokens) {
    if (tokens == 0) return;
    struct linear *l = const_cast<struct linear *>(linear); // remembers algorithms
    struct matmul m;
    matmul_describe(b, &m, l->out, l->in, tokens);
    auto *kept = &l->kept[tokens % linear::KEPT];
    if (kept->tokens == tokens || algorithm_find(b, l, &m, tokens)) {
        float one = 1.0f, zero = 0.0f;
        void *workspace = cuda_scratch(b, SCRATCH_WORKSPACE, WORKSPACE_BYTES);
        cublas_check(b, cublasLtMatmul((cublasLtHandle_t)b->matmul, m.operation, &one, l->weights,
                                       m.w, x, m.x, &zero, y, m.y, y, m.y, &kept->algorithm,
                                       workspace, WORKSPACE_BYTES, b->stream));
    } else {
        cuda_check(b, cudaErrorUnknown, "no cuBLASLt algorithm for a matmul");
    }
    matmul_forget(&m);
}

#endif
