// The emulation's own tests: small kernels that keep its rules run to their end with the right
// numbers, and kernels that break one rule each end with the sentence for it, under every order of
// threads that is tried. Each runs in a child process, whose words and end are looked at.
#include "kernels/cuda/primitives.cuh"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { THREADS = 96, SEEDS = 8 };

// ------------------------------------------------------------------ kernels that keep the rules

// Each thread reads its neighbour's number behind a barrier, twice.
__global__ static void neighbours(int *to) {
    shared<int> x = dynamic_shared<int>();
    int i = threadIdx.x, next = (i + 1) % THREADS;
    for (int round = 0; round < 2; round++) {
        x[i] = i * 10 + round;
        __syncthreads();
        to[i] = x[next];
        __syncthreads();
    }
}

// Inside a warp an exchange is enough.
__global__ static void by_warps(float *to) {
    shared<float> x = dynamic_shared<float>();
    int i = threadIdx.x;
    x[i] = (float)i;
    float sum = warp_sum(1.0f); // all have written
    to[i] = x[i ^ 1] + sum;
}

__global__ static void sums(float *to) {
    to[threadIdx.x] = group_sum((float)threadIdx.x, 4);
}

// ------------------------------------------------------------------ kernels that break one

__global__ static void no_barrier(int *to) {
    shared<int> x = dynamic_shared<int>();
    x[threadIdx.x] = 1;
    to[threadIdx.x] = x[(threadIdx.x + 40) % THREADS];
}

__global__ static void overwritten(int *to) {
    shared<int> x = dynamic_shared<int>();
    x[threadIdx.x] = 1;
    __syncthreads();
    to[threadIdx.x] = x[(threadIdx.x + 40) % THREADS];
    x[threadIdx.x] = 2; // others may not have read it yet
}

__global__ static void same_word(int *) {
    shared<int> x = dynamic_shared<int>();
    x[threadIdx.x / 2] = 1;
}

__global__ static void in_a_warp(int *to) {
    shared<int> x = dynamic_shared<int>();
    x[threadIdx.x] = 1;
    to[threadIdx.x] = x[threadIdx.x ^ 1];
}

__global__ static void some_at_barrier(int *) {
    if (threadIdx.x < 64) __syncthreads();
}

__global__ static void some_lanes_exchange(float *to) {
    if (threadIdx.x % 32 < 16) to[threadIdx.x] = warp_exchange(1.0f, 1);
}

__global__ static void past_shared(int *) {
    shared<int> x = dynamic_shared<int>();
    x[THREADS + threadIdx.x] = 1;
}

__global__ static void past_device(int *to) {
    to[THREADS + threadIdx.x] = 1;
}

// ------------------------------------------------------------------ the tests

static void *device(size_t bytes) {
    void *memory;
    if (cudaMalloc(&memory, bytes) != cudaSuccess) abort();
    return memory;
}

static void expect(bool right, const char *what) {
    if (right) return;
    fprintf(stderr, "%s\n", what);
    abort();
}

static const size_t SHARED = THREADS * 4;

static void run_neighbours() {
    int *to = static_cast<int *>(device(SHARED));
    CUDA_LAUNCH(neighbours, dim3(3), dim3(THREADS), SHARED, nullptr, to);
    for (int i = 0; i < THREADS; i++) expect(to[i] == (i + 1) % THREADS * 10 + 1, "neighbours");
}
static void run_by_warps() {
    float *to = static_cast<float *>(device(SHARED));
    CUDA_LAUNCH(by_warps, dim3(2), dim3(THREADS), SHARED, nullptr, to);
    for (int i = 0; i < THREADS; i++) expect(to[i] == (float)(i ^ 1) + 32, "by_warps");
}
static void run_sums() {
    float *to = static_cast<float *>(device(SHARED));
    CUDA_LAUNCH(sums, dim3(1), dim3(THREADS), 0, nullptr, to);
    for (int i = 0; i < THREADS; i++) expect(to[i] == (float)(i / 4 * 16 + 6), "sums");
}
#define BREAKS(kernel, type)                                                                       \
    static void run_##kernel() {                                                                   \
        type *to = static_cast<type *>(device(SHARED));                                            \
        CUDA_LAUNCH(kernel, dim3(1), dim3(THREADS), SHARED, nullptr, to);                          \
    }
BREAKS(no_barrier, int)
BREAKS(overwritten, int)
BREAKS(same_word, int)
BREAKS(in_a_warp, int)
BREAKS(some_at_barrier, int)
BREAKS(some_lanes_exchange, float)
BREAKS(past_shared, int)
BREAKS(past_device, int)

static const struct {
    const char *name;
    void (*run)();
    const char *sentence; // NULL: it runs to its end; "": ended by a signal, without a sentence
} tests[] = {
    {"neighbours", run_neighbours, nullptr},
    {"by_warps", run_by_warps, nullptr},
    {"sums", run_sums, nullptr},
    {"no_barrier", run_no_barrier, "a race in shared memory"},
    {"overwritten", run_overwritten, "a race in shared memory"},
    {"same_word", run_same_word, "written twice"},
    {"in_a_warp", run_in_a_warp, "a race in shared memory"},
    {"some_at_barrier", run_some_at_barrier, "others wait at a barrier"},
    {"some_lanes_exchange", run_some_lanes_exchange, "some lanes of a warp exchange"},
    {"past_shared", run_past_shared, "beyond what the launch asked for"},
    {"past_device", run_past_device, ""},
};

// What a child says on stderr, and whether it ended well.
static bool child_ends_well(void (*run)(), uint64_t seed, char *said, size_t bytes) {
    int ends[2];
    if (pipe(ends) != 0) abort();
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        emulate_seed = seed;
        run();
        _exit(0);
    }
    close(ends[1]);
    size_t used = 0;
    for (ssize_t got; (got = read(ends[0], said + used, bytes - 1 - used)) > 0;) used += (size_t)got;
    said[used] = 0;
    close(ends[0]);
    int status;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int main() {
    int failed = 0;
    for (const auto &test : tests)
        for (uint64_t seed = 1; seed <= SEEDS; seed++) {
            char said[1000];
            bool well = child_ends_well(test.run, seed, said, sizeof said);
            bool right = test.sentence ? !well && strstr(said, test.sentence) : well;
            if (right) continue;
            failed++;
            printf("%s, seed %d: %s; \"%s\"\n", test.name, (int)seed, well ? "ran" : "ended", said);
        }
    printf("%zu kernels, %d orders each: %d wrong\n", sizeof tests / sizeof *tests, (int)SEEDS,
           failed);
    return failed > 0;
}
