// Rewrites a regular expression of tokenizer.json, whose dialect is Oniguruma's Ruby syntax, as a
// PCRE2 expression that matches the same text. Called at load alone.
//
// Where the two dialects give one spelling two meanings the spelling is replaced: \s and \w have
// other members, \v is one character, X{1,2}+ repeats instead of being possessive, a script name
// stands for the script and not for its extensions. Spellings that only Oniguruma knows, or whose
// difference has no short equivalent, are refused by name.
#include "server/text/pattern_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SPACES                                                                                     \
    "\\t-\\r \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}"       \
    "\\x{3000}"
#define NOT_SPACES                                                                                 \
    "\\x{0}-\\x{8}\\x{e}-\\x{1f}\\x{21}-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}"                   \
    "\\x{1681}-\\x{1fff}\\x{200b}-\\x{2027}\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}"                 \
    "\\x{2060}-\\x{2fff}\\x{3001}-\\x{10ffff}"
// Oniguruma counts the Latin-1 fractions and superscripts as word characters.
#define WORDS                                                                                      \
    "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}\\x{24b6}-\\x{24e9}"     \
    "\\x{1f130}-\\x{1f149}\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}"

enum { GROUP_DEPTH_MAX = 64 };

struct translation {
    const char *regex;
    size_t bytes, at;
    struct text_buffer *out;
    size_t atom;                    // where in `out` the last atom begins
    size_t groups[GROUP_DEPTH_MAX]; // where open groups begin
    int depth;
    struct error *err;
};

static void put(struct translation *t, const char *text) {
    text_append(t->out, text, strlen(text));
}

static char peek(const struct translation *t, size_t ahead) {
    return t->at + ahead < t->bytes ? t->regex[t->at + ahead] : '\0';
}

static void copy(struct translation *t, size_t bytes) {
    if (bytes > t->bytes - t->at) bytes = t->bytes - t->at;
    text_append(t->out, t->regex + t->at, bytes);
    t->at += bytes;
}

static enum status refuse(const struct translation *t, const char *what) {
    return error_set(t->err, STATUS_UNSUPPORTED, "%s in the regular expression is not supported: "
                     "%.120s", what, t->regex);
}

// At "\p" or "\P": copies the property, spelling a script name as the script property.
static enum status property(struct translation *t) {
    if (peek(t, 2) != '{') {
        copy(t, 3);
        return STATUS_OK;
    }
    const char *name = t->regex + t->at + 3;
    const char *end = memchr(name, '}', t->bytes - t->at - 3);
    if (end == NULL) return refuse(t, "an open \\p{");
    bool inverse = *name == '^';
    if (inverse) name++;
    size_t length = (size_t)(end - name);
    copy(t, 3); // "\p{"
    if (inverse) put(t, "^");
    if (length > 2 && memchr(name, '=', length) == NULL && memchr(name, ':', length) == NULL)
        put(t, "sc:");
    t->at = (size_t)(name - t->regex);
    copy(t, length + 1);
    return STATUS_OK;
}

// At a backslash, inside or outside a bracketed class.
static enum status escape(struct translation *t, bool in_class) {
    char letter = peek(t, 1);
    const char *replacement = NULL;
    switch (letter) {
    case 's': replacement = in_class ? SPACES : "[" SPACES "]"; break;
    case 'S': replacement = in_class ? NOT_SPACES : "[^" SPACES "]"; break;
    case 'w': replacement = in_class ? WORDS : "[" WORDS "]"; break;
    case 'W':
        if (in_class) return refuse(t, "\\W inside [...]");
        replacement = "[^" WORDS "]";
        break;
    case 'v': replacement = "\\x0b"; break;
    case 'p':
    case 'P': return property(t);
    case 'u':
        if (t->bytes - t->at < 6) return refuse(t, "a short \\u");
        put(t, "\\x{");
        t->at += 2;
        copy(t, 4);
        put(t, "}");
        return STATUS_OK;
    default:
        if (letter != '\0' && strchr("hHRXKGyYkgONcCM", letter) != NULL)
            return refuse(t, (char[]){'\\', letter, '\0'});
        copy(t, letter == '\0' ? 1 : 2); // a multi-byte character goes on as literals
        return STATUS_OK;
    }
    put(t, replacement);
    t->at += 2;
    return STATUS_OK;
}

// At "[": copies the class up to its "]".
static enum status bracket(struct translation *t) {
    t->atom = t->out->bytes;
    copy(t, 1);
    if (peek(t, 0) == '^') copy(t, 1);
    for (bool first = true; t->at < t->bytes; first = false) {
        char c = peek(t, 0);
        if (c == ']' && !first) {
            copy(t, 1);
            return STATUS_OK;
        }
        if (c == '&' && peek(t, 1) == '&') return refuse(t, "a class intersection (&&)");
        if (c == '[' && peek(t, 1) != ':') return refuse(t, "a class within a class");
        if (c == '\\') {
            enum status status = escape(t, true);
            if (status) return status;
        } else if (c == '[') {
            const char *end = memchr(t->regex + t->at, ']', t->bytes - t->at);
            if (end == NULL) break;
            copy(t, (size_t)(end + 1 - (t->regex + t->at)));
        } else {
            if (c == ']') put(t, "\\");
            copy(t, 1);
        }
    }
    return refuse(t, "an open [");
}

static enum status open_group(struct translation *t) {
    if (t->depth == GROUP_DEPTH_MAX) return refuse(t, "nesting deeper than 64 groups");
    t->groups[t->depth++] = t->out->bytes;
    size_t start = t->at;
    copy(t, 1);
    if (peek(t, 0) != '?') return STATUS_OK;
    size_t header = 1;
    while (strchr(":=!>)", peek(t, header)) == NULL) header++; // stops at the end, too
    for (size_t i = 1; i < header && peek(t, 1) != '<'; i++)
        if (peek(t, i) == 'm') return refuse(t, "the option m");
    if (peek(t, header) == ')') {
        if (start != 0) return refuse(t, "an option in the middle");
        t->depth--;
    }
    copy(t, header + 1);
    return STATUS_OK;
}

// At "{": a repeat count, or a literal brace.
static enum status repeat(struct translation *t) {
    unsigned low = 0, high = 0;
    int used = 0;
    char text[32] = "", spelled[40];
    size_t rest = t->bytes - t->at;
    memcpy(text, t->regex + t->at, rest < sizeof text - 1 ? rest : sizeof text - 1);
    bool exact = false;
    if (sscanf(text, "{%5u}%n", &low, &used) == 1 && used > 0) {
        exact = true;
        snprintf(spelled, sizeof spelled, "{%u}", low);
    } else if ((used = 0, sscanf(text, "{%5u,%5u}%n", &low, &high, &used)) == 2 && used > 0) {
        snprintf(spelled, sizeof spelled, "{%u,%u}", low, high);
    } else if ((used = 0, sscanf(text, "{%5u,}%n", &low, &used)) == 1 && used > 0) {
        snprintf(spelled, sizeof spelled, "{%u,}", low);
    } else if ((used = 0, sscanf(text, "{,%5u}%n", &high, &used)) == 1 && used > 0) {
        snprintf(spelled, sizeof spelled, "{0,%u}", high);
    } else {
        t->atom = t->out->bytes;
        put(t, "\\{");
        t->at++;
        return STATUS_OK;
    }
    t->at += (size_t)used;
    put(t, spelled);
    if (peek(t, 0) == '?') {
        if (exact) return refuse(t, "{n}?");
        copy(t, 1);
    } else if (peek(t, 0) == '+') { // a repeat of the repeat
        struct text_buffer inner = {0};
        text_append(&inner, t->out->data + t->atom, t->out->bytes - t->atom);
        t->out->bytes = t->atom;
        put(t, "(?:");
        text_append(t->out, inner.data, inner.bytes);
        put(t, ")+");
        free(inner.data);
        t->at++;
    }
    return STATUS_OK;
}

static enum status translate_next(struct translation *t) {
    switch (peek(t, 0)) {
    case '\\': t->atom = t->out->bytes; return escape(t, false);
    case '[': return bracket(t);
    case '(': return open_group(t);
    case ')':
        if (t->depth == 0) return refuse(t, "a ) without (");
        t->atom = t->groups[--t->depth];
        copy(t, 1);
        return STATUS_OK;
    case '{': return repeat(t);
    case '*':
    case '+':
    case '?':
        copy(t, 1);
        if (peek(t, 0) == '+' || peek(t, 0) == '?') copy(t, 1);
        return STATUS_OK;
    default: break;
    }
    uint32_t code;
    t->atom = t->out->bytes;
    copy(t, utf8_next(t->regex + t->at, t->bytes - t->at, &code));
    return STATUS_OK;
}

enum status regex_translate(const char *regex, size_t bytes, struct text_buffer *out,
                            struct error *err) {
    struct translation t = {.regex = regex, .bytes = bytes, .out = out, .err = err};
    if (memchr(regex, '\0', bytes)) return refuse(&t, "a NUL character");
    while (t.at < t.bytes) {
        enum status status = translate_next(&t);
        if (status) return status;
    }
    return STATUS_OK;
}
