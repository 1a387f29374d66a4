// The safetensors reader against files that break one rule each, and files that are legal though
// odd. Every case names what it catches; the rules are the format's README and docs on bad input.
// Files are written to a fresh temporary folder.
#include "base/file.h"
#include "base/memory.h"
#include "base/safetensors.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char folder[] = "/tmp/lorad-safetensors-XXXXXX";
static char path[256];

static int make_folder(void **state) {
    if (!mkdtemp(folder)) return -1;
    snprintf(path, sizeof path, "%s/t.safetensors", folder);
    return 0;
}

static int remove_folder(void **state) {
    char command[300];
    snprintf(command, sizeof command, "rm -r '%s'", folder);
    return system(command);
}

static void write_file(const char *name, const void *bytes, size_t count) {
    char *full = path_join(folder, name);
    FILE *file = fopen(full, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, count, file), count);
    assert_int_equal(fclose(file), 0);
    free(full);
}

// length (little-endian), header, then `data_bytes` bytes 0, 1, 2 ...
static void write_tensors(const char *name, uint64_t length, const char *header,
                          size_t header_bytes, size_t data_bytes) {
    unsigned char *bytes = mem_alloc(8 + header_bytes + data_bytes);
    for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)(length >> (8 * i));
    memcpy(bytes + 8, header, header_bytes);
    for (size_t i = 0; i < data_bytes; i++) bytes[8 + header_bytes + i] = (unsigned char)i;
    write_file(name, bytes, 8 + header_bytes + data_bytes);
    free(bytes);
}

static void write_header(const char *name, const char *header, size_t data_bytes) {
    write_tensors(name, strlen(header), header, strlen(header), data_bytes);
}

static void expect_open(const char *what, enum status wanted, const char *says) {
    struct safetensors *file = NULL;
    struct error err = {0};
    enum status status = safetensors_open_file(path, &file, &err);
    if (status == STATUS_OK) safetensors_close(file);
    if (status != wanted || (says && !strstr(err.text, says)))
        fail_msg("%s: %s, \"%s\"; expected %s, \"%s\"", what, status_name(status), err.text,
                 status_name(wanted), says ? says : "");
}

#define ENTRY(dtype, shape, offsets)                                                               \
    "{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}"
#define ONE(dtype, shape, offsets) "{\"a\":" ENTRY(dtype, shape, offsets) "}"
#define TWO(offsets_a, offsets_b)                                                                  \
    "{\"a\":" ENTRY("\"F32\"", "[1]", offsets_a) ",\"b\":" ENTRY("\"F32\"", "[1]", offsets_b) "}"

static const struct {
    const char *what, *header;
    size_t data_bytes;
    const char *says;
} bad_headers[] = {
    {"not JSON", "{nonsense", 0, "not valid JSON"},
    {"not UTF-8", "{\"\xff\xfe\":1}", 0, "not valid JSON"},
    {"an array", "[]", 0, "begin with '{'"},
    {"a leading space", " {}", 0, "begin with '{'"},
    {"two objects", "{}{}", 0, "not valid JSON"},
    {"trailing text", "{} x", 0, "not valid JSON"},
    {"nested too deep", "{\"a\":{\"shape\":[[1]]}}", 0, "nested deeper"},
    {"duplicate tensor name",
     "{\"a\":" ENTRY("\"U8\"", "[1]", "[0,1]") ",\"a\":" ENTRY("\"U8\"", "[1]", "[1,2]") "}", 2,
     "not valid JSON"},
    {"duplicate inner key",
     "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
     "not valid JSON"},
    {"escaped NUL in a name", "{\"a\\u0000b\":" ENTRY("\"U8\"", "[1]", "[0,1]") "}", 1,
     "not valid JSON"},
    {"lone surrogate in a name", "{\"\\ud800\":" ENTRY("\"U8\"", "[1]", "[0,1]") "}", 1,
     "not valid JSON"},
    {"entry not an object", "{\"a\":7}", 0, "must be an object"},
    {"dtype missing", "{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "\"dtype\" is missing"},
    {"shape missing", "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4,
     "\"shape\" is missing"},
    {"offsets missing", "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4,
     "\"data_offsets\" is missing"},
    {"unknown dtype", ONE("\"F33\"", "[1]", "[0,4]"), 4, "unknown dtype \"F33\""},
    {"lower-case dtype", ONE("\"f32\"", "[1]", "[0,4]"), 4, "unknown dtype \"f32\""},
    {"dtype a number", ONE("32", "[1]", "[0,4]"), 4, "\"dtype\" must be a string"},
    {"shape negative", ONE("\"F32\"", "[-1]", "[0,4]"), 4, "dimension 0"},
    {"shape float", ONE("\"F32\"", "[1.0]", "[0,4]"), 4, "dimension 0"},
    {"shape of strings", ONE("\"F32\"", "[1,\"1\"]", "[0,4]"), 4, "dimension 1"},
    {"shape a string", ONE("\"F32\"", "\"1\"", "[0,4]"), 4, "array of integers"},
    {"dimension 2^64", ONE("\"F32\"", "[18446744073709551616]", "[0,4]"), 4, "not valid JSON"},
    {"product wraps to 0", ONE("\"F32\"", "[4294967296,4294967296]", "[0,0]"), 0,
     "product of \"shape\""},
    {"product times dtype wraps", ONE("\"F32\"", "[4611686018427387904]", "[0,0]"), 0,
     "size of \"shape\""},
    {"nine dimensions", ONE("\"F32\"", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, "9 dimensions"},
    {"half a byte", ONE("\"F4\"", "[3]", "[0,2]"), 2, "whole bytes"},
    {"end before begin", ONE("\"F32\"", "[1]", "[4,0]"), 4, "begin <= end"},
    {"negative offset", ONE("\"F32\"", "[1]", "[-4,0]"), 4, "begin <= end"},
    {"one offset", ONE("\"F32\"", "[1]", "[0]"), 4, "two integers"},
    {"three offsets", ONE("\"F32\"", "[1]", "[0,4,8]"), 8, "two integers"},
    {"offsets not numbers", ONE("\"F32\"", "[1]", "[0,\"4\"]"), 4, "two integers"},
    {"offsets an object", ONE("\"F32\"", "[1]", "{}"), 4, "two integers"},
    {"past the end", ONE("\"F32\"", "[2]", "[0,8]"), 4, "ends at 8"},
    {"offset 2^63-1", ONE("\"F32\"", "[1]", "[0,9223372036854775807]"), 4, "ends at 92233"},
    {"size is not shape", ONE("\"F32\"", "[2]", "[0,4]"), 4, "span 4 bytes"},
    {"overlap", TWO("[0,4]", "[2,6]"), 6, "an overlap"},
    {"the same bytes twice", TWO("[0,4]", "[0,4]"), 4, "an overlap"},
    {"hole", TWO("[0,4]", "[8,12]"), 12, "a hole"},
    {"first is not 0", ONE("\"F32\"", "[1]", "[4,8]"), 8, "a hole"},
    {"empty tensor inside another",
     "{\"a\":" ENTRY("\"F32\"", "[1]", "[0,4]") ",\"b\":" ENTRY("\"F32\"", "[0]", "[2,2]") "}", 4,
     "tensor '"},
    {"trailing bytes", ONE("\"F32\"", "[1]", "[0,4]"), 5, "tensors end at byte 4"},
    {"data without tensors", "{}", 1, "tensors end at byte 0"},
    {"truncated", ONE("\"F32\"", "[1]", "[0,4]"), 3, "ends at 4"},
    {"metadata a string", "{\"__metadata__\":\"x\"}", 0, "object of strings"},
    {"metadata of numbers", "{\"__metadata__\":{\"x\":1}}", 0, "object of strings"},
};

static void test_bad_headers(void **state) {
    for (size_t i = 0; i < sizeof bad_headers / sizeof bad_headers[0]; i++) {
        write_header("t.safetensors", bad_headers[i].header, bad_headers[i].data_bytes);
        expect_open(bad_headers[i].what, STATUS_INVALID, bad_headers[i].says);
    }
}

static const struct {
    const char *what;
    uint64_t length;
    size_t header_bytes; // "{}" and spaces
    const char *says;
} bad_lengths[] = {
    {"length 0", 0, 0, "begin with '{'"},
    {"length 2^64-1", UINT64_MAX, 2, "at most 100000000"},
    {"length over the cap", 100000001, 2, "at most 100000000"},
    {"length past the file", 3, 2, "more than the file holds"},
    {"length at the cap, past the file", 100000000, 2, "more than the file holds"},
    {"big-endian length", UINT64_C(2) << 56, 2, "at most 100000000"},
};

static void test_bad_lengths(void **state) {
    for (size_t i = 0; i < sizeof bad_lengths / sizeof bad_lengths[0]; i++) {
        write_tensors("t.safetensors", bad_lengths[i].length, "{}", bad_lengths[i].header_bytes, 0);
        expect_open(bad_lengths[i].what, STATUS_INVALID, bad_lengths[i].says);
    }
    write_file("t.safetensors", "", 0);
    expect_open("0 bytes", STATUS_INVALID, "t.safetensors: a file of 0 bytes");
    write_file("t.safetensors", "\2\0\0\0\0\0\0", 7);
    expect_open("7 bytes", STATUS_INVALID, "a file of 7 bytes");
    write_tensors("t.safetensors", 4, "{}\0\0", 4, 0);
    expect_open("NUL tail", STATUS_INVALID, "not valid JSON");
    write_tensors("t.safetensors", 5, "{\"\0\":", 5, 0);
    expect_open("raw NUL in a name", STATUS_INVALID, "not valid JSON");
}

// Repeats `item` (a printf format with the counter) between "{" and "}".
static void write_repeated(const char *format, int count) {
    size_t item_bytes = strlen(format) + 16;
    char *header = mem_alloc(item_bytes * (size_t)count + 3), *end = header;
    *end++ = '{';
    for (int i = 0; i < count; i++) {
        if (i) *end++ = ',';
        end += snprintf(end, item_bytes, "\"%07d\":%s", i, format);
    }
    strcpy(end, "}");
    write_header("t.safetensors", header, 0);
    free(header);
}

static void test_caps(void **state) {
    write_repeated(ENTRY("\"F32\"", "[0]", "[0,0]"), 200000);
    expect_open("the most tensors that are allowed", STATUS_OK, NULL);
    write_repeated(ENTRY("\"F32\"", "[0]", "[0,0]"), 200001);
    expect_open("one tensor too many", STATUS_INVALID, "more than 200000 tensors");
    write_repeated(ENTRY("\"F32\"", "[0]", "[0,0]"), 1000000);
    expect_open("a million tensors", STATUS_INVALID, "more than 1600000 values");

    size_t name_bytes = 1 << 20;
    char *header = mem_alloc(name_bytes + 128);
    header[0] = '{', header[1] = '"';
    memset(header + 2, 'n', name_bytes);
    strcpy(header + 2 + name_bytes, "\":" ENTRY("\"F32\"", "[0]", "[0,0]") "}");
    write_header("t.safetensors", header, 0);
    expect_open("a name of 1 MiB", STATUS_INVALID, "1048576 bytes");
    free(header);

    enum { DIMS = 1000 };
    char wide[3 * DIMS + 128], *end = wide;
    end += sprintf(end, "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4],\"shape\":[1");
    for (int i = 1; i < DIMS; i++) end += sprintf(end, ",1");
    strcpy(end, "]}}");
    write_header("t.safetensors", wide, 4);
    expect_open("1,000 dimensions", STATUS_INVALID, "1000 dimensions; at most 8");
}

static const struct {
    const char *what, *header;
    size_t data_bytes, tensors;
} accepted[] = {
    {"no tensors", "{}", 0, 0},
    {"empty metadata", "{\"__metadata__\":{}}", 0, 0},
    {"metadata of strings", "{\"__metadata__\":{\"format\":\"pt\"}}", 0, 0},
    {"padding spaces", "{}      ", 0, 0},
    {"a scalar", ONE("\"F32\"", "[]", "[0,4]"), 4, 1},
    {"an empty tensor", ONE("\"F32\"", "[0]", "[0,0]"), 0, 1},
    {"empty beside full",
     "{\"a\":" ENTRY("\"F32\"", "[1]", "[0,4]") ",\"b\":" ENTRY("\"F32\"", "[0,7]", "[4,4]")
     ",\"c\":" ENTRY("\"F32\"", "[0]", "[0,0]") "}", 4, 3},
    {"eight dimensions", ONE("\"U8\"", "[1,1,1,1,1,1,1,2]", "[0,2]"), 2, 1},
    {"header order is not data order", TWO("[4,8]", "[0,4]"), 8, 2},
    {"a type lorad does not compute with", ONE("\"I64\"", "[1]", "[0,8]"), 8, 1},
    {"two elements to a byte", ONE("\"F4\"", "[4]", "[0,2]"), 2, 1},
};

static void test_accepted(void **state) {
    for (size_t i = 0; i < sizeof accepted / sizeof accepted[0]; i++) {
        write_header("t.safetensors", accepted[i].header, accepted[i].data_bytes);
        struct safetensors *file;
        struct error err = {0};
        if (safetensors_open_file(path, &file, &err) != STATUS_OK)
            fail_msg("%s: %s", accepted[i].what, err.text);
        assert_int_equal(safetensors_count(file), accepted[i].tensors);
        assert_null(safetensors_at(file, accepted[i].tensors));
        safetensors_close(file);
    }
}

// Values, offsets and lookup; the F32 tensor lies at an odd address of the file.
static void test_contents(void **state) {
    static const char header[] =
        "{\"byte\":" ENTRY("\"U8\"", "[1]", "[0,1]") ",\"wide\":"
        ENTRY("\"F32\"", "[2,3]", "[1,25]") ",\"half\":" ENTRY("\"BF16\"", "[2]", "[25,29]") "}";
    struct error err = {0};
    struct safetensors *file;
    write_header("t.safetensors", header, 29);
    assert_int_equal(safetensors_open_file(path, &file, &err), STATUS_OK);
    const struct tensor_info *wide = safetensors_find(file, "wide");
    assert_non_null(wide);
    assert_string_equal(wide->name, "wide");
    assert_int_equal(wide->dtype, DTYPE_F32);
    assert_string_equal(wide->dtype_text, "F32");
    assert_int_equal(wide->dims, 2);
    assert_int_equal(wide->shape[0], 2);
    assert_int_equal(wide->shape[1], 3);
    assert_int_equal(wide->elements, 6);
    assert_int_equal(wide->bytes, 24);
    assert_int_equal(wide->offset, 8 + strlen(header) + 1);
    unsigned char bytes[24];
    assert_int_equal(safetensors_read(file, wide, bytes, &err), STATUS_OK);
    for (int i = 0; i < 24; i++) assert_int_equal(bytes[i], i + 1);
    assert_int_equal(safetensors_find(file, "half")->dtype, DTYPE_BF16);
    assert_int_equal(safetensors_find(file, "byte")->dtype, DTYPE_OTHER);
    assert_null(safetensors_find(file, "wid"));
    assert_null(safetensors_find(file, ""));
    safetensors_close(file);
}

// The file is cut, or rewritten in place, between the check and the read.
static void test_changed_file(void **state) {
    unsigned char bytes[4];
    for (int rewrite = 0; rewrite < 2; rewrite++) {
        struct error err = {0};
        struct safetensors *file;
        write_header("t.safetensors", ONE("\"F32\"", "[1]", "[0,4]"), 4);
        assert_int_equal(safetensors_open_file(path, &file, &err), STATUS_OK);
        if (rewrite) {
            struct timespec other[2] = {{.tv_sec = 1000000000}, {.tv_sec = 1000000000}};
            assert_int_equal(utimensat(AT_FDCWD, path, other, 0), 0);
        } else {
            assert_int_equal(truncate(path, 10), 0);
        }
        assert_int_equal(safetensors_read(file, safetensors_at(file, 0), bytes, &err), STATUS_IO);
        assert_non_null(strstr(err.text, rewrite ? "changed while" : "ends 4 bytes too early"));
        safetensors_close(file);
    }
}

static void test_not_regular(void **state) {
    static const struct {
        const char *what, *path;
    } cases[] = {{"endless device", "/dev/zero"}, {"null device", "/dev/null"}, {"folder", "/"}};
    struct safetensors *file;
    struct error err = {0};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        if (safetensors_open_file(cases[i].path, &file, &err) != STATUS_INVALID)
            fail_msg("%s was not refused: %s", cases[i].what, err.text);
    char *fifo = path_join(folder, "fifo");
    assert_int_equal(mkfifo(fifo, 0600), 0);
    assert_int_equal(safetensors_open_file(fifo, &file, &err), STATUS_INVALID); // would hang
    unlink(fifo);
    assert_int_equal(safetensors_open_file(fifo, &file, &err), STATUS_NOT_FOUND);
    free(fifo);
}

// ---- Sharded folders ----------------------------------------------------------------------------

#define INDEX "model.safetensors.index.json"
#define SHARD(name) "{\"" name "\":" ENTRY("\"F32\"", "[1]", "[0,4]") "}"

static const struct {
    const char *what, *index;
    enum status wanted;
    const char *says;
} indexes[] = {
    {"two shards", "{\"metadata\":{\"total_size\":8},\"weight_map\":{\"a\":\"1.safetensors\","
     "\"b\":\"2.safetensors\"}}", STATUS_OK, NULL},
    {"not JSON", "{", STATUS_INVALID, INDEX ": the header is not valid JSON"},
    {"no map", "{}", STATUS_INVALID, "weight_map"},
    {"empty map", "{\"weight_map\":{}}", STATUS_INVALID, "weight_map"},
    {"map an array", "{\"weight_map\":[]}", STATUS_INVALID, "weight_map"},
    {"name twice", "{\"weight_map\":{\"a\":\"1.safetensors\",\"a\":\"2.safetensors\"}}",
     STATUS_INVALID, "not valid JSON"},
    {"shard a number", "{\"weight_map\":{\"a\":1}}", STATUS_INVALID, "must be a string"},
    {"parent folder", "{\"weight_map\":{\"a\":\"../1.safetensors\"}}", STATUS_INVALID,
     "plain file name"},
    {"absolute path", "{\"weight_map\":{\"a\":\"/1.safetensors\"}}", STATUS_INVALID,
     "plain file name"},
    {"sub-folder", "{\"weight_map\":{\"a\":\"x/1.safetensors\"}}", STATUS_INVALID,
     "plain file name"},
    {"dots in the name", "{\"weight_map\":{\"a\":\"1..safetensors\"}}", STATUS_INVALID,
     "plain file name"},
    {"another kind of file", "{\"weight_map\":{\"a\":\"1.bin\"}}", STATUS_INVALID,
     "ends in .safetensors"},
    {"missing shard", "{\"weight_map\":{\"a\":\"9.safetensors\"}}", STATUS_NOT_FOUND,
     "9.safetensors"},
    {"tensor not where listed", "{\"weight_map\":{\"a\":\"2.safetensors\"}}", STATUS_INVALID,
     "tensor 'a'"},
    {"listed, nowhere", "{\"weight_map\":{\"a\":\"1.safetensors\",\"c\":\"1.safetensors\"}}",
     STATUS_INVALID, "tensor 'c'"},
    {"in two shards", "{\"weight_map\":{\"a\":\"1.safetensors\",\"b\":\"3.safetensors\"}}",
     STATUS_INVALID, "in two files"},
    {"a bad shard is named", "{\"weight_map\":{\"a\":\"4.safetensors\"}}", STATUS_INVALID,
     "4.safetensors: a file of 0 bytes"},
};

static void test_indexes(void **state) {
    write_header("1.safetensors", SHARD("a"), 4);
    write_header("2.safetensors", SHARD("b"), 4);
    write_header("3.safetensors", SHARD("a"), 4);
    write_file("4.safetensors", "", 0);
    for (size_t i = 0; i < sizeof indexes / sizeof indexes[0]; i++) {
        write_file(INDEX, indexes[i].index, strlen(indexes[i].index));
        struct safetensors *file = NULL;
        struct error err = {0};
        enum status status = safetensors_open_folder(folder, &file, &err);
        if (status != indexes[i].wanted || (indexes[i].says && !strstr(err.text, indexes[i].says)))
            fail_msg("%s: %s, \"%s\"", indexes[i].what, status_name(status), err.text);
        if (status != STATUS_OK) continue;
        assert_int_equal(safetensors_count(file), 2);
        unsigned char bytes[4];
        const struct tensor_info *b = safetensors_find(file, "b");
        assert_int_equal(b->file, 1);
        assert_int_equal(safetensors_read(file, b, bytes, &err), STATUS_OK);
        assert_int_equal(bytes[3], 3);
        safetensors_close(file);
    }
}

static void test_folder_choice(void **state) {
    struct safetensors *file;
    struct error err = {0};
    char *empty = path_join(folder, "empty");
    assert_int_equal(mkdir(empty, 0700), 0);
    assert_int_equal(safetensors_open_folder(empty, &file, &err), STATUS_NOT_FOUND);
    assert_non_null(strstr(err.text, "neither model.safetensors nor"));
    free(empty);
    write_header("model.safetensors", SHARD("single"), 4);
    assert_int_equal(safetensors_open_folder(folder, &file, &err), STATUS_OK);
    assert_non_null(safetensors_find(file, "single"));
    safetensors_close(file);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_headers),   cmocka_unit_test(test_bad_lengths),
        cmocka_unit_test(test_caps),          cmocka_unit_test(test_accepted),
        cmocka_unit_test(test_contents),      cmocka_unit_test(test_changed_file),
        cmocka_unit_test(test_not_regular),   cmocka_unit_test(test_indexes),
        cmocka_unit_test(test_folder_choice),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
