// A vector of VECTOR_WIDTH floats, by the compiler's vector extensions, so that one source serves
// every instruction set. Included by cpu_kernels_body.h alone, once in each translation unit that
// defines VECTOR_WIDTH (4, 8 or 16).
#ifndef LORAD_KERNELS_CPU_VECTOR_H
#define LORAD_KERNELS_CPU_VECTOR_H

#include <stdint.h>
#include <string.h>
#if VECTOR_WIDTH >= 8
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * VECTOR_WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * VECTOR_WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * VECTOR_WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * VECTOR_WIDTH)));

#if VECTOR_WIDTH == 4
#define REPEAT(v) v, v, v, v
#elif VECTOR_WIDTH == 8
#define REPEAT(v) v, v, v, v, v, v, v, v
#else
#define REPEAT(v) v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v
#endif

INLINE vf vf_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void vf_store(float *p, vf v) {
    memcpy(p, &v, sizeof v);
}

INLINE vu vu_load(const uint32_t *p) {
    vu v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void vu_store(uint32_t *p, vu v) {
    memcpy(p, &v, sizeof v);
}

INLINE vf vf_set(float s) {
    return (vf){REPEAT(s)};
}

// The first n < VECTOR_WIDTH elements, the rest zero.
INLINE vu vu_load_part(const uint32_t *p, int n) {
#if VECTOR_WIDTH == 16
    return (vu)_mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), p);
#else
    vu v = {0};
    memcpy(&v, p, (size_t)n * sizeof *p);
    return v;
#endif
}

INLINE vf vf_load_part(const float *p, int n) {
    return (vf)vu_load_part((const uint32_t *)(const void *)p, n);
}

INLINE void vf_store_part(float *p, vf v, int n) {
    memcpy(p, &v, (size_t)n * sizeof(float));
}

INLINE vf vf_select(vi mask, vf yes, vf no) {
    return (vf)((mask & (vi)yes) | (~mask & (vi)no));
}

// a > b ? a : b, and a < b ? a : b: of a NaN and a number, whichever is b.
INLINE vf vf_max(vf a, vf b) {
#if VECTOR_WIDTH == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif VECTOR_WIDTH == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return vf_select(a > b, a, b);
#endif
}

INLINE vf vf_min(vf a, vf b) {
#if VECTOR_WIDTH == 16
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif VECTOR_WIDTH == 8
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return vf_select(a < b, a, b);
#endif
}

INLINE float vf_sum(vf v) {
#if VECTOR_WIDTH == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    float part[VECTOR_WIDTH];
    vf_store(part, v);
    for (int step = VECTOR_WIDTH / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) part[i] += part[i + step];
    return part[0];
#endif
}

INLINE float vf_maximum(vf v) {
#if VECTOR_WIDTH == 16
    return _mm512_reduce_max_ps((__m512)v);
#else
    float part[VECTOR_WIDTH];
    vf_store(part, v);
    for (int i = 1; i < VECTOR_WIDTH; i++) part[0] = part[i] > part[0] ? part[i] : part[0];
    return part[0];
#endif
}

INLINE vf vf_from_bf16(const uint16_t *p) {
#if VECTOR_WIDTH == 16 // the compiler would widen in two halves
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
#else
    vh half;
    memcpy(&half, p, sizeof half);
    return (vf)(__builtin_convertvector(half, vu) << 16);
#endif
}

// Bits of the nearest bf16 (even on a tie) in the low half of each word; NaN stays NaN.
INLINE vu vf_to_bf16_bits(vf v) {
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    vu quiet = (bits >> 16) | 0x40u;
    vu nan = (vu)((vi)(bits & 0x7fffffffu) > 0x7f800000);
    return (rounded & ~nan) | (quiet & nan);
}

INLINE vh vf_to_bf16(vf v) {
#if KERNELS_BF16 // numbers too small for a normal one become zero, as where they are multiplied
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    return __builtin_convertvector(vf_to_bf16_bits(v), vh);
#endif
}

// exp after Cephes' expf: 2^n times a polynomial of degree 6 on [-ln2/2, ln2/2]; within 2 ulp.
// Below -87.3 the result is 0, above 88.3 it is that of 88.3.
INLINE vf vf_exp(vf x) {
    const vf low = vf_set(-87.33654f), high = vf_set(88.3f), shift = vf_set(12582912.0f);
    vi under = x < low;
    x = vf_max(low, vf_min(high, x));
    vf scaled = x * vf_set(1.44269504f) + shift; // rounds to an integer in the low mantissa bits
    vf n = scaled - shift;
    vf r = x - n * vf_set(0.693359375f);
    r = r + n * vf_set(2.12194440e-4f);
    vf p = vf_set(1.9875691500e-4f);
    p = p * r + vf_set(1.3981999507e-3f);
    p = p * r + vf_set(8.3334519073e-3f);
    p = p * r + vf_set(4.1665795894e-2f);
    p = p * r + vf_set(1.6666665459e-1f);
    p = p * r + vf_set(5.0000001201e-1f);
    p = p * (r * r) + r + vf_set(1.0f);
    vi exponent = ((vi)scaled - (vi)shift + 127) << 23;
    return (vf)(~under & (vi)(p * (vf)exponent));
}

// 2 x 2 -> interleaved: the perfect shuffle of a and b; log2(width) rounds of it transpose.
INLINE void vu_interleave(vu a, vu b, vu *low, vu *high) {
#if VECTOR_WIDTH == 4
    *low = __builtin_shuffle(a, b, (vu){0, 4, 1, 5});
    *high = __builtin_shuffle(a, b, (vu){2, 6, 3, 7});
#elif VECTOR_WIDTH == 8
    *low = __builtin_shuffle(a, b, (vu){0, 8, 1, 9, 2, 10, 3, 11});
    *high = __builtin_shuffle(a, b, (vu){4, 12, 5, 13, 6, 14, 7, 15});
#else
    *low = __builtin_shuffle(a, b, (vu){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
    *high = __builtin_shuffle(
        a, b, (vu){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#endif
}

// [R][VECTOR_WIDTH] -> [VECTOR_WIDTH][R], both as R vectors; R is a constant power of 2. An element's
// place is the bits of its row, then those of its column; a round turns them by one.
INLINE void vu_transpose(vu *m, const int R) {
    vu t[VECTOR_WIDTH];
#pragma GCC unroll 4
    for (int round = 1; round < R; round *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < R / 2; i++) vu_interleave(m[i], m[i + R / 2], &t[2 * i], &t[2 * i + 1]);
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) m[i] = t[i];
    }
}

#endif
