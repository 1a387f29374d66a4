// Histograms and the two lists of names. Counters and gauges are bumped in place by whoever owns
// the event; nothing here blocks. The names are guarded by a sequence lock: odd while the engine
// writes, and a reader that saw the version move tries again.
#include "server/metrics.h"

#include "base/verify.h"

#include <sched.h>
#include <stddef.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

enum { NAMES_BYTES = sizeof ((struct metrics *)0)->running_adapters };
_Static_assert(NAMES_BYTES == 1024, "metrics_names promises buffers of 1024 bytes");

const double histogram_bounds_s[HISTOGRAM_BUCKETS] = {
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25,
    0.5,   0.75,   1,     2.5,    5,    7.5,   10,   25,    50,  100,
};

void histogram_add(struct histogram *histogram, double seconds) {
    if (!(seconds > 0)) seconds = 0;
    if (seconds > 1e9) seconds = 1e9; // microseconds of it still fit in 64 bits
    int bucket = 0;
    while (bucket < HISTOGRAM_BUCKETS && seconds > histogram_bounds_s[bucket]) bucket++;
    atomic_fetch_add_explicit(&histogram->bucket[bucket], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&histogram->sum_us, (uint64_t)(seconds * 1e6), memory_order_relaxed);
    atomic_fetch_add_explicit(&histogram->count, 1, memory_order_relaxed);
}

int metrics_tenant(struct metrics *metrics, const char *name) {
    int count = atomic_load(&metrics->tenant_count);
    for (int i = 0; i < count; i++)
        if (strncmp(metrics->tenants[i].name, name, sizeof metrics->tenants[i].name - 1) == 0)
            return i;
    if (count == METRICS_TENANTS_MAX) return count - 1;
    bool last = count == METRICS_TENANTS_MAX - 1;
    snprintf(metrics->tenants[count].name, sizeof metrics->tenants[count].name, "%s",
             last ? "others" : name);
    atomic_store(&metrics->tenant_count, count + 1);
    return count;
}

// Byte by byte and atomic, so that a torn read is only ever thrown away, never undefined.
static void copy_text(char *to, const char *from) {
    for (int i = 0; i < NAMES_BYTES; i++) {
        char byte = i + 1 < NAMES_BYTES ? __atomic_load_n(&from[i], __ATOMIC_RELAXED) : 0;
        __atomic_store_n(&to[i], byte, __ATOMIC_RELAXED);
        if (byte == 0) return;
    }
}

void metrics_set_names(struct metrics *metrics, const char *running, const char *waiting) {
    uint32_t version = atomic_load_explicit(&metrics->names_version, memory_order_relaxed);
    VERIFY_OP(version % 2, ==, 0);
    // Exchange and fetch-add rather than fences, which ThreadSanitizer does not understand.
    atomic_exchange_explicit(&metrics->names_version, version + 1, memory_order_acq_rel);
    copy_text(metrics->running_adapters, running);
    copy_text(metrics->waiting_adapters, waiting);
    atomic_store_explicit(&metrics->names_version, version + 2, memory_order_release);
}

void metrics_names(struct metrics *metrics, char *running, char *waiting) {
    for (;;) {
        uint32_t before = atomic_load_explicit(&metrics->names_version, memory_order_acquire);
        if (before % 2 == 0) {
            copy_text(running, metrics->running_adapters);
            copy_text(waiting, metrics->waiting_adapters);
            // A read-modify-write that adds nothing: keeps the copies above from sinking below it.
            uint32_t after =
                atomic_fetch_add_explicit(&metrics->names_version, 0, memory_order_acq_rel);
            if (after == before) return;
        }
        sched_yield();
    }
}
