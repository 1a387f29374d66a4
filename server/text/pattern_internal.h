// Shared by pattern.c and regex_translate.c.
#ifndef LORAD_SERVER_TEXT_PATTERN_INTERNAL_H
#define LORAD_SERVER_TEXT_PATTERN_INTERNAL_H

#include "server/text/text_internal.h"

// Appends the PCRE2 spelling of an Oniguruma expression (valid UTF-8, NUL-terminated) to `out`.
// STATUS_UNSUPPORTED: what has no equivalent, by name.
MUST_CHECK enum status regex_translate(const char *regex, size_t bytes, struct text_buffer *out,
                                       struct error *err);

#endif
