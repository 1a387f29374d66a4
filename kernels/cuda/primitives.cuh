// The small words that the kernels are written in, so that they read as algorithms: element types,
// vector loads, sums over a warp, and how to launch. With LORAD_EMULATE the same kernels compile as
// plain C++ against tests/emulation, where threads are fibers on one processor.
#ifndef LORAD_KERNELS_CUDA_PRIMITIVES_CUH
#define LORAD_KERNELS_CUDA_PRIMITIVES_CUH

#include <math.h>
#include <stdint.h>

#ifdef LORAD_EMULATE
#include "tests/emulation/emulate.h"
#else
#include <cuda_runtime.h>

#define CUDA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                \
    kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)

// A place in a block's shared memory; in the emulation a class that watches for races.
template <typename T> using shared = T *;

template <typename T> __device__ inline shared<T> dynamic_shared() {
    extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
    return reinterpret_cast<T *>(dynamic_shared_memory);
}

// What `other`, this lane's number with some bits turned, holds. Every lane of the warp calls it.
__device__ inline float warp_exchange(float value, int bits) {
    return __shfl_xor_sync(0xffffffffu, value, bits);
}

template <typename T, typename U> __device__ inline shared<T> shared_as(shared<U> at) {
    return reinterpret_cast<T *>(at);
}

// Adds to a place in shared memory that other threads add to as well.
template <typename T> __device__ inline void shared_add(shared<T> at, T value) {
    if (sizeof(T) == sizeof(uint64_t))
        atomicAdd(reinterpret_cast<unsigned long long *>(at), (unsigned long long)value);
    else atomicAdd(reinterpret_cast<unsigned *>(at), (unsigned)value);
}

// d [16, 8] += a [16, 16] b [16, 8] on a tensor core: a and b bf16, in fragments (tiles.cuh).
__device__ inline void mma_16x8x16(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

enum { WARP = 32 };

// Sum and maximum over groups of `lanes` (a power of two) neighbouring lanes; each lane has it.
__device__ inline float group_sum(float value, int lanes) {
    for (int bits = lanes / 2; bits > 0; bits /= 2) value += warp_exchange(value, bits);
    return value;
}

__device__ inline float warp_sum(float value) {
    return group_sum(value, WARP);
}

__device__ inline float warp_max(float value) {
    for (int bits = WARP / 2; bits > 0; bits /= 2)
        value = fmaxf(value, warp_exchange(value, bits));
    return value;
}

// ------------------------------------------------------------------ element types

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

__device__ inline float bits_to_float(uint32_t bits) {
    union {
        uint32_t bits;
        float value;
    } both = {bits};
    return both.value;
}

__device__ inline uint32_t float_to_bits(float value) {
    union {
        float value;
        uint32_t bits;
    } both = {value};
    return both.bits;
}

__device__ inline float to_float(float value) {
    return value;
}
__device__ inline float to_float(bf16 value) {
    return bits_to_float((uint32_t)value.bits << 16);
}
// IEEE 754 binary16; subnormals by their value.
__device__ inline float to_float(f16 value) {
    uint32_t sign = (uint32_t)(value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31u;
    uint32_t mantissa = value.bits & 0x3ffu;
    if (exponent == 0) {
        float tiny = (float)mantissa * 5.9604644775390625e-8f; // 2^-24
        return sign ? -tiny : tiny;
    }
    uint32_t high = exponent == 31 ? 255u : exponent + 112u;
    return bits_to_float(sign | high << 23 | mantissa << 13);
}

// To nearest, ties to even, as base/dtype.h does.
template <typename T> __device__ inline T from_float(float value);
template <> __device__ inline float from_float<float>(float value) {
    return value;
}
#ifdef LORAD_EMULATE
template <> inline bf16 from_float<bf16>(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {(uint16_t)(bits >> 16 | 0x40u)};
    return {(uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

// Two bf16 in a word, the first in its low half.
inline uint32_t pack(float low, float high) {
    return (uint32_t)from_float<bf16>(low).bits | (uint32_t)from_float<bf16>(high).bits << 16;
}
#else
template <> __device__ inline bf16 from_float<bf16>(float value) {
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

__device__ inline uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
#endif

// ------------------------------------------------------------------ eight elements at once

enum { EIGHT = 8 };

struct __align__(16) words4 {
    uint32_t word[4];
};

// 16-byte loads; `from` is aligned to 16 bytes.
__device__ inline void load_eight(float to[EIGHT], const bf16 *from) {
    words4 words = *reinterpret_cast<const words4 *>(from);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = bits_to_float(words.word[i] << 16);
        to[2 * i + 1] = bits_to_float(words.word[i] & 0xffff0000u);
    }
}
__device__ inline void load_eight(float to[EIGHT], const float *from) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        words4 words = reinterpret_cast<const words4 *>(from)[half];
#pragma unroll
        for (int i = 0; i < 4; i++) to[4 * half + i] = bits_to_float(words.word[i]);
    }
}

// ------------------------------------------------------------------ pages

// A division by what is known before a launch, as a multiplication (T. Granlund, P. Montgomery,
// "Division by invariant integers using multiplication", 1994): right below 2^31.
struct divisor {
    uint32_t value, factor, shift;
};

inline divisor divisor_of(uint32_t value) {
    uint32_t shift = 0;
    while (((uint64_t)1 << shift) < value) shift++;
    uint64_t more = ((uint64_t)1 << shift) - value;
    return {value, (uint32_t)((more << 32) / value + 1), shift};
}

__device__ inline uint32_t divided(uint32_t n, const divisor &by) {
    return ((uint32_t)((uint64_t)n * by.factor >> 32) + n) >> by.shift;
}

// One layer of the pool: page p begins at base + p * elems. elems is a multiple of 8, so that eight
// elements at a multiple of 8 never lie in two pages.
template <typename T> struct paged {
    T *base;
    uint32_t elems;
    divisor by_elems;
};

// Element e of what lies in `pages`.
template <typename T>
__device__ inline T *paged_at(const paged<T> &pool, const int32_t *pages, uint32_t e) {
    uint32_t page = divided(e, pool.by_elems);
    return pool.base + (size_t)pages[page] * pool.elems + (e - page * pool.elems);
}

// Elements [e, e + EIGHT) as far as they lie before `end`; zero beyond.
template <typename T>
__device__ inline void load_paged(float to[EIGHT], const paged<T> &pool, const int32_t *pages,
                                  uint32_t e, uint32_t end) {
    if (e % EIGHT == 0 && e + EIGHT <= end) {
        load_eight(to, paged_at(pool, pages, e));
        return;
    }
#pragma unroll
    for (uint32_t i = 0; i < EIGHT; i++)
        to[i] = e + i < end ? to_float(*paged_at(pool, pages, e + i)) : 0.0f;
}

#endif
