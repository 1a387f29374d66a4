// The prefix cache: full KV pages that later sequences with an equal prefix may share.
//
// A tree of pages. A node is one page of PREFIX_PAGE_TOKENS tokens; its index is its page's index.
// A root is found by (scope, tokens), any other node by (parent, tokens): hashes only choose a
// bucket, equality is checked on scope, parent and tokens themselves. A scope stands for (tenant
// salt, adapter generations with weights); pages are never shared between scopes (invariant).
//
//   KV, refs > 0 --last prefix_finish--> CACHED, refs == 0 --prefix_match--> KV
//   CACHED without children --prefix_evict--> FREE
//
// A user of a node uses its ancestors too, so that refs never grow towards the leaves.
// Engine thread only. No allocation after prefix_create.
#ifndef LORAD_PAGER_PREFIX_H
#define LORAD_PAGER_PREFIX_H

#include "pager/pool.h"

enum { PREFIX_PAGE_TOKENS = 16 };
struct prefix_scope {
    uint8_t bytes[32]; // the caller's digest of salt, generations and weights
};
struct prefix;

struct prefix *prefix_create(struct pool *pool, int page_count);
void prefix_destroy(struct prefix *prefix); // frees all; nobody may use a page
// Fills `pages` with the longest cached prefix that leaves at least one token to compute, and
// counts one user of each. Returns the number of pages.
int prefix_match(struct prefix *prefix, const struct prefix_scope *scope, const int32_t *tokens,
                 int token_count, int32_t *pages);
// A sequence leaves its PAGE_KV pages, of which the first token_count tokens are written and the
// first `shared` came from prefix_match. Full pages stay cached; the others, and those whose equal
// is there already, become free.
void prefix_finish(struct prefix *prefix, const struct prefix_scope *scope, const int32_t *tokens,
                   int token_count, const int32_t *pages, int page_count, int shared);
// Frees up to `count` unused pages, leaves first; returns how many.
int prefix_evict(struct prefix *prefix, int count);

#endif
