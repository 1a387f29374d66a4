// The tree of shared KV pages (prefix.h). Buckets are chains of node indices; a node knows its
// parent and how many children it has, which is all that leaf-first eviction needs. The nodes of
// one adapter are chained too, through `listed_next`.
#include "pager/prefix.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { NONE = -1 };

struct node {
    bool used;
    int32_t parent, next;
    int refs, children;
    float uses; // matches, for the order of eviction
    int32_t listed_next, listed_previous;
    struct evictable evictable;
    struct prefix_scope scope;
    int32_t tokens[PREFIX_PAGE_TOKENS];
};

struct prefix {
    struct pool *pool;
    struct eviction *eviction;
    double page_s;
    int page_count, used_pages; // used: nodes with refs > 0
    struct node *nodes; // [page_count]
    int32_t *buckets;   // [page_count]
};

static void evict(void *owner, struct evictable *item);

struct prefix *prefix_create(struct pool *pool, struct eviction *eviction, int page_count) {
    struct prefix *prefix = mem_zalloc(1, sizeof *prefix);
    prefix->pool = pool;
    prefix->eviction = eviction;
    prefix->page_s = 1;
    prefix->page_count = page_count;
    prefix->nodes = mem_zalloc((size_t)page_count, sizeof *prefix->nodes);
    prefix->buckets = mem_zalloc((size_t)page_count, sizeof *prefix->buckets);
    for (int i = 0; i < page_count; i++) prefix->buckets[i] = NONE;
    eviction_set_owner(eviction, EVICTABLE_PREFIX, prefix, evict);
    return prefix;
}

void prefix_set_cost(struct prefix *prefix, double page_s) {
    prefix->page_s = page_s;
}

int prefix_used(const struct prefix *prefix) {
    return prefix->used_pages;
}

// ------------------------------------------------------------------ finding

// FNV-1a over words, then a finalizer (splitmix64's): the buckets' count may be a power of two. A
// collision costs a comparison, never a wrong hit.
static int32_t *bucket_of(const struct prefix *prefix, const struct prefix_scope *scope,
                          int32_t parent, const int32_t *tokens) {
    uint64_t hash = 14695981039346656037u, word;
    for (size_t i = 0; i < sizeof scope->bytes; i += sizeof word) {
        memcpy(&word, scope->bytes + i, sizeof word);
        hash = (hash ^ word) * 1099511628211u;
    }
    hash = (hash ^ (uint32_t)parent) * 1099511628211u;
    for (int i = 0; i < PREFIX_PAGE_TOKENS; i++)
        hash = (hash ^ (uint32_t)tokens[i]) * 1099511628211u;
    hash = (hash ^ hash >> 30) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ hash >> 27) * 0x94d049bb133111ebu;
    return &prefix->buckets[(hash ^ hash >> 31) % (uint64_t)prefix->page_count];
}

static int32_t find(const struct prefix *prefix, const struct prefix_scope *scope, int32_t parent,
                    const int32_t *tokens) {
    for (int32_t i = *bucket_of(prefix, scope, parent, tokens); i != NONE;
         i = prefix->nodes[i].next) {
        const struct node *node = &prefix->nodes[i];
        if (node->parent == parent &&
            !memcmp(node->scope.bytes, scope->bytes, sizeof scope->bytes) &&
            !memcmp(node->tokens, tokens, sizeof node->tokens))
            return i;
    }
    return NONE;
}

static struct prefix_scope base_of(const struct prefix_scope *scope) {
    struct prefix_scope base = {.list = NULL};
    memcpy(base.bytes, scope->base, sizeof base.bytes);
    return base;
}

// The scope that page number `page` of a sequence belongs to.
static const struct prefix_scope *scope_at(const struct prefix_scope *scope,
                                           const struct prefix_scope *base, int page) {
    return page < scope->base_pages ? base : scope;
}

int prefix_peek(const struct prefix *prefix, const struct prefix_scope *scope,
                const int32_t *tokens, int token_count) {
    int count = 0;
    struct prefix_scope base = base_of(scope);
    for (int32_t parent = NONE; (count + 1) * PREFIX_PAGE_TOKENS < token_count; count++) {
        parent = find(prefix, scope_at(scope, &base, count), parent,
                      tokens + count * PREFIX_PAGE_TOKENS);
        if (parent == NONE) break;
    }
    return count;
}

// ------------------------------------------------------------------ using and leaving

static void use(struct prefix *prefix, int32_t page) {
    struct node *node = &prefix->nodes[page];
    node->uses++;
    if (node->refs++ > 0) return;
    prefix->used_pages++;
    eviction_remove(prefix->eviction, &node->evictable);
    pool_change_owner(prefix->pool, PAGE_CACHED, PAGE_KV, &page, 1);
}

int prefix_match(struct prefix *prefix, const struct prefix_scope *scope, const int32_t *tokens,
                 int token_count, int32_t *pages) {
    int count = 0;
    struct prefix_scope base = base_of(scope);
    for (int32_t parent = NONE; (count + 1) * PREFIX_PAGE_TOKENS < token_count; count++) {
        int32_t page = find(prefix, scope_at(scope, &base, count), parent,
                            tokens + count * PREFIX_PAGE_TOKENS);
        if (page == NONE) break;
        use(prefix, page);
        pages[count] = parent = page;
    }
    return count;
}

static void list_link(struct prefix *prefix, int32_t page) {
    struct node *node = &prefix->nodes[page];
    int32_t *list = node->scope.list;
    node->listed_next = node->listed_previous = NONE;
    if (!list) return;
    node->listed_next = *list;
    if (*list != NONE) prefix->nodes[*list].listed_previous = page;
    *list = page;
}

static void list_unlink(struct prefix *prefix, int32_t page) {
    const struct node *node = &prefix->nodes[page];
    if (!node->scope.list) return;
    if (node->listed_previous == NONE) *node->scope.list = node->listed_next;
    else prefix->nodes[node->listed_previous].listed_next = node->listed_next;
    if (node->listed_next != NONE)
        prefix->nodes[node->listed_next].listed_previous = node->listed_previous;
}

static void insert(struct prefix *prefix, const struct prefix_scope *scope, int32_t parent,
                   const int32_t *tokens, int32_t page) {
    struct node *node = &prefix->nodes[page];
    VERIFY(!node->used);
    int32_t *bucket = bucket_of(prefix, scope, parent, tokens);
    *node = (struct node){
        .used = true, .parent = parent, .next = *bucket, .refs = 1, .uses = 1, .scope = *scope};
    memcpy(node->tokens, tokens, sizeof node->tokens);
    *bucket = page;
    if (parent != NONE) prefix->nodes[parent].children++;
    list_link(prefix, page);
    prefix->used_pages++;
}

int prefix_add(struct prefix *prefix, const struct prefix_scope *scope, const int32_t *tokens,
               int token_count, int32_t *pages, int shared) {
    int32_t parent = shared > 0 ? pages[shared - 1] : NONE;
    struct prefix_scope base = base_of(scope);
    for (; (shared + 1) * PREFIX_PAGE_TOKENS <= token_count; shared++) {
        const int32_t *own = tokens + shared * PREFIX_PAGE_TOKENS;
        const struct prefix_scope *at = scope_at(scope, &base, shared);
        int32_t equal = find(prefix, at, parent, own);
        if (equal == NONE) {
            insert(prefix, at, parent, own, pages[shared]);
        } else {
            use(prefix, equal);
            pool_give(prefix->pool, PAGE_KV, &pages[shared], 1);
            pages[shared] = equal;
        }
        parent = pages[shared];
    }
    return shared;
}

static void offer(struct prefix *prefix, int32_t page, double now_s) {
    struct node *node = &prefix->nodes[page];
    if (node->refs > 0 || node->children > 0) return;
    double score = eviction_score(prefix->eviction, node->uses, prefix->page_s, 1, now_s);
    eviction_put(prefix->eviction, &node->evictable, EVICTABLE_PREFIX, TIER_IDLE, score);
}

void prefix_leave(struct prefix *prefix, const int32_t *pages, int shared, double now_s) {
    for (int i = shared - 1; i >= 0; i--) {
        struct node *node = &prefix->nodes[pages[i]];
        VERIFY(node->used);
        VERIFY_OP(node->refs, >, 0);
        if (--node->refs > 0) continue;
        prefix->used_pages--;
        node->evictable.score = now_s; // remembered for when its children are gone
        pool_change_owner(prefix->pool, PAGE_KV, PAGE_CACHED, &pages[i], 1);
        offer(prefix, pages[i], now_s);
    }
}

// ------------------------------------------------------------------ freeing

// Takes a node that nobody uses out of the tree; its page becomes free.
static void drop(struct prefix *prefix, int32_t page) {
    struct node *node = &prefix->nodes[page];
    VERIFY(node->used);
    VERIFY_OP(node->refs, ==, 0);
    VERIFY_OP(node->children, ==, 0);
    eviction_remove(prefix->eviction, &node->evictable);
    int32_t *link = bucket_of(prefix, &node->scope, node->parent, node->tokens);
    while (*link != page) link = &prefix->nodes[*link].next;
    *link = node->next;
    list_unlink(prefix, page);
    node->used = false;
    pool_give(prefix->pool, PAGE_CACHED, &page, 1);
    if (node->parent == NONE) return;
    struct node *parent = &prefix->nodes[node->parent];
    parent->children--;
    offer(prefix, node->parent, parent->evictable.score);
}

static void evict(void *owner, struct evictable *item) {
    struct prefix *prefix = owner;
    const struct node *node =
        (const struct node *)((const char *)item - offsetof(struct node, evictable));
    drop(prefix, (int32_t)(node - prefix->nodes));
}

// The children of a node with a list are of its scope, and so in the same list: every turn frees a
// leaf at least.
void prefix_drop(struct prefix *prefix, int32_t *list) {
    while (*list != NONE) {
        int32_t page = *list;
        for (int32_t next; page != NONE; page = next) {
            next = prefix->nodes[page].listed_next;
            if (prefix->nodes[page].children == 0) drop(prefix, page);
        }
    }
}

void prefix_destroy(struct prefix *prefix) {
    if (!prefix) return;
    for (bool more = true; more;) {
        more = false;
        for (int32_t page = 0; page < prefix->page_count; page++) {
            const struct node *node = &prefix->nodes[page];
            if (!node->used) continue;
            VERIFY_OP(node->refs, ==, 0);
            more = true;
            if (node->children == 0) drop(prefix, page);
        }
    }
    free(prefix->nodes);
    free(prefix->buckets);
    free(prefix);
}
