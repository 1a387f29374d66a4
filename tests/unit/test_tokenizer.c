// The tokenizer against the reference library: for every tokenizer under
// tests/fixtures/tokenizers (made by tests/reference/make_tokenizers.py) ids, decoded text and
// streamed text must be what the library gave. Then bad files, bad text, bounds and threads.
#include "server/text/tokenizer.h"

#include "base/file.h"
#include "base/memory.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include <dirent.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#define FIXTURES LORAD_SOURCE_DIR "/tests/fixtures/tokenizers"
// Sanitizers make code several times slower.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SECONDS_MAX 15.0
#else
#define SECONDS_MAX 1.0
#endif
enum { VOCABULARY_MAX = 4096, NAMES_MAX = 64, FILE_MAX = 64 << 20, LINES_MAX = 4096 };

static const char *const open_shapes[] = {"gpt2", "llama3", "qwen2", "llama2", "mistral"};

// ---- fixtures ---------------------------------------------------------------------------------

struct lines {
    json_t *items[LINES_MAX];
    size_t count;
};

static void lines_load(const char *folder, const char *name, struct lines *lines) {
    char path[512], *data;
    size_t bytes;
    struct error err;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    assert_int_equal(file_read_all(path, FILE_MAX, &data, &bytes, &err), STATUS_OK);
    lines->count = 0;
    for (char *at = data, *end; at < data + bytes; at = end + 1) {
        end = memchr(at, '\n', (size_t)(data + bytes - at));
        assert_non_null(end);
        json_t *item = json_loadb(at, (size_t)(end - at), JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
        assert_non_null(item);
        assert_true(lines->count < LINES_MAX);
        lines->items[lines->count++] = item;
    }
    free(data);
}

static void lines_free(struct lines *lines) {
    for (size_t i = 0; i < lines->count; i++) json_decref(lines->items[i]);
}

static struct tokenizer *load(const char *name) {
    char folder[512];
    struct error err = {0};
    struct tokenizer *tokenizer;
    snprintf(folder, sizeof folder, FIXTURES "/%s", name);
    enum status status = tokenizer_load(folder, VOCABULARY_MAX, &tokenizer, &err);
    if (status) fail_msg("%s", err.text);
    return tokenizer;
}

static struct token_list encode(const struct tokenizer *tokenizer, const char *text, size_t bytes,
                                bool add_special, bool parse_special) {
    struct token_list list;
    struct error err = {0};
    if (tokenizer_encode(tokenizer, text, bytes, add_special, parse_special, &list, &err))
        fail_msg("%s", err.text);
    return list;
}

// ---- comparison with the reference ------------------------------------------------------------

static bool ids_equal(const struct token_list *list, const json_t *expected) {
    if (list->count != json_array_size(expected)) return false;
    for (size_t i = 0; i < list->count; i++)
        if (list->ids[i] != json_integer_value(json_array_get(expected, i))) return false;
    return true;
}

static void print_ids(const char *label, const struct token_list *list) {
    printf("  %s:", label);
    for (size_t i = 0; i < list->count; i++) printf(" %d", list->ids[i]);
    printf("\n");
}

static size_t wrong;

// Catches: guarded text that becomes special, or has other ids for its guards.
static void check_guarded(const char *name, const struct tokenizer *tokenizer, const json_t *string,
                          const json_t *parsed, const json_t *plain) {
    size_t bytes = json_string_length(string), guarded_bytes;
    if (strstr(json_string_value(string), "\xef\xb7\x90")) return; // U+FDD0 does not stay
    char *guarded = tokenizer_guard(tokenizer, json_string_value(string), bytes, &guarded_bytes);
    const struct {
        const char *text;
        size_t bytes;
        const json_t *ids;
    } cases[] = {{json_string_value(string), bytes, parsed}, {guarded, guarded_bytes, plain}};
    for (int i = 0; i < 2; i++) {
        struct token_list list;
        struct error err;
        assert_int_equal(tokenizer_encode_guarded(tokenizer, cases[i].text, cases[i].bytes, &list,
                                                  &err), STATUS_OK);
        if (!ids_equal(&list, cases[i].ids)) {
            char *text = json_dumps(string, JSON_ENCODE_ANY);
            printf("%s: ids of %s differ, %s guards\n", name, text, i ? "behind" : "without");
            print_ids("have", &list);
            free(text);
            wrong++;
        }
        free(list.ids);
    }
    free(guarded);
}

static void check_ids(const char *name, const struct tokenizer *tokenizer, const json_t *string,
                      bool add_special, bool parse_special, const json_t *expected) {
    struct token_list list = encode(tokenizer, json_string_value(string),
                                    json_string_length(string), add_special, parse_special);
    if (!ids_equal(&list, expected)) {
        char *shown = json_dumps(expected, JSON_COMPACT);
        char *text = json_dumps(string, JSON_ENCODE_ANY);
        printf("%s: ids of %s differ (special: add %d, parse %d)\n  want %s\n", name, text,
               add_special, parse_special, shown);
        print_ids("have", &list);
        free(shown);
        free(text);
        wrong++;
    }
    free(list.ids);
}

static void append(char **all, size_t *bytes, const char *text, size_t more) {
    *all = mem_realloc(*all, *bytes + more + 1);
    memcpy(*all + *bytes, text, more);
    *bytes += more;
    (*all)[*bytes] = '\0';
}

static bool is_utf8(const char *text, size_t bytes) { // an independent judge: jansson's
    json_t *string = json_stringn(text, bytes);
    json_decref(string);
    return string != NULL;
}

// Every piece of the stream must be whole characters; together they must be the text.
static char *stream(const struct tokenizer *tokenizer, const struct token_list *list,
                    bool skip_special, size_t *bytes) {
    struct detokenizer *detokenizer = detokenizer_create(tokenizer, skip_special);
    char *all = NULL;
    const char *text;
    size_t more;
    *bytes = 0;
    for (size_t i = 0; i <= list->count; i++) {
        if (i < list->count)
            detokenizer_push(detokenizer, list->ids[i], &text, &more);
        else
            detokenizer_finish(detokenizer, &text, &more);
        assert_true(is_utf8(text, more));
        append(&all, bytes, text, more);
    }
    detokenizer_destroy(detokenizer);
    return all;
}

static void check_text(const char *name, const struct tokenizer *tokenizer, const json_t *ids,
                       bool skip_special, const json_t *expected) {
    struct token_list list = {mem_alloc(sizeof(int32_t) * (json_array_size(ids) + 1)), 0};
    for (; list.count < json_array_size(ids); list.count++)
        list.ids[list.count] = (int32_t)json_integer_value(json_array_get(ids, list.count));
    const char *want = json_string_value(expected);
    size_t want_bytes = json_string_length(expected), bytes, streamed_bytes;
    char *text = tokenizer_decode(tokenizer, list.ids, list.count, skip_special, &bytes);
    char *streamed = stream(tokenizer, &list, skip_special, &streamed_bytes);
    if (bytes != want_bytes || memcmp(text, want, bytes) != 0) {
        printf("%s: decoded \"%s\", want \"%s\" (skip %d)\n", name, text, want, skip_special);
        print_ids("ids", &list);
        wrong++;
    }
    if (bytes != streamed_bytes || memcmp(text, streamed, bytes) != 0) {
        printf("%s: streamed \"%s\", decoded \"%s\"\n", name, streamed, text);
        wrong++;
    }
    free(text);
    free(streamed);
    free(list.ids);
}

static void check_tokenizer(const char *name, const struct lines *strings) {
    static struct lines expected, random;
    char folder[512];
    snprintf(folder, sizeof folder, FIXTURES "/%s", name);
    lines_load(folder, "expected.jsonl", &expected);
    lines_load(folder, "decode.jsonl", &random);
    struct tokenizer *tokenizer = load(name);
    assert_true(expected.count >= 100 && random.count >= 40);
    for (size_t i = 0; i < expected.count; i++) {
        const json_t *line = expected.items[i], *ids = json_object_get(line, "ids");
        const json_t *string = strings->items[json_integer_value(json_object_get(line, "n"))];
        const json_t *plain = json_object_get(line, "plain");
        const json_t *bos = json_object_get(line, "bos");
        const json_t *text = json_object_get(line, "text"), *all = json_object_get(line, "all");
        if (text == NULL) text = string;
        check_ids(name, tokenizer, string, false, true, ids);
        check_ids(name, tokenizer, string, false, false, plain ? plain : ids);
        check_guarded(name, tokenizer, string, ids, plain ? plain : ids);
        if (bos) check_ids(name, tokenizer, string, true, true, bos);
        check_text(name, tokenizer, ids, true, text);
        check_text(name, tokenizer, ids, false, all ? all : text);
    }
    for (size_t i = 0; i < random.count; i++) {
        const json_t *line = random.items[i], *ids = json_object_get(line, "ids");
        const json_t *text = json_object_get(line, "text"), *all = json_object_get(line, "all");
        check_text(name, tokenizer, ids, true, text);
        check_text(name, tokenizer, ids, false, all ? all : text);
    }
    tokenizer_destroy(tokenizer);
    lines_free(&expected);
    lines_free(&random);
}

static void test_reference(void **state) {
    static struct lines strings;
    lines_load(FIXTURES, "strings.jsonl", &strings);
    assert_true(strings.count >= 1000);
    DIR *directory = opendir(FIXTURES);
    assert_non_null(directory);
    size_t tokenizers = 0;
    wrong = 0;
    for (struct dirent *entry; (entry = readdir(directory));) {
        if (entry->d_name[0] == '.' || strchr(entry->d_name, '.')) continue;
        size_t before = wrong;
        check_tokenizer(entry->d_name, &strings);
        if (wrong > before) printf("%s: %zu differences\n", entry->d_name, wrong - before);
        tokenizers++;
    }
    closedir(directory);
    lines_free(&strings);
    assert_true(tokenizers >= 20);
    assert_int_equal(wrong, 0);
}

// ---- special tokens ---------------------------------------------------------------------------

static void test_special_text_is_plain_text(void **state) {
    static const struct {
        const char *name, *text;
    } table[] = {
        {"gpt2", "<|endoftext|>"}, {"llama3", "<|begin_of_text|>"}, {"llama3", "<|eot_id|>"},
        {"qwen2", "<|im_start|>"}, {"llama2", "</s>"},              {"mistral", "[INST]"},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        struct tokenizer *tokenizer = load(table[i].name);
        int32_t id = tokenizer_find(tokenizer, table[i].text);
        assert_true(id >= 0);
        size_t bytes = strlen(table[i].text);
        struct token_list parsed = encode(tokenizer, table[i].text, bytes, false, true);
        struct token_list plain = encode(tokenizer, table[i].text, bytes, false, false);
        assert_int_equal(parsed.count, 1);
        assert_int_equal(parsed.ids[0], id);
        for (size_t j = 0; j < plain.count; j++) assert_int_not_equal(plain.ids[j], id);
        // Plain text comes back even where special tokens are left out.
        size_t decoded_bytes;
        char *decoded =
            tokenizer_decode(tokenizer, plain.ids, plain.count, true, &decoded_bytes);
        assert_string_equal(decoded, table[i].text);
        free(decoded);
        free(parsed.ids);
        free(plain.ids);
        tokenizer_destroy(tokenizer);
    }
}

// ignore_merges finds a whole piece in the vocabulary; a special token must not be found so.
static void test_ignore_merges_does_not_find_special(void **state);

// ---- bad files --------------------------------------------------------------------------------

#define MODEL(vocab, merges)                                                                       \
    "{\"model\":{\"type\":\"BPE\",\"vocab\":" vocab ",\"merges\":" merges "}}"
#define WITH(field)                                                                                \
    "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1},\"merges\":[]}," field "}"
#define ADDED(fields) WITH("\"added_tokens\":[{" fields "}]")

static const struct {
    const char *json; // NULL: no file
    enum status status;
    const char *says;
} bad_files[] = {
    {NULL, STATUS_NOT_FOUND, "tokenizer.json"},
    {"", STATUS_INVALID, "JSON"},
    {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0", STATUS_INVALID, "JSON"},
    {"[]", STATUS_INVALID, "object"},
    {"{}", STATUS_INVALID, "\"model\""},
    {"{\"model\":3}", STATUS_INVALID, "\"model\""},
    {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}}", STATUS_UNSUPPORTED, "Unigram"},
    {"{\"model\":{\"type\":\"WordPiece\",\"vocab\":{}}}", STATUS_UNSUPPORTED, "WordPiece"},
    {"{\"model\":{\"type\":\"BPE\",\"merges\":[]}}", STATUS_INVALID, "vocab"},
    {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0}}}", STATUS_INVALID, "merges"},
    {MODEL("{}", "[]"), STATUS_INVALID, "vocab"},
    {MODEL("{\"a\":-1}", "[]"), STATUS_INVALID, "negative"},
    {MODEL("{\"a\":0.5}", "[]"), STATUS_INVALID, "integer"},
    {MODEL("{\"a\":\"0\"}", "[]"), STATUS_INVALID, "integer"},
    {MODEL("{\"a\":10}", "[]"), STATUS_INVALID, "vocabulary size 10"},
    {MODEL("{\"a\":4294967296}", "[]"), STATUS_INVALID, "vocabulary size 10"},
    {MODEL("{\"a\":1,\"b\":1}", "[]"), STATUS_INVALID, "id 1 belongs"},
    {MODEL("{\"a\":1,\"a\":2}", "[]"), STATUS_INVALID, "duplicate"},
    {MODEL("{\"a\":0,\"b\":1}", "[\"a b\"]"), STATUS_INVALID, "\"ab\""},
    {MODEL("{\"a\":0,\"ab\":1}", "[\"a b\"]"), STATUS_INVALID, "\"b\""},
    {MODEL("{\"b\":0,\"ab\":1}", "[[\"a\",\"b\"]]"), STATUS_INVALID, "\"a\""},
    {MODEL("{\"a\":0}", "[\"a\"]"), STATUS_INVALID, "merges[0]"},
    {MODEL("{\"a\":0}", "[\"a a a\"]"), STATUS_INVALID, "merges[0]"},
    {MODEL("{\"a\":0}", "[[\"a\"]]"), STATUS_INVALID, "merges[0]"},
    {MODEL("{\"a\":0}", "[[1,2]]"), STATUS_INVALID, "merges[0]"},
    {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[],\"unk_token\":\"?\"}}",
     STATUS_INVALID, "unk_token"},
    {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[],\"byte_fallback\":1}}",
     STATUS_INVALID, "byte_fallback"},
    {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[],\"dropout\":0.1}}",
     STATUS_UNSUPPORTED, "dropout"},
    {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[],"
     "\"end_of_word_suffix\":\"</w>\"}}",
     STATUS_UNSUPPORTED, "end_of_word_suffix"},
    {ADDED("\"id\":0,\"content\":\"x\""), STATUS_INVALID, "id 0, which belongs to \"a\""},
    {ADDED("\"id\":5,\"content\":\"a\""), STATUS_INVALID, "id 5 here and id 0 elsewhere"},
    {WITH("\"added_tokens\":[{\"id\":5,\"content\":\"x\"},{\"id\":5,\"content\":\"y\"}]"),
     STATUS_INVALID, "added_tokens[1]"},
    {WITH("\"added_tokens\":[{\"id\":5,\"content\":\"x\"},{\"id\":6,\"content\":\"x\"}]"),
     STATUS_INVALID, "added_tokens[1]"},
    {ADDED("\"id\":-2,\"content\":\"x\""), STATUS_INVALID, "negative"},
    {ADDED("\"id\":10,\"content\":\"x\""), STATUS_INVALID, "vocabulary size 10"},
    {ADDED("\"id\":5,\"content\":\"\""), STATUS_INVALID, "empty"},
    {ADDED("\"id\":5"), STATUS_INVALID, "content"},
    {ADDED("\"content\":\"x\""), STATUS_INVALID, "integer"},
    {WITH("\"added_tokens\":{}"), STATUS_INVALID, "array"},
    {WITH("\"normalizer\":{\"type\":\"BertNormalizer\"}"), STATUS_UNSUPPORTED, "BertNormalizer"},
    {WITH("\"normalizer\":{\"type\":\"Precompiled\"}"), STATUS_UNSUPPORTED, "Precompiled"},
    {WITH("\"normalizer\":[]"), STATUS_INVALID, "normalizer"},
    {WITH("\"normalizer\":{\"type\":\"Sequence\"}"), STATUS_INVALID, "normalizers"},
    {WITH("\"normalizer\":{\"type\":\"Replace\",\"content\":\"\"}"), STATUS_INVALID, "pattern"},
    {WITH("\"pre_tokenizer\":{\"type\":\"BertPreTokenizer\"}"), STATUS_UNSUPPORTED,
     "BertPreTokenizer"},
    {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\","
          "\"pattern\":{\"Regex\":\"(\"}}"),
     STATUS_UNSUPPORTED, "regular expression"},
    {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\","
          "\"pattern\":{\"Regex\":\"[a&&b]\"}}"),
     STATUS_UNSUPPORTED, "&&"},
    {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Mixed\","
          "\"pattern\":{\"String\":\"a\"}}"),
     STATUS_UNSUPPORTED, "Mixed"},
    {WITH("\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"ab\"}"), STATUS_INVALID,
     "one character"},
    {WITH("\"post_processor\":{\"type\":\"BertProcessing\"}"), STATUS_UNSUPPORTED,
     "BertProcessing"},
    {WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":["
          "{\"SpecialToken\":{\"id\":\"<s>\"}},{\"Sequence\":{\"id\":\"A\"}}]}"),
     STATUS_INVALID, "<s>"},
    {WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[]}"),
     STATUS_UNSUPPORTED, "sequence A"},
    {WITH("\"decoder\":{\"type\":\"WordPiece\"}"), STATUS_UNSUPPORTED, "WordPiece"},
    {WITH("\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Fuse\"},"
          "{\"type\":\"ByteLevel\"}]}"),
     STATUS_UNSUPPORTED, "joined"},
};

// Loads a tokenizer from text, through a fresh folder.
static enum status load_text(const char *json, struct tokenizer **out, struct error *err) {
    char folder[] = "/tmp/lorad-tokenizer-XXXXXX", path[64];
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/tokenizer.json", folder);
    if (json != NULL) {
        FILE *file = fopen(path, "w");
        assert_non_null(file);
        assert_int_equal(fwrite(json, 1, strlen(json), file), strlen(json));
        assert_int_equal(fclose(file), 0);
    }
    enum status status = tokenizer_load(folder, 10, out, err);
    unlink(path);
    rmdir(folder);
    return status;
}

static void test_bad_files(void **state) {
    for (size_t i = 0; i < sizeof bad_files / sizeof *bad_files; i++) {
        struct tokenizer *tokenizer;
        struct error err = {0};
        enum status status = load_text(bad_files[i].json, &tokenizer, &err);
        if (status != bad_files[i].status || strstr(err.text, bad_files[i].says) == NULL ||
            strstr(err.text, "tokenizer.json") == NULL)
            fail_msg("%s: %s \"%s\", want %s and \"%s\"", bad_files[i].json, status_name(status),
                     err.text, status_name(bad_files[i].status), bad_files[i].says);
        assert_null(tokenizer);
    }
}

// No prefix of a good file may load or crash.
static void test_truncated_file(void **state) {
    static const char good[] =
        "{\"added_tokens\":[{\"id\":2,\"content\":\"<s>\",\"special\":true}],"
        "\"normalizer\":{\"type\":\"NFC\"},"
        "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"aa\":1},\"merges\":[\"a a\"]}}";
    struct tokenizer *tokenizer;
    struct error err = {0};
    assert_int_equal(load_text(good, &tokenizer, &err), STATUS_OK);
    tokenizer_destroy(tokenizer);
    for (size_t length = 0; length + 1 < sizeof good; length += 3) {
        char cut[sizeof good];
        memcpy(cut, good, length);
        cut[length] = '\0';
        assert_int_equal(load_text(cut, &tokenizer, &err), STATUS_INVALID);
    }
}

static void test_ignore_merges_does_not_find_special(void **state) {
    static const char json[] =
        "{\"added_tokens\":[{\"id\":3,\"content\":\"ab\",\"special\":true}],"
        "\"model\":{\"type\":\"BPE\",\"ignore_merges\":true,"
        "\"vocab\":{\"a\":0,\"b\":1,\"ab\":3},\"merges\":[]}}";
    struct tokenizer *tokenizer;
    struct error err = {0};
    assert_int_equal(load_text(json, &tokenizer, &err), STATUS_OK);
    struct token_list parsed = encode(tokenizer, "ab", 2, false, true);
    struct token_list plain = encode(tokenizer, "ab", 2, false, false);
    assert_int_equal(parsed.count, 1);
    assert_int_equal(parsed.ids[0], 3);
    assert_int_equal(plain.count, 2);
    free(parsed.ids);
    free(plain.ids);
    tokenizer_destroy(tokenizer);
}

// ---- bad text ---------------------------------------------------------------------------------

static void test_invalid_utf8(void **state) {
    static const struct {
        const char *text;
        size_t bytes;
    } table[] = {
        {"\xff", 1},
        {"a\x80", 2},
        {"\xc0\xaf", 2},
        {"\xe0\x80\x80", 3},
        {"\xed\xa0\x80", 3},
        {"\xf4\x90\x80\x80", 4},
        {"\xe4\xbd", 2},
        {"ok\xf0\x9f\x98", 5},
        {"\xf8\x88\x80\x80\x80", 5},
        {"12345678\xc3", 9},
    };
    struct tokenizer *tokenizer = load("llama3");
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        struct token_list list;
        struct error err = {0};
        assert_int_equal(tokenizer_encode(tokenizer, table[i].text, table[i].bytes, true, true,
                                          &list, &err),
                         STATUS_INVALID);
        assert_non_null(strstr(err.text, "UTF-8"));
        assert_null(list.ids);
    }
    tokenizer_destroy(tokenizer);
}

// A pattern that backtracks without end must give an error in bounded time.
static void test_match_limit(void **state) {
    static const char json[] =
        "{\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\",\"pattern\":"
        "{\"Regex\":\"(?:a+)+b\"}},"
        "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1},\"merges\":[]}}";
    struct tokenizer *tokenizer;
    struct error err = {0};
    assert_int_equal(load_text(json, &tokenizer, &err), STATUS_OK);
    char text[4001];
    memset(text, 'a', 4000);
    text[2000] = 'c';
    text[4000] = 'b'; // needed, or the search ends before it begins
    struct token_list list;
    assert_int_equal(tokenizer_encode(tokenizer, text, sizeof text, false, false, &list, &err),
                     STATUS_INVALID);
    assert_non_null(strstr(err.text, "too complex"));
    tokenizer_destroy(tokenizer);
}

// 1 MB of one unit, which must take well under a second whatever the shape of the tokenizer.
static void test_long_runs(void **state) {
    static const char *const units[] = {"a", " ", "\n", "0", "!", "\xf0\x9f\x98\x80",
                                        "\xcc\x81\xcc\x96", "<|", "a\n", " \n"};
    enum { BYTES = 1 << 20 };
    char *text = mem_alloc(BYTES + 8);
    for (size_t shape = 0; shape < sizeof open_shapes / sizeof *open_shapes; shape++) {
        struct tokenizer *tokenizer = load(open_shapes[shape]);
        double slowest = 0;
        for (size_t unit = 0; unit < sizeof units / sizeof *units; unit++) {
            size_t length = strlen(units[unit]), bytes = 0;
            for (; bytes < BYTES; bytes += length) memcpy(text + bytes, units[unit], length);
            double start = clock_seconds();
            struct token_list list = encode(tokenizer, text, bytes, false, false);
            double seconds = clock_seconds() - start;
            if (seconds > slowest) slowest = seconds;
            if (seconds > SECONDS_MAX)
                fail_msg("%s: 1 MB of unit %zu took %.2f s", open_shapes[shape], unit, seconds);
            free(list.ids);
        }
        print_message("%s: slowest 1 MB in %.3f s\n", open_shapes[shape], slowest);
        tokenizer_destroy(tokenizer);
    }
    free(text);
}

// Marks in descending order of class after marks of another: quadratic where neighbours are
// exchanged one by one.
static void test_unordered_marks(void **state) {
    enum { MARKS = 200000 };
    char *text = mem_alloc(MARKS * 2);
    for (size_t i = 0; i < MARKS; i++)
        memcpy(text + 2 * i, i < MARKS / 2 ? "\xcc\x81" : "\xcc\x96", 2);
    struct tokenizer *tokenizer = load("qwen2");
    double start = clock_seconds();
    struct token_list list = encode(tokenizer, text, MARKS * 2, false, false);
    assert_true(clock_seconds() - start < SECONDS_MAX);
    size_t bytes;
    char *decoded = tokenizer_decode(tokenizer, list.ids, list.count, false, &bytes);
    assert_int_equal(bytes, MARKS * 2);
    assert_memory_equal(decoded, "\xcc\x96\xcc\x96", 4); // class 220 before class 230
    assert_memory_equal(decoded + bytes - 2, "\xcc\x81", 2);
    free(decoded);
    free(list.ids);
    tokenizer_destroy(tokenizer);
    free(text);
}

// ---- single tokens and streams ----------------------------------------------------------------

static void test_token_text(void **state) {
    static const struct {
        const char *name, *token, *text;
    } table[] = {
        {"gpt2", "\xc4\xa0the", " the"},        {"gpt2", "\xc4\x8a", "\n"},
        {"gpt2", "\xc3\xa4", "\xef\xbf\xbd"}, // the byte e4 alone
        {"llama2", "\xe2\x96\x81the", " the"}, // the space stays: other text may come before
        {"llama2", "<0x0A>", "\n"},             {"llama2", "<0xE4>", "\xef\xbf\xbd"},
        {"mistral", "[INST]", "[INST]"},        {"metaspace_always", "\xe2\x96\x81t", " t"},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        struct tokenizer *tokenizer = load(table[i].name);
        int32_t id = tokenizer_find(tokenizer, table[i].token);
        if (id < 0) fail_msg("%s has no token %s", table[i].name, table[i].token);
        size_t bytes;
        char *text = tokenizer_token_text(tokenizer, id, &bytes);
        assert_string_equal(text, table[i].text);
        assert_int_equal(bytes, strlen(table[i].text));
        free(text);
        tokenizer_destroy(tokenizer);
    }
}

static void test_lookups(void **state) {
    struct tokenizer *tokenizer = load("llama2");
    assert_int_equal(tokenizer_find(tokenizer, "<s>"), 1);
    assert_int_equal(tokenizer_find(tokenizer, "<0x00>"), 3);
    assert_int_equal(tokenizer_find(tokenizer, "no such token"), -1);
    assert_int_equal(tokenizer_find(tokenizer, ""), -1);
    int last = tokenizer_vocabulary(tokenizer) - 1;
    assert_in_range(last, 258, VOCABULARY_MAX - 1);
    // Ids without a token are nothing, not a crash: a model may have more logits than tokens.
    const int32_t ids[] = {-1, last + 1, INT32_MAX, INT32_MIN};
    size_t bytes;
    char *text = tokenizer_decode(tokenizer, ids, 4, true, &bytes);
    assert_int_equal(bytes, 0);
    free(text);
    text = tokenizer_token_text(tokenizer, last + 1, &bytes);
    assert_string_equal(text, "");
    free(text);
    tokenizer_destroy(tokenizer);
}

// A character of four byte tokens comes whole; an unfinished one comes as U+FFFD at the end.
static void test_split_character(void **state) {
    static const struct {
        const char *name;
        const char *bytes[4]; // tokens of f0 9f 98 80
        const char *cut;      // what two of them give in the end
    } table[] = {
        {"gpt2", {"\xc3\xb0", "\xc5\x81", "\xc4\xba", "\xc4\xa2"}, "\xef\xbf\xbd"},
        {"llama2", {"<0xF0>", "<0x9F>", "<0x98>", "<0x80>"}, "\xef\xbf\xbd\xef\xbf\xbd"},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        struct tokenizer *tokenizer = load(table[i].name);
        struct token_list list = {mem_alloc(4 * sizeof(int32_t)), 4};
        for (size_t j = 0; j < 4; j++) {
            list.ids[j] = tokenizer_find(tokenizer, table[i].bytes[j]);
            assert_true(list.ids[j] >= 0);
        }
        size_t bytes;
        char *text = stream(tokenizer, &list, true, &bytes);
        assert_string_equal(text, "\xf0\x9f\x98\x80");
        free(text);
        list.count = 2;
        text = stream(tokenizer, &list, true, &bytes);
        assert_string_equal(text, table[i].cut);
        free(text);
        free(list.ids);
        tokenizer_destroy(tokenizer);
    }
}

// ---- threads ----------------------------------------------------------------------------------

struct worker {
    const struct tokenizer *tokenizer;
    const struct lines *strings, *expected;
    size_t wrong;
};

static void *encode_all(void *argument) {
    struct worker *worker = argument;
    for (size_t i = 0; i < worker->expected->count; i++) {
        const json_t *line = worker->expected->items[i];
        const json_t *string =
            worker->strings->items[json_integer_value(json_object_get(line, "n"))];
        struct token_list list;
        enum status status =
            tokenizer_encode(worker->tokenizer, json_string_value(string),
                             json_string_length(string), false, true, &list, NULL);
        if (status || !ids_equal(&list, json_object_get(line, "ids"))) worker->wrong++;
        size_t bytes;
        char *text = tokenizer_decode(worker->tokenizer, list.ids, list.count, true, &bytes);
        free(text);
        free(list.ids);
    }
    return NULL;
}

static void test_two_threads(void **state) {
    static struct lines strings, expected;
    lines_load(FIXTURES, "strings.jsonl", &strings);
    for (size_t shape = 0; shape < sizeof open_shapes / sizeof *open_shapes; shape++) {
        char folder[512];
        snprintf(folder, sizeof folder, FIXTURES "/%s", open_shapes[shape]);
        lines_load(folder, "expected.jsonl", &expected);
        struct tokenizer *tokenizer = load(open_shapes[shape]);
        struct worker workers[2];
        pthread_t threads[2];
        for (size_t i = 0; i < 2; i++) {
            workers[i] = (struct worker){tokenizer, &strings, &expected, 0};
            assert_int_equal(pthread_create(&threads[i], NULL, encode_all, &workers[i]), 0);
        }
        for (size_t i = 0; i < 2; i++) {
            pthread_join(threads[i], NULL);
            assert_int_equal(workers[i].wrong, 0);
        }
        tokenizer_destroy(tokenizer);
        lines_free(&expected);
    }
    lines_free(&strings);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference),
        cmocka_unit_test(test_special_text_is_plain_text),
        cmocka_unit_test(test_ignore_merges_does_not_find_special),
        cmocka_unit_test(test_bad_files),
        cmocka_unit_test(test_truncated_file),
        cmocka_unit_test(test_invalid_utf8),
        cmocka_unit_test(test_match_limit),
        cmocka_unit_test(test_long_runs),
        cmocka_unit_test(test_unordered_marks),
        cmocka_unit_test(test_token_text),
        cmocka_unit_test(test_lookups),
        cmocka_unit_test(test_split_character),
        cmocka_unit_test(test_two_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
