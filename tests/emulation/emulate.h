// CUDA on one processor, for the kernels of kernels/cuda compiled as plain C++ (LORAD_EMULATE).
//
// A block's threads are fibers. Each runs until it must wait: at __syncthreads for its block, at
// __syncwarp, a warp_exchange or an mma for its warp. Blocks run one after another, so a __shared__ array is a static one.
// The orders of blocks, of warps and of a warp's lanes are shuffled from emulate_seed, and warps run
// ahead of each other as far as barriers let them, so that a missing barrier reads what a later
// thread has not written yet; dynamic shared memory is filled with NaN before each block, and each
// of its words remembers who read and wrote it, so that a race is found whatever the order was. A
// barrier or an exchange that only some threads reach aborts with a sentence. Device memory ends at
// a page that faults, so that a read or write past the end does too; so does shared memory.
//
// Streams, events and recorded graphs: streams.h. test_emulator.cpp breaks each of these rules on
// purpose. What it does not do: memory ordering between blocks, timing, warps of divergent lanes that
// never meet. It is for indexing, barriers, arithmetic and the order of what is queued.
#ifndef LORAD_TESTS_EMULATION_EMULATE_H
#define LORAD_TESTS_EMULATION_EMULATE_H

#include "tests/emulation/streams.h"

#include <functional>
#include <stddef.h>
#include <stdint.h>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct __attribute__((aligned(16))) float4 {
    float x, y, z, w;
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" uint64_t emulate_seed; // tests set it: another seed, another order of threads
extern "C" uint64_t emulate_launches;

void emulate_launch(const char *name, dim3 grid, dim3 block, size_t shared_bytes,
                    const std::function<void()> &thread);
void *emulate_dynamic_shared();
void __syncthreads();
void __syncwarp();
float warp_exchange(float value, int bits);
void mma_16x8x16(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1);

// The arguments are what they are at the call, as for a true launch.
template <typename... Parameters, typename... Arguments>
void emulate_kernel(const char *name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                    size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
    std::tuple<Parameters...> values(arguments...);
    emulate_queue(stream, [=] {
        emulate_launch(name, grid, block, shared_bytes, [&] { std::apply(kernel, values); });
    });
}

#define CUDA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                \
    emulate_kernel(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

// Shared memory, watched word by word: two threads touch a word, one of them writes, and neither a
// barrier of the block nor __syncwarp of their warp lies between: that is a race, and the end. (An
// exchange or an mma orders no memory, though the warp meets.)
void emulate_shared_read(const void *word);
void emulate_shared_write(const void *word);
void emulate_shared_add(const void *word); // an atomic addition: races with all but its like

// What shared<T>[i] gives where it may be written to.
template <typename T> class shared_word {
    T *at;

  public:
    explicit shared_word(T *at) : at(at) {}
    operator T() const {
        for (size_t i = 0; i < sizeof(T); i += 4) emulate_shared_read((const char *)at + i);
        return *at;
    }
    shared_word &operator=(T value) {
        for (size_t i = 0; i < sizeof(T); i += 4) emulate_shared_write((const char *)at + i);
        *at = value;
        return *this;
    }
    shared_word &operator=(const shared_word &other) {
        return *this = static_cast<T>(other);
    }
    shared_word &operator+=(T value) {
        return *this = static_cast<T>(*this) + value;
    }
};

// A pointer into shared memory.
template <typename T> class shared {
    static_assert(sizeof(T) % 4 == 0, "shared memory is watched in words of 4 bytes");
    T *at;

  public:
    shared(T *at = nullptr) : at(at) {}
    shared_word<T> operator[](size_t i) const {
        return shared_word<T>(at + i);
    }
    shared operator+(ptrdiff_t n) const {
        return shared(at + n);
    }
    template <typename U> shared<U> as() const {
        return reinterpret_cast<U *>(at);
    }
    void add(T value) const {
        for (size_t i = 0; i < sizeof(T); i += 4) emulate_shared_add((const char *)at + i);
        *at += value;
    }
};

template <typename T, typename U> inline shared<T> shared_as(shared<U> at) {
    return at.template as<T>();
}

template <typename T> inline void shared_add(shared<T> at, T value) {
    at.add(value);
}

template <typename T> inline shared<T> dynamic_shared() {
    return static_cast<T *>(emulate_dynamic_shared());
}

#endif
