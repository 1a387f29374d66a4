// Base matmuls: y[T, out] = x[T, in] W^T by cuBLASLt, sums in f32. Weights lie in device memory as they
// came, [out, in] in the backend's type; x has it too.
//
// cuBLASLt counts columns first: W is its [in, out] matrix, transposed; x is [in, T]; y is [out, T].
// The algorithm for a (out, in, T) is chosen once and shared by all layers: for steps of up to
// TUNED_TOKENS tokens by timing what the library suggests, on the first such step (step.cu does not
// record that one), and remembered on disk; beyond, the library's first suggestion.
// LORAD_CUDA_TUNE=0: always that.
//
// With LORAD_EMULATE there is no cuBLASLt: a plain kernel takes its place, so that whole steps run.
#include "kernels/cuda/cuda_internal.cuh"

#ifndef LORAD_EMULATE
#include "kernels/algorithm_cache.h"
#include "kernels/cuda/cublaslt.cuh"

#include <stdio.h>
#endif

struct linear {
    int out, in;
    void *weights; // device memory, [out, in]
    size_t bytes;
};

size_t cuda_linear_bytes(const struct linear *linear) {
    return linear->bytes;
}

enum status cuda_linear_create(struct backend *b, const void *weights, enum dtype dtype, int out,
                               int in, struct linear **result, struct error *err) {
    *result = NULL;
    VERIFY(out > 0 && in > 0);
    size_t count = (size_t)out * (size_t)in, bytes = count * dtype_bytes(b->dtype);
    struct linear *l = (struct linear *)mem_zalloc(1, sizeof *l);
    l->out = out;
    l->in = in;
    l->bytes = bytes;
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

enum {
    WORKSPACE_BYTES = 32 << 20, // what cuBLAS recommends on Hopper
    TUNED_TOKENS = RECORDED_TOKENS_MAX,
    SUGGESTIONS = 8,
    TIMINGS = 3, // of a suggestion; the shortest counts
};
static_assert(sizeof(cublasLtMatmulAlgo_t) == ALGORITHM_BYTES, "an algorithm is kept as it is");

// What the handle of cuda_internal.cuh is.
struct matmuls {
    struct cublaslt lt;
    cublasLtHandle_t library;
    struct algorithm_cache *algorithms;
    cudaEvent_t begin, end; // of a timing; NULL: nothing is timed
};

static struct matmuls *matmuls_of(const struct backend *b) {
    return (struct matmuls *)b->matmul;
}

static bool cublas_check(struct backend *b, cublasStatus_t status) {
    if (status == CUBLAS_STATUS_SUCCESS) return true;
    cuda_check(b, cudaErrorUnknown, matmuls_of(b)->lt.GetStatusString(status));
    return false;
}

static struct algorithm_cache *algorithms_open(const struct backend *b) {
    cudaDeviceProp properties = {};
    cudaGetDeviceProperties(&properties, 0);
    char owner[sizeof properties.name + 80];
    snprintf(owner, sizeof owner, "%s, cuBLASLt %zu, %s", properties.name, matmuls_of(b)->lt.GetVersion(),
             dtype_name(b->dtype));
    char *folder = algorithm_cache_folder();
    struct algorithm_cache *cache = algorithm_cache_open(folder, owner);
    free(folder);
    return cache;
}

enum status cuda_matmul_open(struct backend *b, struct error *err) {
    struct matmuls *m = (struct matmuls *)mem_zalloc(1, sizeof *m);
    b->matmul = m;
    enum status loaded = cublaslt_load(&m->lt, err);
    if (loaded != STATUS_OK) return loaded;
    cublasStatus_t status = m->lt.Create(&m->library);
    if (status != CUBLAS_STATUS_SUCCESS)
        return error_set(err, STATUS_DEVICE, "cuBLASLt does not start: %s",
                         m->lt.GetStatusString(status));
    m->algorithms = algorithms_open(b);
    const char *tune = getenv("LORAD_CUDA_TUNE");
    if (tune && strcmp(tune, "0") == 0) return STATUS_OK;
    cudaError_t error = cudaEventCreate(&m->begin);
    if (error == cudaSuccess) error = cudaEventCreate(&m->end);
    cuda_check(b, error, "events to time matmuls with");
    return STATUS_OK;
}

void cuda_matmul_close(struct backend *b) {
    struct matmuls *m = matmuls_of(b);
    if (!m) return;
    if (m->begin) cudaEventDestroy(m->begin);
    if (m->end) cudaEventDestroy(m->end);
    if (m->library) m->lt.Destroy(m->library);
    algorithm_cache_close(m->algorithms);
    free(m);
}

// The descriptors of one call, and what it reads and writes.
struct matmul {
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t w, x, y;
    const void *weights, *from;
    void *to;
};

static void matmul_describe(struct backend *b, struct matmul *m, const struct linear *l, void *y,
                            const void *x, int tokens) {
    const struct cublaslt *lt = &matmuls_of(b)->lt;
    cudaDataType_t type = b->dtype == DTYPE_BF16 ? CUDA_R_16BF : CUDA_R_32F;
    cublasOperation_t transposed = CUBLAS_OP_T;
    uint64_t out = (uint64_t)l->out, in = (uint64_t)l->in, T = (uint64_t)tokens;
    *m = {};
    m->weights = l->weights;
    m->from = x;
    m->to = y;
    cublas_check(b, lt->MatmulDescCreate(&m->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    cublas_check(b, lt->MatmulDescSetAttribute(m->operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                                   &transposed, sizeof transposed));
    cublas_check(b, lt->MatrixLayoutCreate(&m->w, type, in, out, l->in));
    cublas_check(b, lt->MatrixLayoutCreate(&m->x, type, in, T, l->in));
    cublas_check(b, lt->MatrixLayoutCreate(&m->y, CUDA_R_32F, out, T, l->out));
}

static void matmul_forget(struct backend *b, struct matmul *m) {
    const struct cublaslt *lt = &matmuls_of(b)->lt;
    lt->MatrixLayoutDestroy(m->w);
    lt->MatrixLayoutDestroy(m->x);
    lt->MatrixLayoutDestroy(m->y);
    lt->MatmulDescDestroy(m->operation);
}

static cublasStatus_t matmul_queue(struct backend *b, const struct matmul *m,
                                   const cublasLtMatmulAlgo_t *algorithm) {
    float one = 1.0f, zero = 0.0f;
    void *workspace = cuda_scratch(b, SCRATCH_WORKSPACE, WORKSPACE_BYTES);
    const struct matmuls *all = matmuls_of(b);
    return all->lt.Matmul(all->library, m->operation, &one, m->weights, m->w, m->from, m->x, &zero,
                          m->to, m->y, m->to, m->y, algorithm, workspace, WORKSPACE_BYTES,
                          b->stream);
}

// ------------------------------------------------------------------ choosing

// What the library suggests for the shape, best guess first. Returns how many.
static int suggestions(struct backend *b, const struct matmul *m,
                       cublasLtMatmulHeuristicResult_t found[SUGGESTIONS]) {
    const struct cublaslt *lt = &matmuls_of(b)->lt;
    size_t bytes = WORKSPACE_BYTES;
    cublasLtMatmulPreference_t preference;
    int count = 0;
    if (!cublas_check(b, lt->MatmulPreferenceCreate(&preference))) return 0;
    cublas_check(b, lt->MatmulPreferenceSetAttribute(
                        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes));
    cublas_check(b, lt->MatmulAlgoGetHeuristic(matmuls_of(b)->library, m->operation, m->w, m->x,
                                                   m->y, m->y, preference, SUGGESTIONS, found,
                                                   &count));
    lt->MatmulPreferenceDestroy(preference);
    return count;
}

// Milliseconds of one run; negative: it does not run.
static float run_time(struct backend *b, const struct matmul *m,
                      const cublasLtMatmulAlgo_t *algorithm) {
    struct matmuls *all = matmuls_of(b);
    float milliseconds = -1.0f;
    cuda_check(b, cudaEventRecord(all->begin, b->stream), "a timing");
    if (matmul_queue(b, m, algorithm) != CUBLAS_STATUS_SUCCESS) return -1.0f;
    cuda_check(b, cudaEventRecord(all->end, b->stream), "a timing");
    cuda_check(b, cudaEventSynchronize(all->end), "a timing");
    cuda_check(b, cudaEventElapsedTime(&milliseconds, all->begin, all->end), "a timing");
    return milliseconds;
}

// The fastest of `count` suggestions. They take turns, so that none has the caches to itself.
static int fastest(struct backend *b, const struct matmul *m,
                   const cublasLtMatmulHeuristicResult_t *found, int count) {
    float best[SUGGESTIONS];
    int fastest = 0;
    for (int i = 0; i < count; i++) best[i] = INFINITY;
    for (int round = 0; round <= TIMINGS; round++) // the first warms up
        for (int i = 0; i < count && !b->failed; i++) {
            float time = run_time(b, m, &found[i].algo);
            if (round > 0 && time >= 0.0f && time < best[i]) best[i] = time;
        }
    for (int i = 1; i < count; i++)
        if (best[i] < best[fastest]) fastest = i;
    return fastest;
}

// False when there is none: the backend has failed then.
static bool algorithm_of(struct backend *b, const struct matmul *m, const struct linear *l,
                         int tokens, cublasLtMatmulAlgo_t *algorithm) {
    struct matmuls *all = matmuls_of(b);
    const struct algorithm *known =
        algorithm_cache_find(all->algorithms, l->out, l->in, tokens);
    if (known) {
        memcpy(algorithm, known->bytes, sizeof *algorithm);
        return true;
    }
    cublasLtMatmulHeuristicResult_t found[SUGGESTIONS];
    int count = suggestions(b, m, found);
    if (count == 0) {
        cuda_check(b, cudaErrorUnknown, "no cuBLASLt algorithm for a matmul");
        return false;
    }
    bool times = all->end && count > 1 && tokens <= TUNED_TOKENS && !b->recording;
    *algorithm = found[times ? fastest(b, m, found, count) : 0].algo;
    struct algorithm kept = {l->out, l->in, tokens, {}};
    memcpy(kept.bytes, algorithm, sizeof *algorithm);
    algorithm_cache_add(all->algorithms, &kept, times);
    return true;
}

void cuda_linear(struct backend *b, const struct linear *l, void *y, const void *x, int tokens) {
    if (tokens == 0) return;
    struct matmul m;
    cublasLtMatmulAlgo_t algorithm;
    matmul_describe(b, &m, l, y, x, tokens);
    if (algorithm_of(b, &m, l, tokens, &algorithm)) cublas_check(b, matmul_queue(b, &m, &algorithm));
    matmul_forget(b, &m);
}

#endif
