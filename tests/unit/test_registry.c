// Names and generations: which names are refused, what each transition leaves, and threads that
// load, replace, unload, find and list at once. A fake "load" makes a dummy adapter; the registry
// itself never reads a file.
#include "base/memory.h"
#include "server/registry.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "expect_abort.h"

static struct adapter *make(const char *name) {
    struct lora_geometry geometry = {.layers = 1, .in = {2, 2, 2, 2, 2, 2, 2},
                                     .out = {2, 2, 2, 2, 2, 2, 2}, .dtype = DTYPE_F32,
                                     .rank_max = 2, .page_elems = 64, .pool_pages = 1};
    struct adapter *adapter = NULL;
    if (adapter_load(&geometry, name, -1, "dummy:rank=1", &adapter, NULL) != STATUS_OK) abort();
    return adapter;
}

static void add(struct registry *registry, const char *name) {
    assert_int_equal(registry_begin(registry, name, false, NULL), STATUS_OK);
    registry_commit(registry, name, make(name));
}

static bool found(struct registry *registry, const char *name) {
    struct adapter *adapter = registry_find(registry, name);
    adapter_unref(adapter);
    return adapter != NULL;
}

static void checks_names(void **state) {
    struct registry *registry = registry_create("base");
    char long_name[400];
    memset(long_name, 'a', sizeof long_name);
    long_name[300] = 0;
    static const struct {
        const char *name, *says; // says NULL: a good name
    } names[] = {
        {"", "has 0 bytes; it must have 1 to 128"},
        {"a/b", "byte 0x2f at 1"},
        {"../x", "byte 0x2f at 2"},
        {"a\\b", "byte 0x5c at 1"},
        {"a b", "byte 0x20 at 1"},
        {"a\nb", "byte 0x0a at 1"},
        {"a\x7f", "byte 0x7f at 1"},
        {"\xc3\xa4", "byte 0xc3 at 0"},
        {".", "cannot be named"},
        {"..", "cannot be named"},
        {"base", "is the base model's name"},
        {"Base", NULL},
        {"...", NULL},
        {"sql-lora_v2.1:final@x", NULL},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        struct error err = {0};
        enum status wanted = names[i].says ? STATUS_INVALID : STATUS_OK;
        if (registry_check_name(registry, names[i].name, &err) != wanted ||
            (names[i].says && !strstr(err.text, names[i].says)))
            fail_msg("\"%s\": \"%s\"", names[i].name, err.text);
        if (names[i].says)
            assert_int_equal(registry_begin(registry, names[i].name, true, NULL), STATUS_INVALID);
    }
    assert_int_equal(registry_check_name(registry, long_name, NULL), STATUS_INVALID);
    long_name[129] = 0;
    assert_int_equal(registry_check_name(registry, long_name, NULL), STATUS_INVALID);
    long_name[128] = 0;
    assert_int_equal(registry_check_name(registry, long_name, NULL), STATUS_OK);
    assert_null(registry_find(registry, long_name));
    registry_destroy(registry);
}

static void one_name_through_its_life(void **state) {
    struct registry *registry = registry_create("base");
    struct error err = {0};
    assert_int_equal(registry_remove(registry, "a", &err), STATUS_NOT_FOUND);
    assert_non_null(strstr(err.text, "\"a\""));

    assert_int_equal(registry_begin(registry, "a", false, NULL), STATUS_OK);
    assert_null(registry_find(registry, "a")); // not before it is whole
    assert_int_equal(registry_begin(registry, "a", false, NULL), STATUS_BUSY);
    assert_int_equal(registry_begin(registry, "a", true, NULL), STATUS_BUSY);
    assert_int_equal(registry_remove(registry, "a", NULL), STATUS_BUSY);
    registry_commit(registry, "a", NULL); // the load failed: all as before
    assert_null(registry_find(registry, "a"));
    assert_int_equal(registry_remove(registry, "a", NULL), STATUS_NOT_FOUND);

    struct adapter *first = make("a");
    assert_int_equal(registry_begin(registry, "a", true, NULL), STATUS_OK); // nothing to replace
    registry_commit(registry, "a", first);
    struct adapter *request = registry_find(registry, "a");
    assert_ptr_equal(request, first);
    assert_int_equal(registry_begin(registry, "a", false, &err), STATUS_EXISTS);
    assert_non_null(strstr(err.text, "\"a\" is loaded already"));

    assert_int_equal(registry_begin(registry, "a", true, NULL), STATUS_OK);
    assert_true(found(registry, "a")); // the old one serves on
    registry_commit(registry, "a", NULL);
    assert_false(atomic_load(&first->retired)); // a failed replacement retires nobody
    struct adapter *second = make("a");
    assert_int_equal(registry_begin(registry, "a", true, NULL), STATUS_OK);
    registry_commit(registry, "a", second);
    assert_true(atomic_load(&first->retired));
    assert_false(atomic_load(&second->retired));
    assert_true(second->generation > first->generation);
    assert_int_equal(atomic_load(&request->refs), 1); // the request keeps what it began with
    adapter_unref(request);

    request = registry_find(registry, "a");
    assert_ptr_equal(request, second);
    assert_int_equal(registry_remove(registry, "a", NULL), STATUS_OK);
    assert_true(atomic_load(&request->retired));
    assert_false(found(registry, "a"));
    assert_int_equal(registry_remove(registry, "a", NULL), STATUS_NOT_FOUND);
    adapter_unref(request);
    registry_destroy(registry);
}

static void thousands_of_names(void **state) {
    enum { COUNT = 3000 };
    struct registry *registry = registry_create("base");
    char name[32];
    for (int i = 0; i < COUNT; i++) {
        snprintf(name, sizeof name, "adapter-%d", i * 7919 % COUNT);
        add(registry, name);
    }
    for (int i = 0; i < COUNT; i += 2) {
        snprintf(name, sizeof name, "adapter-%d", i);
        assert_int_equal(registry_remove(registry, name, NULL), STATUS_OK);
    }
    assert_int_equal(registry_begin(registry, "loading", false, NULL), STATUS_OK); // not listed
    struct adapter **list = NULL;
    int count = registry_list(registry, &list);
    assert_int_equal(count, COUNT / 2);
    for (int i = 0; i < count; i++) {
        assert_true(i == 0 || strcmp(list[i - 1]->name, list[i]->name) < 0);
        assert_int_equal(atoi(list[i]->name + strlen("adapter-")) % 2, 1);
        assert_int_equal(atomic_load(&list[i]->refs), 2);
        adapter_unref(list[i]);
    }
    free(list);
    for (int i = 0; i < COUNT; i++) {
        snprintf(name, sizeof name, "adapter-%d", i);
        assert_int_equal(found(registry, name), i % 2 == 1);
    }
    registry_commit(registry, "loading", NULL);
    registry_destroy(registry);
}

static void lists_nothing(void **state) {
    struct registry *registry = registry_create("base");
    struct adapter **list = NULL;
    assert_int_equal(registry_list(registry, &list), 0);
    free(list);
    registry_destroy(registry);
}

// ---- threads -----------------------------------------------------------------------------------

enum { THREADS = 4, ROUNDS = 200 };

struct race {
    struct registry *registry;
    pthread_barrier_t barrier;
    _Atomic int winners, busy, exists, other;
    _Atomic int loaded, unloaded;
};

// All begin one name at once; whoever wins commits after the others have been refused.
static void *load_one_name(void *argument) {
    struct race *race = argument;
    for (int round = 0; round < ROUNDS; round++) {
        pthread_barrier_wait(&race->barrier);
        enum status status = registry_begin(race->registry, "a", false, NULL);
        atomic_fetch_add(status == STATUS_OK     ? &race->winners
                         : status == STATUS_BUSY ? &race->busy
                                                 : &race->other, 1);
        pthread_barrier_wait(&race->barrier);
        if (status != STATUS_OK) continue;
        registry_commit(race->registry, "a", round % 2 ? make("a") : NULL);
        if (round % 2 && registry_remove(race->registry, "a", NULL) != STATUS_OK)
            atomic_fetch_add(&race->other, 1);
    }
    return NULL;
}

static void run_threads(struct race *race, void *(*body)(void *)) {
    pthread_t threads[THREADS];
    assert_int_equal(pthread_barrier_init(&race->barrier, NULL, THREADS), 0);
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, body, race), 0);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&race->barrier);
}

static void two_loads_of_one_name(void **state) {
    struct race race = {.registry = registry_create("base")};
    run_threads(&race, load_one_name);
    assert_int_equal(atomic_load(&race.winners), ROUNDS); // exactly one a round
    assert_int_equal(atomic_load(&race.busy), ROUNDS * (THREADS - 1));
    assert_int_equal(atomic_load(&race.other), 0);
    assert_false(found(race.registry, "a"));
    registry_destroy(race.registry);
}

// Load, replace, unload, find and list over three names in any order.
static void *churn(void *argument) {
    struct race *race = argument;
    static const char *const names[] = {"a", "b", "c"};
    unsigned seed = (unsigned)atomic_fetch_add(&race->winners, 1) + 1;
    pthread_barrier_wait(&race->barrier);
    for (int round = 0; round < 5 * ROUNDS; round++) {
        const char *name = names[rand_r(&seed) % 3];
        struct adapter *adapter = NULL, **list = NULL;
        switch (rand_r(&seed) % 4) {
        case 0:
            if (registry_begin(race->registry, name, rand_r(&seed) % 2, NULL) != STATUS_OK) break;
            if (rand_r(&seed) % 4) adapter = make(name);
            atomic_fetch_add(&race->loaded, adapter != NULL);
            registry_commit(race->registry, name, adapter);
            break;
        case 1:
            if (registry_remove(race->registry, name, NULL) == STATUS_OK)
                atomic_fetch_add(&race->unloaded, 1);
            break;
        case 2:
            adapter = registry_find(race->registry, name);
            if (adapter && strcmp(adapter->name, name) != 0) atomic_fetch_add(&race->other, 1);
            if (adapter) adapter_unref(registry_twin(race->registry, adapter));
            adapter_unref(adapter);
            break;
        default:
            for (int i = registry_list(race->registry, &list) - 1; i >= 0; i--)
                adapter_unref(list[i]);
            free(list);
        }
    }
    return NULL;
}

static void churn_of_names(void **state) {
    struct race race = {.registry = registry_create("base")};
    run_threads(&race, churn);
    assert_int_equal(atomic_load(&race.other), 0);
    assert_true(atomic_load(&race.loaded) > 0 && atomic_load(&race.unloaded) > 0);
    struct adapter **list = NULL;
    int count = registry_list(race.registry, &list);
    for (int i = 0; i < count; i++) {
        assert_int_equal(atomic_load(&list[i]->refs), 2); // the registry's and the list's
        assert_false(atomic_load(&list[i]->retired));
        adapter_unref(list[i]);
    }
    free(list);
    registry_destroy(race.registry);
}

static void expect_twin(struct registry *registry, const char *name, const char *wanted) {
    struct adapter *adapter = registry_find(registry, name);
    struct adapter *twin = registry_twin(registry, adapter);
    assert_string_equal(twin ? twin->name : "", wanted);
    if (twin) assert_ptr_not_equal(twin, adapter);
    adapter_unref(twin);
    adapter_unref(adapter);
}

static void add_with(struct registry *registry, const char *name, char content) {
    char digest[65];
    memset(digest, content, 64);
    digest[64] = 0;
    struct adapter *adapter = make(name);
    struct adapter_stamp stamp = {0};
    adapter_set_digest(adapter, digest, &stamp);
    assert_int_equal(registry_begin(registry, name, true, NULL), STATUS_OK);
    registry_commit(registry, name, adapter);
}

// Names of equal content share the pages of one, as long as that is registered.
static void equal_content_is_shared(void **state) {
    struct registry *registry = registry_create("base");
    add_with(registry, "a", '1');
    add_with(registry, "b", '1');
    add_with(registry, "c", '1');
    add_with(registry, "d", '2');
    expect_twin(registry, "a", "");
    expect_twin(registry, "b", "a");
    expect_twin(registry, "d", "");
    expect_twin(registry, "c", "a");
    struct adapter *gone = registry_find(registry, "a");
    assert_int_equal(registry_remove(registry, "a", NULL), STATUS_OK);
    assert_null(registry_twin(registry, gone)); // nobody's any more
    adapter_unref(gone);
    expect_twin(registry, "c", "");
    expect_twin(registry, "b", "c");
    add_with(registry, "c", '2'); // replaced by other content
    expect_twin(registry, "b", "");
    expect_twin(registry, "c", "d");
    registry_destroy(registry);
}

static void commit_without_begin(void *registry) {
    registry_commit(registry, "never-begun", NULL);
}
static void commit_twice(void *registry) {
    registry_commit(registry, "there", NULL);
}

static void wrong_use_aborts(void **state) {
    struct registry *registry = registry_create("base");
    add(registry, "there");
    assert_true(aborts(commit_without_begin, registry));
    assert_true(aborts(commit_twice, registry));
    registry_destroy(registry);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(checks_names),
        cmocka_unit_test(one_name_through_its_life),
        cmocka_unit_test(thousands_of_names),
        cmocka_unit_test(lists_nothing),
        cmocka_unit_test(two_loads_of_one_name),
        cmocka_unit_test(churn_of_names),
        cmocka_unit_test(equal_content_is_shared),
        cmocka_unit_test(wrong_use_aborts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
