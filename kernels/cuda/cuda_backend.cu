// The CUDA backend: opening a device, its memory, and the table of operations. Engine thread alone:
// operations run in the order in which they are queued. Three streams: the operations', the adapters'
// copies, and (LORAD_CUDA_OVERLAP=1) lora_shrink's beside the base matmul, by events in between.
//
// It refuses cards below compute capability 8.0 (no bf16). A device error is for good: it is logged
// once, `health` says no, and the engine ends everybody.
#include "kernels/cuda/cuda_internal.cuh"

void cuda_check(struct backend *b, cudaError_t error, const char *what) {
    if (error == cudaSuccess || b->failed.exchange(true)) return;
    log_event(LOG_ERROR, "cuda", "%s: %s", what, cudaGetErrorString(error));
}

// ------------------------------------------------------------------ memory

static void *memory_create(struct backend *b, size_t bytes) {
    void *memory = NULL;
    if (cudaMalloc(&memory, bytes) != cudaSuccess) {
        cudaGetLastError(); // being out of memory is not for good
        return NULL;
    }
    cuda_check(b, cudaMemsetAsync(memory, 0, bytes, b->stream), "memset");
    return memory;
}

static void memory_destroy(struct backend *b, void *memory) {
    (void)b;
    cudaFree(memory);
}

static void *host_create(struct backend *b, size_t bytes) {
    (void)b;
    void *memory = NULL;
    if (cudaMallocHost(&memory, bytes) == cudaSuccess) return memory;
    cudaGetLastError(); // being out of memory is not for good
    return NULL;
}

static void host_destroy(struct backend *b, void *memory) {
    (void)b;
    cudaFreeHost(memory);
}

static void upload(struct backend *b, void *to, const void *from, size_t bytes) {
    cuda_check(b, cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, b->stream), "upload");
}

static void download(struct backend *b, void *to, const void *from, size_t bytes) {
    cuda_check(b, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, b->stream), "download");
}

static void synchronize(struct backend *b) {
    cuda_check(b, cudaStreamSynchronize(b->stream), "a step");
    cuda_check(b, cudaGetLastError(), "a launch");
}

void cuda_grow(struct backend *b, cudaStream_t stream, struct cuda_buffer *buffer, size_t bytes) {
    if (buffer->bytes >= bytes) return;
    size_t room = bytes + bytes / 2 + 256;
    if (buffer->memory) {
        cuda_check(b, cudaStreamSynchronize(stream), "a step");
        cudaFree(buffer->memory);
    }
    *buffer = {};
    cudaError_t error = cudaMalloc(&buffer->memory, room);
    cuda_check(b, error, "device memory for a step");
    if (error == cudaSuccess) buffer->bytes = room;
}

void *cuda_scratch(struct backend *b, enum cuda_scratch area, size_t bytes) {
    if (b->scratch[area].bytes < bytes) cuda_recordings_drop(b); // they know where it lies
    cuda_grow(b, b->stream, &b->scratch[area], bytes);
    return b->scratch[area].memory;
}

static void pool_attach(struct backend *b, void *pool, const struct pool_shape *shape) {
    VERIFY_OP(shape->elem_bytes, ==, dtype_bytes(b->dtype));
    VERIFY_OP(shape->page_elems, ==, 2 * shape->kv_heads * PAGE_TOKENS * shape->head_size);
    VERIFY_OP(shape->page_elems % EIGHT, ==, 0);
    synchronize(b); // the pool is zeroed before the first copy on the other stream
    cuda_recordings_drop(b);
    b->pool = pool;
    b->shape = *shape;
}

// ------------------------------------------------------------------ open and close

#ifdef LORAD_EMULATE

static enum status device_choose(struct error *err) {
    (void)err;
    return STATUS_OK;
}

#else

static enum status device_choose(struct error *err) {
    int count = 0, driver = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0)
        return error_set(err, STATUS_UNSUPPORTED,
                         "no NVIDIA driver is installed; use --device cpu");
    if (error == cudaErrorInsufficientDriver)
        return error_set(err, STATUS_UNSUPPORTED,
                         "the NVIDIA driver is older than this program's CUDA %d.%d; update the "
                         "driver, or use --device cpu", CUDART_VERSION / 1000,
                         CUDART_VERSION % 1000 / 10);
    if (error != cudaSuccess || count == 0)
        return error_set(err, STATUS_UNSUPPORTED,
                         "no CUDA device (%s); use --device cpu, or see that nvidia-smi lists one",
                         error == cudaSuccess ? "none is listed" : cudaGetErrorString(error));
    cudaDeviceProp properties;
    error = cudaGetDeviceProperties(&properties, 0);
    if (error == cudaSuccess && properties.major < 8)
        return error_set(err, STATUS_UNSUPPORTED,
                         "%s has compute capability %d.%d; 8.0 or later is needed (A100, RTX 30 and "
                         "newer); use --device cpu", properties.name, properties.major,
                         properties.minor);
    if (error == cudaSuccess) error = cudaSetDevice(0);
    if (error != cudaSuccess)
        return error_set(err, STATUS_DEVICE, "the CUDA device does not open: %s",
                         cudaGetErrorString(error));
    log_event(LOG_INFO, "cuda", "device=\"%s\" capability=%d.%d memory=%zu", properties.name,
              properties.major, properties.minor, properties.totalGlobalMem);
    return STATUS_OK;
}

#endif

// An environment variable that is 1, or 0; neither: `otherwise`.
static bool is_on(const char *variable, bool otherwise) {
    const char *value = getenv(variable);
    return value && *value ? strcmp(value, "0") != 0 : otherwise;
}

static enum status streams_open(struct backend *b, struct error *err) {
    cudaError_t error = cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&b->copies, cudaStreamNonBlocking);
    if (error == cudaSuccess && is_on("LORAD_CUDA_OVERLAP", false))
        error = cudaStreamCreateWithFlags(&b->side, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&b->fork, cudaEventDisableTiming);
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&b->join, cudaEventDisableTiming);
    if (error == cudaSuccess) return STATUS_OK;
    return error_set(err, STATUS_DEVICE, "the CUDA device makes no stream: %s",
                     cudaGetErrorString(error));
}

static void streams_close(struct backend *b) {
    if (b->stream) cudaStreamDestroy(b->stream);
    if (b->copies) cudaStreamDestroy(b->copies);
    if (b->side) cudaStreamDestroy(b->side);
    if (b->fork) cudaEventDestroy(b->fork);
    if (b->join) cudaEventDestroy(b->join);
}

static void backend_close(struct backend *b) {
    if (!b) return;
    if (b->matmul) synchronize(b); // else it never opened
    cuda_matmul_close(b);
    for (int i = 0; i < SCRATCH_KINDS; i++) cudaFree(b->scratch[i].memory);
    cuda_recordings_drop(b);
    cudaFreeHost(b->step_host.memory);
    cudaFree(b->step_device.memory);
    cudaFree(b->copy_image.memory);
    cuda_marks_close(b);
    streams_close(b);
    free(b);
}

static enum status backend_open(const struct backend_options *options, struct backend **out,
                                struct error *err) {
    *out = NULL;
    if (options->dtype != DTYPE_F32 && options->dtype != DTYPE_BF16)
        return error_set(err, STATUS_UNSUPPORTED,
                         "the CUDA backend computes in f32 or bf16, not in %s",
                         dtype_name(options->dtype));
    if (options->quantization != QUANT_NONE)
        return error_set(err, STATUS_UNSUPPORTED, "the CUDA backend keeps weights in f32 or bf16; "
                         "quantised ones are computed on the CPU alone (--device cpu)");
    struct backend *b = (struct backend *)mem_zalloc(1, sizeof *b);
    b->dtype = options->dtype;
    b->records = is_on("LORAD_CUDA_GRAPHS", true);
    enum status status = device_choose(err);
    if (status == STATUS_OK) status = streams_open(b, err);
    if (status == STATUS_OK) status = cuda_matmul_open(b, err);
    if (status != STATUS_OK) {
        backend_close(b);
        return status;
    }
    *out = b;
    return STATUS_OK;
}

static size_t memory_free(struct backend *b) {
    size_t available = 0, total = 0;
#ifndef LORAD_EMULATE
    cuda_check(b, cudaMemGetInfo(&available, &total), "free memory");
#endif
    (void)b, (void)total;
    return available;
}

static bool health(struct backend *b) {
    return !b->failed;
}

extern "C" {
extern const struct backend_ops backend_cuda = {
    .name = "cuda",
    .activation_bytes = sizeof(float),
    .narrow_inputs = true,
    .computes_on_host = false,
    .ffn_rows = 0,
    .open = backend_open,
    .close = backend_close,
    .health = health,
    .check_heads = cuda_check_heads,
    .memory_create = memory_create,
    .memory_destroy = memory_destroy,
    .memory_free = memory_free,
    .upload = upload,
    .download = download,
    .synchronize = synchronize,
    .pool_attach = pool_attach,
    .host_create = host_create,
    .host_destroy = host_destroy,
    .pool_write = cuda_pool_write,
    .pool_written = cuda_pool_written,
    .pool_copy = cuda_pool_copy,
    .step_begin = cuda_step_begin,
    .step_end = cuda_step_end,
    .mark = cuda_mark,
    .mark_seconds = cuda_mark_seconds,
    .linear_create = cuda_linear_create,
    .linear_destroy = cuda_linear_destroy,
    .linear_bytes = cuda_linear_bytes,
    .embed = cuda_embed,
    .rms_norm = cuda_rms_norm,
    .linear = cuda_linear,
    .lora_shrink = cuda_lora_shrink,
    .lora_expand = cuda_lora_expand,
    .rope_and_kv_write = cuda_rope_and_kv_write,
    .attention = cuda_attention,
    .silu_mul = cuda_silu_mul,
    .gather_rows = cuda_gather_rows,
    .draw = cuda_draw,
};
}
