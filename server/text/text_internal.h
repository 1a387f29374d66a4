// What the files of server/text share: UTF-8 and character classes, growing buffers, the stages of
// a tokenizer and the scratch memory of one encoding. Stages are read from tokenizer.json once and
// never change; everything that changes during a call lives in a `struct encoding` or a `struct
// detokenizer`, so that any number of threads may use one tokenizer.
#ifndef LORAD_SERVER_TEXT_INTERNAL_H
#define LORAD_SERVER_TEXT_INTERNAL_H

#include "server/text/tokenizer.h"

#include <jansson.h>

// ---- characters (unicode.c) -------------------------------------------------------------------
enum utf8_result { UTF8_CHARACTER, UTF8_MALFORMED, UTF8_INCOMPLETE };

// Looks at the first character of text[0..bytes), bytes > 0. *length: the bytes of the character,
// of the longest malformed start (to be shown as one U+FFFD), or of the incomplete rest.
enum utf8_result utf8_scan(const char *text, size_t bytes, uint32_t *code, size_t *length);
// The same for text already known to be valid; returns the character's length.
size_t utf8_next(const char *text, size_t bytes, uint32_t *code);
size_t utf8_put(uint32_t code, char out[4]);
// The offset of the first byte that is not UTF-8, or `bytes`.
size_t utf8_valid_prefix(const char *text, size_t bytes);

bool char_is_space(uint32_t code);       // Unicode White_Space
bool char_is_numeric(uint32_t code);     // general category N
bool char_is_punctuation(uint32_t code); // ASCII punctuation or general category P
bool char_is_word(uint32_t code);        // \w of UTS #18

// Byte-level alphabet: every byte has one printable character. -1: not of the alphabet.
uint32_t byte_to_character(uint8_t byte);
int character_to_byte(uint32_t code);

// ---- growing memory (unicode.c) ---------------------------------------------------------------
// Makes room for `needed` items; returns the (moved) items.
void *text_grow(void *items, size_t needed, size_t *capacity, size_t item_bytes);

struct text_buffer {
    char *data;
    size_t bytes, capacity;
};
void text_append(struct text_buffer *buffer, const char *text, size_t bytes);
void text_append_character(struct text_buffer *buffer, uint32_t code);

struct id_list {
    int32_t *ids;
    size_t count, capacity;
};
void id_append(struct id_list *list, int32_t id);

// A part of a text: plain text yet to be tokenized (id -1), or an added token.
struct span {
    size_t start, bytes;
    int32_t id;
    bool first; // begins where the caller's text begins
};
struct span_list {
    struct span *items;
    size_t count, capacity;
};
void span_append(struct span_list *list, struct span span);

// ---- JSON fields (text_json.c) ----------------------------------------------------------------
// A field that is missing or null gives the fallback; of another type: STATUS_INVALID.
MUST_CHECK enum status field_bool(const json_t *object, const char *key, bool fallback, bool *out,
                                  struct error *err);
MUST_CHECK enum status field_count(const json_t *object, const char *key, size_t fallback,
                                   size_t *out, struct error *err);
// *out is borrowed from the object; NULL when missing and not `required`.
MUST_CHECK enum status field_string(const json_t *object, const char *key, bool required,
                                    const json_t **out, struct error *err);
// A string of exactly one character.
MUST_CHECK enum status field_character(const json_t *object, const char *key, uint32_t fallback,
                                       uint32_t *out, struct error *err);
// The object's "type"; anything but an object with such a string: STATUS_INVALID naming `what`.
MUST_CHECK enum status field_type(const json_t *object, const char *what, const char **out,
                                  struct error *err);
// An integer in [0, below): the rule for every token id of the file.
MUST_CHECK enum status field_id(const json_t *value, int below, const char *what, int32_t *out,
                                struct error *err);
// Calls `add` for one component, or for each member of (nested) "Sequence" components whose
// members are in the array `members`; NULL and JSON null hold none. `add` answers
// STATUS_NOT_FOUND for a type that it does not know, which is then refused by its name.
typedef enum status component_add(void *owner, const char *type, const json_t *component,
                                  struct error *err);
MUST_CHECK enum status components_load(const json_t *json, const char *what, const char *members,
                                       component_add *add, void *owner, struct error *err);

// ---- patterns (pattern.c) ---------------------------------------------------------------------
struct pattern;
struct pattern_match; // PCRE2's memory for one thread

// A piece of a text, and whether the pattern matched it.
struct cut {
    size_t start, end;
    bool match;
};
struct cut_list {
    struct cut *items;
    size_t count, capacity;
};

// {"Regex": "..."} or {"String": "..."} or a bare string.
MUST_CHECK enum status pattern_load(const json_t *json, struct pattern **out, struct error *err);
MUST_CHECK enum status pattern_from_regex(const char *regex, size_t bytes, struct pattern **out,
                                          struct error *err);
struct pattern *pattern_from_text(const char *text, size_t bytes);
struct pattern *pattern_from_class(bool (*is_member)(uint32_t code));
struct pattern *pattern_of_words(void); // \w+|[^\w\s]+
void pattern_destroy(struct pattern *pattern); // NULL is allowed
// The literal text, or NULL when the pattern is something else.
const char *pattern_text(const struct pattern *pattern, size_t *bytes);
// Cuts valid UTF-8 into matches and what lies between; the cuts cover the text in order.
// STATUS_INVALID: the regular expression gave up (match or memory limit).
MUST_CHECK enum status pattern_cut(const struct pattern *pattern, struct pattern_match **match,
                                   const char *text, size_t bytes, struct cut_list *out,
                                   struct error *err);
void pattern_match_destroy(struct pattern_match *match); // NULL is allowed

// ---- the vocabulary (vocabulary.c) ------------------------------------------------------------
struct token {
    const char *text; // NULL: no token has this id
    size_t bytes;
    bool model, added, special;
};
// Open addressing from token text to id; -1 is a free slot.
struct token_map {
    int32_t *slots;
    size_t mask, count;
};
struct vocabulary {
    struct token *tokens; // [id_count]
    int id_count;         // largest id + 1
    int id_max;           // ids must be below it
    size_t capacity;
    struct token_map model, added;
    struct arena *arena; // owns the texts
};
void vocabulary_init(struct vocabulary *vocabulary, int id_max);
void vocabulary_deinit(struct vocabulary *vocabulary);
MUST_CHECK enum status vocabulary_add_model(struct vocabulary *vocabulary, const char *text,
                                            size_t bytes, int32_t id, struct error *err);
MUST_CHECK enum status vocabulary_add_added(struct vocabulary *vocabulary, const char *text,
                                            size_t bytes, int32_t id, bool special,
                                            struct error *err);
// Ids of exact texts, or -1.
int32_t vocabulary_find_model(const struct vocabulary *vocabulary, const char *text,
                              size_t bytes);
int32_t vocabulary_find_added(const struct vocabulary *vocabulary, const char *text,
                              size_t bytes);
// NULL when no token has the id.
const struct token *vocabulary_token(const struct vocabulary *vocabulary, int32_t id);

// ---- the model (bpe.c) ------------------------------------------------------------------------
struct merge {
    uint64_t pair; // left id << 32 | right id; UINT64_MAX is a free slot
    uint32_t rank;
    int32_t id;
};
struct bpe {
    const struct vocabulary *vocabulary;
    struct merge *merges; // open addressing
    size_t merge_mask;
    int32_t unk; // -1: unknown characters vanish
    int32_t byte_ids[256];
    bool byte_fallback, fuse_unk, ignore_merges;
};
struct bpe_scratch {
    struct bpe_symbol *symbols;
    size_t symbol_count, symbol_capacity;
    struct bpe_candidate *heap;
    size_t heap_count, heap_capacity;
};
// Fills the vocabulary and the merges from "model". A failed load still needs bpe_deinit.
MUST_CHECK enum status bpe_load(struct bpe *bpe, struct vocabulary *vocabulary,
                                const json_t *model, struct error *err);
void bpe_deinit(struct bpe *bpe);
// plain: a piece that reads like a special token must not become one.
void bpe_encode(const struct bpe *bpe, struct bpe_scratch *scratch, const char *text,
                size_t bytes, bool plain, struct id_list *out);
void bpe_scratch_deinit(struct bpe_scratch *scratch);

// ---- normalizers (normalize.c) ----------------------------------------------------------------
struct normalizer;
MUST_CHECK enum status normalizer_load(const json_t *json, struct normalizer **out,
                                       struct error *err);
void normalizer_destroy(struct normalizer *normalizer); // NULL is allowed

// ---- one encoding -----------------------------------------------------------------------------
// All scratch memory of a call to tokenizer_encode.
// Whose text becomes a special token.
enum special_text { SPECIAL_PLAIN, SPECIAL_PARSED, SPECIAL_UNLESS_GUARDED };

struct encoding {
    enum special_text special;
    struct text_buffer text, spare; // `spans` point into `text`; steps write to `spare`, then swap
    struct span_list spans, spare_spans;
    struct text_buffer normal, normal_spare;
    struct cut_list cuts;
    struct pattern_match *match;
    struct bpe_scratch bpe;
    struct id_list ids;
};
void encoding_deinit(struct encoding *encoding);

// Leaves the normal form of text in encoding->normal. *kept_start: the first character survived.
MUST_CHECK enum status normalizer_run(const struct normalizer *normalizer,
                                      struct encoding *encoding, const char *text, size_t bytes,
                                      bool *kept_start, struct error *err);

// ---- pre-tokenizers (pretokenize.c) -----------------------------------------------------------
struct pretokenizer;
MUST_CHECK enum status pretokenizer_load(const json_t *json, struct pretokenizer **out,
                                         struct error *err);
void pretokenizer_destroy(struct pretokenizer *pretokenizer); // NULL is allowed
// Cuts the plain spans of encoding->spans further; may rewrite encoding->text.
MUST_CHECK enum status pretokenizer_run(const struct pretokenizer *pretokenizer,
                                        struct encoding *encoding, struct error *err);

// ---- added tokens (added_tokens.c) ------------------------------------------------------------
struct added_tokens;
// Enters the tokens into the vocabulary, too.
MUST_CHECK enum status added_tokens_load(const json_t *json, const struct normalizer *normalizer,
                                         struct vocabulary *vocabulary,
                                         struct added_tokens **out, struct error *err);
void added_tokens_destroy(struct added_tokens *added); // NULL is allowed
// Cuts text into added tokens and plain spans, appended to `out` with `base` added to their start.
// normalized: text is in normal form, and only tokens that are matched there take part.
void added_tokens_cut(const struct added_tokens *added, bool normalized, enum special_text special,
                      const char *text, size_t bytes, size_t base, bool first,
                      struct span_list *out);
// text with a guard before each text of a special token.
void added_tokens_guard(const struct added_tokens *added, const char *text, size_t bytes,
                        struct text_buffer *to);
// Takes the guards out of encoding->text and its spans.
void added_tokens_unguard(struct encoding *encoding);

// ---- post-processing (postprocess.c) ----------------------------------------------------------
struct post_template {
    struct id_list before, after;
};
MUST_CHECK enum status post_template_load(const json_t *json, int id_max,
                                          struct post_template *out, struct error *err);
void post_template_deinit(struct post_template *post);

// ---- decoders (decode.c) ----------------------------------------------------------------------
struct decoder;
MUST_CHECK enum status decoder_load(const json_t *json, struct decoder **out, struct error *err);
void decoder_destroy(struct decoder *decoder); // NULL is allowed

// The state of a decoder in the middle of a text. Tokens go in one at a time; text that can no
// longer change is appended to `out`.
struct decoding {
    const struct decoder *decoder;
    struct decode_state *states; // one a step
    struct text_buffer *out;
    struct cut_list cuts;
    struct pattern_match *match;
};
// mid_text: as if other tokens had come before, so that no leading space is taken away.
void decoding_init(struct decoding *decoding, const struct decoder *decoder,
                   struct text_buffer *out, bool mid_text);
void decoding_deinit(struct decoding *decoding);
void decoding_push(struct decoding *decoding, const char *token, size_t bytes);
void decoding_finish(struct decoding *decoding);

// ---- the whole (tokenizer.c) ------------------------------------------------------------------
struct tokenizer {
    struct vocabulary vocabulary;
    struct bpe bpe;
    struct normalizer *normalizer;
    struct pretokenizer *pretokenizer;
    struct added_tokens *added;
    struct post_template post;
    struct decoder *decoder;
};

#endif
