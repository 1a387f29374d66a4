// The CPU backend's table, its life and its memory. Operations run at once on the calling thread
// and the workers it wakes, so a queue, events and `synchronize` have nothing to do here.
//
// Activations are f32, but what matmuls read has the dtype of weights and pool elements, f32 or bf16. It
// is the oracle for the other backends: no operation is approximate beyond rounding. It allocates in a
// step only until its scratch has grown to the largest step.
//
// LORAD_CPU_ISA=avx512bf16|avx512vnni|avx512|avx2|scalar forces an instruction set,
// LORAD_CPU_LINEAR=own|plain|onednn the base matmul: our own, the same without compact weights, or
// oneDNN's. Left alone, it is our own but for bf16 on processors with AMX.
#include "kernels/cpu/cpu_internal.h"

#include "base/memory.h"
#include "base/thread.h"
#include "base/verify.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

// ------------------------------------------------------------------ memory

void *cpu_memory(size_t bytes) {
    const size_t huge = (size_t)2 << 20;
    size_t align = bytes >= 2 * huge ? huge : 64;
    size_t rounded = round_up(bytes ? bytes : 1, align);
    if (rounded < bytes) return NULL;
    void *memory = aligned_alloc(align, rounded);
    if (!memory) return NULL;
    if (align == huge) (void)madvise(memory, rounded, MADV_HUGEPAGE); // a hint
    return memory;
}

// A large block is mapped, so that it is zero without being written: what a step of the largest size
// alone would touch takes no memory before one comes. Of a pool's size, a thread of its own makes its
// pages present from the first to the last: serving need not wait for gigabytes, and steps seldom meet
// a page that is not there yet.
struct large {
    struct large *next;
    void *memory;
    size_t bytes;
    pthread_t thread;
    bool has_thread;
    _Atomic bool stop;
};
enum { LARGE_BYTES = 16 << 20, POOL_BYTES_MIN = 256 << 20, POPULATE_BYTES = 8 << 20 };

static void *populate(void *argument) {
    struct large *large = argument;
    (void)setpriority(PRIO_PROCESS, 0, 19); // of this thread alone, on Linux
    for (size_t at = 0; at < large->bytes && !atomic_load(&large->stop); at += POPULATE_BYTES) {
        size_t left = large->bytes - at;
        // A hint: kernels before 5.14 refuse it, and pages then come when they are touched.
        if (madvise((char *)large->memory + at, left < POPULATE_BYTES ? left : POPULATE_BYTES,
                    MADV_POPULATE_WRITE) != 0)
            break;
    }
    return NULL;
}

static void *cpu_memory_create(struct backend *b, size_t bytes) {
    if (bytes < LARGE_BYTES) {
        void *small = cpu_memory(bytes);
        return small ? memset(small, 0, bytes) : NULL;
    }
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return NULL;
    (void)madvise(memory, bytes, MADV_HUGEPAGE); // a hint
    struct large *large = mem_zalloc(1, sizeof *large);
    large->memory = memory;
    large->bytes = bytes;
    large->next = b->large;
    b->large = large;
    large->has_thread =
        bytes >= POOL_BYTES_MIN && thread_start(&large->thread, populate, large) == 0;
    return memory;
}

static void cpu_memory_destroy(struct backend *b, void *memory) {
    struct large **link = &b->large, *large;
    while ((large = *link) && large->memory != memory) link = &large->next;
    if (!large) {
        free(memory);
        return;
    }
    *link = large->next;
    atomic_store(&large->stop, true);
    if (large->has_thread) pthread_join(large->thread, NULL);
    munmap(large->memory, large->bytes);
    free(large);
}

static void cpu_copy(struct backend *b, void *to, const void *from, size_t bytes) {
    (void)b;
    memcpy(to, from, bytes);
}

void *cpu_scratch(struct backend *b, enum cpu_scratch area, size_t bytes) {
    if (b->scratch[area].bytes < bytes) {
        free(b->scratch[area].memory);
        bytes = round_up(bytes + bytes / 4, 4096);
        b->scratch[area].memory = mem_alloc_aligned(bytes);
        b->scratch[area].bytes = bytes;
    }
    return b->scratch[area].memory;
}

void cpu_threads_scratch(struct backend *b, size_t bytes_each) {
    bytes_each = round_up(bytes_each, 4096) + 64; // threads do not share cache sets
    b->thread_scratch_bytes = bytes_each;
    cpu_scratch(b, SCRATCH_THREADS, bytes_each * (size_t)b->thread_count);
}

void *cpu_thread_scratch(struct backend *b, int thread) {
    return (char *)b->scratch[SCRATCH_THREADS].memory + (size_t)thread * b->thread_scratch_bytes;
}

static struct row_groups groups_of(const struct cpu_kernels *kernels, int rows, int height) {
    struct row_groups groups;
    int count = divide_up(rows, height);
    groups.rows = divide_up(rows, count);
    groups.count = divide_up(rows, groups.rows);
    groups.padded = kernels->tile_rows[groups.rows];
    return groups;
}

// Of many rows, those heights about the best one that compute the fewest rows nobody wants.
struct row_groups cpu_row_groups(const struct cpu_kernels *kernels, int rows, int alone) {
    VERIFY_OP(rows, >, 0);
    if (rows <= alone) return groups_of(kernels, rows, alone);
    struct row_groups best = groups_of(kernels, rows, kernels->tile_rows_many);
    for (int height = kernels->tile_rows_many + 1; height <= kernels->tile_rows_many_max; height++) {
        struct row_groups groups = groups_of(kernels, rows, height);
        if (groups.count * groups.padded < best.count * best.padded) best = groups;
    }
    return best;
}

// ------------------------------------------------------------------ pool

static void cpu_pool_attach(struct backend *b, void *pool, const struct pool_shape *shape) {
    VERIFY_OP(shape->elem_bytes, ==, dtype_bytes(b->dtype));
    VERIFY_OP(shape->page_elems, ==, 2 * shape->kv_heads * PAGE_TOKENS * shape->head_size);
    b->pool = pool;
    b->shape = *shape;
}

static void cpu_pool_write(struct backend *b, int layer, const int32_t *pages, const void *image,
                           size_t elems) {
    size_t page_elems = b->shape.page_elems, bytes = b->shape.elem_bytes;
    for (size_t at = 0; at < elems; at += page_elems) {
        size_t count = elems - at < page_elems ? elems - at : page_elems;
        memcpy(cpu_page(b, layer, pages[at / page_elems]), (const char *)image + at * bytes,
               count * bytes);
    }
}

static void cpu_pool_copy(struct backend *b, int layer, const int32_t *pages, void *image,
                          size_t elems, bool to_host) {
    if (!to_host) {
        cpu_pool_write(b, layer, pages, image, elems);
        return;
    }
    size_t page_elems = b->shape.page_elems, bytes = b->shape.elem_bytes;
    for (size_t at = 0; at < elems; at += page_elems) {
        size_t count = elems - at < page_elems ? elems - at : page_elems;
        memcpy((char *)image + at * bytes, cpu_page(b, layer, pages[at / page_elems]),
               count * bytes);
    }
}

// ------------------------------------------------------------------ open and close

// What LORAD_CPU_LINEAR says: *dnnl, or else *compact.
static enum status choose_linear(const struct backend_options *options, bool *dnnl, bool *compact,
                                 struct error *err) {
    const char *choice = getenv("LORAD_CPU_LINEAR");
    if (!choice) choice = "";
    bool own = strcmp(choice, "own") == 0, plain = strcmp(choice, "plain") == 0;
    *dnnl = strcmp(choice, "onednn") == 0;
    if (*choice && !own && !plain && !*dnnl)
        return error_set(err, STATUS_INVALID,
                         "LORAD_CPU_LINEAR=%.40s is not one of own, plain, onednn", choice);
#ifndef LORAD_NO_DNNL // there, who asks for it is told by opening it that it is missing
    if (!*choice) *dnnl = options->dtype == DTYPE_BF16 && cpu_isa_has_amx();
#endif
    *dnnl = *dnnl && options->quantization == QUANT_NONE;
    *compact = options->dtype == DTYPE_BF16 && !plain && !*dnnl;
    return STATUS_OK;
}

static void cpu_close(struct backend *b) {
    if (!b) return;
    cpu_dnnl_close(b->dnnl);
    cpu_threads_destroy(b->threads);
    for (int i = 0; i < SCRATCH_COUNT; i++) free(b->scratch[i].memory);
    free(b);
}

static enum status cpu_open(const struct backend_options *options, struct backend **out,
                            struct error *err) {
    *out = NULL;
    if (options->dtype != DTYPE_F32 && options->dtype != DTYPE_BF16)
        return error_set(err, STATUS_UNSUPPORTED,
                         "the CPU backend computes in f32 or bf16, not in %s",
                         dtype_name(options->dtype));
    if (options->threads < 0)
        return error_set(err, STATUS_INVALID, "%d threads asked for; 0 means all cores",
                         options->threads);
    const struct cpu_kernels *kernels;
    enum status status = cpu_isa_choose(&kernels, err);
    bool dnnl = false, compact = false;
    if (status == STATUS_OK) status = choose_linear(options, &dnnl, &compact, err);
    if (status != STATUS_OK) return status;
    struct backend *b = mem_zalloc(1, sizeof *b);
    b->kernels = kernels;
    b->dtype = options->dtype;
    b->quantization = options->quantization;
    b->compact = compact && kernels->tile_compact;
    b->threads = cpu_threads_create(options->threads);
    b->thread_count = cpu_threads_count(b->threads);
    if (dnnl) status = cpu_dnnl_open(b->thread_count, b->dtype, &b->dnnl, err);
    if (status != STATUS_OK) {
        cpu_close(b);
        return status;
    }
    *out = b;
    return STATUS_OK;
}

static bool cpu_health(struct backend *b) {
    (void)b;
    return true;
}

static void cpu_synchronize(struct backend *b) {
    (void)b;
}

const struct backend_ops backend_cpu = {
    .name = "cpu",
    .activation_bytes = sizeof(float),
    .narrow_inputs = true,
    .computes_on_host = true,
    .ffn_rows = 128,
    .open = cpu_open,
    .close = cpu_close,
    .health = cpu_health,
    .memory_create = cpu_memory_create,
    .memory_destroy = cpu_memory_destroy,
    .upload = cpu_copy,
    .download = cpu_copy,
    .synchronize = cpu_synchronize,
    .pool_attach = cpu_pool_attach,
    .pool_write = cpu_pool_write,
    .pool_copy = cpu_pool_copy,
    .linear_create = cpu_linear_create,
    .linear_destroy = cpu_linear_destroy,
    .linear_bytes = cpu_linear_bytes,
    .embed = cpu_embed,
    .rms_norm = cpu_rms_norm,
    .linear = cpu_linear,
    .lora_shrink = cpu_lora_shrink,
    .lora_expand = cpu_lora_expand,
    .rope_and_kv_write = cpu_rope_and_kv_write,
    .attention = cpu_attention,
    .silu_mul = cpu_silu_mul,
    .gather_rows = cpu_gather_rows,
};
