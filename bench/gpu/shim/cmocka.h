// The few names of cmocka that tests/unit/test_backend_cpu.c uses, for a machine without cmocka. A
// failure ends the program.
#ifndef LORAD_BENCH_GPU_CMOCKA_H
#define LORAD_BENCH_GPU_CMOCKA_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct CMUnitTest {
    const char *name;
    void (*run)(void **state);
};

#define fail_msg(...) (fprintf(stderr, "%s:%d: ", __FILE__, __LINE__), \
                       fprintf(stderr, __VA_ARGS__), fprintf(stderr, "\n"), exit(1))
#define assert_true(what) ((what) ? (void)0 : (void)fail_msg("not true: %s", #what))
#define assert_null(what) assert_true((what) == NULL)
#define assert_non_null(what) assert_true((what) != NULL)
#define assert_int_equal(a, b) assert_true((a) == (b))
#define assert_memory_equal(a, b, n) assert_true(memcmp(a, b, n) == 0)
#define cmocka_unit_test(function) {#function, function}
#define cmocka_run_group_tests(tests, setup, teardown)                                             \
    cmocka_run(tests, sizeof(tests) / sizeof(tests)[0])

static int cmocka_run(const struct CMUnitTest *tests, size_t count) {
    for (size_t i = 0; i < count; i++) {
        tests[i].run(NULL);
        printf("[       OK ] %s\n", tests[i].name);
        fflush(stdout);
    }
    printf("[  PASSED  ] %zu test(s).\n", count);
    return 0;
}

#endif
