// Residency and the order of eviction, without a device: who goes when pages are wanted, and that a
// refusal changes nothing. The random test compares every call with a model that knows nothing of
// heaps: a list of adapters, and the least (tier, score) looked for by hand.
#include "pager/residency.h"
#include "base/memory.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "expect_abort.h"

enum { LAYERS = 2, PAGE_ELEMS = 64, PAGES = 12, ADAPTERS = 6 };

// One layer of rank r: 7 modules of A [r, 4] and B [4, r], 56 r elements.
static struct lora_geometry geometry_of(int pool_pages) {
    struct lora_geometry geometry = {.layers = LAYERS, .dtype = DTYPE_F32, .rank_max = 16,
                                     .page_elems = PAGE_ELEMS, .pool_pages = pool_pages};
    for (int m = 0; m < LORA_MODULES; m++) geometry.in[m] = geometry.out[m] = 4;
    return geometry;
}

struct rig {
    struct pool *pool;
    struct eviction *eviction;
    struct residency *residency;
    struct adapter *adapters[ADAPTERS]; // each with the rig's reference
};

static struct adapter *dummy(int rank, int seed) {
    struct lora_geometry geometry = geometry_of(PAGES);
    struct adapter *adapter = NULL;
    char source[64];
    snprintf(source, sizeof source, "dummy:rank=%d,seed=%d", rank, seed);
    assert_int_equal(adapter_open(&geometry, "x", -1, source, &adapter, NULL), STATUS_OK);
    assert_int_equal(adapter->page_count, (56 * rank + PAGE_ELEMS - 1) / PAGE_ELEMS);
    return adapter;
}

static struct rig *rig_create(enum eviction_policy policy, const int *ranks, int count) {
    struct rig *rig = mem_zalloc(1, sizeof *rig);
    rig->pool = pool_create(PAGES);
    rig->eviction = eviction_create(rig->pool, policy, PAGES);
    rig->residency = residency_create(rig->pool, rig->eviction, NULL);
    for (int i = 0; i < count; i++) rig->adapters[i] = dummy(ranks[i], i);
    return rig;
}

static void rig_destroy(struct rig *rig) {
    residency_destroy(rig->residency);
    eviction_destroy(rig->eviction);
    pool_assert(rig->pool);
    assert_int_equal(pool_counts(rig->pool).of[PAGE_FREE], PAGES);
    for (int i = 0; i < ADAPTERS; i++)
        if (rig->adapters[i]) {
            assert_int_equal(atomic_load(&rig->adapters[i]->refs), 1); // nobody kept one
            assert_false(atomic_load(&rig->adapters[i]->resident));
            rig->adapters[i]->wanted = 0;
            adapter_unref(rig->adapters[i]);
        }
    pool_destroy(rig->pool);
    free(rig);
}

static void expect_counts(const struct rig *rig, int free_pages, int kv, int adapter, int cached) {
    struct pool_counts counts = pool_counts(rig->pool);
    assert_int_equal(counts.of[PAGE_FREE], free_pages);
    assert_int_equal(counts.of[PAGE_KV], kv);
    assert_int_equal(counts.of[PAGE_ADAPTER], adapter);
    assert_int_equal(counts.of[PAGE_CACHED], cached);
    pool_assert(rig->pool);
}

static bool resident(const struct rig *rig, int i) {
    return atomic_load(&rig->adapters[i]->resident);
}

// Placed, arrived, and running at once; idle when `runs` is false.
static enum status bring(struct rig *rig, int i, bool runs, double now_s) {
    struct adapter *adapter = rig->adapters[i];
    if (!atomic_load(&adapter->resident)) {
        enum status status = residency_place(rig->residency, adapter, TIER_IDLE);
        if (status != STATUS_OK) return status;
        residency_arrived(rig->residency, adapter, now_s);
    }
    if (runs) residency_acquire(rig->residency, adapter, now_s);
    return STATUS_OK;
}

// Catches: pages of an arriving or running adapter that count as takable.
static void states_and_counts(void **state) {
    (void)state;
    struct rig *rig = rig_create(EVICTION_LRU, (int[]){4, 1}, 2); // 4 pages and 1 page
    struct adapter *a = rig->adapters[0];
    assert_int_equal(residency_place(rig->residency, a, TIER_IDLE), STATUS_OK);
    expect_counts(rig, 8, 0, 4, 0);
    assert_false(resident(rig, 0));
    assert_false(eviction_reclaim(rig->eviction, 9, TIER_PINNED)); // it is arriving
    residency_cancel(rig->residency, a);
    expect_counts(rig, 12, 0, 0, 0);
    assert_int_equal(bring(rig, 0, true, 1), STATUS_OK);
    residency_acquire(rig->residency, a, 2);
    assert_int_equal(a->running, 2);
    residency_release(rig->residency, a, 3);
    expect_counts(rig, 8, 0, 4, 0); // still one user
    assert_false(eviction_reclaim(rig->eviction, 9, TIER_PINNED));
    residency_release(rig->residency, a, 4);
    expect_counts(rig, 8, 0, 0, 4);
    residency_acquire(rig->residency, a, 5);
    expect_counts(rig, 8, 0, 4, 0);
    residency_release(rig->residency, a, 6);
    struct residency_counts counts = residency_counts(rig->residency);
    assert_int_equal(counts.resident, 1);
    assert_int_equal(counts.loads, 1); // back without a copy
    assert_int_equal(counts.evictions, 0);
    assert_int_equal(counts.bytes_moved, 56 * 4 * LAYERS * sizeof(float));
    rig_destroy(rig);
}

// Catches: LRU that is not; tiers ignored.
static void who_goes_first(void **state) {
    (void)state;
    struct rig *rig = rig_create(EVICTION_LRU, (int[]){4, 4, 4, 4}, 4); // of 4 pages; three fit
    for (int i = 0; i < 3; i++) assert_int_equal(bring(rig, i, true, i), STATUS_OK);
    residency_release(rig->residency, rig->adapters[1], 10);
    residency_release(rig->residency, rig->adapters[0], 11);
    residency_release(rig->residency, rig->adapters[2], 12);
    assert_int_equal(bring(rig, 3, true, 13), STATUS_OK);
    assert_true(resident(rig, 0) && !resident(rig, 1) && resident(rig, 2)); // the longest unused
    residency_want(rig->residency, rig->adapters[0], 1); // somebody waits for it
    assert_true(eviction_reclaim(rig->eviction, 1, TIER_IDLE));
    assert_true(resident(rig, 0) && !resident(rig, 2) && resident(rig, 3));
    assert_false(eviction_reclaim(rig->eviction, 5, TIER_IDLE));
    assert_int_equal(residency_place(rig->residency, rig->adapters[1], TIER_IDLE), STATUS_OK);
    residency_arrived(rig->residency, rig->adapters[1], 14);
    atomic_store(&rig->adapters[1]->pinned, true);
    residency_pin(rig->residency, rig->adapters[1]);
    assert_false(eviction_reclaim(rig->eviction, 1, TIER_IDLE));
    assert_true(eviction_reclaim(rig->eviction, 4, TIER_PINNED)); // the wanted before the pinned
    assert_true(!resident(rig, 0) && resident(rig, 1));
    assert_true(eviction_reclaim(rig->eviction, 8, TIER_PINNED));
    assert_true(!resident(rig, 1) && resident(rig, 3));
    residency_want(rig->residency, rig->adapters[0], -1);
    residency_release(rig->residency, rig->adapters[3], 16);
    rig_destroy(rig);
}

// Catches: frequency that does not count, and fame that never fades.
static void cost_counts_uses_and_ages(void **state) {
    (void)state;
    struct rig *rig = rig_create(EVICTION_COST, (int[]){4, 4, 4, 4, 4}, 5);
    for (int use = 0; use < 5; use++) {
        assert_int_equal(bring(rig, 0, true, use), STATUS_OK);
        residency_release(rig->residency, rig->adapters[0], use);
    }
    for (int round = 0; round < 40; round++)
        for (int i = 1; i < 5 && resident(rig, 0); i++) { // each once in a while, after 0's last use
            assert_int_equal(bring(rig, i, true, 10 + round), STATUS_OK);
            residency_release(rig->residency, rig->adapters[i], 10 + round);
            if (round == 0) assert_true(resident(rig, 0)); // LRU would have evicted it
        }
    assert_false(resident(rig, 0));
    rig_destroy(rig);
}

static void refusal_changes_nothing(void **state) {
    (void)state;
    struct rig *rig = rig_create(EVICTION_LRU, (int[]){4, 4, 8}, 3); // 4, 4 and 7 pages
    int32_t kv[3];
    assert_int_equal(pool_take(rig->pool, PAGE_KV, 3, kv), STATUS_OK);
    assert_int_equal(bring(rig, 0, true, 1), STATUS_OK);
    assert_int_equal(bring(rig, 1, false, 2), STATUS_OK);
    expect_counts(rig, 1, 3, 4, 4);
    struct residency_counts before = residency_counts(rig->residency);
    // 7 wanted; 1 free, 4 idle.
    assert_int_equal(residency_place(rig->residency, rig->adapters[2], TIER_PINNED),
                     STATUS_NO_PAGES);
    expect_counts(rig, 1, 3, 4, 4);
    assert_true(resident(rig, 0) && resident(rig, 1) && !resident(rig, 2));
    assert_false(rig->adapters[2]->arriving);
    assert_int_equal(atomic_load(&rig->adapters[2]->refs), 1);
    struct residency_counts after = residency_counts(rig->residency);
    assert_memory_equal(&after, &before, sizeof after);
    // With two KV pages back it fits exactly, but not while somebody waits for the idle one.
    pool_give(rig->pool, PAGE_KV, kv, 2);
    residency_want(rig->residency, rig->adapters[1], 1);
    assert_int_equal(residency_place(rig->residency, rig->adapters[2], TIER_IDLE), STATUS_NO_PAGES);
    expect_counts(rig, 3, 1, 4, 4);
    residency_want(rig->residency, rig->adapters[1], -1);
    assert_int_equal(residency_place(rig->residency, rig->adapters[2], TIER_IDLE), STATUS_OK);
    expect_counts(rig, 0, 1, 11, 0);
    residency_cancel(rig->residency, rig->adapters[2]);
    residency_release(rig->residency, rig->adapters[0], 6);
    pool_give(rig->pool, PAGE_KV, kv + 2, 1);
    rig_destroy(rig);
}

// Catches: prefixes of an adapter that is gone, which hold pages that nobody can use and point to
// its record.
static void an_adapter_takes_its_prefixes(void **state) {
    (void)state;
    struct rig *rig = rig_create(EVICTION_COST, (int[]){2}, 1); // of 2 pages
    residency_destroy(rig->residency);
    struct prefix *prefix = prefix_create(rig->pool, rig->eviction, PAGES);
    rig->residency = residency_create(rig->pool, rig->eviction, prefix);
    assert_int_equal(bring(rig, 0, true, 1), STATUS_OK);
    const struct prefix_scope own = {.bytes = {1}, .list = &rig->adapters[0]->prefixes};
    const struct prefix_scope base = {.bytes = {2}};
    int32_t tokens[3 * PREFIX_PAGE_TOKENS] = {0}, pages[6];
    for (int i = 0; i < 2; i++) { // three pages each
        const struct prefix_scope *scope = i ? &base : &own;
        assert_int_equal(pool_take(rig->pool, PAGE_KV, 3, pages + 3 * i), STATUS_OK);
        int shared = prefix_add(prefix, scope, tokens, 3 * PREFIX_PAGE_TOKENS, pages + 3 * i, 0);
        prefix_leave(prefix, pages + 3 * i, shared, 2);
    }
    residency_release(rig->residency, rig->adapters[0], 3);
    expect_counts(rig, PAGES - 8, 0, 0, 8);
    atomic_store(&rig->adapters[0]->retired, true);
    residency_sweep(rig->residency);
    expect_counts(rig, PAGES - 3, 0, 0, 3); // the base model's stay
    assert_int_equal(rig->adapters[0]->prefixes, -1);
    assert_int_equal(prefix_peek(prefix, &own, tokens, 3 * PREFIX_PAGE_TOKENS), 0);
    assert_int_equal(prefix_peek(prefix, &base, tokens, 3 * PREFIX_PAGE_TOKENS), 2);
    residency_destroy(rig->residency);
    prefix_destroy(prefix);
    rig->residency = residency_create(rig->pool, rig->eviction, NULL);
    rig_destroy(rig);
}

// A retired adapter leaves at the first sweep that finds it idle, and its record with it.
static void sweeps_the_retired(void **state) {
    (void)state;
    struct rig *rig = rig_create(EVICTION_COST, (int[]){2, 2}, 2);
    struct adapter *a = rig->adapters[0];
    assert_int_equal(bring(rig, 0, true, 1), STATUS_OK);
    assert_int_equal(bring(rig, 1, false, 2), STATUS_OK);
    atomic_store(&a->retired, true);
    residency_sweep(rig->residency);
    assert_true(resident(rig, 0) && resident(rig, 1)); // one still runs, one is not retired
    rig->adapters[0] = NULL;
    adapter_unref(a); // the registry's; residency holds the last one
    residency_release(rig->residency, a, 4);
    residency_sweep(rig->residency);
    expect_counts(rig, PAGES - 2, 0, 0, 2);
    assert_int_equal(residency_counts(rig->residency).resident, 1);
    rig_destroy(rig);
}

// ---- random calls against a model --------------------------------------------------------------

struct model {
    struct {
        bool here, arriving, pinned;
        int running, wanted;
        double used_s;
    } a[ADAPTERS];
    int kv;
};

static int tier(const struct model *m, int i) {
    return m->a[i].pinned ? TIER_PINNED : m->a[i].wanted ? TIER_WANTED : TIER_IDLE;
}

static int pages_of(const struct rig *rig, const struct model *m, bool idle, int tier_max) {
    int pages = 0;
    for (int i = 0; i < ADAPTERS; i++) {
        bool is_idle = m->a[i].here && m->a[i].running == 0;
        bool counts = idle ? is_idle && tier(m, i) <= tier_max
                           : m->a[i].arriving || (m->a[i].here && m->a[i].running > 0);
        if (counts) pages += rig->adapters[i]->page_count;
    }
    return pages;
}

static int free_of(const struct rig *rig, const struct model *m) {
    return PAGES - m->kv - pages_of(rig, m, false, 0) - pages_of(rig, m, true, TIER_PINNED);
}

static bool model_reclaim(const struct rig *rig, struct model *m, int pages, int tier_max) {
    while (free_of(rig, m) < pages) {
        int best = -1;
        for (int i = 0; i < ADAPTERS; i++) {
            if (!m->a[i].here || m->a[i].running > 0 || tier(m, i) > tier_max) continue;
            if (best < 0 || tier(m, i) < tier(m, best) ||
                (tier(m, i) == tier(m, best) && m->a[i].used_s < m->a[best].used_s))
                best = i;
        }
        if (best < 0) return false;
        m->a[best].here = false;
    }
    return true;
}

static void random_call(struct rig *rig, struct model *m, unsigned *seed, int32_t *kv, int step) {
    int i = (int)(rand_r(seed) % ADAPTERS), tier_max = (int)(rand_r(seed) % EVICTION_TIERS);
    struct adapter *adapter = rig->adapters[i];
    switch (rand_r(seed) % 10) {
    case 0: case 1: case 2:
        if (m->a[i].here || m->a[i].arriving) break;
        bool fits = adapter->page_count <= free_of(rig, m) + pages_of(rig, m, true, tier_max);
        assert_int_equal(residency_place(rig->residency, adapter, (enum eviction_tier)tier_max),
                         fits ? STATUS_OK : STATUS_NO_PAGES);
        if (!fits) break;
        assert_true(model_reclaim(rig, m, adapter->page_count, tier_max));
        m->a[i].arriving = true;
        break;
    case 3: case 4:
        if (!m->a[i].arriving) break;
        m->a[i].arriving = false;
        if (rand_r(seed) % 8 == 0) {
            residency_cancel(rig->residency, adapter);
            break;
        }
        residency_arrived(rig->residency, adapter, step);
        m->a[i].here = true;
        m->a[i].used_s = step;
        break;
    case 5: case 6:
        if (!m->a[i].here) break;
        residency_acquire(rig->residency, adapter, step);
        m->a[i].running++;
        break;
    case 7:
        if (m->a[i].running == 0) break;
        residency_release(rig->residency, adapter, step);
        m->a[i].running--;
        m->a[i].used_s = step;
        break;
    case 8:
        if (rand_r(seed) % 4 == 0) {
            m->a[i].pinned = !m->a[i].pinned;
            atomic_store(&adapter->pinned, m->a[i].pinned);
            residency_pin(rig->residency, adapter);
        } else {
            int change = m->a[i].wanted > 0 && rand_r(seed) % 2 ? -1 : 1;
            residency_want(rig->residency, adapter, change);
            m->a[i].wanted += change;
        }
        break;
    default: { // sequences come and go
        int pages = (int)(rand_r(seed) % 6);
        if (m->kv) pool_give(rig->pool, PAGE_KV, kv, m->kv);
        m->kv = 0;
        bool expected = model_reclaim(rig, m, pages, tier_max);
        assert_int_equal(eviction_reclaim(rig->eviction, pages, (enum eviction_tier)tier_max),
                         expected);
        if (pool_take(rig->pool, PAGE_KV, pages, kv) == STATUS_OK) m->kv = pages;
    }
    }
}

static void random_sequences(void **state) {
    (void)state;
    for (unsigned run = 1; run <= 100; run++) {
        struct rig *rig = rig_create(EVICTION_LRU, (int[]){1, 2, 3, 4, 6, 9}, ADAPTERS);
        struct model m = {.kv = 0};
        int32_t kv[PAGES];
        unsigned seed = run;
        for (int step = 0; step < 2000; step++) {
            random_call(rig, &m, &seed, kv, step);
            expect_counts(rig, free_of(rig, &m), m.kv, pages_of(rig, &m, false, 0),
                          pages_of(rig, &m, true, TIER_PINNED));
            for (int i = 0; i < ADAPTERS; i++) assert_int_equal(resident(rig, i), m.a[i].here);
        }
        for (int i = 0; i < ADAPTERS; i++) {
            while (m.a[i].running-- > 0)
                residency_release(rig->residency, rig->adapters[i], 9999);
            if (m.a[i].arriving) residency_cancel(rig->residency, rig->adapters[i]);
        }
        if (m.kv) pool_give(rig->pool, PAGE_KV, kv, m.kv);
        rig_destroy(rig);
    }
}

static void release_unused(void *rig) {
    struct rig *r = rig;
    residency_release(r->residency, r->adapters[0], 2);
}
static void acquire_away(void *rig) {
    struct rig *r = rig;
    residency_acquire(r->residency, r->adapters[1], 2);
}
static void destroy_in_use(void *rig) {
    struct rig *r = rig;
    residency_acquire(r->residency, r->adapters[0], 2);
    residency_destroy(r->residency);
}
static void free_resident(void *rig) {
    struct rig *r = rig;
    adapter_unref(r->adapters[0]);
    adapter_unref(r->adapters[0]); // residency's own reference
}

static void wrong_use_aborts(void **state) {
    (void)state;
    static const struct {
        const char *what;
        void (*call)(void *rig);
    } calls[] = {
        {"release of one that nobody runs", release_unused},
        {"use of one that is not resident", acquire_away},
        {"destroy while one runs", destroy_in_use},
        {"the last reference of a resident one", free_resident},
    };
    struct rig *rig = rig_create(EVICTION_COST, (int[]){1, 1}, 2);
    assert_int_equal(bring(rig, 0, false, 1), STATUS_OK);
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (!aborts(calls[i].call, rig)) fail_msg("%s does not abort", calls[i].what);
    rig_destroy(rig);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(states_and_counts),
        cmocka_unit_test(who_goes_first),
        cmocka_unit_test(cost_counts_uses_and_ages),
        cmocka_unit_test(refusal_changes_nothing),
        cmocka_unit_test(sweeps_the_retired),
        cmocka_unit_test(an_adapter_takes_its_prefixes),
        cmocka_unit_test(random_sequences),
        cmocka_unit_test(wrong_use_aborts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
