// The page pool: all or none, the accounting of every call, random sequences against a model that
// keeps one owner a page, and the calls that must abort.
#include "base/memory.h"
#include "pager/pool.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "expect_abort.h"

static void expect_counts(const struct pool *pool, int free_pages, int kv, int adapter,
                          int cached) {
    struct pool_counts counts = pool_counts(pool);
    assert_int_equal(counts.of[PAGE_FREE], free_pages);
    assert_int_equal(counts.of[PAGE_KV], kv);
    assert_int_equal(counts.of[PAGE_ADAPTER], adapter);
    assert_int_equal(counts.of[PAGE_CACHED], cached);
    assert_int_equal(counts.total, free_pages + kv + adapter + cached);
    pool_assert(pool);
}

static void all_or_none(void **state) {
    struct pool *pool = pool_create(8);
    int32_t pages[9], untouched[9];
    memset(pages, 0x55, sizeof pages);
    memcpy(untouched, pages, sizeof pages);
    expect_counts(pool, 8, 0, 0, 0);
    assert_int_equal(pool_take(pool, PAGE_KV, 9, pages), STATUS_NO_PAGES);
    assert_memory_equal(pages, untouched, sizeof pages);
    expect_counts(pool, 8, 0, 0, 0);
    assert_int_equal(pool_take(pool, PAGE_KV, 3, pages), STATUS_OK);
    assert_int_equal(pool_take(pool, PAGE_ADAPTER, 6, pages + 3), STATUS_NO_PAGES);
    expect_counts(pool, 5, 3, 0, 0);
    assert_int_equal(pool_take(pool, PAGE_ADAPTER, 5, pages + 3), STATUS_OK);
    assert_int_equal(pool_take(pool, PAGE_KV, 1, pages + 8), STATUS_NO_PAGES);
    assert_int_equal(pool_take(pool, PAGE_KV, 0, pages + 8), STATUS_OK);
    bool seen[8] = {false};
    for (int i = 0; i < 8; i++) { // no page is handed out twice
        assert_in_range(pages[i], 0, 7);
        assert_false(seen[pages[i]]);
        seen[pages[i]] = true;
    }
    expect_counts(pool, 0, 3, 5, 0);
    pool_change_owner(pool, PAGE_ADAPTER, PAGE_CACHED, pages + 3, 5);
    expect_counts(pool, 0, 3, 0, 5);
    pool_give(pool, PAGE_CACHED, pages + 3, 5);
    pool_give(pool, PAGE_KV, pages, 3);
    expect_counts(pool, 8, 0, 0, 0);
    pool_destroy(pool);
}

static void empty_pool(void **state) {
    struct pool *pool = pool_create(0);
    int32_t page;
    assert_int_equal(pool_take(pool, PAGE_KV, 1, &page), STATUS_NO_PAGES);
    assert_int_equal(pool_take(pool, PAGE_KV, 0, &page), STATUS_OK);
    expect_counts(pool, 0, 0, 0, 0);
    pool_destroy(pool);
    pool_destroy(NULL);
}

// Pages of one owner in random order; the model of the property test.
struct held {
    int32_t pages[64];
    int count;
};

static void hold(struct held *held, const int32_t *pages, int count) {
    memcpy(held->pages + held->count, pages, (size_t)count * sizeof *pages);
    held->count += count;
}

// Removes `count` pages from random places.
static void pick(struct held *held, unsigned *seed, int count, int32_t *pages) {
    for (int i = 0; i < count; i++) {
        int at = (int)(rand_r(seed) % (unsigned)held->count);
        pages[i] = held->pages[at];
        held->pages[at] = held->pages[--held->count];
    }
}

// One random call, made to the pool and to the model.
static void random_call(struct pool *pool, struct held *held, unsigned *seed) {
    int32_t pages[80];
    int owner = 1 + (int)(rand_r(seed) % (PAGE_OWNERS - 1));
    int other = 1 + (int)(rand_r(seed) % (PAGE_OWNERS - 1));
    int count = (int)(rand_r(seed) % 24);
    int used = held[PAGE_KV].count + held[PAGE_ADAPTER].count + held[PAGE_CACHED].count;
    switch (rand_r(seed) % 3) {
    case 0:
        if (count > 64 - used) {
            assert_int_equal(pool_take(pool, (enum page_owner)owner, count, pages),
                             STATUS_NO_PAGES);
            break;
        }
        assert_int_equal(pool_take(pool, (enum page_owner)owner, count, pages), STATUS_OK);
        for (int i = 0; i < count; i++)
            for (int o = 1; o < PAGE_OWNERS; o++)
                for (int j = 0; j < held[o].count; j++)
                    assert_int_not_equal(pages[i], held[o].pages[j]);
        hold(&held[owner], pages, count);
        break;
    case 1:
        if (count > held[owner].count) count = held[owner].count;
        pick(&held[owner], seed, count, pages);
        pool_give(pool, (enum page_owner)owner, pages, count);
        break;
    default:
        if (count > held[owner].count) count = held[owner].count;
        pick(&held[owner], seed, count, pages);
        pool_change_owner(pool, (enum page_owner)owner, (enum page_owner)other, pages, count);
        hold(&held[other], pages, count);
    }
}

static void random_sequences(void **state) {
    for (unsigned run = 1; run <= 40; run++) {
        struct pool *pool = pool_create(64);
        struct held held[PAGE_OWNERS] = {0};
        unsigned seed = run;
        for (int step = 0; step < 500; step++) {
            random_call(pool, held, &seed);
            int used = held[PAGE_KV].count + held[PAGE_ADAPTER].count + held[PAGE_CACHED].count;
            expect_counts(pool, 64 - used, held[PAGE_KV].count, held[PAGE_ADAPTER].count,
                          held[PAGE_CACHED].count);
        }
        for (int owner = 1; owner < PAGE_OWNERS; owner++)
            pool_give(pool, (enum page_owner)owner, held[owner].pages, held[owner].count);
        expect_counts(pool, 64, 0, 0, 0); // idle returns to the baseline
        pool_destroy(pool);
    }
}

static void give_wrong_owner(void *pool) {
    pool_give(pool, PAGE_ADAPTER, (int32_t[]){0}, 1);
}
static void give_free_page(void *pool) {
    pool_give(pool, PAGE_KV, (int32_t[]){3}, 1);
}
static void give_twice(void *pool) {
    pool_give(pool, PAGE_KV, (int32_t[]){1, 1}, 2);
}
static void give_too_many(void *pool) {
    pool_give(pool, PAGE_KV, (int32_t[]){0, 1, 2}, 3);
}
static void give_negative_page(void *pool) {
    pool_give(pool, PAGE_KV, (int32_t[]){-1}, 1);
}
static void give_page_past_end(void *pool) {
    pool_give(pool, PAGE_KV, (int32_t[]){4}, 1);
}
static void give_negative_count(void *pool) {
    pool_give(pool, PAGE_KV, (int32_t[]){0}, -1);
}
static void give_to_free(void *pool) {
    pool_give(pool, PAGE_FREE, (int32_t[]){3}, 1);
}
static void change_wrong_owner(void *pool) {
    pool_change_owner(pool, PAGE_ADAPTER, PAGE_CACHED, (int32_t[]){0}, 1);
}
static void change_to_free(void *pool) {
    pool_change_owner(pool, PAGE_KV, PAGE_FREE, (int32_t[]){0}, 1);
}
static void change_negative_count(void *pool) {
    pool_change_owner(pool, PAGE_KV, PAGE_CACHED, (int32_t[]){0}, -1);
}
static void take_negative_count(void *pool) {
    int32_t page;
    if (pool_take(pool, PAGE_KV, -1, &page) == STATUS_OK) return;
}
static void take_as_free(void *pool) {
    int32_t page;
    if (pool_take(pool, PAGE_FREE, 1, &page) == STATUS_OK) return;
}
static void give_rightly(void *pool) {
    pool_give(pool, PAGE_KV, (int32_t[]){1, 0}, 2);
    pool_assert(pool);
}

static void wrong_use_aborts(void **state) {
    static const struct {
        const char *what;
        void (*call)(void *pool);
        bool aborts;
    } calls[] = {
        {"page of another owner", give_wrong_owner, true},
        {"page that is free", give_free_page, true},
        {"one page twice", give_twice, true},
        {"more pages than the owner has", give_too_many, true},
        {"page -1", give_negative_page, true},
        {"page beyond the last", give_page_past_end, true},
        {"give -1 pages", give_negative_count, true},
        {"the free pages' owner gives", give_to_free, true},
        {"change of another owner's page", change_wrong_owner, true},
        {"change to free instead of giving", change_to_free, true},
        {"change -1 pages", change_negative_count, true},
        {"take -1 pages", take_negative_count, true},
        {"take for the free pages' owner", take_as_free, true},
        {"right use", give_rightly, false},
    };
    struct pool *pool = pool_create(4);
    int32_t pages[2];
    assert_int_equal(pool_take(pool, PAGE_KV, 2, pages), STATUS_OK);
    assert_int_equal(pages[0] + pages[1], 1); // pages 0 and 1, as the calls above expect
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (aborts(calls[i].call, pool) != calls[i].aborts)
            fail_msg("%s: %s", calls[i].what, calls[i].aborts ? "does not abort" : "aborts");
    pool_destroy(pool);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_or_none),
        cmocka_unit_test(empty_pool),
        cmocka_unit_test(random_sequences),
        cmocka_unit_test(wrong_use_aborts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
