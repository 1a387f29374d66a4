// Adapter residency against a fake device that keeps its pool in host memory and counts calls: who
// is evicted, what is copied where, and that a refusal changes nothing. The random test compares
// every call with a model: a list of adapters from the longest unused to the latest used.
#include "base/memory.h"
#include "pager/adapter.h"

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

struct backend {
    float pool[LAYERS][PAGES][PAGE_ELEMS];
    int writes, writes_since_synchronize, synchronizes;
};

static void fake_pool_write(struct backend *b, int layer, const int32_t *pages, const void *image,
                            size_t elems) {
    assert_in_range(layer, 0, LAYERS - 1);
    for (size_t e = 0; e < elems; e++) {
        int32_t page = pages[e / PAGE_ELEMS];
        assert_in_range(page, 0, PAGES - 1);
        b->pool[layer][page][e % PAGE_ELEMS] = ((const float *)image)[e];
    }
    b->writes++;
    b->writes_since_synchronize++;
}

static void fake_synchronize(struct backend *b) {
    b->synchronizes++;
    b->writes_since_synchronize = 0;
}

static const struct backend_ops fake_ops = {
    .name = "fake", .pool_write = fake_pool_write, .synchronize = fake_synchronize};

struct rig {
    struct backend backend;
    struct pool *pool;
    struct residency *residency;
    struct adapter *adapters[ADAPTERS]; // each with the rig's reference
};

static struct adapter *dummy(int rank, int seed) {
    struct lora_geometry geometry = geometry_of(PAGES);
    struct adapter *adapter = NULL;
    char source[64];
    snprintf(source, sizeof source, "dummy:rank=%d,seed=%d", rank, seed);
    assert_int_equal(adapter_load(&geometry, "x", source, &adapter, NULL), STATUS_OK);
    assert_int_equal(adapter->page_count, (56 * rank + PAGE_ELEMS - 1) / PAGE_ELEMS);
    return adapter;
}

static struct rig *rig_create(const int *ranks, int count) {
    struct rig *rig = mem_zalloc(1, sizeof *rig);
    struct lora_geometry geometry = geometry_of(PAGES);
    rig->pool = pool_create(PAGES);
    rig->residency = residency_create(rig->pool, &fake_ops, &rig->backend, &geometry);
    for (int i = 0; i < count; i++) rig->adapters[i] = dummy(ranks[i], i);
    return rig;
}

static void rig_destroy(struct rig *rig) {
    residency_destroy(rig->residency);
    pool_assert(rig->pool);
    assert_int_equal(pool_counts(rig->pool).of[PAGE_FREE], PAGES);
    for (int i = 0; i < ADAPTERS; i++)
        if (rig->adapters[i]) {
            assert_int_equal(atomic_load(&rig->adapters[i]->refs), 1); // nobody kept one
            assert_false(atomic_load(&rig->adapters[i]->resident));
            adapter_unref(rig->adapters[i]);
        }
    pool_destroy(rig->pool);
    free(rig);
}

// What the device holds in the adapter's pages is the adapter's image, in every layer.
static void expect_on_device(const struct rig *rig, const struct adapter *adapter) {
    assert_true(atomic_load(&adapter->resident));
    for (int layer = 0; layer < LAYERS; layer++)
        for (size_t e = 0; e < adapter->layer_elems; e++) {
            int32_t page = adapter->pages[e / PAGE_ELEMS];
            float on_device = rig->backend.pool[layer][page][e % PAGE_ELEMS];
            size_t at = (size_t)layer * adapter->layer_elems + e;
            float wanted = ((const float *)adapter->image)[at];
            assert_memory_equal(&on_device, &wanted, sizeof wanted);
        }
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

static void copies_once(void **state) {
    struct rig *rig = rig_create((int[]){4, 1}, 2); // 4 pages and 1 page
    struct adapter *a = rig->adapters[0];
    assert_int_equal(residency_acquire(rig->residency, a, 1), STATUS_OK);
    expect_counts(rig, 8, 0, 4, 0);
    expect_on_device(rig, a);
    assert_int_equal(rig->backend.writes, LAYERS); // one call a layer, never one a page
    assert_int_equal(residency_acquire(rig->residency, a, 2), STATUS_OK);
    assert_int_equal(a->running, 2);
    residency_release(rig->residency, a, 3);
    expect_counts(rig, 8, 0, 4, 0); // still one user
    residency_release(rig->residency, a, 4);
    expect_counts(rig, 8, 0, 0, 4);
    assert_int_equal(residency_acquire(rig->residency, a, 5), STATUS_OK);
    expect_counts(rig, 8, 0, 4, 0);
    assert_int_equal(rig->backend.writes, LAYERS); // back without a copy
    residency_release(rig->residency, a, 6);
    struct residency_counts counts = residency_counts(rig->residency);
    assert_int_equal(counts.resident, 1);
    assert_int_equal(counts.loads, 1);
    assert_int_equal(counts.evictions, 0);
    assert_int_equal(counts.bytes_moved, 56 * 4 * LAYERS * sizeof(float));
    rig_destroy(rig);
}

static void evicts_the_longest_unused(void **state) {
    struct rig *rig = rig_create((int[]){4, 4, 4, 4}, 4); // of 4 pages; three fit
    for (int i = 0; i < 3; i++)
        assert_int_equal(residency_acquire(rig->residency, rig->adapters[i], i), STATUS_OK);
    residency_release(rig->residency, rig->adapters[1], 10);
    residency_release(rig->residency, rig->adapters[0], 11);
    residency_release(rig->residency, rig->adapters[2], 12);
    expect_counts(rig, 0, 0, 0, 12);
    assert_int_equal(residency_acquire(rig->residency, rig->adapters[3], 13), STATUS_OK);
    assert_true(resident(rig, 0) && !resident(rig, 1) && resident(rig, 2));
    expect_on_device(rig, rig->adapters[0]);
    expect_on_device(rig, rig->adapters[2]);
    expect_on_device(rig, rig->adapters[3]);
    // A use moves 0 behind 2.
    assert_int_equal(residency_acquire(rig->residency, rig->adapters[0], 14), STATUS_OK);
    residency_release(rig->residency, rig->adapters[0], 15);
    assert_int_equal(residency_evict(rig->residency, 1), 4);
    assert_true(resident(rig, 0) && !resident(rig, 2) && resident(rig, 3));
    assert_int_equal(residency_counts(rig->residency).evictions, 2);
    // Only 0 is idle; 3 runs and stays however many pages are wanted.
    assert_int_equal(residency_evict(rig->residency, 100), 4);
    assert_true(!resident(rig, 0) && resident(rig, 3));
    assert_int_equal(residency_evict(rig->residency, 1), 0);
    residency_release(rig->residency, rig->adapters[3], 16);
    assert_int_equal(residency_evict(rig->residency, 0), 0);
    assert_true(resident(rig, 3));
    rig_destroy(rig);
}

static void refusal_changes_nothing(void **state) {
    struct rig *rig = rig_create((int[]){4, 4, 8}, 3); // 4, 4 and 7 pages
    int32_t kv[2], prefix[1];
    assert_int_equal(pool_take(rig->pool, PAGE_KV, 2, kv), STATUS_OK);
    // A prefix's page: cached, but not an adapter's.
    assert_int_equal(pool_take(rig->pool, PAGE_CACHED, 1, prefix), STATUS_OK);
    assert_int_equal(residency_acquire(rig->residency, rig->adapters[0], 1), STATUS_OK);
    assert_int_equal(residency_acquire(rig->residency, rig->adapters[1], 2), STATUS_OK);
    residency_release(rig->residency, rig->adapters[1], 3);
    expect_counts(rig, 1, 2, 4, 5);
    // 7 wanted; 1 free, 4 idle, and the prefix's page is not for residency to take.
    int writes = rig->backend.writes;
    struct residency_counts before = residency_counts(rig->residency);
    assert_int_equal(residency_acquire(rig->residency, rig->adapters[2], 4), STATUS_NO_PAGES);
    expect_counts(rig, 1, 2, 4, 5);
    assert_true(resident(rig, 0) && resident(rig, 1) && !resident(rig, 2));
    assert_int_equal(rig->adapters[2]->running, 0);
    assert_int_equal(atomic_load(&rig->adapters[2]->refs), 1);
    assert_int_equal(rig->backend.writes, writes);
    struct residency_counts after = residency_counts(rig->residency);
    assert_int_equal(after.resident, before.resident);
    assert_int_equal(after.loads, before.loads);
    assert_int_equal(after.evictions, before.evictions);
    assert_int_equal(after.bytes_moved, before.bytes_moved);
    // With both KV pages back it fits exactly.
    pool_give(rig->pool, PAGE_KV, kv, 2);
    assert_int_equal(residency_acquire(rig->residency, rig->adapters[2], 5), STATUS_OK);
    expect_counts(rig, 0, 0, 11, 1);
    expect_on_device(rig, rig->adapters[0]);
    expect_on_device(rig, rig->adapters[2]);
    residency_release(rig->residency, rig->adapters[0], 6);
    residency_release(rig->residency, rig->adapters[2], 6);
    pool_give(rig->pool, PAGE_CACHED, prefix, 1);
    rig_destroy(rig);
}

// A retired adapter leaves at the first sweep that finds it idle, and its image with it.
static void sweeps_the_retired(void **state) {
    struct rig *rig = rig_create((int[]){2, 2}, 2);
    struct adapter *a = rig->adapters[0], *b = rig->adapters[1];
    assert_int_equal(residency_acquire(rig->residency, a, 1), STATUS_OK);
    assert_int_equal(residency_acquire(rig->residency, b, 2), STATUS_OK);
    residency_release(rig->residency, b, 3);
    atomic_store(&a->retired, true);
    residency_sweep(rig->residency);
    assert_true(resident(rig, 0) && resident(rig, 1)); // one still runs, one is not retired
    rig->adapters[0] = NULL;
    adapter_unref(a); // the registry's; residency holds the last one
    residency_release(rig->residency, a, 4);
    assert_int_equal(rig->backend.synchronizes, 0);
    residency_sweep(rig->residency);
    // Queued copies may read the image that goes away now: they had to be waited for.
    assert_int_equal(rig->backend.synchronizes, 1);
    assert_int_equal(rig->backend.writes_since_synchronize, 0);
    expect_counts(rig, PAGES - 2, 0, 0, 2);
    assert_int_equal(residency_counts(rig->residency).resident, 1);
    rig_destroy(rig);
}

// ---- random calls against a model --------------------------------------------------------------

struct model {
    int order[ADAPTERS], count; // resident ones, longest unused first
    int running[ADAPTERS];
    int kv;
};

static int model_find(const struct model *m, int adapter) {
    for (int i = 0; i < m->count; i++)
        if (m->order[i] == adapter) return i;
    return -1;
}

static void model_remove(struct model *m, int at) {
    memmove(m->order + at, m->order + at + 1, (size_t)(m->count - at - 1) * sizeof *m->order);
    m->count--;
}

static void model_touch(struct model *m, int adapter) {
    int at = model_find(m, adapter);
    if (at >= 0) model_remove(m, at);
    m->order[m->count++] = adapter;
}

static int model_pages(const struct rig *rig, const struct model *m, bool idle) {
    int pages = 0;
    for (int i = 0; i < m->count; i++)
        if ((m->running[m->order[i]] == 0) == idle)
            pages += rig->adapters[m->order[i]]->page_count;
    return pages;
}

static int model_evict(const struct rig *rig, struct model *m, int pages) {
    int freed = 0;
    for (int i = 0; i < m->count && freed < pages;) {
        if (m->running[m->order[i]] > 0) {
            i++;
            continue;
        }
        freed += rig->adapters[m->order[i]]->page_count;
        model_remove(m, i);
    }
    return freed;
}

static void model_acquire(struct rig *rig, struct model *m, int adapter, double now_s) {
    int free_pages = PAGES - m->kv - model_pages(rig, m, true) - model_pages(rig, m, false);
    int missing = model_find(m, adapter) >= 0 ? 0 : rig->adapters[adapter]->page_count - free_pages;
    enum status wanted = missing > model_pages(rig, m, true) ? STATUS_NO_PAGES : STATUS_OK;
    assert_int_equal(residency_acquire(rig->residency, rig->adapters[adapter], now_s), wanted);
    if (wanted != STATUS_OK) return;
    if (missing > 0) model_evict(rig, m, missing);
    model_touch(m, adapter);
    m->running[adapter]++;
}

static void random_call(struct rig *rig, struct model *m, unsigned *seed, int32_t *kv, int step) {
    int adapter = (int)(rand_r(seed) % ADAPTERS), pages = (int)(rand_r(seed) % 6);
    switch (rand_r(seed) % 8) {
    case 0: case 1: case 2:
        model_acquire(rig, m, adapter, step);
        break;
    case 3: case 4: case 5:
        if (m->running[adapter] == 0) break;
        residency_release(rig->residency, rig->adapters[adapter], step);
        m->running[adapter]--;
        model_touch(m, adapter);
        break;
    case 6: {
        int wanted = model_evict(rig, m, pages);
        assert_int_equal(residency_evict(rig->residency, pages), wanted);
        break;
    }
    default: // sequences come and go
        if (m->kv) pool_give(rig->pool, PAGE_KV, kv, m->kv);
        m->kv = 0;
        if (pool_take(rig->pool, PAGE_KV, pages, kv) == STATUS_OK) m->kv = pages;
    }
}

static void random_sequences(void **state) {
    for (unsigned run = 1; run <= 60; run++) {
        struct rig *rig = rig_create((int[]){1, 2, 3, 4, 6, 9}, ADAPTERS); // 1 to 8 pages
        struct model m = {.count = 0};
        int32_t kv[PAGES];
        unsigned seed = run;
        for (int step = 0; step < 300; step++) {
            random_call(rig, &m, &seed, kv, step);
            int idle = model_pages(rig, &m, true), busy = model_pages(rig, &m, false);
            expect_counts(rig, PAGES - m.kv - idle - busy, m.kv, busy, idle);
            assert_int_equal(residency_counts(rig->residency).resident, m.count);
            for (int i = 0; i < ADAPTERS; i++) {
                assert_int_equal(resident(rig, i), model_find(&m, i) >= 0);
                if (resident(rig, i)) expect_on_device(rig, rig->adapters[i]);
            }
        }
        for (int i = 0; i < ADAPTERS; i++)
            while (m.running[i]-- > 0) residency_release(rig->residency, rig->adapters[i], 999);
        if (m.kv) pool_give(rig->pool, PAGE_KV, kv, m.kv);
        rig_destroy(rig);
    }
}

static void release_unused(void *rig) {
    struct rig *r = rig;
    residency_release(r->residency, r->adapters[0], 2);
}
static void release_foreign(void *rig) {
    struct rig *r = rig;
    residency_release(r->residency, r->adapters[1], 2);
}
static void destroy_in_use(void *rig) {
    struct rig *r = rig;
    if (residency_acquire(r->residency, r->adapters[0], 2) == STATUS_OK)
        residency_destroy(r->residency);
}
static void free_resident(void *rig) {
    struct rig *r = rig;
    adapter_unref(r->adapters[0]);
    adapter_unref(r->adapters[0]); // residency's own reference
}

static void wrong_use_aborts(void **state) {
    static const struct {
        const char *what;
        void (*call)(void *rig);
    } calls[] = {
        {"release of one that nobody runs", release_unused},
        {"release of one that is not resident", release_foreign},
        {"destroy while one runs", destroy_in_use},
        {"the last reference of a resident one", free_resident},
    };
    struct rig *rig = rig_create((int[]){1, 1}, 2);
    assert_int_equal(residency_acquire(rig->residency, rig->adapters[0], 1), STATUS_OK);
    residency_release(rig->residency, rig->adapters[0], 1);
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (!aborts(calls[i].call, rig)) fail_msg("%s does not abort", calls[i].what);
    rig_destroy(rig);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(copies_once),
        cmocka_unit_test(evicts_the_longest_unused),
        cmocka_unit_test(refusal_changes_nothing),
        cmocka_unit_test(sweeps_the_retired),
        cmocka_unit_test(random_sequences),
        cmocka_unit_test(wrong_use_aborts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
