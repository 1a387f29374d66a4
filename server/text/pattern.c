// Patterns that cut a text: a regular expression, a literal text, a class of characters, or words.
// Normalizers, pre-tokenizers and decoders share them. A pattern is read-only after load; the
// memory of a match belongs to the caller. The text comes from clients, so a regular expression
// runs with limits on steps and memory, and reaching one is an error and not an endless loop.
#include "server/text/pattern_internal.h"

#include "base/memory.h"
#include "base/verify.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

enum pattern_kind { PATTERN_REGEX, PATTERN_TEXT, PATTERN_CLASS, PATTERN_WORDS };

struct pattern {
    enum pattern_kind kind;
    pcre2_code *code;
    char *text;
    size_t text_bytes;
    bool (*is_member)(uint32_t code);
};

struct pattern_match {
    pcre2_match_data *data;
    pcre2_match_context *context;
};

enum { STEPS_MIN = 10000000, STEPS_PER_BYTE = 32, MATCH_MEMORY_KIB = 64 * 1024 };

// ---- making -----------------------------------------------------------------------------------

enum status pattern_from_regex(const char *regex, size_t bytes, struct pattern **out,
                               struct error *err) {
    *out = NULL;
    struct text_buffer translated = {0};
    enum status status = regex_translate(regex, bytes, &translated, err);
    if (status) {
        free(translated.data);
        return status;
    }
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    if (context == NULL) return error_set(err, STATUS_NO_MEMORY, "out of memory");
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    int code;
    PCRE2_SIZE where;
    // ^ and $ match at every line, as they do in Oniguruma's Ruby syntax.
    uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C;
    pcre2_code *compiled =
        pcre2_compile((PCRE2_SPTR)(translated.data ? translated.data : ""), translated.bytes,
                      options, &code, &where, context);
    pcre2_compile_context_free(context);
    free(translated.data);
    if (compiled == NULL) {
        PCRE2_UCHAR reason[120];
        pcre2_get_error_message(code, reason, sizeof reason);
        return error_set(err, STATUS_UNSUPPORTED, "the regular expression %.120s cannot be used: "
                         "%s", regex, (char *)reason);
    }
    pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE); // slower, but not wrong, without
    *out = mem_zalloc(1, sizeof **out);
    (*out)->kind = PATTERN_REGEX;
    (*out)->code = compiled;
    return STATUS_OK;
}

struct pattern *pattern_from_text(const char *text, size_t bytes) {
    VERIFY_OP(bytes, >, 0);
    struct pattern *pattern = mem_zalloc(1, sizeof *pattern);
    pattern->kind = PATTERN_TEXT;
    pattern->text = mem_strndup(text, bytes);
    pattern->text_bytes = bytes;
    return pattern;
}

struct pattern *pattern_from_class(bool (*is_member)(uint32_t code)) {
    struct pattern *pattern = mem_zalloc(1, sizeof *pattern);
    pattern->kind = PATTERN_CLASS;
    pattern->is_member = is_member;
    return pattern;
}

struct pattern *pattern_of_words(void) {
    struct pattern *pattern = mem_zalloc(1, sizeof *pattern);
    pattern->kind = PATTERN_WORDS;
    return pattern;
}

enum status pattern_load(const json_t *json, struct pattern **out, struct error *err) {
    const json_t *regex = json_object_get(json, "Regex");
    const json_t *text = json_is_string(json) ? json : json_object_get(json, "String");
    *out = NULL;
    if (json_is_string(regex))
        return pattern_from_regex(json_string_value(regex), json_string_length(regex), out, err);
    if (!json_is_string(text) || json_string_length(text) == 0)
        return error_set(err, STATUS_INVALID,
                         "\"pattern\" must be {\"Regex\": ...} or {\"String\": ...}, not empty");
    *out = pattern_from_text(json_string_value(text), json_string_length(text));
    return STATUS_OK;
}

void pattern_destroy(struct pattern *pattern) {
    if (pattern == NULL) return;
    pcre2_code_free(pattern->code);
    free(pattern->text);
    free(pattern);
}

const char *pattern_text(const struct pattern *pattern, size_t *bytes) {
    *bytes = pattern->text_bytes;
    return pattern->text;
}

void pattern_match_destroy(struct pattern_match *match) {
    if (match == NULL) return;
    pcre2_match_data_free(match->data);
    pcre2_match_context_free(match->context);
    free(match);
}

// ---- cutting ----------------------------------------------------------------------------------

static void cut_append(struct cut_list *list, size_t start, size_t end, bool match) {
    list->items = text_grow(list->items, list->count + 1, &list->capacity, sizeof *list->items);
    list->items[list->count++] = (struct cut){start, end, match};
}

// A match at [start, end), after what the last one left; *done moves to its end.
static void cut_match(struct cut_list *list, size_t *done, size_t start, size_t end) {
    if (*done < start) cut_append(list, *done, start, false);
    cut_append(list, start, end, true);
    *done = end;
}

static struct pattern_match *match_create(void) {
    struct pattern_match *match = mem_zalloc(1, sizeof *match);
    match->data = pcre2_match_data_create(1, NULL);
    match->context = pcre2_match_context_create(NULL);
    VERIFY(match->data != NULL && match->context != NULL);
    pcre2_set_heap_limit(match->context, MATCH_MEMORY_KIB);
    return match;
}

// The next match at or after `from`: 1 found, 0 none, -1 a limit was reached.
static int regex_next(const struct pattern *pattern, struct pattern_match *match,
                      const char *text, size_t bytes, size_t from, size_t *start, size_t *end) {
    // The text was checked once; to check it again at each match would be quadratic.
    uint32_t options = PCRE2_NO_UTF_CHECK;
    int rc = pcre2_match(pattern->code, (PCRE2_SPTR)text, bytes, from, options, match->data,
                         match->context);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) // the interpreter may use more memory
        rc = pcre2_match(pattern->code, (PCRE2_SPTR)text, bytes, from, options | PCRE2_NO_JIT,
                         match->data, match->context);
    if (rc == PCRE2_ERROR_NOMATCH) return 0;
    if (rc < 0) return -1;
    const PCRE2_SIZE *offsets = pcre2_get_ovector_pointer(match->data);
    *start = offsets[0];
    *end = offsets[1];
    return 1;
}

// An empty match right behind a match does not count; the search goes on one character later.
static enum status cut_regex(const struct pattern *pattern, struct pattern_match **match,
                             const char *text, size_t bytes, struct cut_list *out, size_t *done,
                             struct error *err) {
    if (*match == NULL) *match = match_create();
    size_t steps = STEPS_MIN + bytes * STEPS_PER_BYTE;
    pcre2_set_match_limit((*match)->context, steps < UINT32_MAX ? (uint32_t)steps : UINT32_MAX);
    size_t from = 0, start, end;
    bool matched = false;
    while (from <= bytes) {
        int found = regex_next(pattern, *match, text, bytes, from, &start, &end);
        if (found < 0)
            return error_set(err, STATUS_INVALID,
                             "the text is too complex for the tokenizer's regular expression");
        if (found == 0) break;
        if (start > end) start = end; // \K is refused; a lookahead may still not end before it
        if (start == end && matched && *done == end) {
            uint32_t code;
            from += from < bytes ? utf8_next(text + from, bytes - from, &code) : 1;
            continue;
        }
        cut_match(out, done, start, end);
        matched = true;
        from = end;
    }
    return STATUS_OK;
}

// Not memmem for one byte: sanitizers check all that it may read at each call.
static const char *find_text(const struct pattern *pattern, const char *text, size_t bytes) {
    if (pattern->text_bytes == 1) return memchr(text, pattern->text[0], bytes);
    return memmem(text, bytes, pattern->text, pattern->text_bytes);
}

static void cut_text(const struct pattern *pattern, const char *text, size_t bytes,
                     struct cut_list *out, size_t *done) {
    const char *found;
    while ((found = find_text(pattern, text + *done, bytes - *done)))
        cut_match(out, done, (size_t)(found - text), (size_t)(found - text) + pattern->text_bytes);
}

static void cut_class(const struct pattern *pattern, const char *text, size_t bytes,
                      struct cut_list *out, size_t *done) {
    for (size_t at = 0, length; at < bytes; at += length) {
        uint32_t code;
        length = utf8_next(text + at, bytes - at, &code);
        if (pattern->is_member(code)) cut_match(out, done, at, at + length);
    }
}

static void cut_words(const char *text, size_t bytes, struct cut_list *out, size_t *done) {
    size_t start = 0;
    int run = 0; // 0 space, 1 word, 2 other
    for (size_t at = 0, length; at < bytes; at += length) {
        uint32_t code;
        length = utf8_next(text + at, bytes - at, &code);
        int kind = char_is_word(code) ? 1 : char_is_space(code) ? 0 : 2;
        if (kind == run) continue;
        if (run != 0) cut_match(out, done, start, at);
        start = at;
        run = kind;
    }
    if (run != 0) cut_match(out, done, start, bytes);
}

enum status pattern_cut(const struct pattern *pattern, struct pattern_match **match,
                        const char *text, size_t bytes, struct cut_list *out, struct error *err) {
    out->count = 0;
    size_t done = 0;
    enum status status = STATUS_OK;
    switch (pattern->kind) {
    case PATTERN_REGEX:
        status = cut_regex(pattern, match, text, bytes, out, &done, err);
        break;
    case PATTERN_TEXT: cut_text(pattern, text, bytes, out, &done); break;
    case PATTERN_CLASS: cut_class(pattern, text, bytes, out, &done); break;
    case PATTERN_WORDS: cut_words(text, bytes, out, &done); break;
    }
    if (status == STATUS_OK && done < bytes) cut_append(out, done, bytes, false);
    return status;
}
