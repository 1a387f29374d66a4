// The host store against a fake device that keeps its pool in host memory: what ends up in the pages
// is the adapter's image, layer by layer; the account is what is there; who is dropped; failures.
#include "pager/host_store.h"

#include "base/log.h"
#include "base/memory.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { LAYERS = 3, PAGE_ELEMS = 64, PAGES = 40, ADAPTERS = 6 };

struct backend {
    float pool[LAYERS][PAGES][PAGE_ELEMS];
};

static void fake_write(struct backend *b, int layer, const int32_t *pages, const void *image,
                       size_t elems) {
    for (size_t e = 0; e < elems; e++)
        b->pool[layer][pages[e / PAGE_ELEMS]][e % PAGE_ELEMS] = ((const float *)image)[e];
}

static const struct backend_ops on_host = {.name = "fake", .pool_write = fake_write,
                                           .computes_on_host = true};
static const struct backend_ops on_device = {.name = "fake", .pool_write = fake_write};

static struct rig {
    struct lora_geometry geometry;
    struct backend backend;
    struct host_store *store;
    struct adapter *adapters[ADAPTERS];
    size_t bytes[ADAPTERS];
} rig;

static void rig_open(const struct backend_ops *ops, int threads, size_t bytes_max) {
    memset(&rig, 0, sizeof rig);
    log_configure(LOG_ERROR + 1, false);
    rig.geometry = (struct lora_geometry){.layers = LAYERS, .dtype = DTYPE_F32, .rank_max = 16,
                                          .page_elems = PAGE_ELEMS, .pool_pages = PAGES};
    for (int m = 0; m < LORA_MODULES; m++) rig.geometry.in[m] = rig.geometry.out[m] = 4;
    struct host_store_options options = {
        .bytes_max = bytes_max, .paced_share = 0.5, .threads = threads};
    assert_int_equal(host_store_create(&rig.geometry, ops, &rig.backend, &options, &rig.store, NULL),
                     STATUS_OK);
    for (int i = 0; i < ADAPTERS; i++) {
        char source[64];
        snprintf(source, sizeof source, "dummy:rank=%d,seed=%d", 1 + i % 3 * 7, i); // 1, 8, 15
        assert_int_equal(adapter_open(&rig.geometry, "x", -1, source, &rig.adapters[i], NULL),
                         STATUS_OK);
        rig.bytes[i] = rig.adapters[i]->image_bytes;
    }
}

static void rig_close(void) {
    struct host_event events[8];
    host_store_stop(rig.store);
    for (int count; (count = host_store_poll(rig.store, events, 8)) > 0;)
        for (int i = 0; i < count; i++) adapter_unref(events[i].adapter);
    host_store_destroy(rig.store);
    for (int i = 0; i < ADAPTERS; i++) {
        if (!rig.adapters[i]) continue;
        assert_int_equal(atomic_load(&rig.adapters[i]->refs), 1);
        adapter_unref(rig.adapters[i]);
    }
}

static int tier(int i) {
    return atomic_load(&rig.adapters[i]->tier);
}

static void wait_tier(int i, int wanted) {
    for (int spins = 0; tier(i) != wanted; spins++) {
        assert_true(spins < 100000);
        usleep(50);
    }
}

// A loader holds an adapter for a moment longer than its tier tells.
static void wait_unused(int i) {
    for (int spins = 0; atomic_load(&rig.adapters[i]->refs) != 1; spins++) {
        assert_true(spins < 100000);
        usleep(50);
    }
}

static void want(int first, int count) {
    host_store_want(rig.store, &rig.adapters[first], count);
}

static struct host_event wait_event(void) {
    struct host_event event;
    for (int spins = 0; host_store_poll(rig.store, &event, 1) == 0; spins++) {
        assert_true(spins < 100000);
        usleep(50);
    }
    return event;
}

// Catches: a layer, a piece or a page of another place.
static void copies_land_where_they_belong(void **state) {
    (void)state;
    for (int way = 0; way < 4; way++) {
        rig_open(way % 2 ? &on_host : &on_device, way / 2 * 2, SIZE_MAX / 2);
        for (int i = 0; i < 3; i++) {
            struct adapter *adapter = rig.adapters[i];
            for (int p = 0; p < adapter->page_count; p++) adapter->pages[p] = (p * 7 + i * 13) % PAGES;
            want(i, 1);
            if (i % 2) wait_tier(i, ADAPTER_IN_HOST); // else the copy may follow the read
            assert_true(host_store_copy(rig.store, adapter));
            struct host_event event = wait_event();
            assert_ptr_equal(event.adapter, adapter);
            assert_true(event.copied && event.status == STATUS_OK);
            adapter_unref(event.adapter);
            struct adapter *loaded = NULL; // the same image, by another way
            assert_int_equal(adapter_load(&rig.geometry, "y", -1, adapter->path, &loaded, NULL),
                             STATUS_OK);
            const float *image = loaded->image;
            for (int layer = 0; layer < LAYERS; layer++)
                for (size_t e = 0; e < adapter->layer_elems; e++) {
                    float there = rig.backend.pool[layer][adapter->pages[e / PAGE_ELEMS]]
                                                  [e % PAGE_ELEMS];
                    float wanted = image[(size_t)layer * adapter->layer_elems + e];
                    assert_memory_equal(&there, &wanted, sizeof there);
                }
            adapter_unref(loaded);
        }
        want(0, 0);
        rig_close();
    }
}

// Catches: an account that drifts; an image dropped that is wanted; a limit that does not hold.
static void the_account_is_kept(void **state) {
    (void)state;
    for (int threads = 0; threads <= 2; threads += 2) {
        rig_open(&on_device, threads, 0);
        size_t room = rig.bytes[0] + rig.bytes[1] + rig.bytes[2];
        want(0, 0);
        rig_close();
        rig_open(&on_device, threads, room);
        host_store_set_pace(rig.store, HOST_PACED); // none is held for its digest, then
        want(0, 3);
        for (int i = 0; i < 3; i++) wait_tier(i, ADAPTER_IN_HOST);
        struct host_store_counts counts = host_store_counts(rig.store);
        assert_int_equal(counts.bytes_used, room);
        assert_int_equal(counts.images, 3);
        want(3, 1); // of the first one's size: the oldest goes
        wait_tier(3, ADAPTER_IN_HOST);
        assert_int_equal(tier(0), ADAPTER_ON_DISK);
        assert_int_equal(host_store_counts(rig.store).bytes_used, room);
        assert_null(rig.adapters[0]->image);
        // Wanted ones are not dropped for others that are wanted: the fourth waits.
        struct adapter *all[4] = {rig.adapters[1], rig.adapters[2], rig.adapters[3],
                                  rig.adapters[4]};
        host_store_want(rig.store, all, 4);
        usleep(2000);
        for (int i = 1; i <= 3; i++) assert_int_equal(tier(i), ADAPTER_IN_HOST);
        assert_int_equal(tier(4), ADAPTER_ON_DISK);
        // Turned round, the most urgent one comes, at the cost of the least.
        struct adapter *turned[4] = {all[3], all[2], all[1], all[0]};
        host_store_want(rig.store, turned, 4);
        wait_tier(4, ADAPTER_IN_HOST);
        assert_int_equal(tier(1) == ADAPTER_IN_HOST && tier(2) == ADAPTER_IN_HOST, false);
        assert_true(host_store_counts(rig.store).bytes_used <= room);
        // Room for something else; what it cannot have it does not get.
        want(0, 0);
        assert_false(host_store_reserve(rig.store, room + 1));
        size_t before = host_store_counts(rig.store).bytes_used;
        assert_true(host_store_reserve(rig.store, rig.bytes[2]));
        assert_true(host_store_counts(rig.store).bytes_used <= room);
        host_store_release(rig.store, rig.bytes[2]);
        assert_true(host_store_counts(rig.store).bytes_used <= before);
        // An adapter that ends takes its image out of the account.
        for (int i = 0; i < ADAPTERS; i++) {
            wait_unused(i);
            adapter_unref(rig.adapters[i]);
            rig.adapters[i] = NULL;
        }
        assert_int_equal(host_store_counts(rig.store).bytes_used, 0);
        assert_int_equal(host_store_counts(rig.store).images, 0);
        rig_close();
    }
}

// Catches: what nobody has begun when the store stops, and that keeps room, a tier or a reference.
static void stops_with_reads_before_it(void **state) {
    (void)state;
    for (int round = 0; round < 20; round++) {
        rig_open(&on_device, 2, SIZE_MAX / 2);
        want(0, ADAPTERS);
        int asked = 0, ended = 0, images = 0;
        size_t bytes = 0;
        for (int i = 0; i < ADAPTERS; i++) {
            if (tier(i) == ADAPTER_ON_DISK) continue;
            for (int p = 0; p < rig.adapters[i]->page_count; p++) rig.adapters[i]->pages[p] = p;
            asked += host_store_copy(rig.store, rig.adapters[i]);
        }
        assert_true(asked >= 2);
        want(0, 0);
        host_store_stop(rig.store);
        struct host_event event;
        for (; host_store_poll(rig.store, &event, 1); ended++) {
            assert_true(event.copied);
            adapter_unref(event.adapter);
        }
        assert_int_equal(ended, asked);
        for (int i = 0; i < ADAPTERS; i++) {
            bool there = tier(i) == ADAPTER_IN_HOST;
            assert_true(there || tier(i) == ADAPTER_ON_DISK);
            images += there;
            bytes += there ? rig.bytes[i] : 0;
        }
        assert_int_equal(host_store_counts(rig.store).images, images);
        assert_int_equal(host_store_counts(rig.store).bytes_used, bytes);
        rig_close();
    }
}

// Catches: a failure that keeps room, a tier or a reference, or that ends others' reads.
static void a_failed_read_leaves_nothing(void **state) {
    (void)state;
    for (int threads = 0; threads <= 2; threads += 2) {
        rig_open(&on_host, threads, SIZE_MAX / 2);
        char *path = rig.adapters[1]->path, gone[] = "/nonexistent/adapter";
        rig.adapters[1]->path = gone;
        want(0, 3);
        struct host_event event = wait_event();
        assert_ptr_equal(event.adapter, rig.adapters[1]);
        assert_false(event.copied);
        assert_int_equal(event.status, STATUS_INVALID);
        assert_null(strstr(event.text, "/nonexistent"));
        adapter_unref(event.adapter);
        wait_tier(0, ADAPTER_IN_HOST);
        wait_tier(2, ADAPTER_IN_HOST);
        assert_int_equal(tier(1), ADAPTER_ON_DISK);
        assert_int_equal(host_store_counts(rig.store).bytes_used, rig.bytes[0] + rig.bytes[2]);
        assert_int_equal(host_store_counts(rig.store).read_failures, 1);
        rig.adapters[1]->path = path;
        want(1, 1);
        wait_tier(1, ADAPTER_IN_HOST);
        want(0, 0);
        rig_close();
    }
}

// Catches: an adopted image that is not counted, or kept where there is no room.
static void adopts_what_was_loaded(void **state) {
    (void)state;
    rig_open(&on_device, 0, 1);
    struct adapter *loaded = NULL;
    assert_int_equal(adapter_load(&rig.geometry, "y", -1, "dummy:rank=3", &loaded, NULL), STATUS_OK);
    host_store_adopt(rig.store, loaded); // one byte is no room
    assert_null(loaded->image);
    assert_int_equal(atomic_load(&loaded->tier), ADAPTER_ON_DISK);
    assert_int_equal(host_store_counts(rig.store).bytes_used, 0);
    adapter_unref(loaded);
    rig_close();
    rig_open(&on_device, 0, SIZE_MAX / 2);
    assert_int_equal(adapter_load(&rig.geometry, "y", -1, "dummy:rank=3", &loaded, NULL), STATUS_OK);
    host_store_adopt(rig.store, loaded);
    assert_int_equal(host_store_counts(rig.store).bytes_used, loaded->image_bytes);
    adapter_unref(loaded);
    assert_int_equal(host_store_counts(rig.store).bytes_used, 0);
    rig_close();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(copies_land_where_they_belong),
        cmocka_unit_test(the_account_is_kept),
        cmocka_unit_test(stops_with_reads_before_it),
        cmocka_unit_test(a_failed_read_leaves_nothing),
        cmocka_unit_test(adopts_what_was_loaded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
