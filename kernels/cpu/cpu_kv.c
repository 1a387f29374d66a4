// KV pages: writing a token's k and v, and reading V. Engine thread and its workers.
#include "kernels/cpu/cpu_kv.h"

#include <string.h>

enum { PART = 256 }; // elements that are rounded to bf16 at a time, even

static char *slot_page(const struct backend *b, int layer, int32_t slot) {
    return cpu_page(b, layer, slot / PAGE_TOKENS);
}

// n words down a column of a panel.
static void write_column(char *panel, int column, const void *words, int n) {
    uint32_t *to = (uint32_t *)(void *)panel + column;
    const char *from = words;
    for (int i = 0; i < n; i++) memcpy(to + i * PAGE_TOKENS, from + 4 * i, sizeof *to);
}

void cpu_kv_write_keys(const struct backend *b, int layer, int32_t slot, const float *k) {
    char *page = slot_page(b, layer, slot);
    int D = b->shape.head_size, column = slot % PAGE_TOKENS;
    for (int head = 0; head < b->shape.kv_heads; head++, k += D) {
        char *panel = kv_head(b, page, head);
        if (b->dtype == DTYPE_F32) write_column(panel, column, k, D);
        for (int at = 0; b->dtype == DTYPE_BF16 && at < D; at += PART) {
            uint16_t rounded[PART];
            int count = min_int(PART, D - at);
            b->kernels->narrow(rounded, k + at, (size_t)count);
            write_column(panel + (size_t)at * PAGE_TOKENS * 2, column, rounded, count / 2);
        }
    }
}

// bf16: `count` elements of v into row to[count] of pairs.
static void write_pairs(const struct backend *b, uint32_t *to, bool second, const float *v,
                        const float *next, int count) {
    uint16_t rounded[PART], next_rounded[PART];
    b->kernels->narrow(rounded, v, (size_t)count);
    if (next) b->kernels->narrow(next_rounded, next, (size_t)count);
    if (!second) b->kernels->pair_rows(to, rounded, next ? next_rounded : NULL, count);
    else
        for (int i = 0; i < count; i++) to[i] = (to[i] & 0xffff) | (uint32_t)rounded[i] << 16;
}

void cpu_kv_write_values(const struct backend *b, int layer, int32_t slot, const float *v,
                         const float *next) {
    char *page = slot_page(b, layer, slot);
    int D = b->shape.head_size, K = b->shape.kv_heads, token = slot % PAGE_TOKENS;
    for (int head = K; head < 2 * K; head++, v += D) {
        uint32_t *values = (uint32_t *)(void *)kv_head(b, page, head);
        if (b->dtype == DTYPE_F32) memcpy(values + token * D, v, (size_t)D * sizeof *v);
        for (int at = 0; b->dtype == DTYPE_BF16 && at < D; at += PART)
            write_pairs(b, values + token / 2 * D + at, token % 2 == 1, v + at,
                        next ? next + at : NULL, min_int(PART, D - at));
        if (next) next += D;
    }
}

const uint32_t *cpu_kv_values(const struct backend *b, char *page, int head, int count,
                              uint32_t *copy) {
    int D = b->shape.head_size, padded = (int)round_up((size_t)D, PANEL);
    const uint32_t *values =
        (const uint32_t *)(const void *)kv_head(b, page, b->shape.kv_heads + head);
    bool bf16 = b->dtype == DTYPE_BF16, half = bf16 && count % 2 == 1;
    if (D == padded && !half) return values;
    int rows = bf16 ? divide_up(count, 2) : count;
    for (int row = 0; row < rows; row++) {
        memcpy(copy + row * padded, values + row * D, (size_t)D * sizeof *copy);
        memset(copy + row * padded + D, 0, (size_t)(padded - D) * sizeof *copy);
    }
    for (int i = 0; half && i < D; i++) copy[(rows - 1) * padded + i] &= 0xffff;
    return copy;
}
