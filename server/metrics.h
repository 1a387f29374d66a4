// Counters, gauges and histograms that any thread may bump; api/ prints them.
#ifndef LORAD_SERVER_METRICS_H
#define LORAD_SERVER_METRICS_H

#include "pager/pool.h"

#include <stdatomic.h>
#include <stdint.h>

enum { HISTOGRAM_BUCKETS = 20, METRICS_ADAPTERS_MAX = 64, METRICS_NAME_MAX = 129,
       METRICS_TENANTS_MAX = 64 };

struct histogram {
    _Atomic uint64_t bucket[HISTOGRAM_BUCKETS + 1]; // cumulative only when printed; last = +Inf
    _Atomic uint64_t count, sum_us;
};

struct metrics {
    _Atomic int running, waiting;
    _Atomic int pages[PAGE_OWNERS], pages_total;
    _Atomic int adapters_resident;
    _Atomic uint64_t prompt_tokens, generation_tokens;
    _Atomic uint64_t started, finished_stop, finished_length, aborted, failed;
    _Atomic uint64_t preemptions, steps, step_us, adapter_loads, adapter_evictions;
    _Atomic uint64_t adapter_bytes_moved;
    _Atomic int host_images;
    _Atomic uint64_t host_bytes, host_reads, host_read_failures, host_read_us, host_copy_us;
    _Atomic uint64_t early_aborts, swaps, swapped_bytes; // bytes both ways
    _Atomic uint64_t step_adapter_bytes; // of distinct adapters, summed over steps
    _Atomic uint64_t drafts, drafts_accepted; // tokens
    _Atomic uint64_t prefix_queries, prefix_hits; // tokens looked up; of those, found
    _Atomic int step_tokens, step_adapters, step_adapters_max; // of the last step; and the most ever
    // Tokens by tenant: the first ones that came; all others share the last place.
    struct {
        char name[64];
        _Atomic uint64_t prompt_tokens, generation_tokens;
    } tenants[METRICS_TENANTS_MAX];
    _Atomic int tenant_count; // names below it stay as they are
    struct histogram ttft, itl, e2e, queue_time;
    // Names in the last step, comma-joined, behind a sequence lock of the engine's.
    _Atomic uint32_t names_version;
    char running_adapters[1024], waiting_adapters[1024];
};

extern const double histogram_bounds_s[HISTOGRAM_BUCKETS];
void histogram_add(struct histogram *histogram, double seconds);
// Engine thread only: the tenant's place.
int metrics_tenant(struct metrics *metrics, const char *name);
// Engine thread only: replaces the two name lists, cut to 1023 bytes each.
void metrics_set_names(struct metrics *metrics, const char *running, const char *waiting);
// A consistent copy of the two name lists; buffers of 1024 bytes. Any thread.
void metrics_names(struct metrics *metrics, char *running, char *waiting);

#endif
