// The unified pool's bookkeeping: which page holds what. Device memory itself belongs to the
// backend; a page is an index valid in every layer (kernels/backend.h: struct pool_shape).
//
// Invariant 1: free + kv + adapter + cached == total, after every call (pool_assert).
// Engine thread only. No allocation after pool_create.
#ifndef LORAD_PAGER_POOL_H
#define LORAD_PAGER_POOL_H

#include "base/error.h"

#include <stdbool.h>
#include <stdint.h>

enum page_owner { PAGE_FREE, PAGE_KV, PAGE_ADAPTER, PAGE_CACHED, PAGE_OWNERS };

struct pool;
struct pool_counts {
    int total, of[PAGE_OWNERS];
};

struct pool *pool_create(int page_count);
void pool_destroy(struct pool *pool);

// Takes `count` free pages, all or none. STATUS_NO_PAGES leaves everything as it was.
MUST_CHECK enum status pool_take(struct pool *pool, enum page_owner owner, int count,
                                 int32_t *pages);
// Gives pages back; each must belong to `owner`.
void pool_give(struct pool *pool, enum page_owner owner, const int32_t *pages, int count);
// Idle adapters' pages are PAGE_CACHED: still filled, but takable by eviction.
void pool_change_owner(struct pool *pool, enum page_owner from, enum page_owner to,
                       const int32_t *pages, int count);
struct pool_counts pool_counts(const struct pool *pool);
void pool_assert(const struct pool *pool); // walks every page; aborts when the counts disagree

#endif
