// Reading files whole, and the clock. Files are read(), never mapped: a mapping that is truncated
// by someone else is a SIGBUS, a short read is an error we can report.
#ifndef LORAD_BASE_FILE_H
#define LORAD_BASE_FILE_H

#include "base/error.h"

#include <stddef.h>
#include <stdint.h>

// Reads a regular file into a fresh NUL-terminated buffer (the NUL is not counted in *bytes).
// STATUS_NOT_FOUND: no such file. STATUS_INVALID: not a regular file (FIFO, directory, device).
// STATUS_TOO_LARGE: more than bytes_max. The caller frees *data.
MUST_CHECK enum status file_read_all(const char *path, size_t bytes_max, char **data,
                                     size_t *bytes, struct error *err);

// Opens a regular file read-only without ever blocking on a FIFO; *fd is the caller's to close.
MUST_CHECK enum status file_open_regular(const char *path, int *fd, uint64_t *bytes,
                                         struct error *err);

// pread() until `bytes` are there; a short file is STATUS_IO.
MUST_CHECK enum status file_read_at(int fd, void *buffer, size_t bytes, uint64_t offset,
                                    const char *path, struct error *err);

// Joins with one '/', malloc'd.
char *path_join(const char *folder, const char *name);

// Monotonic seconds since an arbitrary start; and microseconds.
double clock_seconds(void);
uint64_t clock_us(void);

#endif
