// Status names, the error struct, and failing asserts: what base/status.h, error.h and verify.h
// declare. No state.
#include "base/error.h"
#include "base/utf8.h"
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

static enum status error_fill(struct error *err, enum status status, const char *param,
                              const char *format, va_list arguments) {
    if (!err) return status;
    char text[sizeof err->text]; // the arguments may be err's own text
    vsnprintf(text, sizeof text, format, arguments);
    err->status = status;
    snprintf(err->param, sizeof err->param, "%s", param);
    memcpy(err->text, text, sizeof text);
    utf8_replace_invalid(err->text);
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
    utf8_replace_invalid(err->text);
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
