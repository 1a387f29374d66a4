// Rows in blocks (kernels/row_block.c): blocks cover a step's rows once and none is nearly empty; segments cut by blocks
// put together again are the step's.
#include "kernels/backend.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

enum { ROWS = 1000 };

static void blocks_are_about_equal(void **state) {
    struct backend_ops ops = {.ffn_rows = 0};
    assert_int_equal(row_block_count(&ops, ROWS), 1);
    assert_int_equal(row_block_rows_max(&ops, ROWS), ROWS);
    static const int wanted[] = {1, 10, 64, 128};
    for (size_t w = 0; w < sizeof wanted / sizeof *wanted; w++) {
        ops.ffn_rows = wanted[w];
        for (int rows = 1; rows <= ROWS; rows++) {
            int count = row_block_count(&ops, rows), end = 0;
            for (int block = 0; block < count; block++) {
                assert_int_equal(row_block_first(rows, count, block), end);
                int before = end;
                end = row_block_first(rows, count, block + 1);
                assert_true(end > before && end - before <= row_block_rows_max(&ops, rows));
                // One of a few rows would read all weights, too.
                if (wanted[w] >= 64 && count > 1) assert_true(end - before > wanted[w] / 2);
            }
            assert_int_equal(end, rows);
        }
        assert_int_equal(row_block_count(&ops, wanted[w]), 1);
        if (wanted[w] >= 16) assert_int_equal(row_block_count(&ops, 5 * wanted[w]), 5);
    }
}

// Every row counts who is over it, with which row of v.
static void count_rows(const struct lora_segment *segments, int count, int first,
                       int64_t sums[ROWS]) {
    for (int i = 0; i < count; i++)
        for (int t = 0; t < segments[i].token_count; t++)
            sums[first + segments[i].token_first + t] +=
                (int64_t)(segments[i].page_count + 1) * 10000 + segments[i].v_first + t;
}

static void segments_are_cut(void **state) {
    // One after the other, over each other, one row, ending and beginning where blocks do.
    static const int spans[][2] = {{0, 1}, {1, 15}, {16, 16}, {30, 100}, {32, 64}, {5, 900}, {999, 1}};
    enum { SPANS = sizeof spans / sizeof *spans };
    struct lora_segment segments[SPANS] = {{0}}, part[SPANS];
    int v = 0;
    for (int i = 0; i < SPANS; i++) {
        segments[i].token_first = spans[i][0];
        segments[i].token_count = spans[i][1];
        segments[i].v_first = v;
        segments[i].page_count = i;
        v += spans[i][1];
    }
    static int64_t whole[ROWS];
    count_rows(segments, SPANS, 0, whole);
    for (int block = 1; block <= ROWS; block += 1 + block / 2) {
        int64_t cut[ROWS] = {0};
        for (int first = 0; first < ROWS; first += block) {
            int rows = first + block < ROWS ? block : ROWS - first;
            int count = row_block_segments(part, segments, SPANS, first, rows);
            for (int i = 0; i < count; i++) {
                assert_true(part[i].token_first >= 0 && part[i].token_count > 0);
                assert_true(part[i].token_first + part[i].token_count <= rows);
            }
            count_rows(part, count, first, cut);
        }
        assert_memory_equal(cut, whole, sizeof whole);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(blocks_are_about_equal),
        cmocka_unit_test(segments_are_cut),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
