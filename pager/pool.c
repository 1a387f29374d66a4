// The page pool: one owner byte a page and a free list threaded through the free pages' `next`
// words. Called by the engine thread alone. It never touches device memory and never decides who
// is evicted; it refuses, by assertion, a page given back by someone who does not own it.
#include "pager/pool.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdlib.h>

enum { NO_PAGE = -1 };

struct pool {
    struct pool_counts counts;
    int32_t free_head;
    int32_t *next;  // [total] the free page after this one; meaningless while owned
    uint8_t *owner; // [total] enum page_owner
};

struct pool *pool_create(int page_count) {
    VERIFY_OP(page_count, >=, 0);
    struct pool *pool = mem_zalloc(1, sizeof *pool);
    pool->counts.total = page_count;
    pool->counts.of[PAGE_FREE] = page_count;
    pool->next = mem_zalloc((size_t)page_count, sizeof *pool->next);
    pool->owner = mem_zalloc((size_t)page_count, sizeof *pool->owner);
    for (int32_t page = 0; page < page_count; page++)
        pool->next[page] = page + 1 < page_count ? page + 1 : NO_PAGE;
    pool->free_head = page_count ? 0 : NO_PAGE;
    return pool;
}

void pool_destroy(struct pool *pool) {
    if (!pool) return;
    free(pool->next);
    free(pool->owner);
    free(pool);
}

enum status pool_take(struct pool *pool, enum page_owner owner, int count, int32_t *pages) {
    VERIFY(owner > PAGE_FREE && owner < PAGE_OWNERS);
    VERIFY_OP(count, >=, 0);
    if (count > pool->counts.of[PAGE_FREE]) return STATUS_NO_PAGES;
    for (int i = 0; i < count; i++) {
        int32_t page = pool->free_head;
        VERIFY(page >= 0 && page < pool->counts.total);
        VERIFY_OP(pool->owner[page], ==, PAGE_FREE);
        pool->free_head = pool->next[page];
        pool->owner[page] = (uint8_t)owner;
        pages[i] = page;
    }
    pool->counts.of[PAGE_FREE] -= count;
    pool->counts.of[owner] += count;
    return STATUS_OK;
}

void pool_give(struct pool *pool, enum page_owner owner, const int32_t *pages, int count) {
    VERIFY(owner > PAGE_FREE && owner < PAGE_OWNERS);
    VERIFY_OP(count, >=, 0);
    VERIFY_OP(count, <=, pool->counts.of[owner]);
    for (int i = 0; i < count; i++) {
        int32_t page = pages[i];
        VERIFY(page >= 0 && page < pool->counts.total);
        VERIFY_OP(pool->owner[page], ==, owner);
        pool->owner[page] = PAGE_FREE;
        pool->next[page] = pool->free_head;
        pool->free_head = page;
    }
    pool->counts.of[owner] -= count;
    pool->counts.of[PAGE_FREE] += count;
}

void pool_change_owner(struct pool *pool, enum page_owner from, enum page_owner to,
                       const int32_t *pages, int count) {
    VERIFY(from > PAGE_FREE && from < PAGE_OWNERS);
    VERIFY(to > PAGE_FREE && to < PAGE_OWNERS);
    VERIFY_OP(count, >=, 0);
    for (int i = 0; i < count; i++) {
        VERIFY(pages[i] >= 0 && pages[i] < pool->counts.total);
        VERIFY_OP(pool->owner[pages[i]], ==, from);
        pool->owner[pages[i]] = (uint8_t)to;
    }
    pool->counts.of[from] -= count;
    pool->counts.of[to] += count;
}

struct pool_counts pool_counts(const struct pool *pool) {
    return pool->counts;
}

void pool_assert(const struct pool *pool) {
    int seen[PAGE_OWNERS] = {0}, sum = 0, listed = 0;
    for (int page = 0; page < pool->counts.total; page++) {
        VERIFY_OP(pool->owner[page], <, PAGE_OWNERS);
        seen[pool->owner[page]]++;
    }
    for (int owner = 0; owner < PAGE_OWNERS; owner++) {
        VERIFY_OP(seen[owner], ==, pool->counts.of[owner]);
        sum += seen[owner];
    }
    VERIFY_OP(sum, ==, pool->counts.total);
    // A cycle in the list would run past the count of free pages.
    for (int32_t page = pool->free_head; page != NO_PAGE; page = pool->next[page]) {
        VERIFY_OP(pool->owner[page], ==, PAGE_FREE);
        VERIFY_OP(++listed, <=, pool->counts.of[PAGE_FREE]);
    }
    VERIFY_OP(listed, ==, pool->counts.of[PAGE_FREE]);
}
