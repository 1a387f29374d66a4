// The tokenizer as a whole: loads tokenizer.json and runs its stages in order. Loading happens on
// the main thread at start; tokenizer_encode on the thread pool of api/, on many threads at once.
//
// A text goes through: added tokens of the raw text -> normalizer -> added tokens of the normal
// text -> pre-tokenizer -> byte-pair encoding -> template. Only tokenizer.json is read; whatever in
// it would change the ids and is not carried out is refused by its name, and so is a file whose
// parts contradict each other.
#include "server/text/text_internal.h"

#include "base/file.h"
#include "base/memory.h"

#include <stdlib.h>
#include <string.h>

enum { FILE_BYTES_MAX = 256 << 20, TEXT_BYTES_MAX = 256 << 20 };

// ---- loading ----------------------------------------------------------------------------------

static enum status load_stages(struct tokenizer *tokenizer, const json_t *root, int id_max,
                               struct error *err) {
    enum status status =
        bpe_load(&tokenizer->bpe, &tokenizer->vocabulary, json_object_get(root, "model"), err);
    if (status) return status;
    status = normalizer_load(json_object_get(root, "normalizer"), &tokenizer->normalizer, err);
    if (status) return status;
    status = added_tokens_load(json_object_get(root, "added_tokens"), tokenizer->normalizer,
                               &tokenizer->vocabulary, &tokenizer->added, err);
    if (status) return status;
    status = pretokenizer_load(json_object_get(root, "pre_tokenizer"), &tokenizer->pretokenizer,
                               err);
    if (status) return status;
    status = post_template_load(json_object_get(root, "post_processor"), id_max,
                                &tokenizer->post, err);
    if (status) return status;
    return decoder_load(json_object_get(root, "decoder"), &tokenizer->decoder, err);
}

static enum status load_file(struct tokenizer *tokenizer, const char *path, int id_max,
                             struct error *err) {
    char *data;
    size_t bytes;
    enum status status = file_read_all(path, FILE_BYTES_MAX, &data, &bytes, err);
    if (status) return status;
    json_error_t json_error;
    json_t *root = json_loadb(data, bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &json_error);
    free(data);
    if (root == NULL)
        status = error_set(err, STATUS_INVALID, "not valid JSON at line %d: %.120s",
                           json_error.line, json_error.text);
    else if (!json_is_object(root))
        status = error_set(err, STATUS_INVALID, "must hold a JSON object");
    else
        status = load_stages(tokenizer, root, id_max, err);
    json_decref(root);
    if (status) error_prefix(err, "%s", path);
    return status;
}

enum status tokenizer_load(const char *folder, int vocabulary_max, struct tokenizer **out,
                           struct error *err) {
    *out = NULL;
    if (vocabulary_max <= 0)
        return error_set(err, STATUS_INVALID, "the vocabulary size %d must be above 0",
                         vocabulary_max);
    struct tokenizer *tokenizer = mem_zalloc(1, sizeof *tokenizer);
    vocabulary_init(&tokenizer->vocabulary, vocabulary_max);
    char *path = path_join(folder, "tokenizer.json");
    enum status status = load_file(tokenizer, path, vocabulary_max, err);
    free(path);
    if (status)
        tokenizer_destroy(tokenizer);
    else
        *out = tokenizer;
    return status;
}

void tokenizer_destroy(struct tokenizer *tokenizer) {
    if (tokenizer == NULL) return;
    decoder_destroy(tokenizer->decoder);
    post_template_deinit(&tokenizer->post);
    pretokenizer_destroy(tokenizer->pretokenizer);
    added_tokens_destroy(tokenizer->added);
    normalizer_destroy(tokenizer->normalizer);
    bpe_deinit(&tokenizer->bpe);
    vocabulary_deinit(&tokenizer->vocabulary);
    free(tokenizer);
}

// ---- encoding ---------------------------------------------------------------------------------

void encoding_deinit(struct encoding *encoding) {
    free(encoding->text.data);
    free(encoding->spare.data);
    free(encoding->spans.items);
    free(encoding->spare_spans.items);
    free(encoding->normal.data);
    free(encoding->normal_spare.data);
    free(encoding->cuts.items);
    pattern_match_destroy(encoding->match);
    bpe_scratch_deinit(&encoding->bpe);
    free(encoding->ids.ids);
}

// Fills encoding->text and ->spans with normal text and the added tokens within it.
static enum status find_added(const struct tokenizer *tokenizer, struct encoding *encoding,
                              const char *text, size_t bytes, struct error *err) {
    struct span_list raw = {0};
    added_tokens_cut(tokenizer->added, false, encoding->special, text, bytes, 0, true, &raw);
    enum status status = STATUS_OK;
    for (size_t i = 0; i < raw.count && status == STATUS_OK; i++) {
        struct span span = raw.items[i];
        bool kept_start;
        if (span.id >= 0) {
            span_append(&encoding->spans, span);
            continue;
        }
        status = normalizer_run(tokenizer->normalizer, encoding, text + span.start, span.bytes,
                                &kept_start, err);
        if (status) break;
        size_t base = encoding->text.bytes;
        text_append(&encoding->text, encoding->normal.data, encoding->normal.bytes);
        added_tokens_cut(tokenizer->added, true, encoding->special,
                         encoding->normal.data, encoding->normal.bytes, base,
                         span.first && kept_start, &encoding->spans);
    }
    free(raw.items);
    return status;
}

static void append_all(struct id_list *to, const struct id_list *from) {
    for (size_t i = 0; i < from->count; i++) id_append(to, from->ids[i]);
}

static enum status encode(const struct tokenizer *tokenizer, struct encoding *encoding,
                          const char *text, size_t bytes, bool add_special, struct error *err) {
    enum status status = find_added(tokenizer, encoding, text, bytes, err);
    if (encoding->special == SPECIAL_UNLESS_GUARDED) added_tokens_unguard(encoding);
    if (status == STATUS_OK) status = pretokenizer_run(tokenizer->pretokenizer, encoding, err);
    if (status) return status;
    if (add_special) append_all(&encoding->ids, &tokenizer->post.before);
    for (size_t i = 0; i < encoding->spans.count; i++) {
        struct span span = encoding->spans.items[i];
        if (span.id >= 0)
            id_append(&encoding->ids, span.id);
        else
            bpe_encode(&tokenizer->bpe, &encoding->bpe, encoding->text.data + span.start,
                       span.bytes, encoding->special != SPECIAL_PARSED, &encoding->ids);
    }
    if (add_special) append_all(&encoding->ids, &tokenizer->post.after);
    return STATUS_OK;
}

static enum status encode_checked(const struct tokenizer *tokenizer, const char *text, size_t bytes,
                                  bool add_special, enum special_text special,
                                  struct token_list *out, struct error *err) {
    *out = (struct token_list){0};
    if (bytes > TEXT_BYTES_MAX)
        return error_set(err, STATUS_TOO_LARGE, "a text of %zu bytes is above the limit of %d",
                         bytes, TEXT_BYTES_MAX);
    size_t valid = utf8_valid_prefix(text, bytes);
    if (valid < bytes)
        return error_set(err, STATUS_INVALID, "the text is not valid UTF-8 at byte %zu", valid);
    struct encoding encoding = {.special = special};
    enum status status = encode(tokenizer, &encoding, text, bytes, add_special, err);
    if (status == STATUS_OK) {
        *out = (struct token_list){encoding.ids.ids, encoding.ids.count};
        encoding.ids = (struct id_list){0};
    }
    encoding_deinit(&encoding);
    return status;
}

enum status tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t bytes,
                             bool add_special, bool parse_special, struct token_list *out,
                             struct error *err) {
    return encode_checked(tokenizer, text, bytes, add_special,
                          parse_special ? SPECIAL_PARSED : SPECIAL_PLAIN, out, err);
}

enum status tokenizer_encode_guarded(const struct tokenizer *tokenizer, const char *text,
                                     size_t bytes, struct token_list *out, struct error *err) {
    return encode_checked(tokenizer, text, bytes, false, SPECIAL_UNLESS_GUARDED, out, err);
}

char *tokenizer_guard(const struct tokenizer *tokenizer, const char *text, size_t bytes,
                      size_t *guarded_bytes) {
    struct text_buffer guarded = {0};
    added_tokens_guard(tokenizer->added, text, bytes, &guarded);
    *guarded_bytes = guarded.bytes;
    text_append(&guarded, "", 1);
    return guarded.data;
}

// ---- lookups ----------------------------------------------------------------------------------

int tokenizer_vocabulary(const struct tokenizer *tokenizer) {
    return tokenizer->vocabulary.id_count;
}

int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *token) {
    int32_t id = vocabulary_find_added(&tokenizer->vocabulary, token, strlen(token));
    return id >= 0 ? id : vocabulary_find_model(&tokenizer->vocabulary, token, strlen(token));
}
