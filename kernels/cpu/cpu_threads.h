// The backend's worker threads: one job at a time, cut into chunks. Each thread has its share of them,
// one behind the other, and when it is through takes from the others' ends.
//
// The caller works too, and waits only for chunks that were claimed: a worker that the system has
// put aside delays nothing. Between jobs a worker spins for some tens of microseconds (the gap
// between two operations of a step), then sleeps.
#ifndef LORAD_KERNELS_CPU_THREADS_H
#define LORAD_KERNELS_CPU_THREADS_H

struct cpu_threads;

// One chunk of a job; `thread` is 0 (the caller) .. count - 1 and runs one chunk at a time.
typedef void cpu_chunk(void *context, int chunk, int thread);

// `count` threads in all, the caller included; 0 means one a processor this process may use.
struct cpu_threads *cpu_threads_create(int count);
void cpu_threads_destroy(struct cpu_threads *threads);
int cpu_threads_count(const struct cpu_threads *threads);

// Runs all chunks and returns when they are done. One caller at a time.
void cpu_threads_run(struct cpu_threads *threads, cpu_chunk *function, void *context, int chunks);

// While a chunk runs: the one that its thread has next, unless another takes it. -1: none of its share.
int cpu_threads_next(const struct cpu_threads *threads, int chunk, int thread);

#endif
