// See residency.h. The adapters that are not away form a list; those that may be evicted stand in
// the order of eviction, too.
#include "pager/residency.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stddef.h>
#include <stdlib.h>

struct residency {
    struct pool *pool;
    struct eviction *eviction;
    struct prefix *prefix;
    struct adapter *first;
    struct residency_counts counts;
    double page_s;
    int idle_pages[EVICTION_TIERS]; // of idle adapters, by tier
};

static void assert_state(const struct residency *residency, const struct adapter *adapter) {
    bool idle = atomic_load(&adapter->resident) && adapter->running == 0;
    VERIFY(!(atomic_load(&adapter->resident) && adapter->arriving));
    VERIFY_OP(adapter->running, >=, 0);
    VERIFY_OP(idle, ==, (adapter->evictable.place > 0));
    for (int tier = 0; tier < EVICTION_TIERS; tier++)
        VERIFY_OP(residency->idle_pages[tier], >=, 0);
}

static void list_add(struct residency *residency, struct adapter *adapter) {
    adapter->residency_previous = NULL;
    adapter->residency_next = residency->first;
    if (residency->first) residency->first->residency_previous = adapter;
    residency->first = adapter;
}

static void list_remove(struct residency *residency, struct adapter *adapter) {
    struct adapter *previous = adapter->residency_previous, *next = adapter->residency_next;
    *(previous ? &previous->residency_next : &residency->first) = next;
    if (next) next->residency_previous = previous;
    adapter->residency_previous = adapter->residency_next = NULL;
}

// ------------------------------------------------------------------ idle adapters

static enum eviction_tier tier_of(const struct adapter *adapter) {
    if (atomic_load(&adapter->retired)) return TIER_IDLE;
    if (atomic_load(&adapter->pinned)) return TIER_PINNED;
    return adapter->wanted > 0 ? TIER_WANTED : TIER_IDLE;
}

static void idle_leave(struct residency *residency, struct adapter *adapter) {
    VERIFY_OP(adapter->evictable.place, >, 0);
    residency->idle_pages[adapter->evictable.tier] -= adapter->page_count;
    eviction_remove(residency->eviction, &adapter->evictable);
}

static void idle_enter(struct residency *residency, struct adapter *adapter) {
    enum eviction_tier tier = tier_of(adapter);
    double score = eviction_score(residency->eviction, adapter->uses,
                                  residency->page_s * adapter->page_count, adapter->page_count,
                                  atomic_load(&adapter->last_used_s));
    eviction_put(residency->eviction, &adapter->evictable, EVICTABLE_ADAPTER, tier, score);
    residency->idle_pages[tier] += adapter->page_count;
}

// Its tier may have changed.
static void idle_again(struct residency *residency, struct adapter *adapter) {
    if (adapter->evictable.place == 0 || adapter->evictable.tier == tier_of(adapter)) return;
    residency->idle_pages[adapter->evictable.tier] -= adapter->page_count;
    residency->idle_pages[tier_of(adapter)] += adapter->page_count;
    eviction_put(residency->eviction, &adapter->evictable, EVICTABLE_ADAPTER, tier_of(adapter),
                 adapter->evictable.score);
}

// An idle adapter, out of the order of eviction already.
static void drop(struct residency *residency, struct adapter *adapter) {
    VERIFY_OP(adapter->running, ==, 0);
    if (residency->prefix) prefix_drop(residency->prefix, &adapter->prefixes);
    list_remove(residency, adapter);
    pool_give(residency->pool, PAGE_CACHED, adapter->pages, adapter->page_count);
    residency->counts.resident--;
    residency->counts.evictions++;
    adapter->uses /= 2; // what comes back soon is remembered
    atomic_store(&adapter->resident, false);
    adapter_unref(adapter);
}

// The order of eviction took it out before it called.
static void evict(void *owner, struct evictable *item) {
    struct residency *residency = owner;
    struct adapter *adapter =
        (struct adapter *)((char *)item - offsetof(struct adapter, evictable));
    residency->idle_pages[item->tier] -= adapter->page_count;
    drop(residency, adapter);
}

// ------------------------------------------------------------------ life

struct residency *residency_create(struct pool *pool, struct eviction *eviction,
                                   struct prefix *prefix) {
    struct residency *residency = mem_zalloc(1, sizeof *residency);
    residency->pool = pool;
    residency->eviction = eviction;
    residency->prefix = prefix;
    residency->page_s = 1;
    eviction_set_owner(eviction, EVICTABLE_ADAPTER, residency, evict);
    return residency;
}

void residency_destroy(struct residency *residency) {
    if (!residency) return;
    while (residency->first) {
        idle_leave(residency, residency->first);
        drop(residency, residency->first);
    }
    for (int tier = 0; tier < EVICTION_TIERS; tier++)
        VERIFY_OP(residency->idle_pages[tier], ==, 0);
    free(residency);
}

void residency_set_cost(struct residency *residency, double page_s) {
    residency->page_s = page_s;
}

struct residency_counts residency_counts(const struct residency *residency) {
    return residency->counts;
}

// ------------------------------------------------------------------ transitions

// Cached pages that eviction up to tier_max can free: prefixes are all TIER_IDLE.
static int reclaimable(const struct residency *residency, enum eviction_tier tier_max) {
    int pages = pool_counts(residency->pool).of[PAGE_CACHED];
    for (int tier = tier_max + 1; tier < EVICTION_TIERS; tier++)
        pages -= residency->idle_pages[tier];
    return pages;
}

enum status residency_place(struct residency *residency, struct adapter *adapter,
                            enum eviction_tier tier_max) {
    VERIFY(!atomic_load(&adapter->resident) && !adapter->arriving);
    VERIFY_OP(adapter->running, ==, 0);
    int missing = adapter->page_count - pool_counts(residency->pool).of[PAGE_FREE];
    if (missing > reclaimable(residency, tier_max)) return STATUS_NO_PAGES;
    VERIFY(eviction_reclaim(residency->eviction, adapter->page_count, tier_max));
    enum status status =
        pool_take(residency->pool, PAGE_ADAPTER, adapter->page_count, adapter->pages);
    VERIFY_OP(status, ==, STATUS_OK);
    adapter_ref(adapter);
    adapter->arriving = true;
    list_add(residency, adapter);
    residency->counts.arriving++;
    assert_state(residency, adapter);
    return STATUS_OK;
}

void residency_arrived(struct residency *residency, struct adapter *adapter, double now_s) {
    VERIFY(adapter->arriving);
    adapter->arriving = false;
    residency->counts.arriving--;
    residency->counts.resident++;
    residency->counts.loads++;
    residency->counts.bytes_moved += adapter->image_bytes;
    atomic_store(&adapter->last_used_s, now_s);
    pool_change_owner(residency->pool, PAGE_ADAPTER, PAGE_CACHED, adapter->pages,
                      adapter->page_count);
    atomic_store(&adapter->resident, true);
    idle_enter(residency, adapter);
    assert_state(residency, adapter);
}

void residency_cancel(struct residency *residency, struct adapter *adapter) {
    VERIFY(adapter->arriving);
    adapter->arriving = false;
    residency->counts.arriving--;
    list_remove(residency, adapter);
    pool_give(residency->pool, PAGE_ADAPTER, adapter->pages, adapter->page_count);
    adapter_unref(adapter);
}

void residency_acquire(struct residency *residency, struct adapter *adapter, double now_s) {
    VERIFY(atomic_load(&adapter->resident));
    assert_state(residency, adapter);
    if (adapter->running++ == 0) {
        residency->counts.running++;
        idle_leave(residency, adapter);
        pool_change_owner(residency->pool, PAGE_CACHED, PAGE_ADAPTER, adapter->pages,
                          adapter->page_count);
    }
    adapter->uses++;
    atomic_store(&adapter->last_used_s, now_s);
}

void residency_release(struct residency *residency, struct adapter *adapter, double now_s) {
    VERIFY(atomic_load(&adapter->resident));
    VERIFY_OP(adapter->running, >, 0);
    atomic_store(&adapter->last_used_s, now_s);
    if (--adapter->running > 0) return;
    residency->counts.running--;
    pool_change_owner(residency->pool, PAGE_ADAPTER, PAGE_CACHED, adapter->pages,
                      adapter->page_count);
    idle_enter(residency, adapter);
    assert_state(residency, adapter);
}

void residency_want(struct residency *residency, struct adapter *adapter, int change) {
    adapter->wanted += change;
    VERIFY_OP(adapter->wanted, >=, 0);
    idle_again(residency, adapter);
}

void residency_pin(struct residency *residency, struct adapter *adapter) {
    idle_again(residency, adapter);
}

void residency_sweep(struct residency *residency) {
    for (struct adapter *adapter = residency->first, *next; adapter; adapter = next) {
        next = adapter->residency_next;
        if (!atomic_load(&adapter->retired) || adapter->evictable.place == 0) continue;
        idle_leave(residency, adapter);
        drop(residency, adapter);
    }
}
