// API keys: read once at start, compared without telling by time how much of one was right.
#include "api/api_internal.h"

#include "base/file.h"
#include "base/memory.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { KEY_BYTES_MAX = 256, KEYS_FILE_MAX = 1 << 20 };

struct keys {
    int count;
    char (*key)[KEY_BYTES_MAX]; // zero-filled
};

enum status keys_load(const char *path, struct keys **out, struct error *err) {
    *out = NULL;
    if (!path) return STATUS_OK;
    char *text;
    size_t bytes;
    enum status status = file_read_all(path, KEYS_FILE_MAX, &text, &bytes, err);
    if (status != STATUS_OK) return status;
    struct keys *keys = mem_zalloc(1, sizeof *keys);
    char *rest = text, *line;
    while (status == STATUS_OK && (line = strsep(&rest, "\r\n"))) {
        if (!*line) continue;
        if (strlen(line) >= KEY_BYTES_MAX) {
            status = error_set(err, STATUS_INVALID, "%.200s: a key is longer than %d bytes", path,
                               KEY_BYTES_MAX - 1);
            break;
        }
        keys->key = mem_realloc(keys->key, ((size_t)keys->count + 1) * sizeof *keys->key);
        memset(keys->key[keys->count], 0, KEY_BYTES_MAX);
        memcpy(keys->key[keys->count++], line, strlen(line));
    }
    free(text);
    if (status == STATUS_OK && keys->count == 0)
        status = error_set(err, STATUS_INVALID, "%.200s holds no key; write one a line", path);
    if (status == STATUS_OK) *out = keys;
    else keys_destroy(keys);
    return status;
}

void keys_destroy(struct keys *keys) {
    if (!keys) return;
    free(keys->key);
    free(keys);
}

int keys_find(const struct keys *keys, const char *authorization) {
    char given[KEY_BYTES_MAX] = {0};
    if (!keys || strncasecmp(authorization, "Bearer ", 7) != 0) return 0;
    if (strlen(authorization + 7) >= KEY_BYTES_MAX) return 0;
    memcpy(given, authorization + 7, strlen(authorization + 7));
    int found = 0;
    for (int i = 0; i < keys->count; i++) {
        unsigned char difference = 0;
        for (int j = 0; j < KEY_BYTES_MAX; j++)
            difference |= (unsigned char)(given[j] ^ keys->key[i][j]);
        found |= (i + 1) & -(difference == 0); // no branch on what was right
    }
    return found;
}
