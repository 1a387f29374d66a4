// A step's rows in blocks: see backend.h.
#include "kernels/backend.h"

enum { UNIT = 16 }; // rows

// All blocks are about as high: one of few rows would read all weights for them.
int row_block_count(const struct backend_ops *ops, int rows) {
    int wanted = ops->ffn_rows, units = (rows + UNIT - 1) / UNIT;
    if (wanted <= 0 || rows < wanted) return 1;
    int count = (rows + wanted / 2) / wanted;
    return count < units ? count : units;
}

int row_block_first(int rows, int count, int block) {
    int64_t units = (rows + UNIT - 1) / UNIT;
    int first = (int)(units * block / count) * UNIT;
    return first < rows ? first : rows;
}

int row_block_rows_max(const struct backend_ops *ops, int rows) {
    int most = ops->ffn_rows + ops->ffn_rows / 2 + 2 * UNIT;
    return ops->ffn_rows > 0 && rows > most ? most : rows;
}

int row_block_segments(struct lora_segment *to, const struct lora_segment *segments, int count,
                       int first, int rows) {
    int made = 0;
    for (int i = 0; i < count; i++) {
        struct lora_segment part = segments[i];
        int end = part.token_first + part.token_count;
        if (end > first + rows) end = first + rows;
        int skipped = first > part.token_first ? first - part.token_first : 0;
        part.token_first += skipped;
        part.v_first += skipped;
        part.token_count = end - part.token_first;
        if (part.token_count <= 0) continue;
        part.token_first -= first;
        to[made++] = part;
    }
    return made;
}
