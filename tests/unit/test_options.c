// Options: sizes, precedence of flag over environment over default, and what is refused.
#include "server/options.h"

#include "base/memory.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void test_sizes(void **state) {
    static const struct {
        const char *text;
        bool good;
        size_t bytes;
    } rows[] = {{"0", true, 0}, {"17", true, 17}, {"64KiB", true, 65536}, {"4GiB", true, 4ull << 30},
                {"10MB", true, 10000000}, {"", false, 0}, {"-1", false, 0}, {"4G", false, 0},
                {"1.5GiB", false, 0}, {"99999999999999999999", false, 0},
                {"9999999999TiB", false, 0}, {" 1", false, 0}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        size_t bytes = 0;
        assert_int_equal(option_size_parse(rows[i].text, &bytes), rows[i].good);
        if (rows[i].good) assert_int_equal(bytes, rows[i].bytes);
    }
}

static enum status parse(struct options *o, struct error *err, const char *line) {
    static char text[512];
    char *argv[32] = {"serve"}, *rest = text, *word;
    int argc = 1;
    snprintf(text, sizeof text, "%s", line);
    while ((word = strsep(&rest, " "))) argv[argc++] = word;
    return options_parse(argc, argv, o, err);
}

static void test_precedence(void **state) {
    struct options o;
    struct error err;
    assert_int_equal(parse(&o, &err, "--model m"), STATUS_OK);
    assert_int_equal(o.port, 8000);
    assert_false(o.host_given);
    setenv("LORAD_PORT", "9", 1);
    setenv("LORAD_MAX_SEQS", "5", 1);
    assert_int_equal(parse(&o, &err, "--model m --max-seqs=7 --host ::1 --adapter a=b"), STATUS_OK);
    assert_int_equal(o.port, 9);
    assert_int_equal(o.max_seqs, 7);
    assert_true(o.host_given);
    assert_int_equal(o.adapter_count, 1);
    options_deinit(&o);
    setenv("LORAD_PORT", "x", 1);
    assert_int_equal(parse(&o, &err, "--model m"), STATUS_INVALID);
    unsetenv("LORAD_PORT");
    unsetenv("LORAD_MAX_SEQS");
}

static void test_refused(void **state) {
    static const struct {
        const char *line, *named;
    } rows[] = {{"--port 8000", "--model"}, {"--model m --frob 1", "--frob"},
                {"--model m extra", "extra"}, {"--model m --port", "--port"},
                {"--model m --port 70000", "65535"}, {"--model m --max-seqs 0", "--max-seqs"},
                {"--model m --adapter x", "NAME=DIR"}, {"--model m --adapter =x", "NAME=DIR"},
                {"--model m --pool-bytes 4X", "--pool-bytes"}, {"--model m --dtype f64", "--dtype"},
                {"--model m --quantization int5", "--quantization"},
                {"--model m --device tpu", "--device"}, {"--model m --log-level loud", "--log-level"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct options o;
        struct error err = {0};
        assert_int_equal(parse(&o, &err, rows[i].line), STATUS_INVALID);
        assert_non_null(strstr(err.text, rows[i].named));
        options_deinit(&o);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_sizes),
                                       cmocka_unit_test(test_precedence),
                                       cmocka_unit_test(test_refused)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
