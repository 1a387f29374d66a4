// The measurements of machine_peak.h. Threads start a round together at a barrier; a round's time
// runs from the first thread's begin to the last one's end.
#include "bench/machine_peak.h"

#include "base/file.h"
#include "base/memory.h"

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

enum {
    ROUNDS = 6,
    BUFFER_BYTES = 512 << 20, // far beyond any cache that we expect
    PREFETCH_BYTES = 2048,    // some machines' own prefetchers reach a fraction of the bandwidth
    CHAINS = 12,              // independent accumulators: latency 4-6 x 2 units
};
static const int64_t MULTIPLY_STEPS = 4 << 20;

typedef double work_function(const char *buffer, size_t bytes); // returns operations or bytes

struct round_thread {
    pthread_t thread;
    pthread_barrier_t *barrier;
    work_function *work;
    const char *buffer;
    size_t bytes;
    double done, begin_s, end_s; // of the latest round
};

static void *round_main(void *argument) {
    struct round_thread *t = argument;
    for (int round = 0; round < ROUNDS; round++) {
        pthread_barrier_wait(t->barrier);
        t->begin_s = clock_seconds();
        t->done = t->work(t->buffer, t->bytes);
        t->end_s = clock_seconds();
        pthread_barrier_wait(t->barrier);
    }
    return NULL;
}

// The best rate of ROUNDS rounds: what all threads did, over the round's seconds.
static double best_rate(int threads, work_function *work, const char *buffer, size_t bytes) {
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, NULL, (unsigned)threads + 1);
    struct round_thread *all = mem_zalloc((size_t)threads, sizeof *all);
    size_t part = bytes / (size_t)threads / 4096 * 4096;
    for (int i = 0; i < threads; i++) {
        all[i] = (struct round_thread){.barrier = &barrier, .work = work,
                                       .buffer = buffer ? buffer + (size_t)i * part : NULL,
                                       .bytes = part};
        if (pthread_create(&all[i].thread, NULL, round_main, &all[i]) != 0) abort();
    }
    double best = 0;
    for (int round = 0; round < ROUNDS; round++) {
        pthread_barrier_wait(&barrier);
        pthread_barrier_wait(&barrier);
        double done = 0, begin = all[0].begin_s, end = all[0].end_s;
        for (int i = 0; i < threads; i++) {
            done += all[i].done;
            begin = fmin(begin, all[i].begin_s);
            end = fmax(end, all[i].end_s);
        }
        best = fmax(best, done / (end - begin));
    }
    for (int i = 0; i < threads; i++) pthread_join(all[i].thread, NULL);
    pthread_barrier_destroy(&barrier);
    free(all);
    return best;
}

static volatile uint64_t sink; // keeps the compiler from dropping a result nobody reads

typedef uint64_t line __attribute__((vector_size(64), may_alias));

// Four streams at once: on some machines one alone does not fill the memory's pipes. Some read faster
// when they are asked `ahead` bytes before, others (Zen 5) when they are left alone.
static inline double read_streams(const char *buffer, size_t bytes, const size_t ahead) {
    enum { STREAMS = 4 };
    const line *lines = (const line *)(const void *)buffer;
    size_t each = bytes / sizeof(line) / STREAMS;
    line sum[STREAMS] = {{0}};
    for (size_t i = 0; i < each; i++)
#pragma GCC unroll 4
        for (size_t s = 0; s < STREAMS; s++) {
            sum[s] ^= lines[s * each + i];
            if (ahead > 0) __builtin_prefetch((const char *)&lines[s * each + i] + ahead);
        }
    for (int s = 1; s < STREAMS; s++) sum[0] ^= sum[s];
    for (int i = 1; i < 8; i++) sum[0][0] ^= sum[0][i];
    sink = sum[0][0];
    return (double)(each * STREAMS * sizeof(line));
}

static double read_asked(const char *buffer, size_t bytes) {
    return read_streams(buffer, bytes, PREFETCH_BYTES);
}

static double read_plain(const char *buffer, size_t bytes) {
    return read_streams(buffer, bytes, 0);
}

typedef float wide __attribute__((vector_size(32)));

// Two floats' worth of operations a lane; the compiler fuses where the target has it.
#define MULTIPLY_BODY                                                                              \
    wide acc[CHAINS], a = {0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f}, c = a;                 \
    memset(acc, 0, sizeof acc);                                                                    \
    for (int64_t step = 0; step < MULTIPLY_STEPS; step++)                                          \
        _Pragma("GCC unroll 16") for (int i = 0; i < CHAINS; i++) acc[i] = acc[i] * a + c;         \
    for (int i = 1; i < CHAINS; i++) acc[0] += acc[i];                                             \
    sink = (uint64_t)acc[0][0];                                                                    \
    return 2.0 * 8 * CHAINS * (double)MULTIPLY_STEPS;

#ifdef __x86_64__
__attribute__((target("avx2,fma"))) static double multiply_avx2(const char *buffer, size_t bytes) {
    (void)buffer, (void)bytes;
    MULTIPLY_BODY
}

__attribute__((target("avx512f"))) static double multiply_avx512(const char *buffer, size_t bytes) {
    (void)buffer, (void)bytes;
    __m512 acc[CHAINS], a = _mm512_set1_ps(0.5f);
    for (int i = 0; i < CHAINS; i++) acc[i] = _mm512_setzero_ps();
    for (int64_t step = 0; step < MULTIPLY_STEPS; step++)
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) acc[i] = _mm512_fmadd_ps(acc[i], a, a);
    for (int i = 1; i < CHAINS; i++) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    sink = (uint64_t)_mm512_cvtss_f32(acc[0]);
    return 2.0 * 16 * CHAINS * (double)MULTIPLY_STEPS;
}

__attribute__((target("avx512f,avx512bf16"))) static double multiply_bf16(const char *buffer,
                                                                          size_t bytes) {
    (void)buffer, (void)bytes;
    __m512 acc[CHAINS];
    __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f003f00); // pairs of 0.5
    for (int i = 0; i < CHAINS; i++) acc[i] = _mm512_setzero_ps();
    for (int64_t step = 0; step < MULTIPLY_STEPS; step++)
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) acc[i] = _mm512_dpbf16_ps(acc[i], a, a);
    for (int i = 1; i < CHAINS; i++) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    sink = (uint64_t)_mm512_cvtss_f32(acc[0]);
    return 2.0 * 2 * 16 * CHAINS * (double)MULTIPLY_STEPS;
}
#endif

static double multiply_plain(const char *buffer, size_t bytes) {
    (void)buffer, (void)bytes;
    MULTIPLY_BODY
}

struct machine_peak machine_peak_measure(int threads) {
    struct machine_peak peak = {0};
    char *buffer = aligned_alloc(2 << 20, BUFFER_BYTES);
    if (!buffer) abort();
    madvise(buffer, BUFFER_BYTES, MADV_HUGEPAGE); // a wish; without it pages are small
    memset(buffer, 1, BUFFER_BYTES);
    peak.read_bytes_per_s = fmax(best_rate(threads, read_asked, buffer, BUFFER_BYTES),
                                 best_rate(threads, read_plain, buffer, BUFFER_BYTES));
    free(buffer);
    work_function *f32 = multiply_plain, *bf16 = NULL;
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("fma")) f32 = multiply_avx2;
    if (__builtin_cpu_supports("avx512f")) f32 = multiply_avx512;
    if (__builtin_cpu_supports("avx512bf16")) bf16 = multiply_bf16;
#endif
    peak.f32_flops_per_s = best_rate(threads, f32, NULL, 0);
    peak.has_bf16 = bf16 != NULL;
    peak.bf16_flops_per_s = bf16 ? best_rate(threads, bf16, NULL, 0) : peak.f32_flops_per_s;
    return peak;
}

void machine_cpu_name(char *name, size_t room) {
    char text[256];
    FILE *file = fopen("/proc/cpuinfo", "r");
    snprintf(name, room, "unknown");
    while (file && fgets(text, sizeof text, file)) {
        const char *colon = strchr(text, ':');
        if (strncmp(text, "model name", 10) != 0 || !colon) continue;
        text[strcspn(text, "\n")] = 0;
        snprintf(name, room, "%s", colon + 2);
        break;
    }
    if (file) fclose(file);
}
