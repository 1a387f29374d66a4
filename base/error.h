// A failure that a person will read: which status, and a sentence that says what was wrong, where,
// and what would be right. The caller owns the storage; every function accepts NULL for it.
#ifndef LORAD_BASE_ERROR_H
#define LORAD_BASE_ERROR_H

#include "base/status.h"

#include <stdarg.h>

struct error {
    enum status status;
    char param[48]; // the request field or option at fault, or ""
    char text[320]; // one sentence, always NUL-terminated, always valid UTF-8
};

// Fills `err` (when not NULL) and returns `status`, so that a failure reads
// `return error_set(err, STATUS_INVALID, "...")`. Bytes that are not UTF-8 are replaced by '?'.
__attribute__((format(printf, 3, 4))) enum status error_set(struct error *err, enum status status,
                                                            const char *format, ...);

// The same, naming the parameter at fault (it becomes `error.param` in the HTTP answer).
__attribute__((format(printf, 4, 5))) enum status error_set_param(struct error *err,
                                                                  enum status status,
                                                                  const char *param,
                                                                  const char *format, ...);

// Puts "context: " before the text already in `err`; returns err's status unchanged.
__attribute__((format(printf, 2, 3))) enum status error_prefix(struct error *err,
                                                               const char *format, ...);

void error_clear(struct error *err);

#endif
