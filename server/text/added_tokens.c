// Added tokens: texts such as "<|eot_id|>" that become one token before the model sees anything.
// They are found by walking a trie of their bytes from each position: at most the longest token's
// length a position, whatever the text. Built at load, then read-only; any thread.
//
// Some are looked for in the text as it came, the others in its normal form (with their own text
// normalized likewise); hence two tries. Where special tokens are not parsed, or a guard stands before
// one, its text is passed over and stays plain text.
#include "server/text/text_internal.h"

#include "base/memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct added_token {
    int32_t id;
    bool special, lstrip, rstrip, single_word, normalized;
};

struct trie_node {
    int32_t child, sibling; // -1: none
    int32_t token;          // index of the token that ends here, or -1
    unsigned char byte;
};

struct trie {
    struct trie_node *nodes;
    size_t count, capacity;
    int32_t roots[256];
};

struct added_tokens {
    struct added_token *tokens;
    size_t count, capacity;
    struct trie raw, normal;
};

// ---- the trie ---------------------------------------------------------------------------------

static void trie_init(struct trie *trie) {
    memset(trie->roots, 0xff, sizeof trie->roots);
}

static int32_t trie_node_add(struct trie *trie, unsigned char byte, int32_t sibling) {
    trie->nodes =
        text_grow(trie->nodes, trie->count + 1, &trie->capacity, sizeof *trie->nodes);
    trie->nodes[trie->count] = (struct trie_node){-1, sibling, -1, byte};
    return (int32_t)trie->count++;
}

static int32_t trie_child(const struct trie *trie, int32_t node, unsigned char byte) {
    int32_t child = trie->nodes[node].child;
    while (child >= 0 && trie->nodes[child].byte != byte) child = trie->nodes[child].sibling;
    return child;
}

// The first token with a text keeps it.
static void trie_add(struct trie *trie, const char *text, size_t bytes, int32_t token) {
    const unsigned char *at = (const unsigned char *)text;
    if (trie->roots[at[0]] < 0) trie->roots[at[0]] = trie_node_add(trie, at[0], -1);
    int32_t node = trie->roots[at[0]];
    for (size_t i = 1; i < bytes; i++) {
        int32_t child = trie_child(trie, node, at[i]);
        if (child < 0) {
            child = trie_node_add(trie, at[i], trie->nodes[node].child);
            trie->nodes[node].child = child;
        }
        node = child;
    }
    if (trie->nodes[node].token < 0) trie->nodes[node].token = token;
}

// The longest token that begins at text[0]: its index, or -1.
static int32_t trie_match(const struct trie *trie, const char *text, size_t bytes,
                          size_t *length) {
    const unsigned char *at = (const unsigned char *)text;
    int32_t best = -1;
    int32_t node = trie->roots[at[0]];
    for (size_t i = 1; node >= 0; i++) {
        if (trie->nodes[node].token >= 0) {
            best = trie->nodes[node].token;
            *length = i;
        }
        if (i == bytes) break;
        node = trie_child(trie, node, at[i]);
    }
    return best;
}

// ---- loading ----------------------------------------------------------------------------------

static enum status load_token(const json_t *json, const struct normalizer *normalizer,
                              struct vocabulary *vocabulary, struct encoding *scratch,
                              struct added_tokens *added, struct error *err) {
    const json_t *content;
    struct added_token token;
    if (!json_is_object(json)) return error_set(err, STATUS_INVALID, "must be an object");
    enum status status = field_string(json, "content", true, &content, err);
    if (status) return status;
    const char *text = json_string_value(content);
    size_t bytes = json_string_length(content);
    if (bytes == 0) return error_set(err, STATUS_INVALID, "\"content\" must not be empty");
    char what[80];
    snprintf(what, sizeof what, "added token \"%.60s\"", text);
    status = field_id(json_object_get(json, "id"), vocabulary->id_max, what, &token.id, err);
    if (status == STATUS_OK) status = field_bool(json, "special", false, &token.special, err);
    if (status == STATUS_OK) status = field_bool(json, "lstrip", false, &token.lstrip, err);
    if (status == STATUS_OK) status = field_bool(json, "rstrip", false, &token.rstrip, err);
    if (status == STATUS_OK)
        status = field_bool(json, "single_word", false, &token.single_word, err);
    if (status == STATUS_OK)
        status = field_bool(json, "normalized", !token.special, &token.normalized, err);
    if (status == STATUS_OK)
        status = vocabulary_add_added(vocabulary, text, bytes, token.id, token.special, err);
    if (status) return status;
    added->tokens = text_grow(added->tokens, added->count + 1, &added->capacity,
                              sizeof *added->tokens);
    added->tokens[added->count] = token;
    int32_t index = (int32_t)added->count++;
    if (!token.normalized) {
        trie_add(&added->raw, text, bytes, index);
        return STATUS_OK;
    }
    bool kept_start;
    status = normalizer_run(normalizer, scratch, text, bytes, &kept_start, err);
    if (status) return status;
    if (scratch->normal.bytes == 0)
        return error_set(err, STATUS_INVALID, "%s normalizes to nothing", what);
    trie_add(&added->normal, scratch->normal.data, scratch->normal.bytes, index);
    return STATUS_OK;
}

enum status added_tokens_load(const json_t *json, const struct normalizer *normalizer,
                              struct vocabulary *vocabulary, struct added_tokens **out,
                              struct error *err) {
    *out = mem_zalloc(1, sizeof **out);
    trie_init(&(*out)->raw);
    trie_init(&(*out)->normal);
    if (json == NULL || json_is_null(json)) return STATUS_OK;
    if (!json_is_array(json))
        return error_set(err, STATUS_INVALID, "\"added_tokens\" must be an array");
    struct encoding scratch = {0};
    enum status status = STATUS_OK;
    for (size_t i = 0; i < json_array_size(json) && status == STATUS_OK; i++) {
        status = load_token(json_array_get(json, i), normalizer, vocabulary, &scratch, *out, err);
        if (status) error_prefix(err, "added_tokens[%zu]", i);
    }
    encoding_deinit(&scratch);
    return status;
}

void added_tokens_destroy(struct added_tokens *added) {
    if (added == NULL) return;
    free(added->tokens);
    free(added->raw.nodes);
    free(added->normal.nodes);
    free(added);
}

// ---- cutting ----------------------------------------------------------------------------------

// The character that ends at text[end], end > 0.
static uint32_t character_before(const char *text, size_t end, size_t *start) {
    *start = end - 1;
    while (((unsigned char)text[*start] & 0xc0) == 0x80) --*start;
    uint32_t code;
    utf8_next(text + *start, end - *start, &code);
    return code;
}

static bool stands_alone(const char *text, size_t bytes, size_t start, size_t end) {
    size_t before;
    uint32_t code;
    if (start > 0 && char_is_word(character_before(text, start, &before))) return false;
    if (end == bytes) return true;
    utf8_next(text + end, bytes - end, &code);
    return !char_is_word(code);
}

// The token takes the white space beside it, but none that an earlier token has taken.
static void widen(const struct added_token *token, const char *text, size_t bytes, size_t done,
                  size_t *start, size_t *end) {
    size_t before, length;
    uint32_t code;
    while (token->lstrip && *start > done &&
           char_is_space(character_before(text, *start, &before)))
        *start = before;
    while (token->rstrip && *end < bytes) {
        length = utf8_next(text + *end, bytes - *end, &code);
        if (!char_is_space(code)) break;
        *end += length;
    }
}

static const char GUARD[] = "\xef\xb7\x90", REPLACEMENT[] = "\xef\xbf\xbd"; // U+FDD0, U+FFFD
enum { GUARD_BYTES = sizeof GUARD - 1 };

static bool is_guard(const char *text, size_t bytes) {
    return bytes >= GUARD_BYTES && memcmp(text, GUARD, GUARD_BYTES) == 0;
}

static bool is_plain(enum special_text special, const char *text, size_t at) {
    if (special == SPECIAL_UNLESS_GUARDED)
        return at >= GUARD_BYTES && is_guard(text + at - GUARD_BYTES, GUARD_BYTES);
    return special == SPECIAL_PLAIN;
}

void added_tokens_cut(const struct added_tokens *added, bool normalized, enum special_text special,
                      const char *text, size_t bytes, size_t base, bool first,
                      struct span_list *out) {
    const struct trie *trie = normalized ? &added->normal : &added->raw;
    size_t done = 0, length = 0;
    for (size_t at = 0; at < bytes;) {
        int32_t index = trie_match(trie, text + at, bytes - at, &length);
        if (index < 0) {
            at++;
            continue;
        }
        const struct added_token *token = &added->tokens[index];
        size_t start = at, end = at + length;
        at = end;
        if (token->special && is_plain(special, text, start)) continue;
        if (token->single_word && !stands_alone(text, bytes, start, end)) continue;
        widen(token, text, bytes, done, &start, &end);
        if (done < start)
            span_append(out, (struct span){base + done, start - done, -1, first && done == 0});
        span_append(out, (struct span){base + start, end - start, token->id, false});
        done = end;
    }
    if (done < bytes)
        span_append(out, (struct span){base + done, bytes - done, -1, first && done == 0});
}

// ---- guards -----------------------------------------------------------------------------------

static bool is_special(const struct added_tokens *added, const char *text, size_t bytes) {
    size_t length;
    int32_t raw = trie_match(&added->raw, text, bytes, &length);
    int32_t normal = trie_match(&added->normal, text, bytes, &length);
    return (raw >= 0 && added->tokens[raw].special) ||
           (normal >= 0 && added->tokens[normal].special);
}

void added_tokens_guard(const struct added_tokens *added, const char *text, size_t bytes,
                        struct text_buffer *to) {
    for (size_t at = 0; at < bytes;) {
        if (is_guard(text + at, bytes - at)) {
            text_append(to, REPLACEMENT, sizeof REPLACEMENT - 1);
            at += GUARD_BYTES;
            continue;
        }
        if (is_special(added, text + at, bytes - at)) text_append(to, GUARD, GUARD_BYTES);
        text_append(to, text + at++, 1);
    }
}

void added_tokens_unguard(struct encoding *encoding) {
    struct text_buffer clean = {0};
    size_t kept = 0;
    for (size_t i = 0; i < encoding->spans.count; i++) {
        struct span span = encoding->spans.items[i];
        size_t start = clean.bytes, end = span.start + span.bytes;
        for (size_t at = span.start; span.id < 0 && at < end;) {
            if (is_guard(encoding->text.data + at, end - at)) at += GUARD_BYTES;
            else text_append(&clean, encoding->text.data + at++, 1);
        }
        if (span.id < 0 && clean.bytes == start) continue; // a guard alone
        if (span.id < 0) span.start = start, span.bytes = clean.bytes - start;
        encoding->spans.items[kept++] = span;
    }
    encoding->spans.count = kept;
    free(encoding->text.data);
    encoding->text = clean;
}
