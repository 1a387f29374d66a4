// Streaming detokenizer: ids in, text out that is complete UTF-8 and final. One belongs to one
// sequence of one thread; many may share a tokenizer. tokenizer_decode is the same machine fed at
// once, which is why a stream's pieces always add up to it.
#include "server/text/text_internal.h"

#include "base/memory.h"

#include <stdlib.h>

struct detokenizer {
    const struct tokenizer *tokenizer;
    bool skip_special;
    struct decoding decoding;
    struct text_buffer out;
};

static void push(struct detokenizer *detokenizer, int32_t id) {
    const struct token *token = vocabulary_token(&detokenizer->tokenizer->vocabulary, id);
    if (token == NULL || (detokenizer->skip_special && token->special)) return;
    decoding_push(&detokenizer->decoding, token->text, token->bytes);
}

static void init(struct detokenizer *detokenizer, const struct tokenizer *tokenizer,
                 bool skip_special, bool mid_text) {
    *detokenizer =
        (struct detokenizer){.tokenizer = tokenizer, .skip_special = skip_special};
    decoding_init(&detokenizer->decoding, tokenizer->decoder, &detokenizer->out, mid_text);
}

// The text so far as the caller's own NUL-terminated memory.
static char *take_text(struct detokenizer *detokenizer, size_t *bytes) {
    *bytes = detokenizer->out.bytes;
    text_append(&detokenizer->out, "", 1);
    decoding_deinit(&detokenizer->decoding);
    return detokenizer->out.data;
}

struct detokenizer *detokenizer_create(const struct tokenizer *tokenizer, bool skip_special) {
    struct detokenizer *detokenizer = mem_alloc(sizeof *detokenizer);
    init(detokenizer, tokenizer, skip_special, false);
    return detokenizer;
}

void detokenizer_destroy(struct detokenizer *detokenizer) {
    if (detokenizer == NULL) return;
    decoding_deinit(&detokenizer->decoding);
    free(detokenizer->out.data);
    free(detokenizer);
}

static void give(struct detokenizer *detokenizer, const char **text, size_t *bytes) {
    *text = detokenizer->out.data ? detokenizer->out.data : "";
    *bytes = detokenizer->out.bytes;
}

void detokenizer_push(struct detokenizer *detokenizer, int32_t id, const char **text,
                      size_t *bytes) {
    detokenizer->out.bytes = 0;
    push(detokenizer, id);
    give(detokenizer, text, bytes);
}

void detokenizer_finish(struct detokenizer *detokenizer, const char **text, size_t *bytes) {
    detokenizer->out.bytes = 0;
    decoding_finish(&detokenizer->decoding);
    give(detokenizer, text, bytes);
}

char *tokenizer_decode(const struct tokenizer *tokenizer, const int32_t *ids, size_t count,
                       bool skip_special, size_t *bytes) {
    struct detokenizer whole;
    init(&whole, tokenizer, skip_special, false);
    for (size_t i = 0; i < count; i++) push(&whole, ids[i]);
    decoding_finish(&whole.decoding);
    return take_text(&whole, bytes);
}

char *tokenizer_token_text(const struct tokenizer *tokenizer, int32_t id, size_t *bytes) {
    struct detokenizer alone;
    init(&alone, tokenizer, false, true);
    push(&alone, id);
    decoding_finish(&alone.decoding);
    return take_text(&alone, bytes);
}
