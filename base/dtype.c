// Element conversion between f32, bf16 and f16 on the host: loading weights and adapters. Pure
// functions, any thread. Sources and targets may be unaligned. Rounds to nearest even, as IEEE 754
// and the frameworks that write such files do. Not for the hot path: kernels convert by themselves.
#include "base/dtype.h"

#include "base/verify.h"
#include "base/wide.h"

const char *dtype_name(enum dtype dtype) {
    switch (dtype) {
    case DTYPE_F32: return "f32";
    case DTYPE_BF16: return "bf16";
    case DTYPE_F16: return "f16";
    case DTYPE_OTHER: break;
    }
    return "other";
}

static float f16_to_f32(uint16_t value) {
    uint32_t sign = (uint32_t)(value & 0x8000u) << 16, exponent = (value >> 10) & 0x1fu;
    uint32_t mantissa = value & 0x3ffu, bits;
    if (exponent == 0x1f) {
        bits = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent) {
        bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    } else { // zero or subnormal: mantissa * 2^-24, exact in f32
        float magnitude = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &magnitude, 4);
        bits |= sign;
    }
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static uint16_t f32_to_f16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); // 65520 and more: infinity
    if (magnitude >= 0x38800000u) {                                  // 2^-14: a normal f16
        uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
        return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
    }
    // Subnormal: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded to even.
    float absolute;
    memcpy(&absolute, &magnitude, 4);
    absolute += 0.5f;
    memcpy(&bits, &absolute, 4);
    return (uint16_t)(sign | (bits - 0x3f000000u));
}

WIDE static void bf16_row_to_f32(float *to, const unsigned char *from, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint16_t value;
        memcpy(&value, from + 2 * i, 2);
        to[i] = bf16_to_f32(value);
    }
}

WIDE static void f32_row_to_bf16(unsigned char *to, const unsigned char *from, size_t count) {
    for (size_t i = 0; i < count; i++) {
        float value;
        memcpy(&value, from + 4 * i, 4);
        uint16_t rounded = f32_to_bf16(value);
        memcpy(to + 2 * i, &rounded, 2);
    }
}

void dtype_to_f32(float *to, const void *from, enum dtype from_type, size_t count) {
    VERIFY_OP(from_type, !=, DTYPE_OTHER);
    const unsigned char *source = from;
    if (count == 0) return;
    if (from_type == DTYPE_F32) {
        memcpy(to, source, count * 4);
        return;
    }
    if (from_type == DTYPE_BF16) {
        bf16_row_to_f32(to, source, count);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        uint16_t value;
        memcpy(&value, source + 2 * i, 2);
        to[i] = f16_to_f32(value);
    }
}

static void f32_to_dtype(void *to, enum dtype to_type, const void *from, size_t count) {
    unsigned char *target = to;
    const unsigned char *source = from;
    if (to_type == DTYPE_F32) {
        memcpy(target, source, count * 4);
        return;
    }
    if (to_type == DTYPE_BF16) {
        f32_row_to_bf16(target, source, count);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        float value;
        memcpy(&value, source + 4 * i, 4);
        uint16_t rounded = f32_to_f16(value);
        memcpy(target + 2 * i, &rounded, 2);
    }
}

void dtype_convert(void *to, enum dtype to_type, const void *from, enum dtype from_type,
                   size_t count) {
    enum { BLOCK = 512 };
    VERIFY_OP(to_type, !=, DTYPE_OTHER);
    VERIFY_OP(from_type, !=, DTYPE_OTHER);
    if (count == 0) return;
    if (to_type == from_type) { // NaN payloads too
        memcpy(to, from, count * dtype_bytes(to_type));
        return;
    }
    if (from_type == DTYPE_F32) {
        f32_to_dtype(to, to_type, from, count);
        return;
    }
    float block[BLOCK];
    for (size_t done = 0; done < count; done += BLOCK) {
        size_t part = count - done < BLOCK ? count - done : BLOCK;
        dtype_to_f32(block, (const char *)from + done * dtype_bytes(from_type), from_type, part);
        f32_to_dtype((char *)to + done * dtype_bytes(to_type), to_type, block, part);
    }
}
