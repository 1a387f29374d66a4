// The store: what a put or delete leaves for the next process to open, that a failed write leaves
// what was, and the two halves of a removal in the registry.
#include "base/memory.h"
#include "server/registry.h"
#include "server/store.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmocka.h>

static char folder[64];

static int make_folder(void **state) {
    strcpy(folder, "/tmp/lorad-store-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state) {
    static const char *const files[] = {"registry.sqlite", "registry.sqlite-wal",
                                        "registry.sqlite-shm"};
    char path[128];
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, files[i]);
        unlink(path);
    }
    return rmdir(folder);
}

static struct store *reopen(void) {
    struct store *store = NULL;
    struct error err = {0};
    if (store_open(folder, &store, &err) != STATUS_OK) fail_msg("%s", err.text);
    return store;
}

// "name=path/digest/dtype;" for each, in order.
static void expect(struct store *store, const char *wanted) {
    struct store_entry *list;
    int count;
    char text[1024] = "";
    assert_int_equal(store_list(store, &list, &count, NULL), STATUS_OK);
    for (int i = 0; i < count; i++)
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s=%s/%s/%s%s;", list[i].name,
                 list[i].path, list[i].digest, list[i].dtype, list[i].pinned ? "!" : "");
    store_list_free(list, count);
    assert_string_equal(text, wanted);
}

static void remembers(void **state) {
    struct store *store = reopen();
    expect(store, "");
    assert_int_equal(store_put(store, "b", "two", "d2", "f32", "stamp", false, NULL), STATUS_OK);
    assert_int_equal(store_put(store, "a'; --", "one \"x\"", "d1", "bf16", "stamp", false, NULL), STATUS_OK);
    assert_int_equal(store_put(store, "c", "three", "d3", "f32", "stamp", false, NULL), STATUS_OK);
    assert_int_equal(store_put(store, "b", "2", "d22", "f32", "stamp", false, NULL), STATUS_OK);
    assert_int_equal(store_delete(store, "c", NULL), STATUS_OK);
    assert_int_equal(store_delete(store, "never there", NULL), STATUS_OK);
    store_close(store);
    store = reopen();
    expect(store, "a'; --=one \"x\"/d1/bf16;b=2/d22/f32;");
    store_close(store);
}

static void failed_write_leaves_what_was(void **state) {
    struct store *store = reopen();
    assert_int_equal(store_put(store, "a", "one", "d1", "f32", "stamp", false, NULL), STATUS_OK);
    struct rlimit limits, none;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limits), 0);
    none = (struct rlimit){.rlim_cur = 0, .rlim_max = limits.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &none), 0);
    struct error err = {0};
    enum status put = store_put(store, "b", "two", "d2", "f32", "stamp", false, &err);
    enum status removed = store_delete(store, "a", NULL);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limits), 0);
    assert_int_equal(put, STATUS_IO);
    assert_int_equal(removed, STATUS_IO);
    assert_non_null(strstr(err.text, "--state-dir"));
    assert_null(strstr(err.text, folder));
    expect(store, "a=one/d1/f32;");
    assert_int_equal(store_put(store, "b", "two", "d2", "f32", "stamp", false, NULL), STATUS_OK); // goes on
    store_close(store);
    store = reopen();
    expect(store, "a=one/d1/f32;b=two/d2/f32;");
    store_close(store);
}

static void refuses_what_it_cannot_own(void **state) {
    struct store *first = reopen(), *second = NULL;
    struct error err = {0};
    assert_int_equal(store_open(folder, &second, &err), STATUS_BUSY);
    assert_null(second);
    store_close(first);
    char path[128];
    snprintf(path, sizeof path, "%s/registry.sqlite", folder);
    FILE *file = fopen(path, "r+");
    assert_non_null(file);
    // user_version: 4 bytes, big-endian, at offset 60 of the header (SQLite's file format, 1.3).
    assert_int_equal(fseek(file, 60, SEEK_SET), 0);
    assert_int_equal(fwrite("\0\0\0\x03", 1, 4, file), 4);
    fclose(file);
    assert_int_equal(store_open(folder, &second, &err), STATUS_INVALID);
    assert_non_null(strstr(err.text, "has version 3"));
}

static struct adapter *make(const char *name) {
    struct lora_geometry geometry = {.layers = 1, .in = {2, 2, 2, 2, 2, 2, 2},
                                     .out = {2, 2, 2, 2, 2, 2, 2}, .dtype = DTYPE_F32,
                                     .rank_max = 2, .page_elems = 64, .pool_pages = 1};
    struct adapter *adapter = NULL;
    if (adapter_load(&geometry, name, -1, "dummy:rank=1", &adapter, NULL) != STATUS_OK) abort();
    return adapter;
}

static void removal_in_two_halves(void **state) {
    struct registry *registry = registry_create("base");
    assert_int_equal(registry_begin_remove(registry, "a", NULL), STATUS_NOT_FOUND);
    assert_int_equal(registry_begin(registry, "a", false, NULL), STATUS_OK);
    assert_int_equal(registry_begin_remove(registry, "a", NULL), STATUS_BUSY);
    registry_commit(registry, "a", make("a"));
    for (int remove = 0; remove < 2; remove++) {
        assert_int_equal(registry_begin_remove(registry, "a", NULL), STATUS_OK);
        struct adapter *serving = registry_find(registry, "a");
        assert_non_null(serving);
        assert_int_equal(registry_begin_remove(registry, "a", NULL), STATUS_BUSY);
        assert_int_equal(registry_remove(registry, "a", NULL), STATUS_BUSY);
        assert_int_equal(registry_begin(registry, "a", true, NULL), STATUS_BUSY);
        registry_end_remove(registry, "a", remove);
        assert_int_equal(atomic_load(&serving->retired), remove);
        assert_int_equal(atomic_load(&serving->refs), 2 - remove);
        adapter_unref(serving);
    }
    assert_null(registry_find(registry, "a"));
    registry_destroy(registry);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(remembers, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(failed_write_leaves_what_was, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(refuses_what_it_cannot_own, make_folder, remove_folder),
        cmocka_unit_test(removal_in_two_halves),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
