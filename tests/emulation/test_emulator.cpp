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

// Inside a warp __syncwarp is enough.
__global__ static void by_warps(float *to) {
    shared<float> x = dynamic_shared<float>();
    int i = threadIdx.x;
    x[i] = (float)i;
    __syncwarp();
    to[i] = x[i ^ 1] + warp_sum(1.0f);
}

// All add to a few places at once.
__global__ static void count(int *to) {
    shared<int> x = dynamic_shared<int>();
    if (threadIdx.x < 4) x[threadIdx.x] = 0;
    __syncthreads();
    shared_add(x + threadIdx.x % 4, 1);
    __syncthreads();
    if (threadIdx.x < 4) to[threadIdx.x] = x[threadIdx.x];
}

__global__ static void add_and_read(int *to) {
    shared<int> x = dynamic_shared<int>();
    if (threadIdx.x == 0) x[0] = 0;
    __syncthreads();
    if (threadIdx.x < 40) shared_add(x + 0, 1);
    else to[threadIdx.x] = x[0];
}

// An identity times a matrix of small numbers: every element of both fragments is looked at.
__global__ static void multiply(float *to) {
    int lane = threadIdx.x % WARP, row = lane / 4, column = lane % 4 * 2;
    auto one = [](int r, int k) { return r == k ? 0x3f80u : 0u; };
    auto number = [](int k, int n) { return (uint32_t)from_float<bf16>((float)(8 * k + n)).bits; };
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; i++) {
        int r = row + i % 2 * 8, k = column + i / 2 * 8;
        a[i] = one(r, k) | one(r, k + 1) << 16;
    }
    for (int i = 0; i < 2; i++)
        b[i] = number(column + 8 * i, row) | number(column + 8 * i + 1, row) << 16;
    float d[4] = {1, 1, 1, 1};
    mma_16x8x16(d, a, b[0], b[1]);
    for (int i = 0; i < 4; i++) to[threadIdx.x * 4 + i] = d[i];
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

// An exchange lets a warp meet, but orders no memory.
__global__ static void exchange_for_sync(float *to) {
    shared<float> x = dynamic_shared<float>();
    x[threadIdx.x] = 1;
    float sum = warp_sum(1.0f);
    to[threadIdx.x] = x[threadIdx.x ^ 1] + sum;
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
static void run_count() {
    int *to = static_cast<int *>(device(SHARED));
    CUDA_LAUNCH(count, dim3(1), dim3(THREADS), SHARED, nullptr, to);
    for (int i = 0; i < 4; i++) expect(to[i] == THREADS / 4, "count");
}
static void run_multiply() {
    float *to = static_cast<float *>(device(4 * SHARED));
    CUDA_LAUNCH(multiply, dim3(1), dim3(THREADS), 0, nullptr, to);
    for (int i = 0; i < 4 * THREADS; i++) {
        int lane = i / 4 % WARP, row = lane / 4 + i % 4 / 2 * 8, column = lane % 4 * 2 + i % 2;
        expect(to[i] == (float)(8 * row + column + 1), "multiply");
    }
}

// ---- streams: a chain over two streams, then as a recording, with page-locked memory that changes
// after the copy was queued and before it ran

__global__ static void add(int *to, const int *what) {
    to[threadIdx.x] += what[0];
}
__global__ static void twice(int *to) {
    to[threadIdx.x] *= 2;
}

struct chain {
    cudaStream_t one, two;
    cudaEvent_t event, back;
    int *to, *what, *host;
};

static chain chain_make() {
    chain c = {};
    cudaStreamCreateWithFlags(&c.one, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&c.two, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&c.event, cudaEventDisableTiming);
    cudaEventCreateWithFlags(&c.back, cudaEventDisableTiming);
    void *host;
    cudaMallocHost(&host, sizeof(int));
    c.host = static_cast<int *>(host);
    c.to = static_cast<int *>(device(SHARED));
    c.what = static_cast<int *>(device(sizeof(int)));
    cudaMemsetAsync(c.to, 0, SHARED, c.one);
    return c;
}

// to = (to + what) * 2 + what, the multiplication on the other stream.
static void chain_queue(const chain &c, bool there, bool back) {
    CUDA_LAUNCH(add, dim3(1), dim3(32), 0, c.one, c.to, c.what);
    cudaEventRecord(c.event, c.one);
    if (there) cudaStreamWaitEvent(c.two, c.event);
    CUDA_LAUNCH(twice, dim3(1), dim3(32), 0, c.two, c.to);
    cudaEventRecord(c.back, c.two);
    if (back) cudaStreamWaitEvent(c.one, c.back);
    CUDA_LAUNCH(add, dim3(1), dim3(32), 0, c.one, c.to, c.what);
}

static void chain_send(const chain &c, int what) {
    *c.host = what;
    cudaMemcpyAsync(c.what, c.host, sizeof(int), cudaMemcpyHostToDevice, c.one);
}

static void chain_run(bool there, bool back) {
    chain c = chain_make();
    for (int i = 1; i <= 8; i++) { // so many chances to run in a wrong order
        cudaMemsetAsync(c.to, 0, SHARED, c.one);
        chain_send(c, i);
        chain_queue(c, there, back);
        cudaStreamSynchronize(c.two);
        cudaStreamSynchronize(c.one);
        expect(c.to[0] == 3 * i, "a wrong order");
    }
}
static void run_two_streams() {
    chain_run(true, true);
}
static void run_no_event_there() {
    chain_run(false, true);
}
static void run_no_event_back() {
    chain_run(true, false);
}
static void run_changed_under_a_copy() {
    chain c = chain_make();
    chain_send(c, 1);
    *c.host = 2;
    cudaStreamSynchronize(c.one);
    int got = c.what[0];
    expect(got == 1, "the copy had not run yet");
}

static void run_recording() {
    chain c = chain_make();
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    chain_send(c, 3); // before the recording, and not part of it
    cudaStreamBeginCapture(c.one, cudaStreamCaptureModeThreadLocal);
    chain_queue(c, true, true);
    cudaStreamEndCapture(c.one, &graph);
    cudaGraphInstantiate(&exec, graph, 0);
    cudaGraphDestroy(graph);
    int expected = 0;
    for (int what = 3; what < 6; what++) {
        if (what > 3) chain_send(c, what);
        cudaGraphLaunch(exec, c.one);
        cudaStreamSynchronize(c.one);
        expected = (expected + what) * 2 + what;
        expect(c.to[0] == expected, "a replay");
    }
    cudaGraphExecDestroy(exec);
}
static void run_recording_that_waits() {
    chain c = chain_make();
    cudaStreamBeginCapture(c.one, cudaStreamCaptureModeThreadLocal);
    cudaStreamSynchronize(c.one);
}
static void run_recording_that_allocates() {
    chain c = chain_make();
    cudaStreamBeginCapture(c.one, cudaStreamCaptureModeThreadLocal);
    device(16);
}
static void run_recording_that_leaves_one_behind() {
    chain c = chain_make();
    cudaGraph_t graph;
    cudaStreamBeginCapture(c.one, cudaStreamCaptureModeThreadLocal);
    chain_queue(c, true, false);
    cudaStreamEndCapture(c.one, &graph);
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
BREAKS(exchange_for_sync, float)
BREAKS(add_and_read, int)
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
    {"count", run_count, nullptr},
    {"multiply", run_multiply, nullptr},
    {"two_streams", run_two_streams, nullptr},
    {"recording", run_recording, nullptr},
    {"no_barrier", run_no_barrier, "a race in shared memory"},
    {"overwritten", run_overwritten, "a race in shared memory"},
    {"same_word", run_same_word, "written twice"},
    {"in_a_warp", run_in_a_warp, "a race in shared memory"},
    {"add_and_read", run_add_and_read, "a race in shared memory"},
    {"exchange_for_sync", run_exchange_for_sync, "a race in shared memory"},
    {"no_event_there", run_no_event_there, "a wrong order"},
    {"no_event_back", run_no_event_back, "a wrong order"},
    {"changed_under_a_copy", run_changed_under_a_copy, "the copy had not run yet"},
    {"recording_that_waits", run_recording_that_waits, "a wait for a stream that is recorded"},
    {"recording_that_allocates", run_recording_that_allocates, "allocated while a stream"},
    {"recording_that_leaves_one_behind", run_recording_that_leaves_one_behind, "came back"},
    {"some_at_barrier", run_some_at_barrier, "others wait at a barrier"},
    {"some_lanes_exchange", run_some_lanes_exchange, "some lanes of a warp meet"},
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
