// The fibers of emulate.h. x86-64 only: a switch saves the registers that a call must keep.
#include "tests/emulation/emulate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;
uint64_t emulate_seed = 1, emulate_launches;

enum { THREADS_MAX = 1024, LANES = 32, STACK_BYTES = 64 << 10, SHARED_MAX = 228 << 10 };
enum wait { RUNS, AT_BLOCK, AT_WARP, DONE, WAITS };

struct fiber {
    void *stack_pointer;
    char *stack;
    dim3 index;
    wait waits;
    int meetings; // of its warp that it has come to: its parity names the buffer
    int syncs;    // of them, those that order memory
};

static fiber fibers[THREADS_MAX];
static int lanes_in[THREADS_MAX / LANES][WAITS]; // of each warp: how many are in which state
static int fiber_count, current;
static void *scheduler_pointer;
static const std::function<void()> *thread_function;
static const char *kernel_name;
static uint32_t exchanged[2][THREADS_MAX][6];
alignas(256) static unsigned char shared_memory[SHARED_MAX];

// emulate_switch(&save, load): pushes what must be kept, changes stacks, pops.
asm(R"(
.text
.globl emulate_switch
emulate_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");
extern "C" void emulate_switch(void **save, void *load);

[[noreturn]] static void fail(const char *what) {
    fprintf(stderr, "emulation: %s: block (%u, %u, %u): %s\n", kernel_name, blockIdx.x, blockIdx.y,
            blockIdx.z, what);
    abort();
}

// ------------------------------------------------------------------ races in shared memory

// Who touched a word since the block's last barrier. Of readers: the last one, and which warps.
struct touched {
    int barrier;                // of which barrier's time this is
    int writer, write_sync; // -1: nobody
    bool adds;              // the writer added, atomically
    int reader, read_sync;
    uint32_t reader_warps;
};
static touched words[SHARED_MAX / 4];
static int barriers;
static size_t shared_size;

static touched *touch(const void *word) {
    size_t at = static_cast<size_t>(static_cast<const unsigned char *>(word) - shared_memory);
    if (at + 4 > shared_size) fail("shared memory beyond what the launch asked for");
    touched *t = &words[at / 4];
    if (t->barrier != barriers) *t = {barriers, -1, 0, false, -1, 0, 0};
    return t;
}

// Whether the running thread comes after what `other` did behind its `sync`-th __syncwarp.
static bool after(int other, int sync) {
    return other == current || (other / LANES == current / LANES && sync < fibers[current].syncs);
}

[[noreturn]] static void race(const char *what, int other, const void *word) {
    char text[160];
    size_t at = static_cast<size_t>(static_cast<const unsigned char *>(word) - shared_memory) / 4;
    snprintf(text, sizeof text, "a race in shared memory: threads %d and %d, word %zu, %s", other,
             current, at, what);
    fail(text);
}

void emulate_shared_read(const void *word) {
    touched *t = touch(word);
    if (t->writer >= 0 && !after(t->writer, t->write_sync))
        race("written and read", t->writer, word);
    t->reader = current;
    t->read_sync = fibers[current].syncs;
    t->reader_warps |= 1u << current / LANES;
}

static void write(const void *word, bool adds) {
    touched *t = touch(word);
    if (t->writer >= 0 && !(adds && t->adds) && !after(t->writer, t->write_sync))
        race("written twice", t->writer, word);
    if (t->reader >= 0 && !after(t->reader, t->read_sync))
        race("read and written", t->reader, word);
    if (t->reader_warps & ~(1u << current / LANES)) race("read and written", t->reader, word);
    t->writer = current;
    t->adds = adds;
    t->write_sync = fibers[current].syncs;
}

void emulate_shared_write(const void *word) {
    write(word, false);
}

void emulate_shared_add(const void *word) {
    write(word, true);
}

// ------------------------------------------------------------------ threads

static void set_state(int thread, wait what) {
    int *lanes = lanes_in[thread / LANES];
    lanes[fibers[thread].waits]--;
    lanes[what]++;
    fibers[thread].waits = what;
}

static void wait_for(wait what) {
    set_state(current, what);
    emulate_switch(&fibers[current].stack_pointer, scheduler_pointer);
}

static void fiber_main() {
    (*thread_function)();
    wait_for(DONE);
    fail("a thread that ended was run again");
}

void __syncthreads() {
    wait_for(AT_BLOCK);
}

// Leaves `count` words for the warp's other lanes; says where each lane's lie.
static uint32_t (*meet(const uint32_t *words, int count))[6] {
    int parity = fibers[current].meetings++ & 1;
    memcpy(exchanged[parity][current], words, (size_t)count * sizeof *words);
    wait_for(AT_WARP);
    return exchanged[parity];
}

void __syncwarp() {
    fibers[current].syncs++;
    meet(nullptr, 0);
}

float warp_exchange(float value, int bits) {
    int other = current ^ bits;
    if (other >= fiber_count) fail("an exchange with a lane that is not there");
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    memcpy(&value, meet(&word, 1)[other], sizeof value);
    return value;
}

static float half_of(uint32_t word, int half) {
    uint32_t bits = half ? word & 0xffff0000u : word << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Fragments as the PTX ISA has them for mma.m16n8k16 with .bf16.
void mma_16x8x16(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
    uint32_t (*all)[6] = meet(words, 6) + current / LANES * LANES;
    int lane = current % LANES;
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            uint32_t x = all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            uint32_t y = all[column * 4 + k % 8 / 2][4 + k / 8];
            d[i] += half_of(x, k % 2) * half_of(y, k % 2);
        }
    }
}

void *emulate_dynamic_shared() {
    return shared_memory;
}

static uint64_t random_next(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

template <typename T> static void shuffle(uint64_t *state, std::vector<T> *list) {
    for (size_t i = list->size() - 1; i > 0; i--)
        std::swap((*list)[i], (*list)[random_next(state) % (i + 1)]);
}

static void fiber_start(fiber *f) {
    if (!f->stack) f->stack = static_cast<char *>(malloc(STACK_BYTES));
    // As after a call: the stack is 8 off a multiple of 16 when fiber_main begins.
    void **top = reinterpret_cast<void **>(f->stack + STACK_BYTES) - 2;
    *top = reinterpret_cast<void *>(fiber_main);
    f->stack_pointer = top - 6;
    memset(top - 6, 0, 6 * sizeof *top);
    f->waits = RUNS;
    f->meetings = f->syncs = 0;
}

static void fiber_run(int index) {
    current = index;
    threadIdx = fibers[index].index;
    emulate_switch(&scheduler_pointer, fibers[index].stack_pointer);
}

// Runs a warp's threads until each waits or has ended; lets them go again when they met.
static void warp_run(int warp, const std::vector<int> &lanes) {
    int first = warp * LANES;
    for (int lane : lanes)
        if (fibers[first + lane].waits == RUNS) fiber_run(first + lane);
    if (lanes_in[warp][AT_WARP] == 0) return;
    if (lanes_in[warp][AT_WARP] < LANES) fail("some lanes of a warp meet, others wait or have ended");
    for (int i = first; i < first + LANES; i++) {
        if (fibers[i].meetings != fibers[first].meetings)
            fail("lanes of a warp meet a different number of times");
        set_state(i, RUNS);
    }
}

// Warps go ahead of each other as chance has it, as far as barriers let them.
static void block_run(uint64_t *random, const std::vector<int> &lanes, size_t shared_bytes) {
    uint32_t nan = 0x7fc0dead;
    int warps = fiber_count / LANES;
    for (size_t at = 0; at + 4 <= shared_bytes; at += 4) memcpy(shared_memory + at, &nan, 4);
    for (int i = 0; i < fiber_count; i++) fiber_start(&fibers[i]);
    memset(lanes_in, 0, sizeof lanes_in);
    for (int warp = 0; warp < warps; warp++) lanes_in[warp][RUNS] = LANES;
    shared_size = shared_bytes;
    barriers++; // no word remembers another block
    for (;;) {
        int runnable[THREADS_MAX / LANES], count = 0, done = 0, at_block = 0;
        for (int warp = 0; warp < warps; warp++) {
            if (lanes_in[warp][RUNS] > 0) runnable[count++] = warp;
            done += lanes_in[warp][DONE];
            at_block += lanes_in[warp][AT_BLOCK];
        }
        if (count > 0) {
            warp_run(runnable[random_next(random) % static_cast<uint64_t>(count)], lanes);
            continue;
        }
        if (done == fiber_count) return;
        if (at_block < fiber_count) fail("some threads ended while others wait at a barrier");
        barriers++;
        for (int i = 0; i < fiber_count; i++) set_state(i, RUNS);
    }
}

void emulate_launch(const char *name, dim3 grid, dim3 block, size_t shared_bytes,
                    const std::function<void()> &thread) {
    kernel_name = name;
    thread_function = &thread;
    gridDim = grid;
    blockDim = block;
    blockIdx = dim3(0, 0, 0);
    fiber_count = static_cast<int>(block.x * block.y * block.z);
    if (fiber_count < 1 || fiber_count > THREADS_MAX) fail("a block has 1 to 1,024 threads");
    if (fiber_count % LANES != 0) fail("a block here is whole warps");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
        fail("a grid has 1 to 65,535 blocks in y and z");
    if (shared_bytes > SHARED_MAX) fail("more shared memory than a device has");
    for (unsigned i = 0; i < static_cast<unsigned>(fiber_count); i++)
        fibers[i].index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    uint64_t state = emulate_seed + 7919 * ++emulate_launches;
    std::vector<int> lanes;
    for (int i = 0; i < LANES; i++) lanes.push_back(i);
    shuffle(&state, &lanes);
    std::vector<unsigned> blocks(grid.x * grid.y * grid.z);
    for (unsigned i = 0; i < blocks.size(); i++) blocks[i] = i;
    shuffle(&state, &blocks);
    for (unsigned i : blocks) {
        blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        block_run(&state, lanes, shared_bytes);
    }
}
