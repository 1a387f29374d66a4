// The load generator's pure parts: the workload's distributions against their formulas, summaries,
// and events out of bytes in any pieces.
#include "bench/sse.h"
#include "bench/stats.h"
#include "bench/workload.h"

#include "base/memory.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const struct workload_options common = {
    .adapters = 100, .alpha = 1, .rate = 10, .cv = 1, .duration_s = 2000, .input_min = 8,
    .input_max = 512, .output_min = 3, .output_max = 3, .seed = 42};

static void close_to(double value, double wanted, double share) {
    if (fabs(value - wanted) > share * fabs(wanted))
        fail_msg("%g, wanted %g within %g of it", value, wanted, share);
}

// Catches a wrong shape or scale of the gamma gaps, in both of its branches (shape below 1, above).
static void gaps(void **state) {
    (void)state;
    const double cvs[] = {0.5, 1, 2, 4};
    for (size_t c = 0; c < sizeof cvs / sizeof *cvs; c++) {
        struct workload_options options = common;
        options.cv = cvs[c];
        options.requests = 200000;
        struct workload_request *list;
        size_t count = workload_make(&options, &list);
        assert_int_equal(count, options.requests);
        double mean = list[count - 1].at_s / (double)count, variance = 0, before = 0;
        for (size_t i = 0; i < count; before = list[i++].at_s) {
            assert_true(list[i].at_s >= before);
            variance += pow(list[i].at_s - before - mean, 2) / (double)count;
        }
        close_to(mean, 1 / options.rate, 0.05);
        close_to(sqrt(variance) / mean, cvs[c], 0.05);
        free(list);
    }
}

// P(adapter < k) = (k / n)^alpha. Catches 1 - alpha, 1 / alpha and an index past the end.
static void popularity(void **state) {
    (void)state;
    const double alphas[] = {0.1, 0.5, 1, 3};
    for (size_t a = 0; a < sizeof alphas / sizeof *alphas; a++) {
        struct workload_options options = common;
        options.alpha = alphas[a];
        options.requests = 100000;
        struct workload_request *list;
        size_t count = workload_make(&options, &list);
        double below[101] = {0};
        for (size_t i = 0; i < count; i++) {
            assert_in_range(list[i].adapter, 0, 99);
            below[list[i].adapter + 1] += 1.0 / (double)count;
        }
        for (int k = 1; k <= 100; k++) below[k] += below[k - 1];
        for (int k = 10; k <= 100; k += 30)
            assert_true(fabs(below[k] - pow(k / 100.0, alphas[a])) < 0.01);
        free(list);
    }
}

// Catches an end of the range that is never drawn, and streams that are not apart.
static void lengths_and_seeds(void **state) {
    (void)state;
    struct workload_request *one, *two, *other;
    struct workload_options options = common;
    size_t count = workload_make(&options, &one);
    assert_int_equal(count, 20000);
    options.output_max = 9; // changes no arrival and no adapter
    assert_int_equal(workload_make(&options, &two), count);
    options.seed++;
    workload_make(&options, &other);
    bool low = false, high = false, differs = false;
    for (size_t i = 0; i < count; i++) {
        assert_in_range(one[i].input_tokens, 8, 512);
        assert_int_equal(one[i].output_tokens, 3);
        low |= one[i].input_tokens == 8;
        high |= one[i].input_tokens == 512;
        assert_true(one[i].at_s == two[i].at_s && one[i].adapter == two[i].adapter);
        assert_true(one[i].seed == two[i].seed);
        differs |= two[i].at_s != other[i].at_s && two[i].adapter != other[i].adapter;
    }
    assert_true(low && high && differs);
    free(one);
    free(two);
    free(other);
}

static void base_only(void **state) {
    (void)state;
    struct workload_options options = common;
    options.adapters = 0;
    options.rate = 0;
    options.requests = 5;
    struct workload_request *list;
    assert_int_equal(workload_make(&options, &list), 5);
    for (int i = 0; i < 5; i++) assert_true(list[i].adapter == -1 && list[i].at_s == 0);
    free(list);
}

// Nearest rank: off by one is visible at every size.
static void summaries(void **state) {
    (void)state;
    for (int n = 1; n <= 200; n++) {
        struct samples samples = {0};
        for (int i = n; i >= 1; i--) samples_add(&samples, i);
        struct summary summary = samples_summary(&samples);
        assert_true(summary.count == (size_t)n && summary.max == n);
        assert_true(fabs(summary.mean - (n + 1) / 2.0) < 1e-9);
        assert_true(summary.p50 == (n + 1) / 2);
        assert_true(summary.p90 == (n * 9 + 9) / 10);
        assert_true(summary.p99 == (n * 99 + 99) / 100);
        samples_deinit(&samples);
    }
    struct samples none = {0};
    assert_true(samples_summary(&none).p99 == 0);
    assert_true(stats_jain((double[]){2, 2, 2}, 3) == 1.0);
    assert_true(fabs(stats_jain((double[]){5, 0, 0, 0}, 4) - 0.25) < 1e-12);
}

struct heard {
    char text[256];
};

static void hear(void *context, const char *data, size_t bytes) {
    struct heard *heard = context;
    assert_int_equal(strlen(data), bytes);
    strcat(strcat(heard->text, data), "|");
}

// The same events whatever pieces the bytes come in.
static void events(void **state) {
    (void)state;
    static const char bytes[] = "data: {\"a\":1}\n\n: a comment\r\nevent: x\r\ndata:two\r\n\r\n"
                                "data: [DONE]\n\ndata: cut";
    for (size_t first = 0; first < sizeof bytes; first++)
        for (size_t second = first; second < sizeof bytes; second++) {
            struct heard heard = {""};
            struct sse sse = {.on_data = hear, .context = &heard};
            sse_feed(&sse, bytes, first);
            sse_feed(&sse, bytes + first, second - first);
            sse_feed(&sse, bytes + second, sizeof bytes - 1 - second);
            assert_string_equal(heard.text, "{\"a\":1}|two|[DONE]|");
            sse_deinit(&sse);
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gaps),      cmocka_unit_test(popularity),
        cmocka_unit_test(base_only), cmocka_unit_test(lengths_and_seeds),
        cmocka_unit_test(summaries), cmocka_unit_test(events),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
