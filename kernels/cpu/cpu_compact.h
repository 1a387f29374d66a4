// Base weights of bf16 kept in 12 bits a number, without loss (cpu_compact.c). A panel is what
// cpu_linear.c multiplies: [words][PANEL] pairs of bf16.
#ifndef LORAD_KERNELS_CPU_COMPACT_H
#define LORAD_KERNELS_CPU_COMPACT_H

#include "kernels/cpu/cpu_internal.h"

struct compact;

// Whether a matrix of this shape can be kept so.
bool cpu_compact_can(int out, int in);
// NULL: no memory.
struct compact *cpu_compact_create(const struct cpu_kernels *kernels, int panels, int words);
void cpu_compact_destroy(struct compact *c);
// Any thread, each panel once. Afterwards: whether all panels' numbers were worth it; if not, the
// whole is of no use.
void cpu_compact_pack(struct compact *c, int panel, const uint32_t *words);
bool cpu_compact_fits(const struct compact *c);
size_t cpu_compact_bytes(const struct compact *c);

// The tile with panels from `panel` on, from word `first`, in place of its w; the tile is used up.
// `expanded`: NULL, or where the words are left as they are multiplied (struct cpu_compact_tile).
void cpu_compact_multiply(const struct compact *c, struct cpu_tile *tile, int panel, int first,
                          uint32_t *expanded, size_t expanded_stride);
// Where the codes of words [first, first + count), a piece, of a panel lie; the next panel's follow.
const char *cpu_compact_codes(const struct compact *c, int panel, int first, int count);

#endif
