// Which idle pages go first when pages are wanted: one order over idle adapters and the leaves of
// finished prefixes, whatever they are. A heap of items that their owners embed; no clock of its
// own, no device. Engine thread only; no allocation after eviction_create.
//
// EVICTION_COST is GreedyDual-Size-Frequency (Cherkasova, HPL-98-69, 1998): an item's score is
//     clock + uses * seconds to bring it back / pages,
// the least goes first, and the clock then becomes its score, so that what is not used again ages.
// EVICTION_LRU scores by the time of the last use. docs/simulator.md compares the two on traces.
#ifndef LORAD_PAGER_EVICTION_H
#define LORAD_PAGER_EVICTION_H

#include "pager/pool.h"

enum eviction_policy { EVICTION_COST, EVICTION_LRU };
// An item goes only when no item of a lower tier is left.
enum eviction_tier {
    TIER_IDLE,
    TIER_WANTED, // an adapter that somebody who waits will use
    TIER_PINNED,
    EVICTION_TIERS
};
enum evictable_kind { EVICTABLE_ADAPTER, EVICTABLE_PREFIX, EVICTABLE_KINDS };

struct evictable { // embedded; zeroed before its first use
    double score;
    int place; // in the heap, from 1; 0: not evictable now
    uint8_t tier, kind;
};

struct eviction;
// At most `capacity` items are evictable at once (every one holds a page).
struct eviction *eviction_create(struct pool *pool, enum eviction_policy policy, int capacity);
void eviction_destroy(struct eviction *eviction);
// Who gives an item's pages back to the pool; called by eviction_reclaim after it took the item out
// of the heap. It may put other items in and take others out.
void eviction_set_owner(struct eviction *eviction, enum evictable_kind kind, void *owner,
                        void (*evict)(void *owner, struct evictable *item));

// `uses` so far, `seconds` to bring back, `pages` held; now_s: of the last use.
double eviction_score(const struct eviction *eviction, double uses, double seconds, int pages,
                      double now_s);
void eviction_put(struct eviction *eviction, struct evictable *item, enum evictable_kind kind,
                  enum eviction_tier tier, double score); // in, or to its new place
void eviction_remove(struct eviction *eviction, struct evictable *item); // allowed when it is out
// Evicts until `pages` pages of the pool are free, or nothing up to that tier is left; says whether
// they are.
bool eviction_reclaim(struct eviction *eviction, int pages, enum eviction_tier tier_max);

#endif
