// What every base matmul of the CPU backend promises: a row has the same bits alone, at any place and
// in any batch.
#ifndef LORAD_TESTS_ROWS_ALIKE_H
#define LORAD_TESTS_ROWS_ALIKE_H

#include "kernels/backend.h"

#include "base/memory.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <cmocka.h>

// x [rows, in], x_bytes an element, by a matrix of [out, in].
static void expect_rows_alike(const struct backend_ops *ops, struct backend *b,
                              const struct linear *linear, const void *x, int rows, int out,
                              int in, size_t x_bytes) {
    size_t count = (size_t)rows * (size_t)out;
    float *alone = mem_alloc(count * sizeof *alone), *batch = mem_alloc(count * sizeof *batch);
    size_t row = (size_t)in * x_bytes;
    for (int t = 0; t < rows; t++)
        ops->linear(b, linear, alone + t * out, (const char *)x + (size_t)t * row, 1);
    for (int first = 0; first < 3; first++)
        for (int some = 1; first + some <= rows; some += 1 + some / 6) {
            ops->linear(b, linear, batch, (const char *)x + (size_t)first * row, some);
            ops->synchronize(b);
            assert_memory_equal(batch, alone + first * out,
                                (size_t)some * (size_t)out * sizeof *batch);
        }
    free(alone);
    free(batch);
}

#endif
