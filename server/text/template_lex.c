// Tokens of a template. White space goes as Jinja's environment of transformers has it: a line break
// behind a tag goes (trim_blocks), blanks before a tag that begins its line go (lstrip_blocks), "-" takes
// all white space beside it, "+" none; one line break at the very end goes.
#include "server/text/template_internal.h"

#include <ctype.h>
#include <string.h>

struct lexer {
    struct arena *arena;
    const char *at, *end;
    int line;
    bool line_begins; // at a line's beginning, whatever tags stand before
    struct template_token **link;
    struct error *err;
};

static enum status lex_fail(struct lexer *l, const char *what) {
    return error_set(l->err, STATUS_INVALID, "chat template, line %d: %s", l->line, what);
}

static void token_add(struct lexer *l, enum token_type type, const char *text, size_t bytes) {
    struct template_token *token = arena_alloc(l->arena, sizeof *token);
    *token = (struct template_token){type, arena_strndup(l->arena, text, bytes), bytes, l->line, NULL};
    *l->link = token;
    l->link = &token->next;
}

static void advance(struct lexer *l, size_t bytes) {
    for (; bytes > 0; bytes--) l->line += *l->at++ == '\n';
}

static bool starts(const struct lexer *l, const char *text) {
    size_t bytes = strlen(text);
    return (size_t)(l->end - l->at) >= bytes && memcmp(l->at, text, bytes) == 0;
}

// ------------------------------------------------------------------ text

static bool is_space(char c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

// What of the text before a tag stays.
static size_t text_kept(const struct lexer *l, const char *text, size_t bytes, char kind, char sign) {
    if (sign == '-') {
        while (bytes > 0 && is_space(text[bytes - 1])) bytes--;
        return bytes;
    }
    if (kind == '{' || sign == '+') return bytes;
    size_t line = bytes;
    while (line > 0 && (text[line - 1] == ' ' || text[line - 1] == '\t')) line--;
    bool begins = line > 0 ? text[line - 1] == '\n' : l->line_begins;
    return begins ? line : bytes;
}

static void text_add(struct lexer *l, const char *text, size_t bytes) {
    if (bytes > 0) token_add(l, TOKEN_TEXT, text, bytes);
}

// Behind the end of a tag, an output (no line break goes) or a comment.
static void after_end(struct lexer *l, bool strips, bool trims) {
    l->line_begins = false;
    if (strips) {
        while (l->at < l->end && is_space(*l->at)) {
            l->line_begins = *l->at == '\n';
            advance(l, 1);
        }
    } else if (trims && l->at < l->end && *l->at == '\n') {
        advance(l, 1);
        l->line_begins = true;
    }
}

// ------------------------------------------------------------------ inside of tags

static int hex_digits(const char *at, int count) {
    int value = 0;
    for (int i = 0; i < count; i++) {
        if (!isxdigit((unsigned char)at[i])) return -1;
        int digit = isdigit((unsigned char)at[i]) ? at[i] - '0' : (tolower(at[i]) - 'a') + 10;
        value = value * 16 + digit;
    }
    return value;
}

// One escape from `at` (behind the backslash) on; returns its bytes, 0: not one that is known.
static size_t escape_add(struct text_buffer *to, const char *at, const char *end) {
    static const char names[] = "ntrbfv0\\'\"", means[] = "\n\t\r\b\f\v\0\\'\"";
    if (at == end) return 0;
    const char *found = strchr(names, *at);
    if (found && *at) {
        text_append(to, &means[found - names], 1);
        return 1;
    }
    int digits = *at == 'x' ? 2 : *at == 'u' ? 4 : 0;
    int code = digits && end - at > digits ? hex_digits(at + 1, digits) : -1;
    if (*at == '\n') return 1; // the line goes on
    if (code < 0 || (code >= 0xd800 && code < 0xe000)) { // as Python: both characters stay
        text_append(to, "\\", 1);
        text_append(to, at, 1);
        return 1;
    }
    text_append_character(to, (uint32_t)code);
    return (size_t)digits + 1;
}

static enum status string_add(struct lexer *l) {
    char quote = *l->at;
    struct text_buffer text = {0};
    const char *at = l->at + 1;
    while (at < l->end && *at != quote) {
        if (*at == '\\') {
            size_t bytes = escape_add(&text, at + 1, l->end);
            if (bytes == 0) break;
            at += 1 + bytes;
        } else {
            text_append(&text, at++, 1);
        }
    }
    bool ends = at < l->end;
    if (ends) {
        token_add(l, TOKEN_STRING, text.data ? text.data : "", text.bytes);
        advance(l, (size_t)(at + 1 - l->at));
    }
    free(text.data);
    return ends ? STATUS_OK : lex_fail(l, "a string has no end");
}

static bool is_word(char c) {
    return isalnum((unsigned char)c) || c == '_';
}

static enum status operator_add(struct lexer *l, int *depth) {
    static const char *const operators[] = {"==", "!=", "<=", ">=", "//", "**"};
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++)
        if (starts(l, operators[i])) {
            token_add(l, TOKEN_OPERATOR, operators[i], 2);
            advance(l, 2);
            return STATUS_OK;
        }
    if (!strchr("+-*/%~<>()[]{}.,:|=", *l->at)) return lex_fail(l, "a character that is no operator");
    *depth += (strchr("([{", *l->at) != NULL) - (strchr(")]}", *l->at) != NULL);
    token_add(l, TOKEN_OPERATOR, l->at, 1);
    advance(l, 1);
    return STATUS_OK;
}

// From behind "{{" or "{%" to behind its end.
static enum status lex_inside(struct lexer *l, bool output) {
    int depth = 0;
    const char *plain = output ? "}}" : "%}", *minus = output ? "-}}" : "-%}";
    while (l->at < l->end) {
        char c = *l->at;
        bool strips = depth == 0 && starts(l, minus), keeps = depth == 0 && !output && starts(l, "+%}");
        if (strips || keeps || (depth == 0 && starts(l, plain))) {
            token_add(l, output ? TOKEN_OUTPUT_END : TOKEN_TAG_END, plain, 2);
            advance(l, 2 + (strips || keeps));
            after_end(l, strips, !output && !keeps);
            return STATUS_OK;
        }
        enum status status = STATUS_OK;
        size_t bytes = 0;
        if (is_space(c)) {
            advance(l, 1);
        } else if (c == '\'' || c == '"') {
            status = string_add(l);
        } else if (is_word(c)) {
            bool number = isdigit((unsigned char)c);
            while (l->at + bytes < l->end &&
                   (is_word(l->at[bytes]) ||
                    (number && l->at[bytes] == '.' && l->at + bytes + 1 < l->end &&
                     isdigit((unsigned char)l->at[bytes + 1]))))
                bytes++;
            token_add(l, number ? TOKEN_NUMBER : TOKEN_NAME, l->at, bytes);
            advance(l, bytes);
        } else {
            status = operator_add(l, &depth);
        }
        if (status) return status;
    }
    return lex_fail(l, output ? "\"{{\" has no end" : "\"{%\" has no end");
}

static enum status lex_comment(struct lexer *l) {
    for (; l->at < l->end; advance(l, 1)) {
        bool strips = starts(l, "-#}");
        if (!strips && !starts(l, "#}")) continue;
        advance(l, 2 + strips);
        after_end(l, strips, true);
        return STATUS_OK;
    }
    return lex_fail(l, "\"{#\" has no end");
}

enum status template_lex(struct arena *arena, const char *source, size_t bytes, struct template_token **first,
                         struct error *err) {
    if (bytes > 0 && source[bytes - 1] == '\n') bytes--;
    struct lexer l = {arena, source, source + bytes, 1, true, first, err};
    while (l.at < l.end) {
        const char *text = l.at;
        const char *tag = text;
        while (tag < l.end && !(tag + 1 < l.end && *tag == '{' && strchr("{%#", tag[1]))) tag++;
        if (tag == l.end) {
            text_add(&l, text, (size_t)(tag - text));
            break;
        }
        char kind = tag[1], sign = tag + 2 < l.end ? tag[2] : 0;
        if (sign != '-' && sign != '+') sign = 0;
        text_add(&l, text, text_kept(&l, text, (size_t)(tag - text), kind, sign));
        advance(&l, (size_t)(tag - text) + 2 + (sign != 0));
        enum status status = STATUS_OK;
        if (kind == '#') {
            status = lex_comment(&l);
        } else {
            token_add(&l, kind == '{' ? TOKEN_OUTPUT_BEGIN : TOKEN_TAG_BEGIN, tag, 2);
            status = lex_inside(&l, kind == '{');
        }
        if (status) return status;
    }
    token_add(&l, TOKEN_END, "", 0);
    struct template_token *end = *first;
    while (end->next) end = end->next;
    end->next = end;
    return STATUS_OK;
}
