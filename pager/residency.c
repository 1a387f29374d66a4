// Which adapters have their pages in the pool, and who leaves when pages are wanted. Engine thread
// only.
//
//   HOST --residency_acquire--> RUNNING (PAGE_ADAPTER, running > 0)
//   RUNNING --last residency_release--> IDLE (PAGE_CACHED, running == 0)
//   IDLE --residency_acquire--> RUNNING, without a copy
//   IDLE --residency_evict, _sweep (retired), _destroy--> HOST
//
// Resident adapters form a list from the one whose last use is longest ago to the latest. The list
// holds one reference to each. A running adapter is never evicted.
#include "pager/adapter.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdlib.h>

struct residency {
    struct pool *pool;
    const struct backend_ops *ops;
    struct backend *backend;
    struct lora_geometry geometry;
    struct adapter *oldest, *newest;
    struct residency_counts counts;
    int idle_pages;        // of adapters with running == 0: what eviction can free
    bool uploads_may_run;  // the backend may still be reading host images
};

static void assert_state(const struct residency *residency, const struct adapter *adapter) {
    VERIFY(atomic_load(&adapter->resident));
    VERIFY_OP(adapter->running, >=, 0);
    VERIFY_OP(residency->idle_pages, >=, 0);
}

static void list_append(struct residency *residency, struct adapter *adapter) {
    adapter->residency_previous = residency->newest;
    adapter->residency_next = NULL;
    if (residency->newest) residency->newest->residency_next = adapter;
    else residency->oldest = adapter;
    residency->newest = adapter;
}

static void list_remove(struct residency *residency, struct adapter *adapter) {
    struct adapter *previous = adapter->residency_previous, *next = adapter->residency_next;
    *(previous ? &previous->residency_next : &residency->oldest) = next;
    *(next ? &next->residency_previous : &residency->newest) = previous;
    adapter->residency_previous = adapter->residency_next = NULL;
}

static void list_touch(struct residency *residency, struct adapter *adapter, double now_s) {
    adapter->last_used_s = now_s;
    list_remove(residency, adapter);
    list_append(residency, adapter);
}

struct residency *residency_create(struct pool *pool, const struct backend_ops *ops,
                                   struct backend *backend, const struct lora_geometry *geometry) {
    struct residency *residency = mem_zalloc(1, sizeof *residency);
    residency->pool = pool;
    residency->ops = ops;
    residency->backend = backend;
    residency->geometry = *geometry;
    return residency;
}

static void evict(struct residency *residency, struct adapter *adapter) {
    assert_state(residency, adapter);
    VERIFY_OP(adapter->running, ==, 0);
    // The last reference may go below, and with it an image that a queued copy still reads.
    if (residency->uploads_may_run) residency->ops->synchronize(residency->backend);
    residency->uploads_may_run = false;
    list_remove(residency, adapter);
    pool_give(residency->pool, PAGE_CACHED, adapter->pages, adapter->page_count);
    residency->idle_pages -= adapter->page_count;
    residency->counts.resident--;
    residency->counts.evictions++;
    atomic_store(&adapter->resident, false);
    adapter_unref(adapter);
}

void residency_destroy(struct residency *residency) {
    if (!residency) return;
    while (residency->oldest) evict(residency, residency->oldest);
    VERIFY_OP(residency->idle_pages, ==, 0);
    free(residency);
}

int residency_evict(struct residency *residency, int pages) {
    int freed = 0;
    for (struct adapter *adapter = residency->oldest, *next; adapter && freed < pages;
         adapter = next) {
        next = adapter->residency_next;
        if (adapter->running > 0) continue;
        freed += adapter->page_count;
        evict(residency, adapter);
    }
    return freed;
}

void residency_sweep(struct residency *residency) {
    for (struct adapter *adapter = residency->oldest, *next; adapter; adapter = next) {
        next = adapter->residency_next;
        if (adapter->running == 0 && atomic_load(&adapter->retired)) evict(residency, adapter);
    }
}

static void upload(struct residency *residency, struct adapter *adapter) {
    size_t layer_bytes = adapter->layer_elems * dtype_bytes(residency->geometry.dtype);
    for (int layer = 0; layer < residency->geometry.layers; layer++)
        residency->ops->pool_write(residency->backend, layer, adapter->pages,
                                   (const char *)adapter->image + (size_t)layer * layer_bytes,
                                   adapter->layer_elems);
    residency->uploads_may_run = true;
    residency->counts.loads++;
    residency->counts.bytes_moved += adapter->image_bytes;
}

enum status residency_acquire(struct residency *residency, struct adapter *adapter, double now_s) {
    if (atomic_load(&adapter->resident)) {
        assert_state(residency, adapter);
        if (adapter->running++ == 0) {
            pool_change_owner(residency->pool, PAGE_CACHED, PAGE_ADAPTER, adapter->pages,
                              adapter->page_count);
            residency->idle_pages -= adapter->page_count;
        }
        list_touch(residency, adapter, now_s);
        return STATUS_OK;
    }
    VERIFY_OP(adapter->running, ==, 0);
    int missing = adapter->page_count - pool_counts(residency->pool).of[PAGE_FREE];
    if (missing > residency->idle_pages) return STATUS_NO_PAGES;
    if (missing > 0) VERIFY_OP(residency_evict(residency, missing), >=, missing);
    enum status status =
        pool_take(residency->pool, PAGE_ADAPTER, adapter->page_count, adapter->pages);
    VERIFY_OP(status, ==, STATUS_OK);
    adapter_ref(adapter);
    adapter->running = 1;
    adapter->last_used_s = now_s;
    atomic_store(&adapter->resident, true);
    list_append(residency, adapter);
    residency->counts.resident++;
    upload(residency, adapter);
    return STATUS_OK;
}

void residency_release(struct residency *residency, struct adapter *adapter, double now_s) {
    assert_state(residency, adapter);
    VERIFY_OP(adapter->running, >, 0);
    list_touch(residency, adapter, now_s);
    if (--adapter->running > 0) return;
    pool_change_owner(residency->pool, PAGE_ADAPTER, PAGE_CACHED, adapter->pages,
                      adapter->page_count);
    residency->idle_pages += adapter->page_count;
}

struct residency_counts residency_counts(const struct residency *residency) {
    return residency->counts;
}
