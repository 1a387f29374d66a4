// Histograms: the bucket a value falls into and what is never counted wrongly. Name lists: cut, and
// read whole while another thread writes them. A request's defaults.
#include "server/metrics.h"
#include "server/request.h"

#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void buckets(void **state) {
    static const struct {
        double seconds;
        int bucket; // HISTOGRAM_BUCKETS: beyond the last bound
        uint64_t sum_us;
    } values[] = {
        {0, 0, 0},
        {0.001, 0, 1000}, // a bound belongs to its bucket: Prometheus' "le"
        {0.0011, 1, 1100},
        {0.5, 10, 500000},
        {100, 19, 100000000},
        {100.5, 20, 100500000},
        {-1, 0, 0}, // a clock that went wrong
        {NAN, 0, 0},
        {INFINITY, 20, 1000000000000000},
    };
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        struct histogram histogram = {.count = 0};
        histogram_add(&histogram, values[i].seconds);
        for (int b = 0; b <= HISTOGRAM_BUCKETS; b++)
            assert_int_equal(atomic_load(&histogram.bucket[b]), b == values[i].bucket);
        assert_int_equal(atomic_load(&histogram.count), 1);
        uint64_t sum = atomic_load(&histogram.sum_us), wanted = values[i].sum_us;
        assert_true(sum <= wanted && wanted - sum <= 1); // microseconds are cut, not rounded
    }
    for (int b = 1; b < HISTOGRAM_BUCKETS; b++)
        assert_true(histogram_bounds_s[b] > histogram_bounds_s[b - 1]);
}

static void long_names_are_cut(void **state) {
    static struct metrics metrics;
    char names[3000], running[1024], waiting[1024];
    memset(names, 'n', sizeof names);
    names[sizeof names - 1] = 0;
    metrics_set_names(&metrics, names, "w");
    metrics_names(&metrics, running, waiting);
    assert_int_equal(strlen(running), 1023);
    assert_string_equal(waiting, "w");
    metrics_set_names(&metrics, "", names);
    metrics_names(&metrics, running, waiting);
    assert_string_equal(running, "");
    assert_int_equal(strlen(waiting), 1023);
}

struct shared {
    struct metrics metrics;
    _Atomic bool done;
    _Atomic int torn, reads;
};

// Both lists always say the same here, so that a reader sees it when they are of two writes.
static void *read_names(void *argument) {
    struct shared *shared = argument;
    char running[1024], waiting[1024];
    while (!atomic_load(&shared->done) || atomic_load(&shared->reads) == 0) {
        metrics_names(&shared->metrics, running, waiting);
        if (strcmp(running, waiting) != 0) atomic_fetch_add(&shared->torn, 1);
        for (const char *c = running; *c; c++)
            if (*c != *running) atomic_fetch_add(&shared->torn, 1);
        atomic_fetch_add(&shared->reads, 1);
    }
    return NULL;
}

static void names_are_never_torn(void **state) {
    static struct shared shared;
    pthread_t reader;
    assert_int_equal(pthread_create(&reader, NULL, read_names, &shared), 0);
    for (int i = 0; i < 20000 || atomic_load(&shared.reads) < 100; i++) {
        char names[1024];
        int length = i * 37 % 1000;
        memset(names, 'a' + i % 26, (size_t)length);
        names[length] = 0;
        metrics_set_names(&shared.metrics, names, names);
    }
    atomic_store(&shared.done, true);
    pthread_join(reader, NULL);
    assert_true(atomic_load(&shared.reads) > 0);
    assert_int_equal(atomic_load(&shared.torn), 0);
}

static void request_defaults(void **state) {
    struct request *request = request_create();
    const struct sampling *s = &request->sampling;
    // OpenAI's API reference: temperature 1, top_p 1, no penalties, no logprobs.
    assert_true(fabsf(s->temperature - 1) < 1e-9f && fabsf(s->top_p - 1) < 1e-9f);
    assert_true(fabsf(s->repetition_penalty - 1) < 1e-9f && fabsf(s->min_p) < 1e-9f);
    assert_true(fabsf(s->presence_penalty) < 1e-9f && fabsf(s->frequency_penalty) < 1e-9f);
    assert_int_equal(s->logprobs, -1);
    assert_int_equal(s->top_k, 0);
    assert_false(s->seeded || s->ignore_eos || s->include_stop);
    assert_null(request->sequence);
    assert_false(atomic_load(&request->cancelled));
    request_destroy(request);
    request_destroy(NULL);
}

// Catches: one place for two tenants, or places without end.
static void tenants_have_places(void **state) {
    (void)state;
    static struct metrics metrics;
    char name[16];
    for (int round = 0; round < 2; round++)
        for (int i = 0; i < 100; i++) {
            snprintf(name, sizeof name, "t%d", i);
            int place = metrics_tenant(&metrics, name);
            assert_int_equal(place, i < METRICS_TENANTS_MAX - 1 ? i : METRICS_TENANTS_MAX - 1);
            if (i < METRICS_TENANTS_MAX - 1) assert_string_equal(metrics.tenants[place].name, name);
        }
    assert_string_equal(metrics.tenants[METRICS_TENANTS_MAX - 1].name, "others");
    assert_int_equal(atomic_load(&metrics.tenant_count), METRICS_TENANTS_MAX);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tenants_have_places),
        cmocka_unit_test(buckets),
        cmocka_unit_test(long_names_are_cut),
        cmocka_unit_test(names_are_never_torn),
        cmocka_unit_test(request_defaults),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
