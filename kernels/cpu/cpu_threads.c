// Worker threads of the CPU backend. Called by the engine thread, and by whoever loads weights
// before serving. It knows nothing of what the chunks compute.
//
// A job's chunks are dealt out in order, an equal share for each thread. Its own it takes from the
// front, then the others' from the back. A chunk is claimed by changing the share that it is in; the
// job's function and context are read only after that, and the caller does not return, and so cannot
// publish another job, before every chunk is done. So the fields are never read while they change,
// however long a worker slept in between.
#include "kernels/cpu/cpu_threads.h"

#include "base/memory.h"
#include "base/thread.h"
#include "base/verify.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SPINS_BEFORE_SLEEP = 3000, SPINS_BEFORE_YIELD = 3000, THREADS_MAX = 512 };

struct worker {
    struct cpu_threads *owner;
    pthread_t thread;
    int index;
};

// Chunks [first, end) that nobody has claimed: first is the high half, end the low one.
struct share {
    _Alignas(64) _Atomic uint64_t chunks;
};

struct cpu_threads {
    int count;
    struct share *shares; // [count]
    int chunks;           // of the latest job
    cpu_chunk *function;
    void *context;
    _Alignas(64) _Atomic uint32_t job; // number of the latest
    _Alignas(64) _Atomic uint32_t done;
    _Alignas(64) _Atomic int sleepers;
    _Atomic bool stop;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    struct worker *workers; // count - 1 of them
};

static void relax(void) {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

static uint64_t share_of(int first, int end) {
    return (uint64_t)first << 32 | (uint32_t)end;
}

// Where a thread's share of the job begins.
static int share_begin(const struct cpu_threads *threads, int thread) {
    return (int)((int64_t)threads->chunks * thread / threads->count);
}

// Claims the first chunk of a share, or the last. -1: there is none.
static int claim(struct share *share, bool last) {
    uint64_t chunks = atomic_load(&share->chunks);
    for (;;) {
        int first = (int)(chunks >> 32), end = (int)(uint32_t)chunks;
        if (first >= end) return -1;
        uint64_t left = last ? share_of(first, end - 1) : share_of(first + 1, end);
        if (atomic_compare_exchange_weak(&share->chunks, &chunks, left))
            return last ? end - 1 : first;
    }
}

static void work(struct cpu_threads *threads, int thread) {
    for (int i = 0; i < threads->count; i++) {
        struct share *share = &threads->shares[(thread + i) % threads->count];
        for (int chunk; (chunk = claim(share, i > 0)) >= 0;) {
            threads->function(threads->context, chunk, thread);
            atomic_fetch_add(&threads->done, 1);
        }
    }
}

// Whether there is another job than that one, or none will come.
static bool has_news(struct cpu_threads *threads, uint32_t job) {
    return atomic_load(&threads->job) != job || atomic_load(&threads->stop);
}

static void *worker_main(void *argument) {
    struct worker *worker = argument;
    struct cpu_threads *threads = worker->owner;
    uint32_t job = 0;
    while (!atomic_load(&threads->stop)) {
        for (int spins = 0; spins < SPINS_BEFORE_SLEEP && !has_news(threads, job); spins++) relax();
        if (!has_news(threads, job)) {
            pthread_mutex_lock(&threads->lock);
            atomic_fetch_add(&threads->sleepers, 1);
            while (!has_news(threads, job)) pthread_cond_wait(&threads->wake, &threads->lock);
            atomic_fetch_sub(&threads->sleepers, 1);
            pthread_mutex_unlock(&threads->lock);
        }
        job = atomic_load(&threads->job);
        work(threads, worker->index);
    }
    return NULL;
}

static void wake_sleepers(struct cpu_threads *threads) {
    if (atomic_load(&threads->sleepers) == 0) return;
    pthread_mutex_lock(&threads->lock);
    pthread_cond_broadcast(&threads->wake);
    pthread_mutex_unlock(&threads->lock);
}

struct cpu_threads *cpu_threads_create(int count) {
    if (count == 0) {
        cpu_set_t set;
        count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    }
    if (count > THREADS_MAX) count = THREADS_MAX;
    struct cpu_threads *threads = mem_alloc_aligned(sizeof *threads);
    *threads = (struct cpu_threads){.count = count};
    pthread_mutex_init(&threads->lock, NULL);
    pthread_cond_init(&threads->wake, NULL);
    threads->shares = mem_alloc_aligned((size_t)count * sizeof *threads->shares);
    memset(threads->shares, 0, (size_t)count * sizeof *threads->shares);
    threads->workers = mem_zalloc((size_t)count, sizeof *threads->workers);
    for (int i = 1; i < count; i++) {
        struct worker *worker = &threads->workers[i - 1];
        *worker = (struct worker){.owner = threads, .index = i};
        if (thread_start(&worker->thread, worker_main, worker) != 0) {
            threads->count = i; // fewer threads are slower, not wrong
            break;
        }
    }
    return threads;
}

void cpu_threads_destroy(struct cpu_threads *threads) {
    if (!threads) return;
    atomic_store(&threads->stop, true);
    wake_sleepers(threads);
    for (int i = 1; i < threads->count; i++) pthread_join(threads->workers[i - 1].thread, NULL);
    pthread_mutex_destroy(&threads->lock);
    pthread_cond_destroy(&threads->wake);
    free(threads->workers);
    free(threads->shares);
    free(threads);
}

int cpu_threads_count(const struct cpu_threads *threads) {
    return threads->count;
}

void cpu_threads_run(struct cpu_threads *threads, cpu_chunk *function, void *context, int chunks) {
    threads->chunks = chunks;
    if (threads->count == 1 || chunks <= 1) {
        for (int i = 0; i < chunks; i++) function(context, i, 0);
        return;
    }
    VERIFY(!threads->function);
    threads->function = function;
    threads->context = context;
    atomic_store(&threads->done, 0);
    for (int i = 0; i < threads->count; i++)
        atomic_store(&threads->shares[i].chunks,
                     share_of(share_begin(threads, i), share_begin(threads, i + 1)));
    atomic_fetch_add(&threads->job, 1);
    wake_sleepers(threads);
    work(threads, 0);
    for (int spins = 0; atomic_load(&threads->done) != (uint32_t)chunks; spins++) {
        if (spins < SPINS_BEFORE_YIELD) relax();
        else sched_yield();
    }
    threads->function = NULL;
}

int cpu_threads_next(const struct cpu_threads *threads, int chunk, int thread) {
    bool own = chunk >= share_begin(threads, thread);
    return own && chunk + 1 < share_begin(threads, thread + 1) ? chunk + 1 : -1;
}
