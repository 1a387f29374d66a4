// The heap of eviction.h: a binary heap by (tier, score), the first to go at the top.
#include "pager/eviction.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdlib.h>

struct eviction {
    struct pool *pool;
    enum eviction_policy policy;
    double clock; // EVICTION_COST: the score of the last one that went
    struct {
        void *owner;
        void (*evict)(void *owner, struct evictable *item);
    } kind[EVICTABLE_KINDS];
    int count, capacity;
    struct evictable **heap; // [1 .. count]
};

struct eviction *eviction_create(struct pool *pool, enum eviction_policy policy, int capacity) {
    struct eviction *eviction = mem_zalloc(1, sizeof *eviction);
    eviction->pool = pool;
    eviction->policy = policy;
    eviction->capacity = capacity;
    eviction->heap = mem_zalloc((size_t)capacity + 1, sizeof *eviction->heap);
    return eviction;
}

void eviction_destroy(struct eviction *eviction) {
    if (!eviction) return;
    VERIFY_OP(eviction->count, ==, 0);
    free(eviction->heap);
    free(eviction);
}

void eviction_set_owner(struct eviction *eviction, enum evictable_kind kind, void *owner,
                        void (*evict)(void *owner, struct evictable *item)) {
    eviction->kind[kind].owner = owner;
    eviction->kind[kind].evict = evict;
}

double eviction_score(const struct eviction *eviction, double uses, double seconds, int pages,
                      double now_s) {
    VERIFY_OP(pages, >, 0);
    if (eviction->policy == EVICTION_LRU) return now_s;
    return eviction->clock + uses * seconds / pages;
}

static bool goes_before(const struct evictable *a, const struct evictable *b) {
    return a->tier != b->tier ? a->tier < b->tier : a->score < b->score;
}

static void set(struct eviction *eviction, int place, struct evictable *item) {
    eviction->heap[place] = item;
    item->place = place;
}

static void rise(struct eviction *eviction, struct evictable *item) {
    int place = item->place;
    for (; place > 1 && goes_before(item, eviction->heap[place / 2]); place /= 2)
        set(eviction, place, eviction->heap[place / 2]);
    set(eviction, place, item);
}

static void sink(struct eviction *eviction, struct evictable *item) {
    int place = item->place;
    for (int child; (child = 2 * place) <= eviction->count; place = child) {
        if (child < eviction->count &&
            goes_before(eviction->heap[child + 1], eviction->heap[child]))
            child++;
        if (!goes_before(eviction->heap[child], item)) break;
        set(eviction, place, eviction->heap[child]);
    }
    set(eviction, place, item);
}

void eviction_put(struct eviction *eviction, struct evictable *item, enum evictable_kind kind,
                  enum eviction_tier tier, double score) {
    if (item->place == 0) {
        VERIFY_OP(eviction->count, <, eviction->capacity);
        set(eviction, ++eviction->count, item);
    }
    VERIFY(eviction->heap[item->place] == item);
    item->kind = (uint8_t)kind;
    item->tier = (uint8_t)tier;
    item->score = score;
    rise(eviction, item);
    sink(eviction, item);
}

void eviction_remove(struct eviction *eviction, struct evictable *item) {
    if (item->place == 0) return;
    VERIFY(eviction->heap[item->place] == item);
    struct evictable *last = eviction->heap[eviction->count--];
    if (last != item) {
        set(eviction, item->place, last);
        rise(eviction, last);
        sink(eviction, last);
    }
    item->place = 0;
}

bool eviction_reclaim(struct eviction *eviction, int pages, enum eviction_tier tier_max) {
    while (pool_counts(eviction->pool).of[PAGE_FREE] < pages) {
        struct evictable *first = eviction->count ? eviction->heap[1] : NULL;
        if (!first || first->tier > tier_max) return false;
        eviction_remove(eviction, first);
        if (first->tier == TIER_IDLE && first->score > eviction->clock)
            eviction->clock = first->score;
        eviction->kind[first->kind].evict(eviction->kind[first->kind].owner, first);
    }
    return true;
}
