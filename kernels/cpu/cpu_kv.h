// How a KV page lies on the CPU: as what attention multiplies, so that a step turns nothing round.
//   K of a head: [words of D][PAGE_TOKENS], a panel; a word is an f32, or a pair of bf16 of
//   neighbouring elements.
//   V of a head: f32 [PAGE_TOKENS][D]; bf16 [PAGE_TOKENS / 2][D] pairs of neighbouring tokens.
// K's heads come first, then V's. A pair whose second token is not there has anything in its place.
#ifndef LORAD_KERNELS_CPU_KV_H
#define LORAD_KERNELS_CPU_KV_H

#include "kernels/cpu/cpu_internal.h"

static inline char *kv_head(const struct backend *b, char *page, int head) {
    return page + (size_t)head * PAGE_TOKENS * (size_t)b->shape.head_size * b->shape.elem_bytes;
}

// Writes a token's k [K][D] into its slot of a layer.
void cpu_kv_write_keys(const struct backend *b, int layer, int32_t slot, const float *k);
// The same of v. `next`: in bf16, for the first token of a pair, v of the second, written with it;
// NULL: nothing is known of that.
void cpu_kv_write_values(const struct backend *b, int layer, int32_t slot, const float *v,
                         const float *next);
// K of a head as a panel, in place.
static inline const uint32_t *cpu_kv_keys(const struct backend *b, char *page, int head) {
    return (const uint32_t *)(const void *)kv_head(b, page, head);
}
// The first `count` tokens of V of a head in rows of D rounded up to PANEL words, in place or in
// `copy`; tokens behind them are zero in their pairs.
const uint32_t *cpu_kv_values(const struct backend *b, char *page, int head, int count,
                              uint32_t *copy);

#endif
