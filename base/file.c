// Whole files, exact reads, paths and the monotonic clock. Any thread; no state.
//
// Only regular files are opened: a FIFO, a device or a folder is refused before the first read, so
// that no path can make a thread hang or read for ever. Errors name a file by its last component:
// the folder may be none of a client's business, and a caller that wants it said prefixes it.
#include "base/file.h"

#include "base/memory.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char *last_component(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

enum status file_open_regular(const char *path, int *fd, uint64_t *bytes, struct error *err) {
    const char *name = last_component(path);
    // O_NONBLOCK: opening a FIFO returns at once; it means nothing for a regular file.
    int opened = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
    if (opened < 0) {
        if (errno == ENOENT || errno == ENOTDIR)
            return error_set(err, STATUS_NOT_FOUND, "%s: no such file", name);
        if (errno == ENXIO)
            return error_set(err, STATUS_INVALID, "%s is not a regular file", name);
        return error_set(err, STATUS_IO, "%s: cannot open: %s", name, strerror(errno));
    }
    struct stat stat;
    enum status status = STATUS_OK;
    if (fstat(opened, &stat) != 0)
        status = error_set(err, STATUS_IO, "%s: cannot stat: %s", name, strerror(errno));
    else if (!S_ISREG(stat.st_mode))
        status = error_set(err, STATUS_INVALID, "%s is not a regular file", name);
    if (status != STATUS_OK) {
        close(opened);
        return status;
    }
    *fd = opened;
    *bytes = (uint64_t)stat.st_size;
    return STATUS_OK;
}

enum status file_read_at(int fd, void *buffer, size_t bytes, uint64_t offset, const char *path,
                         struct error *err) {
    enum { READ_BYTES_MAX = 1 << 30 }; // Linux stops a single read a little below 2 GiB
    char *to = buffer;
    const char *name = last_component(path);
    while (bytes > 0) {
        size_t part = bytes < READ_BYTES_MAX ? bytes : READ_BYTES_MAX;
        ssize_t got = pread(fd, to, part, (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0)
            return error_set(err, STATUS_IO, "%s: cannot read: %s", name, strerror(errno));
        if (got == 0)
            return error_set(err, STATUS_IO, "%s: ends %zu bytes too early", name, bytes);
        to += got;
        offset += (uint64_t)got;
        bytes -= (size_t)got;
    }
    return STATUS_OK;
}

enum status file_read_all(const char *path, size_t bytes_max, char **data, size_t *bytes,
                          struct error *err) {
    int fd;
    uint64_t size;
    enum status status = file_open_regular(path, &fd, &size, err);
    if (status != STATUS_OK) return status;
    if (size > bytes_max) {
        close(fd);
        return error_set(err, STATUS_TOO_LARGE, "%s has %llu bytes; at most %zu are read",
                         last_component(path), (unsigned long long)size, bytes_max);
    }
    char *buffer = mem_alloc((size_t)size + 1);
    status = file_read_at(fd, buffer, (size_t)size, 0, path, err);
    close(fd);
    if (status != STATUS_OK) {
        free(buffer);
        return status;
    }
    buffer[size] = 0;
    *data = buffer;
    *bytes = (size_t)size;
    return STATUS_OK;
}

char *path_join(const char *folder, const char *name) {
    size_t folder_bytes = strlen(folder), name_bytes = strlen(name);
    while (folder_bytes > 0 && folder[folder_bytes - 1] == '/') folder_bytes--;
    char *path = mem_alloc(folder_bytes + 1 + name_bytes + 1);
    memcpy(path, folder, folder_bytes);
    path[folder_bytes] = '/';
    memcpy(path + folder_bytes + 1, name, name_bytes + 1);
    return path;
}

double clock_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

uint64_t clock_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}
