// Byte-pair encoding (Sennrich et al., arXiv 1508.07909): a piece of text starts as one symbol a
// character; the neighbouring pair whose merge was learnt first becomes one symbol, until no pair
// has a merge. Called by tokenizer_encode on any thread; the model itself is read-only.
//
// DESIGN. Symbols are a doubly linked list in one array. Candidates (rank, position, result) lie in
// a binary heap; a candidate whose symbols have changed since is recognised when it comes up, by
// its result, and dropped. Each merge adds at most two candidates, so n characters cost
// O(n log n) time and O(n) memory, however they are arranged.
//
// It refuses dropout, and the prefixes and suffixes of word-based models.
#include "server/text/text_internal.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct bpe_symbol {
    int32_t id; // -1: merged into an earlier one
    int32_t previous, next; // -1: none
};

struct bpe_candidate {
    uint64_t order; // rank << 32 | position of the left symbol
    int32_t id;     // the result
};

// ---- the table of merges ----------------------------------------------------------------------

static uint64_t pair_of(int32_t left, int32_t right) {
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

static struct merge *merge_slot(const struct bpe *bpe, uint64_t pair) {
    uint64_t hash = pair * 0x9e3779b97f4a7c15u;
    for (size_t at = hash >> 32;; at++) {
        struct merge *merge = &bpe->merges[at & bpe->merge_mask];
        if (merge->pair == pair || merge->pair == UINT64_MAX) return merge;
    }
}

static const struct merge *merge_find(const struct bpe *bpe, int32_t left, int32_t right) {
    const struct merge *merge = merge_slot(bpe, pair_of(left, right));
    return merge->pair == UINT64_MAX ? NULL : merge;
}

// ---- loading ----------------------------------------------------------------------------------

static enum status load_vocabulary(struct vocabulary *vocabulary, const json_t *model,
                                   struct error *err) {
    json_t *vocab = json_object_get(model, "vocab");
    if (!json_is_object(vocab) || json_object_size(vocab) == 0)
        return error_set(err, STATUS_INVALID, "model.vocab must be an object with tokens in it");
    const char *text;
    json_t *value;
    json_object_foreach(vocab, text, value) {
        char what[80];
        snprintf(what, sizeof what, "token \"%.60s\"", text);
        int32_t id;
        enum status status = field_id(value, vocabulary->id_max, what, &id, err);
        if (status == STATUS_OK)
            status = vocabulary_add_model(vocabulary, text, strlen(text), id, err);
        if (status) {
            error_prefix(err, "model.vocab");
            return status;
        }
    }
    return STATUS_OK;
}

// A merge is written "a b", or as the array ["a", "b"] where tokens hold spaces.
static bool merge_parts(const json_t *merge, const char *parts[2], size_t bytes[2]) {
    if (json_is_array(merge) && json_array_size(merge) == 2) {
        for (size_t i = 0; i < 2; i++) {
            const json_t *part = json_array_get(merge, i);
            if (!json_is_string(part)) return false;
            parts[i] = json_string_value(part);
            bytes[i] = json_string_length(part);
        }
        return true;
    }
    if (!json_is_string(merge)) return false;
    const char *text = json_string_value(merge);
    size_t length = json_string_length(merge);
    const char *space = memchr(text, ' ', length);
    if (space == NULL || memchr(space + 1, ' ', length - (size_t)(space + 1 - text))) return false;
    parts[0] = text;
    bytes[0] = (size_t)(space - text);
    parts[1] = space + 1;
    bytes[1] = length - bytes[0] - 1;
    return true;
}

static enum status load_merge(struct bpe *bpe, const json_t *json, size_t rank,
                              struct text_buffer *whole, struct error *err) {
    const char *parts[2];
    size_t bytes[2];
    if (!merge_parts(json, parts, bytes))
        return error_set(err, STATUS_INVALID, "model.merges[%zu] must be \"a b\" or [\"a\", \"b\"]",
                         rank);
    whole->bytes = 0;
    text_append(whole, parts[0], bytes[0]);
    text_append(whole, parts[1], bytes[1]);
    int32_t left = vocabulary_find_model(bpe->vocabulary, parts[0], bytes[0]);
    int32_t right = vocabulary_find_model(bpe->vocabulary, parts[1], bytes[1]);
    int32_t id = vocabulary_find_model(bpe->vocabulary, whole->data, whole->bytes);
    if (left < 0 || right < 0 || id < 0) {
        text_append(whole, "", 1);
        const char *missing = left < 0 ? parts[0] : right < 0 ? parts[1] : whole->data;
        return error_set(err, STATUS_INVALID,
                         "model.merges[%zu] needs the token \"%.60s\", which model.vocab lacks",
                         rank, missing);
    }
    struct merge *merge = merge_slot(bpe, pair_of(left, right));
    *merge = (struct merge){pair_of(left, right), (uint32_t)rank, id};
    return STATUS_OK;
}

static enum status load_merges(struct bpe *bpe, const json_t *model, struct error *err) {
    const json_t *merges = json_object_get(model, "merges");
    if (!json_is_array(merges))
        return error_set(err, STATUS_INVALID, "model.merges must be an array");
    size_t count = json_array_size(merges), slots = 16;
    while (slots < count * 2) slots *= 2;
    bpe->merges = mem_alloc(slots * sizeof *bpe->merges);
    bpe->merge_mask = slots - 1;
    for (size_t i = 0; i < slots; i++) bpe->merges[i].pair = UINT64_MAX;
    struct text_buffer whole = {0};
    enum status status = STATUS_OK;
    for (size_t i = 0; i < count && status == STATUS_OK; i++)
        status = load_merge(bpe, json_array_get(merges, i), i, &whole, err);
    free(whole.data);
    return status;
}

static enum status load_unknown(struct bpe *bpe, const json_t *model, struct error *err) {
    const json_t *unk;
    enum status status = field_string(model, "unk_token", false, &unk, err);
    bpe->unk = -1;
    if (status || unk == NULL) return status;
    bpe->unk = vocabulary_find_model(bpe->vocabulary, json_string_value(unk),
                                     json_string_length(unk));
    if (bpe->unk < 0)
        return error_set(err, STATUS_INVALID, "model.unk_token \"%.60s\" is not in model.vocab",
                         json_string_value(unk));
    return STATUS_OK;
}

static enum status refuse_options(const json_t *model, struct error *err) {
    static const char *const names[] = {"continuing_subword_prefix", "end_of_word_suffix",
                                        "dropout"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const json_t *value = json_object_get(model, names[i]);
        bool unset = value == NULL || json_is_null(value) ||
                     (json_is_string(value) && json_string_length(value) == 0) ||
                     (json_is_number(value) && json_number_value(value) == 0);
        if (!unset)
            return error_set(err, STATUS_UNSUPPORTED, "model.%s is not supported", names[i]);
    }
    return STATUS_OK;
}

enum status bpe_load(struct bpe *bpe, struct vocabulary *vocabulary, const json_t *model,
                     struct error *err) {
    *bpe = (struct bpe){.vocabulary = vocabulary};
    const json_t *type = json_object_get(model, "type");
    if (!json_is_object(model) || (type != NULL && !json_is_string(type)))
        return error_set(err, STATUS_INVALID, "\"model\" must be an object with a \"type\"");
    if (type != NULL && strcmp(json_string_value(type), "BPE") != 0)
        return error_set(err, STATUS_UNSUPPORTED, "model type \"%.60s\" is not supported; \"BPE\" "
                         "is", json_string_value(type));
    enum status status = refuse_options(model, err);
    if (status == STATUS_OK)
        status = field_bool(model, "byte_fallback", false, &bpe->byte_fallback, err);
    if (status == STATUS_OK) status = field_bool(model, "fuse_unk", false, &bpe->fuse_unk, err);
    if (status == STATUS_OK)
        status = field_bool(model, "ignore_merges", false, &bpe->ignore_merges, err);
    if (status == STATUS_OK) status = load_vocabulary(vocabulary, model, err);
    if (status == STATUS_OK) status = load_merges(bpe, model, err);
    if (status == STATUS_OK) status = load_unknown(bpe, model, err);
    if (status) return status;
    for (int byte = 0; byte < 256; byte++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", byte);
        bpe->byte_ids[byte] = vocabulary_find_model(vocabulary, name, 6);
    }
    return STATUS_OK;
}

void bpe_deinit(struct bpe *bpe) {
    free(bpe->merges);
}

// ---- encoding ---------------------------------------------------------------------------------

static void symbol_add(struct bpe_scratch *scratch, int32_t id) {
    size_t at = scratch->symbol_count++;
    scratch->symbols = text_grow(scratch->symbols, scratch->symbol_count,
                                 &scratch->symbol_capacity, sizeof *scratch->symbols);
    scratch->symbols[at] = (struct bpe_symbol){id, (int32_t)at - 1, (int32_t)at + 1};
}

static bool add_byte_symbols(const struct bpe *bpe, struct bpe_scratch *scratch, const char *text,
                             size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
        if (bpe->byte_ids[(unsigned char)text[i]] < 0) return false;
    for (size_t i = 0; i < bytes; i++)
        symbol_add(scratch, bpe->byte_ids[(unsigned char)text[i]]);
    return true;
}

// One symbol a character. An unknown character becomes its bytes, or the unknown token (which
// stays pending so that fuse_unk can make a run of them one), or nothing. Bytes do not end a
// pending run: it goes out before the next known character, as the reference library does.
static void split_symbols(const struct bpe *bpe, struct bpe_scratch *scratch, const char *text,
                          size_t bytes) {
    bool pending = false;
    for (size_t at = 0, length; at < bytes; at += length) {
        uint32_t code;
        length = utf8_next(text + at, bytes - at, &code);
        int32_t id = vocabulary_find_model(bpe->vocabulary, text + at, length);
        if (id >= 0) {
            if (pending) symbol_add(scratch, bpe->unk);
            pending = false;
            symbol_add(scratch, id);
        } else if (bpe->byte_fallback && add_byte_symbols(bpe, scratch, text + at, length)) {
            continue;
        } else if (bpe->unk >= 0) {
            if (pending && !bpe->fuse_unk) symbol_add(scratch, bpe->unk);
            pending = true;
        }
    }
    if (pending) symbol_add(scratch, bpe->unk);
    if (scratch->symbol_count > 0) scratch->symbols[scratch->symbol_count - 1].next = -1;
}

static void heap_down(struct bpe_scratch *scratch, size_t at) {
    struct bpe_candidate *heap = scratch->heap, moving = heap[at];
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= scratch->heap_count) break;
        if (child + 1 < scratch->heap_count && heap[child + 1].order < heap[child].order) child++;
        if (moving.order <= heap[child].order) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = moving;
}

static void heap_up(struct bpe_scratch *scratch, size_t at) {
    struct bpe_candidate *heap = scratch->heap, moving = heap[at];
    while (at > 0 && moving.order < heap[(at - 1) / 2].order) {
        heap[at] = heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    heap[at] = moving;
}

// Appends the candidate for the symbol and its right neighbour, if there is a merge for them.
static bool candidate_add(const struct bpe *bpe, struct bpe_scratch *scratch, int32_t left) {
    int32_t right = scratch->symbols[left].next;
    if (right < 0) return false;
    const struct merge *merge =
        merge_find(bpe, scratch->symbols[left].id, scratch->symbols[right].id);
    if (merge == NULL) return false;
    size_t at = scratch->heap_count++;
    scratch->heap = text_grow(scratch->heap, scratch->heap_count, &scratch->heap_capacity,
                              sizeof *scratch->heap);
    scratch->heap[at] =
        (struct bpe_candidate){(uint64_t)merge->rank << 32 | (uint32_t)left, merge->id};
    return true;
}

static void merge_all(const struct bpe *bpe, struct bpe_scratch *scratch) {
    struct bpe_symbol *symbols = scratch->symbols;
    scratch->heap_count = 0;
    for (size_t i = 0; i < scratch->symbol_count; i++) candidate_add(bpe, scratch, (int32_t)i);
    for (size_t i = scratch->heap_count / 2; i-- > 0;) heap_down(scratch, i);
    while (scratch->heap_count > 0) {
        struct bpe_candidate best = scratch->heap[0];
        scratch->heap[0] = scratch->heap[--scratch->heap_count];
        if (scratch->heap_count > 0) heap_down(scratch, 0);
        int32_t at = (int32_t)(best.order & 0xffffffffu);
        struct bpe_symbol *left = &symbols[at];
        if (left->id < 0 || left->next < 0) continue;
        struct bpe_symbol *right = &symbols[left->next];
        const struct merge *merge = merge_find(bpe, left->id, right->id);
        if (merge == NULL || merge->id != best.id) continue; // its symbols have changed
        left->id = best.id;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0) symbols[left->next].previous = at;
        if (left->previous >= 0 && candidate_add(bpe, scratch, left->previous))
            heap_up(scratch, scratch->heap_count - 1);
        if (candidate_add(bpe, scratch, at)) heap_up(scratch, scratch->heap_count - 1);
    }
}

void bpe_encode(const struct bpe *bpe, struct bpe_scratch *scratch, const char *text,
                size_t bytes, bool plain, struct id_list *out) {
    VERIFY_OP(bytes, <, INT32_MAX);
    if (bpe->ignore_merges) {
        int32_t id = vocabulary_find_model(bpe->vocabulary, text, bytes);
        if (id >= 0 && !(plain && bpe->vocabulary->tokens[id].special)) {
            id_append(out, id);
            return;
        }
    }
    scratch->symbol_count = 0;
    split_symbols(bpe, scratch, text, bytes);
    if (scratch->symbol_count > 1) merge_all(bpe, scratch);
    for (size_t i = 0; i < scratch->symbol_count; i++)
        if (scratch->symbols[i].id >= 0) id_append(out, scratch->symbols[i].id);
}

void bpe_scratch_deinit(struct bpe_scratch *scratch) {
    free(scratch->symbols);
    free(scratch->heap);
}
