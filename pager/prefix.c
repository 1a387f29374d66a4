// The tree of shared KV pages (prefix.h). Buckets are chains of node indices; a node knows its
// parent and how many children it has, which is all that leaf-first eviction needs.
#include "pager/prefix.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdlib.h>
#include <string.h>

struct node {
    bool used;
    int32_t parent, next; // -1: none
    int refs, children;
    struct prefix_scope scope;
    int32_t tokens[PREFIX_PAGE_TOKENS];
};

struct prefix {
    struct pool *pool;
    int page_count, hand; // hand: where the search for a leaf goes on
    struct node *nodes;   // [page_count]
    int32_t *buckets;     // [page_count]
};

struct prefix *prefix_create(struct pool *pool, int page_count) {
    struct prefix *prefix = mem_zalloc(1, sizeof *prefix);
    prefix->pool = pool;
    prefix->page_count = page_count;
    prefix->nodes = mem_zalloc((size_t)page_count, sizeof *prefix->nodes);
    prefix->buckets = mem_zalloc((size_t)page_count, sizeof *prefix->buckets);
    for (int i = 0; i < page_count; i++) prefix->buckets[i] = -1;
    return prefix;
}

// FNV-1a; a collision costs a comparison, never a wrong hit.
static int32_t *bucket_of(struct prefix *prefix, const struct prefix_scope *scope, int32_t parent,
                          const int32_t *tokens) {
    uint64_t hash = 14695981039346656037u;
    for (size_t i = 0; i < sizeof scope->bytes; i++)
        hash = (hash ^ scope->bytes[i]) * 1099511628211u;
    hash = (hash ^ (uint32_t)parent) * 1099511628211u;
    for (int i = 0; i < PREFIX_PAGE_TOKENS; i++)
        hash = (hash ^ (uint32_t)tokens[i]) * 1099511628211u;
    return &prefix->buckets[hash % (uint64_t)prefix->page_count];
}

static int32_t find(struct prefix *prefix, const struct prefix_scope *scope, int32_t parent,
                    const int32_t *tokens) {
    for (int32_t i = *bucket_of(prefix, scope, parent, tokens); i >= 0; i = prefix->nodes[i].next) {
        const struct node *node = &prefix->nodes[i];
        if (node->parent == parent && !memcmp(&node->scope, scope, sizeof *scope) &&
            !memcmp(node->tokens, tokens, sizeof node->tokens))
            return i;
    }
    return -1;
}

int prefix_match(struct prefix *prefix, const struct prefix_scope *scope, const int32_t *tokens,
                 int token_count, int32_t *pages) {
    int count = 0;
    for (int32_t parent = -1; (count + 1) * PREFIX_PAGE_TOKENS < token_count; count++) {
        int32_t page = find(prefix, scope, parent, tokens + count * PREFIX_PAGE_TOKENS);
        if (page < 0) break;
        if (prefix->nodes[page].refs++ == 0)
            pool_change_owner(prefix->pool, PAGE_CACHED, PAGE_KV, &page, 1);
        pages[count] = parent = page;
    }
    return count;
}

static void insert(struct prefix *prefix, const struct prefix_scope *scope, int32_t parent,
                   const int32_t *tokens, int32_t page) {
    struct node *node = &prefix->nodes[page];
    VERIFY(!node->used);
    int32_t *bucket = bucket_of(prefix, scope, parent, tokens);
    *node = (struct node){.used = true, .parent = parent, .next = *bucket, .scope = *scope};
    memcpy(node->tokens, tokens, sizeof node->tokens);
    *bucket = page;
    if (parent >= 0) prefix->nodes[parent].children++;
    pool_change_owner(prefix->pool, PAGE_KV, PAGE_CACHED, &page, 1);
}

void prefix_finish(struct prefix *prefix, const struct prefix_scope *scope, const int32_t *tokens,
                   int token_count, const int32_t *pages, int page_count, int shared) {
    VERIFY_OP(shared, <=, page_count);
    int32_t parent = -1;
    for (int i = 0; i < page_count; i++) {
        int32_t page = pages[i];
        const int32_t *own = tokens + i * PREFIX_PAGE_TOKENS;
        if (i < shared) {
            VERIFY(prefix->nodes[page].used);
            VERIFY_OP(prefix->nodes[page].refs, >, 0);
            if (--prefix->nodes[page].refs == 0)
                pool_change_owner(prefix->pool, PAGE_KV, PAGE_CACHED, &page, 1);
            parent = page;
            continue;
        }
        bool full = (i + 1) * PREFIX_PAGE_TOKENS <= token_count;
        int32_t equal = full ? find(prefix, scope, parent, own) : -1;
        if (full && equal < 0) insert(prefix, scope, parent, own, page);
        else pool_give(prefix->pool, PAGE_KV, &page, 1);
        parent = equal >= 0 ? equal : page;
    }
}

static void drop(struct prefix *prefix, int32_t page) {
    struct node *node = &prefix->nodes[page];
    int32_t *link = bucket_of(prefix, &node->scope, node->parent, node->tokens);
    while (*link != page) link = &prefix->nodes[*link].next;
    *link = node->next;
    if (node->parent >= 0) prefix->nodes[node->parent].children--;
    node->used = false;
    pool_give(prefix->pool, PAGE_CACHED, &page, 1);
}

int prefix_evict(struct prefix *prefix, int count) {
    int freed = 0;
    for (int idle = 0; freed < count && idle < prefix->page_count; idle++) {
        int32_t page = prefix->hand;
        prefix->hand = (prefix->hand + 1) % prefix->page_count;
        const struct node *node = &prefix->nodes[page];
        if (!node->used || node->refs > 0 || node->children > 0) continue;
        drop(prefix, page);
        freed++;
        idle = -1; // its parent may be a leaf now
    }
    return freed;
}

void prefix_destroy(struct prefix *prefix) {
    if (!prefix) return;
    prefix_evict(prefix, prefix->page_count);
    for (int i = 0; i < prefix->page_count; i++) VERIFY(!prefix->nodes[i].used);
    free(prefix->nodes);
    free(prefix->buckets);
    free(prefix);
}
