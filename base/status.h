// The one list of outcomes that every function of lorad shares.
//
// STATUS_OK is 0, everything else is negative. A function that can fail returns `enum status`
// and, where a user will read the reason, fills a caller-owned `struct error` (error.h).
// api/ alone turns a status into an HTTP status code.
#ifndef LORAD_BASE_STATUS_H
#define LORAD_BASE_STATUS_H

// X(name, value, short text)
#define STATUS_LIST(X)                                                                             \
    X(STATUS_OK, 0, "ok")                                                                          \
    X(STATUS_INVALID, -1, "invalid input")                                                         \
    X(STATUS_NOT_FOUND, -2, "not found")                                                           \
    X(STATUS_EXISTS, -3, "already exists")                                                         \
    X(STATUS_BUSY, -4, "in use or not ready; try again later")                                     \
    X(STATUS_FULL, -5, "a bounded queue or table is full")                                         \
    X(STATUS_NO_PAGES, -6, "the page pool is exhausted")                                           \
    X(STATUS_TOO_LARGE, -7, "larger than a configured limit")                                      \
    X(STATUS_FORBIDDEN, -8, "not allowed")                                                         \
    X(STATUS_UNSUPPORTED, -9, "not supported")                                                     \
    X(STATUS_IO, -10, "input/output error")                                                        \
    X(STATUS_NO_MEMORY, -11, "out of memory")                                                      \
    X(STATUS_DEVICE, -12, "device error")                                                          \
    X(STATUS_CANCELLED, -13, "cancelled by the client")                                            \
    X(STATUS_DEADLINE, -14, "deadline passed")                                                     \
    X(STATUS_SHUTDOWN, -15, "shutting down")

enum status {
#define STATUS_ENUM(name, value, text) name = value,
    STATUS_LIST(STATUS_ENUM)
#undef STATUS_ENUM
};

#define MUST_CHECK __attribute__((warn_unused_result))

// Static strings: the constant's name ("STATUS_INVALID") and its short text.
const char *status_name(enum status status);
const char *status_text(enum status status);

#endif
