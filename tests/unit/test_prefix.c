// The prefix cache on random traces against a model that remembers, for every page, the scope and
// the whole token prefix it was filled for; accounting after every call; drained to all free.
#include "pager/prefix.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { PAGES = 64, LENGTH = 96, LIVE = 6, STEPS = 200000, SCOPES = 3 };

struct sequence {
    int scope, tokens, computed, pages, shared; // pages == 0: not running
    int32_t token[LENGTH], page[LENGTH / PREFIX_PAGE_TOKENS];
};
static struct filled {
    int scope, tokens;
    int32_t token[LENGTH];
} filled[PAGES];
static int32_t lists[SCOPES];

static struct world {
    struct pool *pool;
    struct eviction *eviction;
    struct prefix *prefix;
    struct sequence live[LIVE];
    long hits, drops;
} world;

static void world_open(enum eviction_policy policy) {
    memset(&world, 0, sizeof world);
    for (int i = 0; i < SCOPES; i++) lists[i] = -1;
    world.pool = pool_create(PAGES);
    world.eviction = eviction_create(world.pool, policy, PAGES);
    world.prefix = prefix_create(world.pool, world.eviction, PAGES);
}

static void world_close(void) {
    assert_int_equal(pool_counts(world.pool).of[PAGE_KV], 0);
    assert_int_equal(prefix_used(world.prefix), 0);
    assert_true(eviction_reclaim(world.eviction, PAGES, TIER_IDLE)); // leaf by leaf, all of it
    for (int i = 0; i < SCOPES; i++) assert_int_equal(lists[i], -1);
    prefix_destroy(world.prefix);
    eviction_destroy(world.eviction);
    pool_destroy(world.pool);
}

// 64 apart, so that scopes fall into one bucket of PAGES and only the comparison keeps them apart.
static struct prefix_scope scope_of(int scope) {
    return (struct prefix_scope){.bytes = {(uint8_t)(scope * 64)}, .list = &lists[scope]};
}

static void expect_filled(const struct sequence *s, int first, int end) {
    for (int i = first; i < end; i++) {
        const struct filled *f = &filled[s->page[i]];
        assert_int_equal(f->scope, s->scope);
        assert_int_equal(f->tokens, (i + 1) * PREFIX_PAGE_TOKENS);
        assert_memory_equal(f->token, s->token, (size_t)f->tokens * sizeof *f->token);
    }
}

static void start(struct sequence *s) {
    s->scope = rand() % SCOPES;
    s->tokens = 1 + rand() % LENGTH;
    for (int i = 0; i < s->tokens; i++)
        s->token[i] = i % PREFIX_PAGE_TOKENS == 0 ? rand() % 2 : 7; // few prefixes: many hits
    struct prefix_scope scope = scope_of(s->scope);
    int expected = prefix_peek(world.prefix, &scope, s->token, s->tokens);
    s->shared = prefix_match(world.prefix, &scope, s->token, s->tokens, s->page);
    assert_int_equal(s->shared, expected);
    assert_true(s->shared * PREFIX_PAGE_TOKENS < s->tokens); // the last token is computed
    world.hits += s->shared;
    expect_filled(s, 0, s->shared);
    s->computed = s->shared * PREFIX_PAGE_TOKENS;
    int own = (s->tokens + PREFIX_PAGE_TOKENS - 1) / PREFIX_PAGE_TOKENS - s->shared;
    assert_true(eviction_reclaim(world.eviction, own, TIER_IDLE));
    assert_int_equal(pool_take(world.pool, PAGE_KV, own, s->page + s->shared), STATUS_OK);
    s->pages = s->shared + own;
    for (int i = s->shared; i < s->pages; i++) {
        struct filled *f = &filled[s->page[i]];
        f->scope = s->scope;
        f->tokens = (i + 1) * PREFIX_PAGE_TOKENS;
        memcpy(f->token, s->token, sizeof f->token);
    }
}

static void compute(struct sequence *s) {
    struct prefix_scope scope = scope_of(s->scope);
    s->computed += 1 + rand() % 40;
    if (s->computed > s->tokens) s->computed = s->tokens;
    int before = s->shared;
    s->shared = prefix_add(world.prefix, &scope, s->token, s->computed, s->page, s->shared);
    assert_int_equal(s->shared, s->computed / PREFIX_PAGE_TOKENS);
    expect_filled(s, before, s->shared); // its own, or an equal one's
}

static void finish(struct sequence *s, double now_s) {
    prefix_leave(world.prefix, s->page, s->shared, now_s);
    pool_give(world.pool, PAGE_KV, s->page + s->shared, s->pages - s->shared);
    s->pages = 0;
}

static bool runs(int scope) {
    for (int i = 0; i < LIVE; i++)
        if (world.live[i].pages && world.live[i].scope == scope) return true;
    return false;
}

// What the running sequences use: each page once, and no page of one that another owns alone.
static void check_accounts(void) {
    bool used[PAGES] = {false};
    int shared = 0, own = 0;
    for (int i = 0; i < LIVE; i++) {
        const struct sequence *s = &world.live[i];
        for (int p = 0; s->pages && p < s->pages; p++) {
            if (p >= s->shared) {
                assert_false(used[s->page[p]]);
                own++;
            } else {
                shared += !used[s->page[p]];
            }
            used[s->page[p]] = true;
        }
    }
    assert_int_equal(prefix_used(world.prefix), shared);
    assert_int_equal(pool_counts(world.pool).of[PAGE_KV], shared + own);
    pool_assert(world.pool);
}

// Catches: sharing between scopes, a page reused under a sharer, a leak, a node evicted before its
// children, an adapter's prefixes that outlive it.
static void random_traces(void **state) {
    (void)state;
    for (int policy = EVICTION_COST; policy <= EVICTION_LRU; policy++) {
        world_open((enum eviction_policy)policy);
        srand(1);
        for (int step = 0; step < STEPS; step++) {
            struct sequence *s = &world.live[rand() % LIVE];
            int scope = rand() % SCOPES;
            if (rand() % 64 == 0 && !runs(scope)) {
                prefix_drop(world.prefix, &lists[scope]);
                assert_int_equal(lists[scope], -1);
                struct prefix_scope gone = scope_of(scope);
                int32_t token[LENGTH] = {0};
                assert_int_equal(prefix_peek(world.prefix, &gone, token, LENGTH), 0);
                world.drops++;
            } else if (!s->pages) {
                start(s);
            } else if (s->computed < s->tokens && rand() % 8) {
                compute(s);
            } else {
                finish(s, step);
            }
            check_accounts();
        }
        for (int i = 0; i < LIVE; i++)
            if (world.live[i].pages) finish(&world.live[i], STEPS);
        assert_true(world.hits > STEPS / 20);
        assert_true(world.drops > 100);
        world_close();
    }
}

// Catches: two that compute the same at the same time and both keep their copy.
static void equal_pages_become_one(void **state) {
    (void)state;
    world_open(EVICTION_COST);
    struct sequence *a = &world.live[0], *b = &world.live[1];
    struct prefix_scope scope = scope_of(0);
    for (int i = 0; i < 2; i++) {
        struct sequence *s = &world.live[i];
        s->tokens = s->computed = 40; // two full pages and a half
        s->pages = 3;
        assert_int_equal(pool_take(world.pool, PAGE_KV, 3, s->page), STATUS_OK);
    }
    a->shared = prefix_add(world.prefix, &scope, a->token, 40, a->page, 0);
    assert_int_equal(pool_counts(world.pool).of[PAGE_KV], 6);
    b->shared = prefix_add(world.prefix, &scope, b->token, 40, b->page, 0);
    assert_int_equal(b->shared, 2);
    assert_int_equal(pool_counts(world.pool).of[PAGE_KV], 4);
    assert_memory_equal(a->page, b->page, 2 * sizeof *a->page);
    assert_int_not_equal(a->page[2], b->page[2]); // what is not full is nobody else's
    finish(a, 1);
    assert_int_equal(pool_counts(world.pool).of[PAGE_CACHED], 0); // b uses them
    finish(b, 2);
    assert_int_equal(pool_counts(world.pool).of[PAGE_CACHED], 2);
    world_close();
}

// What comes before an activated adapter is the base's: pages of either serve both. From there on
// nothing is shared, and the adapter's pages go with it alone.
static void base_pages_are_shared(void **state) {
    (void)state;
    world_open(EVICTION_COST);
    struct prefix_scope base = {.bytes = {7}}, own = scope_of(1);
    memcpy(own.base, base.bytes, sizeof own.base);
    own.base_pages = 2;
    int32_t token[LENGTH] = {0}, computed[4], matched[6];
    assert_int_equal(pool_take(world.pool, PAGE_KV, 4, computed), STATUS_OK);
    assert_int_equal(prefix_add(world.prefix, &base, token, 64, computed, 0), 4);
    assert_int_equal(prefix_peek(world.prefix, &own, token, LENGTH), 2);
    assert_int_equal(prefix_match(world.prefix, &own, token, LENGTH, matched), 2);
    assert_memory_equal(matched, computed, 2 * sizeof *matched);
    assert_int_equal(pool_take(world.pool, PAGE_KV, 2, matched + 2), STATUS_OK);
    assert_int_equal(prefix_add(world.prefix, &own, token, 64, matched, 2), 4);
    assert_int_not_equal(matched[2], computed[2]);
    assert_int_equal(prefix_peek(world.prefix, &own, token, LENGTH), 4);
    prefix_leave(world.prefix, matched, 4, 1);
    prefix_leave(world.prefix, computed, 4, 2);
    prefix_drop(world.prefix, own.list);
    assert_int_equal(prefix_peek(world.prefix, &own, token, LENGTH), 2);
    assert_int_equal(prefix_peek(world.prefix, &base, token, LENGTH), 4);
    world_close();
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(random_traces),
                                       cmocka_unit_test(equal_pages_become_one),
                                       cmocka_unit_test(base_pages_are_shared)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
