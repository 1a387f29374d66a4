// Worker threads of the CPU backend. Called by the engine thread, and by whoever loads weights
// before serving. It knows nothing of what the chunks compute.
//
// `ticket` holds a job's chunk count (high half) and the next chunk to claim (low half). A chunk is
// claimed by adding one to the ticket; the job's function and context are read only after that, and
// the caller does not return, and so cannot publish another job, before every chunk is done. So the
// fields are never read while they change, however long a worker slept in between.
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

enum { SPINS_BEFORE_SLEEP = 3000, SPINS_BEFORE_YIELD = 3000, THREADS_MAX = 512 };

struct worker {
    struct cpu_threads *owner;
    pthread_t thread;
    int index;
};

struct cpu_threads {
    int count;
    _Alignas(64) _Atomic uint64_t ticket;
    cpu_chunk *function;
    void *context;
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

static bool has_chunk(uint64_t ticket) {
    return (uint32_t)ticket < ticket >> 32;
}

static bool work_waits(struct cpu_threads *threads) {
    return has_chunk(atomic_load(&threads->ticket)) || atomic_load(&threads->stop);
}

// Claims and runs chunks until there are none.
static void work(struct cpu_threads *threads, int thread) {
    uint64_t ticket = atomic_load(&threads->ticket);
    while (has_chunk(ticket)) {
        if (!atomic_compare_exchange_weak(&threads->ticket, &ticket, ticket + 1)) continue;
        threads->function(threads->context, (int)(uint32_t)ticket, thread);
        atomic_fetch_add(&threads->done, 1);
        ticket = atomic_load(&threads->ticket);
    }
}

static void *worker_main(void *argument) {
    struct worker *worker = argument;
    struct cpu_threads *threads = worker->owner;
    while (!atomic_load(&threads->stop)) {
        for (int spins = 0; spins < SPINS_BEFORE_SLEEP && !work_waits(threads); spins++) relax();
        if (!work_waits(threads)) {
            pthread_mutex_lock(&threads->lock);
            atomic_fetch_add(&threads->sleepers, 1);
            while (!work_waits(threads)) pthread_cond_wait(&threads->wake, &threads->lock);
            atomic_fetch_sub(&threads->sleepers, 1);
            pthread_mutex_unlock(&threads->lock);
        }
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
    free(threads);
}

int cpu_threads_count(const struct cpu_threads *threads) {
    return threads->count;
}

void cpu_threads_run(struct cpu_threads *threads, cpu_chunk *function, void *context, int chunks) {
    if (threads->count == 1 || chunks <= 1) {
        for (int i = 0; i < chunks; i++) function(context, i, 0);
        return;
    }
    VERIFY(!has_chunk(atomic_load(&threads->ticket)));
    threads->function = function;
    threads->context = context;
    atomic_store(&threads->done, 0);
    atomic_store(&threads->ticket, (uint64_t)chunks << 32);
    wake_sleepers(threads);
    work(threads, 0);
    for (int spins = 0; atomic_load(&threads->done) != (uint32_t)chunks; spins++) {
        if (spins < SPINS_BEFORE_YIELD) relax();
        else sched_yield();
    }
}
