// The prefix cache on random traces against a model that remembers, for every page, the scope and
// the whole token prefix it was filled for; accounting after every call; drained to all free.
#include "pager/prefix.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { PAGES = 64, LENGTH = 96, LIVE = 6, STEPS = 200000 };

struct sequence {
    int scope, tokens, pages, shared; // pages == 0: not running
    int32_t token[LENGTH], page[LENGTH / PREFIX_PAGE_TOKENS];
};
static struct filled {
    int scope, tokens;
    int32_t token[LENGTH];
} filled[PAGES];

// 64 apart, so that scopes fall into one bucket of PAGES and only the comparison keeps them apart.
static struct prefix_scope scope_of(int scope) {
    return (struct prefix_scope){.bytes = {(uint8_t)(scope * 64)}};
}

static void start(struct pool *pool, struct prefix *prefix, struct sequence *s, long *hits) {
    s->scope = rand() % 3;
    s->tokens = 1 + rand() % LENGTH;
    for (int i = 0; i < s->tokens; i++)
        s->token[i] = i % PREFIX_PAGE_TOKENS == 0 ? rand() % 2 : 7; // few prefixes: many hits
    struct prefix_scope scope = scope_of(s->scope);
    s->shared = prefix_match(prefix, &scope, s->token, s->tokens, s->page);
    assert_true(s->shared * PREFIX_PAGE_TOKENS < s->tokens); // the last token is computed
    *hits += s->shared;
    for (int i = 0; i < s->shared; i++) {
        const struct filled *f = &filled[s->page[i]];
        assert_int_equal(f->scope, s->scope);
        assert_int_equal(f->tokens, (i + 1) * PREFIX_PAGE_TOKENS);
        assert_memory_equal(f->token, s->token, (size_t)f->tokens * sizeof *f->token);
    }
    int own = (s->tokens + PREFIX_PAGE_TOKENS - 1) / PREFIX_PAGE_TOKENS - s->shared;
    int missing = own - pool_counts(pool).of[PAGE_FREE];
    if (missing > 0) assert_true(prefix_evict(prefix, missing) >= missing);
    assert_int_equal(pool_take(pool, PAGE_KV, own, s->page + s->shared), STATUS_OK);
    s->pages = s->shared + own;
    for (int i = s->shared; i < s->pages; i++) {
        struct filled *f = &filled[s->page[i]];
        f->scope = s->scope;
        f->tokens = (i + 1) * PREFIX_PAGE_TOKENS;
        memcpy(f->token, s->token, sizeof f->token);
    }
}

static void finish(struct prefix *prefix, struct sequence *s) {
    struct prefix_scope scope = scope_of(s->scope);
    prefix_finish(prefix, &scope, s->token, s->tokens, s->page, s->pages, s->shared);
    s->pages = 0;
}

static void random_traces(void **state) {
    (void)state;
    struct pool *pool = pool_create(PAGES);
    struct prefix *prefix = prefix_create(pool, PAGES);
    static struct sequence live[LIVE];
    long hits = 0;
    srand(1);
    for (int step = 0; step < STEPS; step++) {
        struct sequence *s = &live[rand() % LIVE];
        if (s->pages) finish(prefix, s);
        else start(pool, prefix, s, &hits);
        pool_assert(pool);
    }
    for (int i = 0; i < LIVE; i++)
        if (live[i].pages) finish(prefix, &live[i]);
    assert_true(hits > STEPS / 10);
    assert_int_equal(pool_counts(pool).of[PAGE_KV], 0);
    prefix_evict(prefix, PAGES);
    assert_int_equal(pool_counts(pool).of[PAGE_FREE], PAGES);
    prefix_destroy(prefix);
    pool_destroy(pool);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(random_traces)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
