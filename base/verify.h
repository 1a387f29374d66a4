// Asserts that stay on in release builds and print both operands. They guard the program's own
// invariants, never what a client sent. A failing assert logs and aborts.
#ifndef LORAD_BASE_VERIFY_H
#define LORAD_BASE_VERIFY_H

#include <stdint.h>

__attribute__((noreturn)) void verify_fail(const char *file, int line, const char *expression);
__attribute__((noreturn)) void verify_fail_operands(const char *file, int line, const char *expression,
                                    long long left, long long right);

#define VERIFY(condition)                                                                          \
    do {                                                                                           \
        if (__builtin_expect(!(condition), 0)) verify_fail(__FILE__, __LINE__, #condition);        \
    } while (0)

// Integer comparison; `op` is ==, !=, <, <=, > or >=.
#define VERIFY_OP(left, op, right)                                                                 \
    do {                                                                                           \
        long long verify_l_ = (long long)(left), verify_r_ = (long long)(right);                   \
        if (__builtin_expect(!(verify_l_ op verify_r_), 0))                                        \
            verify_fail_operands(__FILE__, __LINE__, #left " " #op " " #right, verify_l_,          \
                                 verify_r_);                                                       \
    } while (0)

#endif
