// The prefix cache: full KV pages that later sequences with an equal prefix may share.
//
// A tree of pages. A node is one page of PREFIX_PAGE_TOKENS tokens; its index is its page's index.
// A root is found by (scope, tokens), any other node by (parent, tokens): hashes only choose a
// bucket, equality is checked on scope, parent and tokens themselves. A scope stands for (tenant
// salt, adapter generations with weights); pages are never shared between scopes (invariant 5).
//
//   KV, refs > 0 --last prefix_leave--> CACHED, refs == 0 --prefix_match--> KV
//   CACHED without children --eviction, prefix_drop--> FREE
//
// A user of a node uses its ancestors too, so that refs never grow towards the leaves, and what
// nobody uses can be freed from the leaves on. A leaf that nobody uses is evictable (eviction.h).
// Engine thread only. No allocation after prefix_create.
#ifndef LORAD_PAGER_PREFIX_H
#define LORAD_PAGER_PREFIX_H

#include "pager/eviction.h"

enum { PREFIX_PAGE_TOKENS = 16 };
struct prefix_scope {
    uint8_t bytes[32]; // the caller's digest of salt, generations and weights
    // Where the nodes of one adapter are listed, so that they can go with it: NULL, or a word that
    // lives as long as any of them and is -1 at first.
    int32_t *list;
    // The first base_pages pages belong to another scope, without a list: what the base model
    // computed before an activated adapter begins. Sequences of that scope itself share them.
    uint8_t base[32];
    int base_pages;
};
struct prefix;

struct prefix *prefix_create(struct pool *pool, struct eviction *eviction, int page_count);
void prefix_destroy(struct prefix *prefix); // frees all; nobody may use a page
// The seconds that computing one page's tokens again takes, for the order of eviction.
void prefix_set_cost(struct prefix *prefix, double page_s);

// How many pages prefix_match would find.
int prefix_peek(const struct prefix *prefix, const struct prefix_scope *scope,
                const int32_t *tokens, int token_count);
// Fills `pages` with the longest cached prefix that leaves at least one token to compute, and
// counts one user of each. Returns the number of pages.
int prefix_match(struct prefix *prefix, const struct prefix_scope *scope, const int32_t *tokens,
                 int token_count, int32_t *pages);
// A running sequence, whose first `shared` pages are nodes that it uses, has computed the first
// token_count tokens: the full pages among them become nodes that it uses. Where an equal node is
// there already, it takes that one, and its own page becomes free. Returns the new `shared`.
int prefix_add(struct prefix *prefix, const struct prefix_scope *scope, const int32_t *tokens,
               int token_count, int32_t *pages, int shared);
// It uses its first `shared` pages no longer.
void prefix_leave(struct prefix *prefix, const int32_t *pages, int shared, double now_s);
// Frees every node of a list; nobody may use one.
void prefix_drop(struct prefix *prefix, int32_t *list);
// Pages in the tree that somebody uses, each counted once.
int prefix_used(const struct prefix *prefix);

#endif
