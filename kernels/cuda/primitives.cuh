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
template <> __device__ inline bf16 from_float<bf16>(float value) {
    uint32_t bits = float_to_bits(value);
    bf16 result;
    if ((bits & 0x7fffffffu) > 0x7f800000u) result.bits = (uint16_t)(bits >> 16 | 0x40u);
    else result.bits = (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    return result;
}

// What a value becomes when a matmul of T reads it.
template <typename T> __device__ inline float rounded(float value) {
    return to_float(from_float<T>(value));
}

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

// One layer of the pool: page p begins at base + p * elems. elems is a multiple of 8, so that eight
// elements at a multiple of 8 never lie in two pages.
template <typename T> struct paged {
    T *base;
    uint32_t elems;
};

// Element e of what lies in `pages`.
template <typename T>
__device__ inline T *paged_at(const paged<T> &pool, const int32_t *pages, uint32_t e) {
    uint32_t page = e / pool.elems;
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
