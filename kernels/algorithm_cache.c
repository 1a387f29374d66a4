// The cache of algorithm_cache.h.
#include "kernels/algorithm_cache.h"

#include "base/file.h"
#include "base/log.h"
#include "base/memory.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILE_BYTES_MAX = 16 << 20, LINE_BYTES = 2 * ALGORITHM_BYTES + 64, HEAD_BYTES = 300 };

struct algorithm_cache {
    struct algorithm *list;
    int count, room;
    char *path; // NULL: in memory alone
};

char *algorithm_cache_folder(void) {
    const char *named = getenv("LORAD_CACHE_DIR"), *xdg = getenv("XDG_CACHE_HOME");
    const char *home = getenv("HOME");
    if (named && *named) return strdup(named);
    if (xdg && *xdg) return path_join(xdg, "lorad");
    return home && *home ? path_join(home, ".cache/lorad") : NULL;
}

static struct algorithm *entry(const struct algorithm_cache *cache, int out, int in, int tokens) {
    for (int i = 0; i < cache->count; i++) {
        struct algorithm *a = &cache->list[i];
        if (a->out == out && a->in == in && a->tokens == tokens) return a;
    }
    return NULL;
}

const struct algorithm *algorithm_cache_find(const struct algorithm_cache *cache, int out, int in,
                                             int tokens) {
    return entry(cache, out, in, tokens);
}

static void remember(struct algorithm_cache *cache, const struct algorithm *algorithm) {
    struct algorithm *known = entry(cache, algorithm->out, algorithm->in, algorithm->tokens);
    if (known) {
        *known = *algorithm;
        return;
    }
    if (cache->count == cache->room) {
        cache->room = cache->room ? 2 * cache->room : 64;
        cache->list = mem_realloc(cache->list, (size_t)cache->room * sizeof *cache->list);
    }
    cache->list[cache->count++] = *algorithm;
}

// ------------------------------------------------------------------ the file

static void head_write(char head[HEAD_BYTES], const char *owner) {
    snprintf(head, HEAD_BYTES, "lorad algorithms 1: %s\n", owner);
}

static bool line_parse(const char *line, struct algorithm *to) {
    int used = 0;
    if (sscanf(line, "%d %d %d %n", &to->out, &to->in, &to->tokens, &used) != 3) return false;
    for (int i = 0; i < ALGORITHM_BYTES; i++) {
        const char *two = line + used + 2 * i;
        if (!isxdigit((unsigned char)two[0]) || !isxdigit((unsigned char)two[1])) return false;
        to->bytes[i] = (unsigned char)strtol((char[]){two[0], two[1], 0}, NULL, 16);
    }
    return line[used + 2 * ALGORITHM_BYTES] == 0 && to->out > 0 && to->in > 0 && to->tokens > 0;
}

static void file_append(const struct algorithm_cache *cache, const char *text) {
    int fd = open(cache->path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    ssize_t bytes = (ssize_t)strlen(text);
    if (fd < 0 || write(fd, text, (size_t)bytes) != bytes)
        log_event(LOG_WARN, "algorithms", "%s: %s: the next start will measure again", cache->path,
                  strerror(errno));
    if (fd >= 0) close(fd);
}

// Takes what the file has; makes one where there is none, or another's.
static void file_read(struct algorithm_cache *cache, const char *owner) {
    char head[HEAD_BYTES], *data, *rest;
    size_t bytes;
    struct error err;
    head_write(head, owner);
    if (file_read_all(cache->path, FILE_BYTES_MAX, &data, &bytes, &err) != STATUS_OK) {
        file_append(cache, head);
        return;
    }
    if (strncmp(data, head, strlen(head)) == 0) {
        strtok_r(data, "\n", &rest);
        for (char *line; (line = strtok_r(NULL, "\n", &rest));) {
            struct algorithm algorithm;
            if (line_parse(line, &algorithm)) remember(cache, &algorithm);
        }
    } else {
        unlink(cache->path);
        file_append(cache, head);
    }
    free(data);
}

// Letters and digits of the owner name its file.
static char *path_of(const char *folder, const char *owner) {
    char name[HEAD_BYTES];
    snprintf(name, sizeof name, "algorithms-%s", owner);
    for (char *at = name; *at; at++)
        if (!isalnum((unsigned char)*at)) *at = '-';
    return path_join(folder, name);
}

static bool folder_make(const char *folder) {
    char *path = strdup(folder);
    for (char *at = path + 1; *at; at++)
        if (*at == '/') {
            *at = 0;
            mkdir(path, 0755);
            *at = '/';
        }
    mkdir(path, 0755);
    struct stat state;
    bool there = stat(path, &state) == 0 && S_ISDIR(state.st_mode);
    free(path);
    return there;
}

// ------------------------------------------------------------------ open, add, close

struct algorithm_cache *algorithm_cache_open(const char *folder, const char *owner) {
    struct algorithm_cache *cache = mem_zalloc(1, sizeof *cache);
    if (!folder || !folder_make(folder)) return cache;
    cache->path = path_of(folder, owner);
    file_read(cache, owner);
    return cache;
}

void algorithm_cache_close(struct algorithm_cache *cache) {
    if (!cache) return;
    free(cache->list);
    free(cache->path);
    free(cache);
}

void algorithm_cache_add(struct algorithm_cache *cache, const struct algorithm *algorithm,
                         bool measured) {
    remember(cache, algorithm);
    if (!measured || !cache->path) return;
    char line[LINE_BYTES];
    int used = snprintf(line, sizeof line, "%d %d %d ", algorithm->out, algorithm->in,
                        algorithm->tokens);
    for (int i = 0; i < ALGORITHM_BYTES; i++)
        used += snprintf(line + used, sizeof line - (size_t)used, "%02x", algorithm->bytes[i]);
    snprintf(line + used, sizeof line - (size_t)used, "\n");
    file_append(cache, line);
}
