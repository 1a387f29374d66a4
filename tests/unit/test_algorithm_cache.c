// kernels/algorithm_cache.h: what was measured is there at the next open, whatever else is in the file.
#include "kernels/algorithm_cache.h"

#include "base/file.h"
#include "base/memory.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

static char folder[] = "/tmp/lorad-algorithms-XXXXXX";
static char nested[sizeof folder + 20];

static int make_folder(void **state) {
    (void)state;
    snprintf(nested, sizeof nested, "%s/a/b", mkdtemp(folder));
    return 0;
}

static int drop_folder(void **state) {
    (void)state;
    char command[100];
    snprintf(command, sizeof command, "rm -r %s", folder);
    return system(command);
}

static struct algorithm algorithm_of(int out, int tokens, int fill) {
    struct algorithm a = {.out = out, .in = 64, .tokens = tokens};
    for (int i = 0; i < ALGORITHM_BYTES; i++) a.bytes[i] = (unsigned char)(fill + 3 * i);
    return a;
}

static void expect(const struct algorithm_cache *cache, int out, int tokens, int fill) {
    const struct algorithm *found = algorithm_cache_find(cache, out, 64, tokens);
    struct algorithm wanted = algorithm_of(out, tokens, fill);
    assert_non_null(found);
    assert_memory_equal(found->bytes, wanted.bytes, ALGORITHM_BYTES);
}

static void add(struct algorithm_cache *cache, int out, int tokens, int fill, bool measured) {
    struct algorithm a = algorithm_of(out, tokens, fill);
    algorithm_cache_add(cache, &a, measured);
}

static void survives_a_restart(void **state) {
    (void)state;
    struct algorithm_cache *cache = algorithm_cache_open(nested, "card 1, bf16");
    for (int i = 1; i <= 100; i++) add(cache, i, 8, i, i % 2);
    add(cache, 7, 16, 200, true);
    add(cache, 7, 16, 201, true); // better than before
    for (int i = 1; i <= 100; i++) expect(cache, i, 8, i);
    algorithm_cache_close(cache);

    cache = algorithm_cache_open(nested, "card 1, bf16");
    for (int i = 1; i <= 100; i++)
        if (i % 2) expect(cache, i, 8, i);
        else assert_null(algorithm_cache_find(cache, i, 64, 8));
    expect(cache, 7, 16, 201);
    assert_null(algorithm_cache_find(cache, 7, 65, 16));
    algorithm_cache_close(cache);

    cache = algorithm_cache_open(nested, "card 2, bf16"); // another card has its own
    assert_null(algorithm_cache_find(cache, 7, 64, 16));
    algorithm_cache_close(cache);
}

static void path_of_only_file(char *path, size_t bytes) {
    DIR *dir = opendir(nested);
    for (struct dirent *entry; (entry = readdir(dir));)
        if (strstr(entry->d_name, "card-3")) snprintf(path, bytes, "%s/%s", nested, entry->d_name);
    closedir(dir);
}

// A line cut short by a crash, one of something else, and a file that is another's altogether.
static void passes_over_what_is_broken(void **state) {
    (void)state;
    char path[400] = "";
    struct algorithm_cache *cache = algorithm_cache_open(nested, "card 3");
    add(cache, 1, 1, 1, true);
    algorithm_cache_close(cache);
    path_of_only_file(path, sizeof path);
    FILE *file = fopen(path, "a");
    fprintf(file, "5 64 1 00ff\nhello\n-1 64 1 00\n\n");
    fclose(file);
    cache = algorithm_cache_open(nested, "card 3");
    expect(cache, 1, 1, 1);
    assert_null(algorithm_cache_find(cache, 5, 64, 1));
    add(cache, 2, 1, 2, true);
    algorithm_cache_close(cache);
    cache = algorithm_cache_open(nested, "card 3");
    expect(cache, 1, 1, 1);
    expect(cache, 2, 1, 2);
    algorithm_cache_close(cache);

    file = fopen(path, "w");
    fprintf(file, "somebody else's\n");
    fclose(file);
    cache = algorithm_cache_open(nested, "card 3");
    assert_null(algorithm_cache_find(cache, 1, 64, 1));
    add(cache, 4, 1, 4, true);
    algorithm_cache_close(cache);
    cache = algorithm_cache_open(nested, "card 3");
    expect(cache, 4, 1, 4);
    algorithm_cache_close(cache);
}

static void does_without_a_folder(void **state) {
    (void)state;
    const char *folders[] = {NULL, "/proc/no/such"};
    for (int i = 0; i < 2; i++) {
        struct algorithm_cache *cache = algorithm_cache_open(folders[i], "card");
        add(cache, 1, 1, 1, true);
        expect(cache, 1, 1, 1);
        algorithm_cache_close(cache);
    }
}

static void folder_by_environment(void **state) {
    (void)state;
    static const char *const cases[][4] = {{"/x", "/y", "/z", "/x"},
                                           {"", "/y", "/z", "/y/lorad"},
                                           {"", "", "/z", "/z/.cache/lorad"},
                                           {"", "", "", NULL}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        setenv("LORAD_CACHE_DIR", cases[i][0], 1);
        setenv("XDG_CACHE_HOME", cases[i][1], 1);
        setenv("HOME", cases[i][2], 1);
        char *got = algorithm_cache_folder();
        if (cases[i][3]) assert_string_equal(got, cases[i][3]);
        else assert_null(got);
        free(got);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(survives_a_restart), cmocka_unit_test(passes_over_what_is_broken),
        cmocka_unit_test(does_without_a_folder), cmocka_unit_test(folder_by_environment)};
    return cmocka_run_group_tests(tests, make_folder, drop_folder);
}
