// Status names, the error struct, and failing asserts: what base/status.h, error.h and verify.h
// declare. No state.
#include "base/error.h"
#include "base/verify.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *status_name(enum status status) {
    switch (status) {
#define STATUS_CASE(name, value, text)                                                             \
    case name: return #name;
        STATUS_LIST(STATUS_CASE)
#undef STATUS_CASE
    }
    return "STATUS_UNKNOWN";
}

const char *status_text(enum status status) {
    switch (status) {
#define STATUS_CASE(name, value, text)                                                             \
    case name: return text;
        STATUS_LIST(STATUS_CASE)
#undef STATUS_CASE
    }
    return "unknown status";
}

// Length of the valid UTF-8 sequence at `s` (NUL-terminated), or 0.
static int utf8_length(const unsigned char *s) {
    if (s[0] < 0x80) return 1;
    int length = s[0] >= 0xf0 && s[0] <= 0xf4 ? 4 : s[0] >= 0xe0 ? 3 : s[0] >= 0xc2 ? 2 : 0;
    if (s[0] > 0xf4) return 0;
    for (int i = 1; i < length; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    if (s[0] == 0xe0 && s[1] < 0xa0) return 0;
    if (s[0] == 0xed && s[1] > 0x9f) return 0;
    if (s[0] == 0xf0 && s[1] < 0x90) return 0;
    if (s[0] == 0xf4 && s[1] > 0x8f) return 0;
    return length;
}

static void replace_invalid_utf8(char *text) {
    for (unsigned char *s = (unsigned char *)text; *s;) {
        int length = utf8_length(s);
        if (length == 0) *s = '?';
        s += length ? length : 1;
    }
}

static enum status error_fill(struct error *err, enum status status, const char *param,
                              const char *format, va_list arguments) {
    if (!err) return status;
    err->status = status;
    snprintf(err->param, sizeof err->param, "%s", param);
    vsnprintf(err->text, sizeof err->text, format, arguments);
    replace_invalid_utf8(err->text);
    return status;
}

enum status error_set(struct error *err, enum status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    error_fill(err, status, "", format, arguments);
    va_end(arguments);
    return status;
}

enum status error_set_param(struct error *err, enum status status, const char *param,
                            const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    error_fill(err, status, param, format, arguments);
    va_end(arguments);
    return status;
}

enum status error_prefix(struct error *err, const char *format, ...) {
    if (!err) return STATUS_INVALID;
    char old[sizeof err->text], prefix[sizeof err->text];
    memcpy(old, err->text, sizeof old);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(prefix, sizeof prefix, format, arguments);
    va_end(arguments);
    int used = snprintf(err->text, sizeof err->text, "%s: ", prefix);
    if (used >= 0 && (size_t)used < sizeof err->text)
        snprintf(err->text + used, sizeof err->text - (size_t)used, "%s", old);
    replace_invalid_utf8(err->text);
    return err->status;
}

void error_clear(struct error *err) {
    if (err) memset(err, 0, sizeof *err);
}

_Noreturn void verify_fail(const char *file, int line, const char *expression) {
    fprintf(stderr, "%s:%d: assertion failed: %s\n", file, line, expression);
    abort();
}

_Noreturn void verify_fail_operands(const char *file, int line, const char *expression,
                                    long long left, long long right) {
    fprintf(stderr, "%s:%d: assertion failed: %s (%lld, %lld)\n", file, line, expression, left,
            right);
    abort();
}
