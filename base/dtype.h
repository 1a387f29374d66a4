// Element types of stored tensors, and their conversion to and from f32 on the host.
#ifndef LORAD_BASE_DTYPE_H
#define LORAD_BASE_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum dtype { DTYPE_F32, DTYPE_BF16, DTYPE_F16, DTYPE_OTHER };

static inline size_t dtype_bytes(enum dtype dtype) {
    return dtype == DTYPE_F32 ? 4 : 2;
}
const char *dtype_name(enum dtype dtype); // "f32", "bf16", "f16", "other"

static inline float bf16_to_f32(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

// Round to nearest even; NaN stays NaN.
static inline uint16_t f32_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = bits >> 16 | 0x40u;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded); // loops become vectors
}

// Element-wise conversion of `count` elements; source may be unaligned. Not for DTYPE_OTHER.
void dtype_to_f32(float *to, const void *from, enum dtype from_type, size_t count);
void dtype_convert(void *to, enum dtype to_type, const void *from, enum dtype from_type,
                   size_t count);

#endif
