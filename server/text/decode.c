// Decoders: from token texts back to text. A decoder is a chain of steps, and each step takes
// tokens one at a time and passes on what can no longer change; so the same code decodes a whole
// text and a stream, and the two cannot differ. Steps are read-only; their state is the caller's
// struct decoding, used by one thread.
//
// Up to a step that joins tokens (ByteLevel, Fuse) a step sees whole tokens, and an empty one
// counts. After it there is one long token that arrives in fragments, cut anywhere between
// characters; steps that would need to see all of it at once are refused at load.
//
// What is held back: ByteLevel, the bytes of an unfinished character; ByteFallback, a run of byte
// tokens until it ends, since one bad byte turns every byte of its run into U+FFFD; Replace and
// Strip behind a joining step, what may yet be part of a match or of the end.
#include "server/text/text_internal.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdlib.h>
#include <string.h>

enum decode_kind {
    DECODE_BYTE_LEVEL,
    DECODE_METASPACE,
    DECODE_REPLACE,
    DECODE_BYTE_FALLBACK,
    DECODE_FUSE,
    DECODE_STRIP,
    DECODE_SPACED, // no decoder: tokens with spaces between them
};

enum { DECODE_STEPS_MAX = 16 };

struct decode_step {
    enum decode_kind kind;
    bool joined; // its input is one token in fragments
    struct pattern *pattern;
    char *content; // REPLACE
    size_t content_bytes;
    uint32_t code;      // METASPACE: the mark; STRIP: the character
    bool keeps_leading; // METASPACE
    size_t start, stop; // STRIP: characters to take away at most
};

struct decoder {
    struct decode_step steps[DECODE_STEPS_MAX];
    size_t count;
    bool joined; // while loading: the steps so far have joined the tokens
};

struct decode_state {
    size_t tokens;           // METASPACE, SPACED: seen so far
    size_t start_left;       // STRIP, joined
    size_t stop_held;        // STRIP, joined: characters held back
    struct text_buffer held; // bytes held back
};

static void emit(struct decoding *decoding, size_t step, const char *text, size_t bytes);

// ---- loading ----------------------------------------------------------------------------------

static enum status load_replace(struct decode_step *step, const json_t *json, struct error *err) {
    const json_t *content;
    size_t bytes;
    enum status status = pattern_load(json_object_get(json, "pattern"), &step->pattern, err);
    if (status == STATUS_OK) status = field_string(json, "content", true, &content, err);
    if (status) return status;
    step->content_bytes = json_string_length(content);
    step->content = mem_strndup(json_string_value(content), step->content_bytes);
    if (step->joined && pattern_text(step->pattern, &bytes) == NULL)
        return error_set(err, STATUS_UNSUPPORTED,
                         "a regular expression after tokens are joined is not supported");
    return STATUS_OK;
}

static enum status load_metaspace(struct decode_step *step, const json_t *json,
                                  struct error *err) {
    const json_t *scheme;
    bool add_space;
    enum status status = field_character(json, "replacement", 0x2581, &step->code, err);
    if (status == STATUS_OK) status = field_bool(json, "add_prefix_space", true, &add_space, err);
    if (status == STATUS_OK) status = field_string(json, "prepend_scheme", false, &scheme, err);
    if (status) return status;
    step->keeps_leading = scheme ? strcmp(json_string_value(scheme), "never") == 0 : !add_space;
    return STATUS_OK;
}

static enum status load_strip(struct decode_step *step, const json_t *json, struct error *err) {
    enum status status = field_character(json, "content", ' ', &step->code, err);
    if (status == STATUS_OK) status = field_count(json, "start", 0, &step->start, err);
    if (status == STATUS_OK) status = field_count(json, "stop", 0, &step->stop, err);
    return status;
}

static enum status add_component(void *owner, const char *type, const json_t *json,
                                 struct error *err) {
    static const struct {
        const char *name;
        enum decode_kind kind;
        bool whole_tokens; // makes sense before tokens are joined only
    } kinds[] = {
        {"ByteLevel", DECODE_BYTE_LEVEL, true},       {"Metaspace", DECODE_METASPACE, true},
        {"ByteFallback", DECODE_BYTE_FALLBACK, true}, {"Replace", DECODE_REPLACE, false},
        {"Fuse", DECODE_FUSE, false},                 {"Strip", DECODE_STRIP, false},
    };
    struct decoder *decoder = owner;
    if (decoder->count == DECODE_STEPS_MAX)
        return error_set(err, STATUS_UNSUPPORTED, "more than %d steps", DECODE_STEPS_MAX);
    size_t i = 0, known = sizeof kinds / sizeof *kinds;
    while (i < known && strcmp(type, kinds[i].name) != 0) i++;
    if (i == known) return STATUS_NOT_FOUND;
    if (kinds[i].whole_tokens && decoder->joined)
        return error_set(err, STATUS_UNSUPPORTED, "after tokens are joined is not supported");
    struct decode_step *step = &decoder->steps[decoder->count++];
    step->kind = kinds[i].kind;
    step->joined = decoder->joined;
    if (step->kind == DECODE_BYTE_LEVEL || step->kind == DECODE_FUSE) decoder->joined = true;
    if (step->kind == DECODE_REPLACE) return load_replace(step, json, err);
    if (step->kind == DECODE_METASPACE) return load_metaspace(step, json, err);
    if (step->kind == DECODE_STRIP) return load_strip(step, json, err);
    return STATUS_OK;
}

enum status decoder_load(const json_t *json, struct decoder **out, struct error *err) {
    *out = mem_zalloc(1, sizeof **out);
    if (json == NULL || json_is_null(json)) {
        (*out)->steps[(*out)->count++].kind = DECODE_SPACED;
        return STATUS_OK;
    }
    return components_load(json, "decoder", "decoders", add_component, *out, err);
}

void decoder_destroy(struct decoder *decoder) {
    if (decoder == NULL) return;
    for (size_t i = 0; i < decoder->count; i++) {
        pattern_destroy(decoder->steps[i].pattern);
        free(decoder->steps[i].content);
    }
    free(decoder);
}

// ---- ByteLevel --------------------------------------------------------------------------------

static void emit_replacement(struct decoding *decoding, size_t step) {
    emit(decoding, step + 1, "\xef\xbf\xbd", 3);
}

// Passes on the characters in `held`; malformed bytes become U+FFFD.
static void flush_bytes(struct decoding *decoding, size_t step, bool finish) {
    struct text_buffer *held = &decoding->states[step].held;
    size_t at = 0, good = 0, length; // [good, at) is valid and not yet passed on
    while (at < held->bytes) {
        uint32_t code;
        enum utf8_result result = utf8_scan(held->data + at, held->bytes - at, &code, &length);
        if (result == UTF8_INCOMPLETE && !finish) break;
        if (result != UTF8_CHARACTER) {
            if (at > good) emit(decoding, step + 1, held->data + good, at - good);
            emit_replacement(decoding, step);
            good = at + length;
        }
        at += length;
    }
    if (at > good) emit(decoding, step + 1, held->data + good, at - good);
    if (at > 0) memmove(held->data, held->data + at, held->bytes - at);
    held->bytes -= at;
}

// A token with a character outside the byte alphabet stands for itself.
static void byte_level(struct decoding *decoding, size_t step, const char *text, size_t bytes) {
    struct text_buffer *held = &decoding->states[step].held;
    size_t before = held->bytes;
    for (size_t at = 0; at < bytes;) {
        uint32_t code;
        at += utf8_next(text + at, bytes - at, &code);
        int byte = character_to_byte(code);
        if (byte < 0) {
            held->bytes = before;
            text_append(held, text, bytes);
            break;
        }
        text_append(held, (char[]){(char)byte}, 1);
    }
    flush_bytes(decoding, step, false);
}

// ---- ByteFallback -----------------------------------------------------------------------------

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return -1;
}

// The byte of a token such as "<0x0A>", or -1.
static int byte_of_token(const char *text, size_t bytes) {
    if (bytes != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>') return -1;
    int high = text[3] == '+' ? 0 : hex_digit(text[3]), low = hex_digit(text[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

static void end_byte_run(struct decoding *decoding, size_t step) {
    struct text_buffer *held = &decoding->states[step].held;
    if (held->bytes == 0) return;
    if (utf8_valid_prefix(held->data, held->bytes) == held->bytes)
        emit(decoding, step + 1, held->data, held->bytes);
    else
        for (size_t i = 0; i < held->bytes; i++) emit_replacement(decoding, step);
    held->bytes = 0;
}

static void byte_fallback(struct decoding *decoding, size_t step, const char *text,
                          size_t bytes) {
    int byte = byte_of_token(text, bytes);
    if (byte >= 0) {
        text_append(&decoding->states[step].held, (char[]){(char)byte}, 1);
        return;
    }
    end_byte_run(decoding, step);
    emit(decoding, step + 1, text, bytes);
}

// ---- Metaspace, Replace, Strip ----------------------------------------------------------------

static void metaspace(struct decoding *decoding, size_t step, const char *text, size_t bytes) {
    const struct decode_step *self = &decoding->decoder->steps[step];
    bool drops = decoding->states[step].tokens++ == 0 && !self->keeps_leading;
    struct text_buffer out = {0};
    for (size_t at = 0, length; at < bytes; at += length) {
        uint32_t code;
        length = utf8_next(text + at, bytes - at, &code);
        if (code != self->code)
            text_append(&out, text + at, length);
        else if (!drops)
            text_append(&out, " ", 1);
    }
    emit(decoding, step + 1, out.data, out.bytes);
    free(out.data);
}

static void replace_token(struct decoding *decoding, size_t step, const char *text,
                          size_t bytes) {
    const struct decode_step *self = &decoding->decoder->steps[step];
    struct text_buffer out = {0};
    struct cut_list *cuts = &decoding->cuts;
    if (pattern_cut(self->pattern, &decoding->match, text, bytes, cuts, NULL) != STATUS_OK) {
        emit(decoding, step + 1, text, bytes); // a limit was reached: the token stays as it is
        return;
    }
    for (size_t i = 0; i < cuts->count; i++) {
        const struct cut *cut = &cuts->items[i];
        if (cut->match)
            text_append(&out, self->content, self->content_bytes);
        else
            text_append(&out, text + cut->start, cut->end - cut->start);
    }
    emit(decoding, step + 1, out.data, out.bytes);
    free(out.data);
}

// In fragments: keeps the end back while it is a beginning of the pattern.
static void replace_joined(struct decoding *decoding, size_t step, const char *text,
                           size_t bytes) {
    const struct decode_step *self = &decoding->decoder->steps[step];
    struct text_buffer *held = &decoding->states[step].held;
    size_t pattern_bytes, at = 0;
    const char *pattern = pattern_text(self->pattern, &pattern_bytes);
    text_append(held, text, bytes);
    const char *found;
    while ((found = memmem(held->data + at, held->bytes - at, pattern, pattern_bytes))) {
        size_t start = (size_t)(found - held->data);
        emit(decoding, step + 1, held->data + at, start - at);
        emit(decoding, step + 1, self->content, self->content_bytes);
        at = start + pattern_bytes;
    }
    size_t keep = held->bytes - at < pattern_bytes ? held->bytes - at : pattern_bytes - 1;
    while (keep > 0 && memcmp(held->data + held->bytes - keep, pattern, keep) != 0) keep--;
    emit(decoding, step + 1, held->data + at, held->bytes - at - keep);
    memmove(held->data, held->data + held->bytes - keep, keep);
    held->bytes = keep;
}

static void strip_token(struct decoding *decoding, size_t step, const char *text, size_t bytes) {
    const struct decode_step *self = &decoding->decoder->steps[step];
    char mark[4];
    size_t mark_bytes = utf8_put(self->code, mark), start = 0, end = bytes;
    for (size_t i = 0; i < self->start && end - start >= mark_bytes; i++) {
        if (memcmp(text + start, mark, mark_bytes) != 0) break;
        start += mark_bytes;
    }
    for (size_t i = 0; i < self->stop && end - start >= mark_bytes; i++) {
        if (memcmp(text + end - mark_bytes, mark, mark_bytes) != 0) break;
        end -= mark_bytes;
    }
    emit(decoding, step + 1, text + start, end - start);
}

static void release_stop(struct decoding *decoding, size_t step, size_t keep) {
    const struct decode_step *self = &decoding->decoder->steps[step];
    struct decode_state *state = &decoding->states[step];
    char mark[4];
    size_t mark_bytes = utf8_put(self->code, mark);
    for (; state->stop_held > keep; state->stop_held--)
        emit(decoding, step + 1, mark, mark_bytes);
}

static void strip_joined(struct decoding *decoding, size_t step, const char *text,
                         size_t bytes) {
    const struct decode_step *self = &decoding->decoder->steps[step];
    struct decode_state *state = &decoding->states[step];
    for (size_t at = 0, length; at < bytes; at += length) {
        uint32_t code;
        length = utf8_next(text + at, bytes - at, &code);
        if (code != self->code) {
            state->start_left = 0;
            release_stop(decoding, step, 0);
            emit(decoding, step + 1, text + at, length);
        } else if (state->start_left > 0) {
            state->start_left--;
        } else {
            state->stop_held++;
            release_stop(decoding, step, self->stop);
        }
    }
}

// ---- the chain --------------------------------------------------------------------------------

// Hands a token (or a fragment, once joined) to a step; past the last one it is text.
static void emit(struct decoding *decoding, size_t step, const char *text, size_t bytes) {
    if (step == decoding->decoder->count) {
        text_append(decoding->out, text, bytes);
        return;
    }
    const struct decode_step *self = &decoding->decoder->steps[step];
    if (text == NULL) text = "";
    if (self->joined && bytes == 0) return;
    switch (self->kind) {
    case DECODE_BYTE_LEVEL: byte_level(decoding, step, text, bytes); break;
    case DECODE_METASPACE: metaspace(decoding, step, text, bytes); break;
    case DECODE_BYTE_FALLBACK: byte_fallback(decoding, step, text, bytes); break;
    case DECODE_FUSE: emit(decoding, step + 1, text, bytes); break;
    case DECODE_REPLACE:
        (self->joined ? replace_joined : replace_token)(decoding, step, text, bytes);
        break;
    case DECODE_STRIP:
        (self->joined ? strip_joined : strip_token)(decoding, step, text, bytes);
        break;
    case DECODE_SPACED:
        if (decoding->states[step].tokens++ > 0) emit(decoding, step + 1, " ", 1);
        emit(decoding, step + 1, text, bytes);
        break;
    }
}

void decoding_init(struct decoding *decoding, const struct decoder *decoder,
                   struct text_buffer *out, bool mid_text) {
    *decoding = (struct decoding){.decoder = decoder, .out = out};
    decoding->states = mem_zalloc(DECODE_STEPS_MAX, sizeof *decoding->states);
    for (size_t i = 0; i < decoder->count; i++) {
        const struct decode_step *step = &decoder->steps[i];
        decoding->states[i].tokens = mid_text && step->kind == DECODE_METASPACE ? 1 : 0;
        decoding->states[i].start_left = mid_text ? 0 : step->start;
    }
}

void decoding_deinit(struct decoding *decoding) {
    for (size_t i = 0; i < DECODE_STEPS_MAX; i++) free(decoding->states[i].held.data);
    free(decoding->states);
    free(decoding->cuts.items);
    pattern_match_destroy(decoding->match);
}

void decoding_push(struct decoding *decoding, const char *token, size_t bytes) {
    emit(decoding, 0, token, bytes);
}

// Ends the steps in order, so that what one releases still passes through the later ones.
void decoding_finish(struct decoding *decoding) {
    for (size_t i = 0; i < decoding->decoder->count; i++) {
        const struct decode_step *step = &decoding->decoder->steps[i];
        struct decode_state *state = &decoding->states[i];
        if (step->kind == DECODE_BYTE_LEVEL) flush_bytes(decoding, i, true);
        if (step->kind == DECODE_BYTE_FALLBACK) end_byte_run(decoding, i);
        if (step->kind == DECODE_REPLACE && state->held.bytes > 0) {
            emit(decoding, i + 1, state->held.data, state->held.bytes);
            state->held.bytes = 0;
        }
        state->stop_held = 0; // the end has come: these are what Strip takes away
    }
}
