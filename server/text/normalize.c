// Normalizers: what tokenizer.json does to a text before it is cut. A tokenizer has a flat list of
// steps, run in order on each part of the text between added tokens. Any thread; no state.
//
// Every step takes time linear in the text. That is why the canonical order of combining marks is
// made here by counting, and utf8proc is asked for decompositions and compositions only: its own
// reordering exchanges neighbours, which is quadratic in a run of marks, and clients choose those.
#include "server/text/text_internal.h"

#include "base/memory.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

enum normalize_kind {
    NORMALIZE_UNICODE,
    NORMALIZE_LOWERCASE,
    NORMALIZE_PREPEND,
    NORMALIZE_REPLACE,
    NORMALIZE_STRIP,
};

enum { NORMALIZE_STEPS_MAX = 64, DECOMPOSITION_MAX = 64 };

struct normalize_step {
    enum normalize_kind kind;
    bool compatible, compose;    // UNICODE: K forms, C forms
    bool strip_left, strip_right; // STRIP
    struct pattern *pattern;     // REPLACE
    char *content;               // PREPEND, REPLACE
    size_t content_bytes;
};

struct normalizer {
    struct normalize_step steps[NORMALIZE_STEPS_MAX];
    size_t count;
};

// ---- loading ----------------------------------------------------------------------------------

static enum status load_content(struct normalize_step *step, const json_t *json, const char *key,
                                struct error *err) {
    const json_t *content;
    enum status status = field_string(json, key, true, &content, err);
    if (status) return status;
    step->content_bytes = json_string_length(content);
    step->content = mem_strndup(json_string_value(content), step->content_bytes);
    return STATUS_OK;
}

static enum status add_step(void *owner, const char *type, const json_t *json,
                            struct error *err) {
    struct normalizer *normalizer = owner;
    if (normalizer->count == NORMALIZE_STEPS_MAX)
        return error_set(err, STATUS_UNSUPPORTED, "more than %d steps", NORMALIZE_STEPS_MAX);
    struct normalize_step *step = &normalizer->steps[normalizer->count++];
    if (strcmp(type, "NFC") == 0 || strcmp(type, "NFD") == 0 || strcmp(type, "NFKC") == 0 ||
        strcmp(type, "NFKD") == 0) {
        step->kind = NORMALIZE_UNICODE;
        step->compatible = type[2] == 'K';
        step->compose = type[strlen(type) - 1] == 'C';
        return STATUS_OK;
    }
    if (strcmp(type, "Lowercase") == 0) {
        step->kind = NORMALIZE_LOWERCASE;
        return STATUS_OK;
    }
    if (strcmp(type, "Prepend") == 0) {
        step->kind = NORMALIZE_PREPEND;
        return load_content(step, json, "prepend", err);
    }
    if (strcmp(type, "Replace") == 0) {
        step->kind = NORMALIZE_REPLACE;
        enum status status =
            pattern_load(json_object_get(json, "pattern"), &step->pattern, err);
        return status ? status : load_content(step, json, "content", err);
    }
    if (strcmp(type, "Strip") == 0) {
        step->kind = NORMALIZE_STRIP;
        enum status status = field_bool(json, "strip_left", true, &step->strip_left, err);
        return status ? status : field_bool(json, "strip_right", true, &step->strip_right, err);
    }
    return STATUS_NOT_FOUND;
}

enum status normalizer_load(const json_t *json, struct normalizer **out, struct error *err) {
    *out = mem_zalloc(1, sizeof **out);
    return components_load(json, "normalizer", "normalizers", add_step, *out, err);
}

void normalizer_destroy(struct normalizer *normalizer) {
    if (normalizer == NULL) return;
    for (size_t i = 0; i < normalizer->count; i++) {
        pattern_destroy(normalizer->steps[i].pattern);
        free(normalizer->steps[i].content);
    }
    free(normalizer);
}

// ---- Unicode normal forms ---------------------------------------------------------------------

struct codes {
    utf8proc_int32_t *items;
    size_t count, capacity;
};

static int combining_class(utf8proc_int32_t code) {
    return code < 0x300 ? 0 : utf8proc_get_property(code)->combining_class;
}

// Stable order of codes[0..count), all of class > 0, by class.
static void order_marks(utf8proc_int32_t *codes, size_t count) {
    if (count < 2) return;
    size_t starts[257] = {0};
    for (size_t i = 0; i < count; i++) starts[combining_class(codes[i]) + 1]++;
    for (size_t i = 0; i < 256; i++) starts[i + 1] += starts[i];
    utf8proc_int32_t few[32];
    utf8proc_int32_t *ordered = count <= 32 ? few : mem_alloc(count * sizeof *ordered);
    for (size_t i = 0; i < count; i++) ordered[starts[combining_class(codes[i])]++] = codes[i];
    memcpy(codes, ordered, count * sizeof *codes);
    if (ordered != few) free(ordered);
}

static void normal_form(const struct normalize_step *step, const struct text_buffer *from,
                        struct text_buffer *to) {
    utf8proc_option_t options = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE;
    if (step->compatible) options |= UTF8PROC_COMPAT;
    struct codes codes = {0};
    int boundary = 0;
    for (size_t at = 0; at < from->bytes;) {
        uint32_t code;
        at += utf8_next(from->data + at, from->bytes - at, &code);
        codes.items = text_grow(codes.items, codes.count + DECOMPOSITION_MAX, &codes.capacity,
                                sizeof *codes.items);
        utf8proc_ssize_t length =
            utf8proc_decompose_char((utf8proc_int32_t)code, codes.items + codes.count,
                                    DECOMPOSITION_MAX, options, &boundary);
        if (length > 0 && length <= DECOMPOSITION_MAX) codes.count += (size_t)length;
    }
    for (size_t i = 0, run; i < codes.count; i += run + 1) {
        for (run = 0; i + run < codes.count && combining_class(codes.items[i + run]) > 0;) run++;
        order_marks(codes.items + i, run);
    }
    if (step->compose) {
        utf8proc_ssize_t count = utf8proc_normalize_utf32(
            codes.items, (utf8proc_ssize_t)codes.count, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        if (count >= 0) codes.count = (size_t)count;
    }
    for (size_t i = 0; i < codes.count; i++)
        text_append_character(to, (uint32_t)codes.items[i]);
    free(codes.items);
}

static bool is_ascii(const struct text_buffer *text) {
    for (size_t i = 0; i < text->bytes; i++)
        if ((unsigned char)text->data[i] >= 0x80) return false;
    return true;
}

// ---- the other steps --------------------------------------------------------------------------

static void lowercase(const struct text_buffer *from, struct text_buffer *to) {
    for (size_t at = 0; at < from->bytes;) {
        uint32_t code;
        at += utf8_next(from->data + at, from->bytes - at, &code);
        if (code == 0x130) { // the one character whose lower case is two
            text_append(to, "i\xcc\x87", 3);
            continue;
        }
        text_append_character(to, (uint32_t)utf8proc_tolower((utf8proc_int32_t)code));
    }
}

static enum status replace(const struct normalize_step *step, struct encoding *encoding,
                           const struct text_buffer *from, struct text_buffer *to,
                           struct error *err) {
    struct cut_list *cuts = &encoding->cuts;
    enum status status =
        pattern_cut(step->pattern, &encoding->match, from->data, from->bytes, cuts, err);
    if (status) return status;
    for (size_t i = 0; i < cuts->count; i++) {
        const struct cut *cut = &cuts->items[i];
        if (cut->match)
            text_append(to, step->content, step->content_bytes);
        else
            text_append(to, from->data + cut->start, cut->end - cut->start);
    }
    return STATUS_OK;
}

static void strip(const struct normalize_step *step, const struct text_buffer *from,
                  struct text_buffer *to, bool *kept_start) {
    size_t start = 0, end = from->bytes, last = 0;
    uint32_t code;
    while (step->strip_left && start < end) {
        size_t length = utf8_next(from->data + start, end - start, &code);
        if (!char_is_space(code)) break;
        start += length;
    }
    for (size_t at = start; at < end;) {
        at += utf8_next(from->data + at, end - at, &code);
        if (!char_is_space(code)) last = at;
    }
    if (step->strip_right) end = last > start ? last : start;
    if (start > 0) *kept_start = false;
    text_append(to, from->data + start, end - start);
}

static enum status run_step(const struct normalize_step *step, struct encoding *encoding,
                            const struct text_buffer *from, struct text_buffer *to,
                            bool *kept_start, struct error *err) {
    switch (step->kind) {
    case NORMALIZE_UNICODE:
        if (is_ascii(from))
            text_append(to, from->data, from->bytes);
        else
            normal_form(step, from, to);
        break;
    case NORMALIZE_LOWERCASE: lowercase(from, to); break;
    case NORMALIZE_PREPEND:
        if (from->bytes > 0) text_append(to, step->content, step->content_bytes);
        text_append(to, from->data, from->bytes);
        break;
    case NORMALIZE_REPLACE: return replace(step, encoding, from, to, err);
    case NORMALIZE_STRIP: strip(step, from, to, kept_start); break;
    }
    return STATUS_OK;
}

enum status normalizer_run(const struct normalizer *normalizer, struct encoding *encoding,
                           const char *text, size_t bytes, bool *kept_start, struct error *err) {
    *kept_start = true;
    encoding->normal.bytes = 0;
    text_append(&encoding->normal, text, bytes);
    for (size_t i = 0; i < normalizer->count; i++) {
        encoding->normal_spare.bytes = 0;
        enum status status = run_step(&normalizer->steps[i], encoding, &encoding->normal,
                                      &encoding->normal_spare, kept_start, err);
        if (status) return status;
        struct text_buffer done = encoding->normal_spare;
        encoding->normal_spare = encoding->normal;
        encoding->normal = done;
    }
    return STATUS_OK;
}
