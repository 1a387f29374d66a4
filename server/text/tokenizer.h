// tokenizer.json (the Hugging Face tokenizers format): byte-level BPE and SentencePiece-style BPE
// with byte fallback, with normalizers, pre-tokenizers, added tokens, post-processor templates and
// decoders. Immutable after load; usable from any thread at once.
#ifndef LORAD_SERVER_TEXT_TOKENIZER_H
#define LORAD_SERVER_TEXT_TOKENIZER_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tokenizer;

// Loads FOLDER/tokenizer.json. STATUS_NOT_FOUND; STATUS_INVALID: the file contradicts itself or
// the format; STATUS_UNSUPPORTED: it names a component that lorad does not carry out.
// vocabulary_max: ids must be below it (the model's logits width).
MUST_CHECK enum status tokenizer_load(const char *folder, int vocabulary_max,
                                      struct tokenizer **out, struct error *err);
void tokenizer_destroy(struct tokenizer *tokenizer);

struct token_list {
    int32_t *ids; // malloc'd; the caller frees
    size_t count;
};
// Encodes UTF-8; STATUS_INVALID when it is not, or when a regular expression gives up on it.
// add_special: apply the post-processor's template (BOS and the like).
// parse_special: text such as "</s>" becomes the special token; false treats it as plain text.
MUST_CHECK enum status tokenizer_encode(const struct tokenizer *tokenizer, const char *text,
                                        size_t bytes, bool add_special, bool parse_special,
                                        struct token_list *out, struct error *err);
// Text that several have written, such as a chat's: special tokens in it are parsed but where
// tokenizer_guard has been, which puts a guard (U+FDD0, a character that no text has) before each. Guards
// leave no trace; one that was there before becomes U+FFFD. tokenizer_guard's text is malloc'd,
// NUL-terminated.
MUST_CHECK enum status tokenizer_encode_guarded(const struct tokenizer *tokenizer, const char *text,
                                                size_t bytes, struct token_list *out,
                                                struct error *err);
char *tokenizer_guard(const struct tokenizer *tokenizer, const char *text, size_t bytes,
                      size_t *guarded_bytes);
// The whole text of ids; malloc'd, NUL-terminated.
char *tokenizer_decode(const struct tokenizer *tokenizer, const int32_t *ids, size_t count,
                       bool skip_special, size_t *bytes);
int tokenizer_vocabulary(const struct tokenizer *tokenizer); // largest id + 1
// The id of an exact token text, or -1.
int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *token);
// The text of one token as shown in logprobs (raw bytes replaced where they are not UTF-8).
// malloc'd.
char *tokenizer_token_text(const struct tokenizer *tokenizer, int32_t id, size_t *bytes);

// Streaming: text that is complete UTF-8 and final. A character split across tokens is held back;
// so is a run of byte tokens ("<0xE4>") until another token ends it. The pieces of a stream add up
// to tokenizer_decode of its ids, in particular the first token loses its leading space where the
// decoder takes it away: to continue a prompt, push the prompt's ids first and drop their text.
struct detokenizer;
struct detokenizer *detokenizer_create(const struct tokenizer *tokenizer, bool skip_special);
void detokenizer_destroy(struct detokenizer *detokenizer);
// Appends one token; *text is the new text (borrowed until the next call), maybe empty.
void detokenizer_push(struct detokenizer *detokenizer, int32_t id, const char **text,
                      size_t *bytes);
// What is still held back, with U+FFFD for incomplete bytes.
void detokenizer_finish(struct detokenizer *detokenizer, const char **text, size_t *bytes);

#endif
