// Which adapters have their pages in the pool. Bookkeeping alone: host_store.h copies.
//
//   AWAY --residency_place--> ARRIVING (PAGE_ADAPTER) --residency_arrived--> RESIDENT
//   RESIDENT: RUNNING (PAGE_ADAPTER, running > 0) or IDLE (PAGE_CACHED, running == 0)
//   IDLE --residency_acquire--> RUNNING --last residency_release--> IDLE
//   IDLE --eviction, residency_sweep (retired), residency_destroy--> AWAY, its prefixes with it
//   ARRIVING --residency_cancel--> AWAY
//
// One reference is held to each that is not away. A running or arriving adapter is never evicted;
// of the idle ones those that waiting requests want go late, pinned ones last. Engine thread only.
#ifndef LORAD_PAGER_RESIDENCY_H
#define LORAD_PAGER_RESIDENCY_H

#include "pager/adapter.h"
#include "pager/prefix.h"

struct residency;
struct residency *residency_create(struct pool *pool, struct eviction *eviction,
                                   struct prefix *prefix); // prefix may be NULL
void residency_destroy(struct residency *residency); // evicts all; nobody may run or arrive
// The seconds that one page of an adapter takes to bring back, for the order of eviction.
void residency_set_cost(struct residency *residency, double page_s);

// Takes the adapter's pages, evicting idle ones up to `tier_max`. STATUS_NO_PAGES: not even that is
// enough; nothing changed.
MUST_CHECK enum status residency_place(struct residency *residency, struct adapter *adapter,
                                       enum eviction_tier tier_max);
void residency_arrived(struct residency *residency, struct adapter *adapter, double now_s);
void residency_cancel(struct residency *residency, struct adapter *adapter);

// One more, or one less, running user of a resident adapter.
void residency_acquire(struct residency *residency, struct adapter *adapter, double now_s);
void residency_release(struct residency *residency, struct adapter *adapter, double now_s);
// One more, or one less, waiting request that will use it; resident or not.
void residency_want(struct residency *residency, struct adapter *adapter, int change);
void residency_pin(struct residency *residency, struct adapter *adapter); // `pinned` has changed

// Drops retired adapters that nobody runs. Called each step.
void residency_sweep(struct residency *residency);
struct residency_counts {
    int resident, arriving, running;
    uint64_t loads, evictions, bytes_moved;
};
struct residency_counts residency_counts(const struct residency *residency);

#endif
