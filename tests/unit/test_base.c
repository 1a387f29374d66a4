// base/ apart from safetensors: status names, error texts, UTF-8, the arena, files, log lines and
// element types. Expected bit patterns come from IEEE 754, hashes and JSON from their standards.
#include "base/dtype.h"
#include "base/error.h"
#include "base/file.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/sha256.h"
#include "base/utf8.h"

#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

// ---- Status and error ---------------------------------------------------------------------------

static void test_status(void **state) {
#define CHECK_STATUS(name, value, text)                                                            \
    assert_int_equal(name, value);                                                                 \
    assert_string_equal(status_name(name), #name);                                                 \
    assert_string_equal(status_text(name), text);
    STATUS_LIST(CHECK_STATUS)
    assert_string_equal(status_name((enum status)-999), "STATUS_UNKNOWN");
}

static void test_error(void **state) {
    struct error err;
    assert_int_equal(error_set(&err, STATUS_INVALID, "%d apples", 3), STATUS_INVALID);
    assert_string_equal(err.text, "3 apples");
    assert_string_equal(err.param, "");
    assert_int_equal(error_set_param(&err, STATUS_FULL, "top_p", "too much"), STATUS_FULL);
    assert_string_equal(err.param, "top_p");
    assert_int_equal(error_prefix(&err, "x=%d", 1), STATUS_FULL);
    assert_string_equal(err.text, "x=1: too much");
    (void)error_set_param(&err, STATUS_INVALID, "prompt", "so: %s", err.text); // its own text
    assert_string_equal(err.text, "so: x=1: too much");
    assert_int_equal(error_set(NULL, STATUS_IO, "nobody reads this"), STATUS_IO);
    error_clear(&err);
    assert_int_equal(err.status, STATUS_OK);
    assert_string_equal(err.text, "");
}

// A long text is cut; a cut inside a character leaves no half of it.
static void test_error_truncation(void **state) {
    struct error err;
    char text[512];
    for (int shift = 0; shift < 4; shift++) {
        memset(text, 'a', (size_t)shift);
        for (size_t i = (size_t)shift; i + 4 < sizeof text; i += 4)
            memcpy(text + i, "\xf0\x9f\x98\x80", 5);
        error_set(&err, STATUS_INVALID, "%s", text);
        assert_int_equal(strlen(err.text), sizeof err.text - 1);
        json_t *string = json_string(err.text); // refuses what is not UTF-8
        assert_non_null(string);
        json_decref(string);
    }
}

static void test_utf8(void **state) {
    static const struct {
        const char *what, *text, *wanted;
    } cases[] = {
        {"plain", "abc", "abc"},
        {"two, three, four bytes", "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80",
         "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80"},
        {"lone continuation", "a\x80z", "a?z"},
        {"overlong slash", "\xc0\xaf", "??"},
        {"overlong, three bytes", "\xe0\x80\xaf", "???"},
        {"surrogate", "\xed\xa0\x80", "???"},
        {"past U+10FFFF", "\xf4\x90\x80\x80", "????"},
        {"0xff", "\xff", "?"},
        {"ends too early", "a\xe2\x82", "a??"},
        {"last allowed", "\xf4\x8f\xbf\xbf", "\xf4\x8f\xbf\xbf"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[32];
        strcpy(text, cases[i].text);
        utf8_replace_invalid(text);
        if (strcmp(text, cases[i].wanted) != 0) fail_msg("%s: \"%s\"", cases[i].what, text);
    }
}

// ---- Memory -------------------------------------------------------------------------------------

static void test_arena(void **state) {
    struct arena *arena = arena_create();
    unsigned char *parts[200];
    for (int i = 0; i < 200; i++) {
        size_t bytes = (size_t)i * 37 % 500 + (i == 100 ? 100000 : 0);
        parts[i] = arena_alloc(arena, bytes);
        assert_int_equal((uintptr_t)parts[i] % 16, 0);
        for (size_t j = 0; j < bytes; j++) assert_int_equal(parts[i][j], 0);
        memset(parts[i], i + 1, bytes);
    }
    for (int i = 0; i < 200; i++) // no allocation overlaps another
        for (size_t j = 0; j < (size_t)i * 37 % 500; j++)
            assert_int_equal(parts[i][j], (unsigned char)(i + 1));
    assert_string_equal(arena_strndup(arena, "abcdef", 3), "abc");
    arena_destroy(arena);
    arena_destroy(NULL);
}

static void test_memory(void **state) {
    char *aligned = mem_alloc_aligned(65);
    assert_int_equal((uintptr_t)aligned % 64, 0);
    memset(aligned, 1, 65);
    free(aligned);
    char *copy = mem_strndup("ab\0cd", 5);
    assert_memory_equal(copy, "ab\0cd\0", 6);
    free(copy);
    free(mem_alloc(0));
}

// ---- Files --------------------------------------------------------------------------------------

static void test_files(void **state) {
    char path[] = "/tmp/lorad-file-XXXXXX", *data;
    int fd = mkstemp(path);
    size_t bytes;
    struct error err = {0};
    assert_int_equal(write(fd, "one\0two", 7), 7);
    assert_int_equal(file_read_all(path, 7, &data, &bytes, &err), STATUS_OK);
    assert_int_equal(bytes, 7);
    assert_memory_equal(data, "one\0two\0", 8); // with the NUL behind it
    free(data);
    assert_int_equal(file_read_all(path, 6, &data, &bytes, &err), STATUS_TOO_LARGE);
    char part[4] = "";
    assert_int_equal(file_read_at(fd, part, 3, 4, path, &err), STATUS_OK);
    assert_string_equal(part, "two");
    assert_int_equal(file_read_at(fd, part, 4, 4, path, &err), STATUS_IO);
    assert_null(strstr(err.text, "/tmp")); // the folder is not shown
    assert_int_equal(file_read_all("/tmp", 100, &data, &bytes, &err), STATUS_INVALID);
    assert_int_equal(file_read_all("/dev/zero", 100, &data, &bytes, &err), STATUS_INVALID);
    close(fd);
    unlink(path);
    assert_int_equal(file_read_all(path, 7, &data, &bytes, &err), STATUS_NOT_FOUND);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_int_equal(file_read_all(path, 7, &data, &bytes, &err), STATUS_INVALID); // would hang
    unlink(path);
}

static void test_paths_and_clock(void **state) {
    static const struct {
        const char *folder, *name, *wanted;
    } cases[] = {{"a", "b", "a/b"}, {"a/", "b", "a/b"}, {"/", "b", "/b"}, {"a//", "b/c", "a/b/c"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char *joined = path_join(cases[i].folder, cases[i].name);
        assert_string_equal(joined, cases[i].wanted);
        free(joined);
    }
    uint64_t before = clock_us();
    double middle = clock_seconds();
    uint64_t after = clock_us();
    assert_true((double)before <= middle * 1e6 + 1 && middle * 1e6 <= (double)after + 1);
}

// ---- Log ----------------------------------------------------------------------------------------

// Runs one log_event with stderr in a pipe; returns what came out.
static size_t capture_log(bool json, enum log_level least, enum log_level level, const char *message,
                          char *out, size_t out_bytes) {
    int ends[2], saved = dup(STDERR_FILENO);
    assert_int_equal(pipe(ends), 0);
    dup2(ends[1], STDERR_FILENO);
    log_configure(least, json);
    log_event(level, "adapter_loaded", "%s", message);
    log_configure(LOG_INFO, false);
    dup2(saved, STDERR_FILENO);
    close(saved);
    close(ends[1]);
    ssize_t got = read(ends[0], out, out_bytes - 1);
    close(ends[0]);
    assert_true(got >= 0);
    out[got] = 0;
    return (size_t)got;
}

static void test_log_text(void **state) {
    char line[8192];
    int year, month, day, hour, minute, second, millis, used = 0;
    capture_log(false, LOG_INFO, LOG_INFO, "name=x rank=8", line, sizeof line);
    assert_int_equal(sscanf(line, "%4d-%2d-%2dT%2d:%2d:%2d.%3dZ%n", &year, &month, &day, &hour,
                            &minute, &second, &millis, &used), 7);
    assert_int_equal(used, 24);
    assert_string_equal(line + used, " INFO  adapter_loaded name=x rank=8\n");
    capture_log(false, LOG_INFO, LOG_ERROR, "a\nb\x01\xff", line, sizeof line);
    assert_string_equal(line + 24, " ERROR adapter_loaded a\\nb\\x01?\n"); // no forged line
    assert_int_equal(capture_log(false, LOG_WARN, LOG_INFO, "quiet", line, sizeof line), 0);
    char *flood = mem_alloc(100001);
    memset(flood, 'x', 100000);
    flood[100000] = 0;
    size_t bytes = capture_log(false, LOG_INFO, LOG_WARN, flood, line, sizeof line);
    assert_true(bytes > 1000 && bytes < 4096);
    assert_int_equal(line[bytes - 1], '\n');
    free(flood);
}

static void test_log_json(void **state) {
    char line[8192];
    static const char message[] = "say \"hi\" \\ \t\n\x02 \xc3\xa9";
    capture_log(true, LOG_DEBUG, LOG_WARN, message, line, sizeof line);
    assert_int_equal(strcspn(line, "\n"), strlen(line) - 1);
    json_t *root = json_loads(line, JSON_REJECT_DUPLICATES, NULL);
    assert_non_null(root);
    assert_int_equal(json_object_size(root), 4);
    assert_int_equal(json_string_length(json_object_get(root, "ts")), 24);
    assert_string_equal(json_string_value(json_object_get(root, "level")), "warn");
    assert_string_equal(json_string_value(json_object_get(root, "event")), "adapter_loaded");
    assert_string_equal(json_string_value(json_object_get(root, "message")), message);
    json_decref(root);
}

static void test_log_levels(void **state) {
    enum log_level level = LOG_ERROR;
    assert_true(log_level_parse("debug", &level) && level == LOG_DEBUG);
    assert_true(log_level_parse("WARN", &level) && level == LOG_WARN);
    assert_false(log_level_parse("loud", &level));
    assert_int_equal(level, LOG_WARN);
}

// ---- Element types ------------------------------------------------------------------------------

static uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

// f16 <-> f32 pairs that are exact in both.
static const struct {
    uint16_t f16;
    float f32;
} halves[] = {
    {0x0000, 0.0f},       {0x8000, -0.0f},          {0x3c00, 1.0f},     {0xc000, -2.0f},
    {0x7bff, 65504.0f},   {0x0400, 0x1p-14f},       {0x0001, 0x1p-24f}, {0x03ff, 0x3ffp-24f},
    {0x8001, -0x1p-24f},  {0x3555, 0.333251953125f}, {0x7c00, INFINITY}, {0xfc00, -INFINITY},
    {0x3c01, 1.0009765625f},
};

// f32 values that must be rounded, and where to.
static const struct {
    float f32;
    uint16_t f16, bf16;
} rounded[] = {
    {65519.0f, 0x7bff, 0x4780},              // f16: below the halfway point to infinity
    {65520.0f, 0x7c00, 0x4780},              // f16: overflows
    {0x1p-25f, 0x0000, 0x3300},              // f16: tie between 0 and the smallest, to even
    {0x1.8p-24f, 0x0002, 0x33c0},            // f16: tie between 1 and 2, to even
    {0x1.000002p-25f, 0x0001, 0x3300},       // f16: just above the tie
    {0x1.ffcp-15f, 0x0400, 0x3880},          // f16: the largest subnormal rounds to a normal
    {1.0f + 0x1p-11f, 0x3c00, 0x3f80},       // f16: tie, to even (down)
    {1.0f + 0x3p-11f, 0x3c02, 0x3f80},       // f16: tie, to even (up)
    {1.0f + 0x1p-8f, 0x3c04, 0x3f80},        // bf16: tie, to even (down)
    {1.0f + 0x3p-8f, 0x3c0c, 0x3f82},        // bf16: tie, to even (up)
    {-0x1.fffffep127f, 0xfc00, 0xff80},      // both overflow
};

static void test_halves(void **state) {
    for (size_t i = 0; i < sizeof halves / sizeof halves[0]; i++) {
        float wide;
        uint16_t narrow;
        dtype_to_f32(&wide, &halves[i].f16, DTYPE_F16, 1);
        assert_int_equal(float_bits(wide), float_bits(halves[i].f32));
        dtype_convert(&narrow, DTYPE_F16, &halves[i].f32, DTYPE_F32, 1);
        assert_int_equal(narrow, halves[i].f16);
    }
}

static void test_rounding(void **state) {
    for (size_t i = 0; i < sizeof rounded / sizeof rounded[0]; i++) {
        uint16_t f16, bf16;
        dtype_convert(&f16, DTYPE_F16, &rounded[i].f32, DTYPE_F32, 1);
        dtype_convert(&bf16, DTYPE_BF16, &rounded[i].f32, DTYPE_F32, 1);
        if (f16 != rounded[i].f16 || bf16 != rounded[i].bf16)
            fail_msg("%a: f16 %04x, bf16 %04x; expected %04x, %04x", (double)rounded[i].f32, f16,
                     bf16, rounded[i].f16, rounded[i].bf16);
    }
}

// Every 16-bit pattern survives the way through f32 (NaN stays NaN), at odd addresses.
static void test_roundtrip(void **state) {
    enum { ALL = 65536 };
    static const enum dtype types[] = {DTYPE_F16, DTYPE_BF16};
    unsigned char *from = mem_alloc(2 * ALL + 1), *back = mem_alloc(2 * ALL + 1);
    float *wide = mem_alloc(4 * ALL);
    for (int i = 0; i < ALL; i++) memcpy(from + 1 + 2 * i, &(uint16_t){(uint16_t)i}, 2);
    for (int t = 0; t < 2; t++) {
        dtype_to_f32(wide, from + 1, types[t], ALL);
        dtype_convert(back + 1, types[t], wide, DTYPE_F32, ALL);
        for (int i = 0; i < ALL; i++) {
            uint16_t got;
            memcpy(&got, back + 1 + 2 * i, 2);
            uint16_t infinity = types[t] == DTYPE_F16 ? 0x7c00 : 0x7f80;
            if ((i & 0x7fff) > infinity)
                assert_true(isnan(wide[i]) && (got & 0x7fff) > infinity);
            else
                assert_int_equal(got, i);
        }
    }
    free(from);
    free(back);
    free(wide);
}

static void test_dtype_names(void **state) {
    assert_string_equal(dtype_name(DTYPE_F32), "f32");
    assert_string_equal(dtype_name(DTYPE_BF16), "bf16");
    assert_string_equal(dtype_name(DTYPE_F16), "f16");
    assert_string_equal(dtype_name(DTYPE_OTHER), "other");
    // f16 -> bf16 goes through f32; the same type is copied bit for bit, NaN payloads too.
    uint16_t one = 0x3c00, payload = 0x7d55, result;
    dtype_convert(&result, DTYPE_BF16, &one, DTYPE_F16, 1);
    assert_int_equal(result, 0x3f80);
    dtype_convert(&result, DTYPE_F16, &payload, DTYPE_F16, 1);
    assert_int_equal(result, payload);
}

// FIPS 180-4 examples.
static void test_sha256(void **state) {
    static const struct {
        const char *text, *hex;
    } cases[] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct sha256 hash;
        char hex[65];
        sha256_init(&hash);
        for (const char *s = cases[i].text; *s; s++) sha256_update(&hash, s, 1);
        sha256_hex(&hash, hex);
        assert_string_equal(hex, cases[i].hex);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_status),     cmocka_unit_test(test_error),
        cmocka_unit_test(test_error_truncation), cmocka_unit_test(test_utf8),
        cmocka_unit_test(test_arena),      cmocka_unit_test(test_memory),
        cmocka_unit_test(test_files),      cmocka_unit_test(test_paths_and_clock),
        cmocka_unit_test(test_log_text),   cmocka_unit_test(test_log_json),
        cmocka_unit_test(test_log_levels), cmocka_unit_test(test_halves),
        cmocka_unit_test(test_rounding),   cmocka_unit_test(test_roundtrip),
        cmocka_unit_test(test_dtype_names), cmocka_unit_test(test_sha256),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
