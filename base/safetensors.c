// Reader of safetensors files. Owns one open file per shard and the table of their tensors; called
// by the loaders of weights and adapters, each reader by one thread at a time.
//
// Everything in a file may be hostile. The header is bounded before it is read, scanned before it
// is parsed (so that the parser's memory is bounded too), and its tensors must tile the data
// section exactly: no hole, no overlap, nothing behind the last. Tensor bytes are pread() into the
// caller's memory; a file that changes while it is open is an error, never a signal.
#include "base/safetensors.h"

#include "base/file.h"
#include "base/memory.h"

#include <errno.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    HEADER_BYTES_MAX = 100000000, // the format's own limit
    TENSORS_MAX = 200000,
    SHARDS_MAX = 1000,
    NAME_BYTES_MAX = 1024,
    NESTING_MAX = 3, // header, tensor, shape
    COMMAS_MAX = TENSORS_MAX * 8,
};

#define SINGLE_FILE "model.safetensors"
#define INDEX_FILE "model.safetensors.index.json"

struct shard {
    char *name; // last component
    int fd;
    uint64_t bytes;
    struct timespec modified;
};

struct safetensors {
    struct arena *names;
    struct shard *shards;
    int shard_count;
    struct tensor_info *tensors; // by shard, then by offset
    size_t count, capacity;
    const struct tensor_info **by_name; // sorted
};

// ---- Element types ------------------------------------------------------------------------------

static const struct stored_type {
    const char *text;
    unsigned bits;
    enum dtype dtype;
} stored_types[] = {
    {"F32", 32, DTYPE_F32},      {"BF16", 16, DTYPE_BF16},    {"F16", 16, DTYPE_F16},
    {"F64", 64, DTYPE_OTHER},    {"I64", 64, DTYPE_OTHER},    {"U64", 64, DTYPE_OTHER},
    {"I32", 32, DTYPE_OTHER},    {"U32", 32, DTYPE_OTHER},    {"I16", 16, DTYPE_OTHER},
    {"U16", 16, DTYPE_OTHER},    {"I8", 8, DTYPE_OTHER},      {"U8", 8, DTYPE_OTHER},
    {"BOOL", 8, DTYPE_OTHER},    {"F8_E4M3", 8, DTYPE_OTHER}, {"F8_E5M2", 8, DTYPE_OTHER},
    {"F8_E8M0", 8, DTYPE_OTHER}, {"F6_E2M3", 6, DTYPE_OTHER}, {"F6_E3M2", 6, DTYPE_OTHER},
    {"F4", 4, DTYPE_OTHER},      {"C64", 64, DTYPE_OTHER},
};

static const struct stored_type *find_type(const char *text) {
    for (size_t i = 0; i < sizeof stored_types / sizeof stored_types[0]; i++)
        if (strcmp(text, stored_types[i].text) == 0) return &stored_types[i];
    return NULL;
}

// ---- One tensor's entry of the header -----------------------------------------------------------

// "tensor 'x': rule". Names are cut so that the rule stays readable.
#define REFUSE_TENSOR(err, name, format, ...)                                                      \
    error_set(err, STATUS_INVALID, "tensor '%.96s': " format, name, ##__VA_ARGS__)

static enum status parse_shape(const char *name, const json_t *shape, const struct stored_type *type,
                               struct tensor_info *info, struct error *err) {
    if (!json_is_array(shape))
        return REFUSE_TENSOR(err, name, "\"shape\" must be an array of integers");
    if (json_array_size(shape) > SAFETENSORS_DIMS_MAX)
        return REFUSE_TENSOR(err, name, "%zu dimensions; at most %d are supported",
                             json_array_size(shape), SAFETENSORS_DIMS_MAX);
    info->dims = (int)json_array_size(shape);
    uint64_t elements = 1, bits;
    for (int d = 0; d < info->dims; d++) {
        const json_t *size = json_array_get(shape, (size_t)d);
        if (!json_is_integer(size) || json_integer_value(size) < 0)
            return REFUSE_TENSOR(err, name, "dimension %d of \"shape\" must be an integer of 0 or "
                                 "more", d);
        info->shape[d] = json_integer_value(size);
        if (__builtin_mul_overflow(elements, (uint64_t)info->shape[d], &elements))
            return REFUSE_TENSOR(err, name, "the product of \"shape\" does not fit 64 bits");
    }
    if (__builtin_mul_overflow(elements, (uint64_t)type->bits, &bits))
        return REFUSE_TENSOR(err, name, "the size of \"shape\" does not fit 64 bits");
    if (bits % 8 != 0)
        return REFUSE_TENSOR(err, name, "its %s elements do not fill whole bytes", type->text);
    info->elements = (size_t)elements;
    info->bytes = (size_t)(bits / 8);
    return STATUS_OK;
}

// Sets info->offset relative to the data section.
static enum status parse_offsets(const char *name, const json_t *offsets, uint64_t data_bytes,
                                 struct tensor_info *info, struct error *err) {
    const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end))
        return REFUSE_TENSOR(err, name, "\"data_offsets\" must be two integers");
    json_int_t from = json_integer_value(begin), to = json_integer_value(end);
    if (from < 0 || to < from)
        return REFUSE_TENSOR(err, name, "\"data_offsets\" must be 0 <= begin <= end, not "
                             "[%lld, %lld]", (long long)from, (long long)to);
    if ((uint64_t)to > data_bytes)
        return REFUSE_TENSOR(err, name, "its data ends at %lld, but the file holds %llu bytes of "
                             "data", (long long)to, (unsigned long long)data_bytes);
    if ((uint64_t)(to - from) != info->bytes)
        return REFUSE_TENSOR(err, name, "\"data_offsets\" span %lld bytes, but shape and dtype need "
                             "%zu", (long long)(to - from), info->bytes);
    info->offset = (uint64_t)from;
    return STATUS_OK;
}

static enum status parse_tensor(const char *name, const json_t *entry, uint64_t data_bytes,
                                struct tensor_info *info, struct error *err) {
    if (!json_is_object(entry))
        return REFUSE_TENSOR(err, name, "its entry must be an object");
    static const char *const fields[] = {"dtype", "shape", "data_offsets"};
    for (int i = 0; i < 3; i++)
        if (!json_object_get(entry, fields[i]))
            return REFUSE_TENSOR(err, name, "\"%s\" is missing", fields[i]);
    const char *text = json_string_value(json_object_get(entry, "dtype"));
    if (!text) return REFUSE_TENSOR(err, name, "\"dtype\" must be a string");
    const struct stored_type *type = find_type(text);
    if (!type) return REFUSE_TENSOR(err, name, "unknown dtype \"%.32s\"", text);
    info->dtype = type->dtype;
    memcpy(info->dtype_text, type->text, strlen(type->text) + 1);
    enum status status = parse_shape(name, json_object_get(entry, "shape"), type, info, err);
    if (status != STATUS_OK) return status;
    return parse_offsets(name, json_object_get(entry, "data_offsets"), data_bytes, info, err);
}

static enum status check_metadata(const json_t *metadata, struct error *err) {
    bool strings = json_is_object(metadata);
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)metadata, key, value) strings = strings && json_is_string(value);
    if (strings) return STATUS_OK;
    return error_set(err, STATUS_INVALID, "\"__metadata__\" must be an object of strings");
}

// ---- The header ---------------------------------------------------------------------------------

// Counts what the parser would allocate, without parsing: a header of 100 MB can hold 50 million
// numbers. Unbalanced text is left for the parser to refuse.
static enum status scan_json(const char *text, size_t bytes, struct error *err) {
    bool in_string = false;
    size_t commas = 0;
    int nesting = 0;
    for (size_t i = 0; i < bytes; i++) {
        char c = text[i];
        if (in_string) {
            if (c == '\\') i++;
            else if (c == '"') in_string = false;
            continue;
        }
        if (c == '"') in_string = true;
        if (c == '{' || c == '[') nesting++;
        if (c == '}' || c == ']') nesting--;
        if (c == ',') commas++;
        if (nesting > NESTING_MAX)
            return error_set(err, STATUS_INVALID, "the header is nested deeper than %d",
                             NESTING_MAX);
        if (commas > COMMAS_MAX)
            return error_set(err, STATUS_INVALID, "the header has more than %d values; at most %d "
                             "tensors are supported", COMMAS_MAX, TENSORS_MAX);
    }
    return STATUS_OK;
}

static enum status parse_json(const char *text, size_t bytes, json_t **root, struct error *err) {
    if (bytes == 0 || text[0] != '{')
        return error_set(err, STATUS_INVALID, "the header must begin with '{'");
    enum status status = scan_json(text, bytes, err);
    if (status != STATUS_OK) return status;
    json_error_t reason;
    *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &reason);
    if (*root) return STATUS_OK;
    return error_set(err, STATUS_INVALID, "the header is not valid JSON: %s (byte %d)", reason.text,
                     reason.position);
}

static struct tensor_info *append_tensor(struct safetensors *file) {
    if (file->count == file->capacity) {
        file->capacity = file->capacity ? 2 * file->capacity : 64;
        file->tensors = mem_realloc(file->tensors, file->capacity * sizeof *file->tensors);
    }
    struct tensor_info *info = &file->tensors[file->count++];
    memset(info, 0, sizeof *info);
    return info;
}

static enum status collect_tensors(struct safetensors *file, json_t *root, uint64_t data_bytes,
                                   struct error *err) {
    const char *key;
    json_t *value;
    json_object_foreach(root, key, value) {
        if (strcmp(key, "__metadata__") == 0) {
            enum status status = check_metadata(value, err);
            if (status != STATUS_OK) return status;
            continue;
        }
        size_t key_bytes = strlen(key);
        if (key_bytes > NAME_BYTES_MAX)
            return error_set(err, STATUS_INVALID, "a tensor's name has %zu bytes; at most %d are "
                             "supported", key_bytes, NAME_BYTES_MAX);
        if (file->count == TENSORS_MAX)
            return error_set(err, STATUS_INVALID, "more than %d tensors", TENSORS_MAX);
        struct tensor_info *info = append_tensor(file);
        info->file = file->shard_count - 1;
        info->name = arena_strndup(file->names, key, key_bytes);
        enum status status = parse_tensor(info->name, value, data_bytes, info, err);
        if (status != STATUS_OK) return status;
    }
    return STATUS_OK;
}

static int compare_offsets(const void *left, const void *right) {
    const struct tensor_info *a = left, *b = right;
    if (a->offset != b->offset) return a->offset < b->offset ? -1 : 1;
    return a->bytes < b->bytes ? -1 : a->bytes > b->bytes; // empty ones first
}

// Sorts the shard's tensors by offset and makes the offsets absolute.
static enum status check_tiling(struct tensor_info *tensors, size_t count, uint64_t data_start,
                                uint64_t data_bytes, struct error *err) {
    if (count) qsort(tensors, count, sizeof *tensors, compare_offsets);
    uint64_t covered = 0;
    for (size_t i = 0; i < count; i++) {
        if (tensors[i].offset != covered)
            return REFUSE_TENSOR(err, tensors[i].name, "its data begins at %llu, but the data "
                                 "before it ends at %llu: the file has %s",
                                 (unsigned long long)tensors[i].offset, (unsigned long long)covered,
                                 tensors[i].offset > covered ? "a hole" : "an overlap");
        covered += tensors[i].bytes;
        tensors[i].offset += data_start;
    }
    if (covered != data_bytes)
        return error_set(err, STATUS_INVALID, "the tensors end at byte %llu of the data, but the "
                         "file holds %llu", (unsigned long long)covered,
                         (unsigned long long)data_bytes);
    return STATUS_OK;
}

static enum status read_header(struct safetensors *file, const struct shard *shard,
                               struct error *err) {
    uint8_t prefix[8];
    if (shard->bytes < sizeof prefix)
        return error_set(err, STATUS_INVALID, "a file of %llu bytes is too short for a header",
                         (unsigned long long)shard->bytes);
    enum status status = file_read_at(shard->fd, prefix, sizeof prefix, 0, shard->name, err);
    if (status != STATUS_OK) return status;
    uint64_t header_bytes = 0;
    for (int i = 7; i >= 0; i--) header_bytes = header_bytes << 8 | prefix[i];
    if (header_bytes > HEADER_BYTES_MAX)
        return error_set(err, STATUS_INVALID, "the header's length is %llu; at most %d is allowed",
                         (unsigned long long)header_bytes, HEADER_BYTES_MAX);
    if (header_bytes > shard->bytes - sizeof prefix)
        return error_set(err, STATUS_INVALID, "the header's length is %llu, more than the file "
                         "holds", (unsigned long long)header_bytes);
    char *header = mem_alloc((size_t)header_bytes);
    json_t *root = NULL;
    size_t first = file->count;
    uint64_t data_start = sizeof prefix + header_bytes, data_bytes = shard->bytes - data_start;
    status = file_read_at(shard->fd, header, (size_t)header_bytes, sizeof prefix, shard->name, err);
    if (status == STATUS_OK) status = parse_json(header, (size_t)header_bytes, &root, err);
    free(header);
    if (status == STATUS_OK) status = collect_tensors(file, root, data_bytes, err);
    json_decref(root);
    if (status != STATUS_OK) return status;
    return check_tiling(file->tensors + first, file->count - first, data_start, data_bytes, err);
}

// ---- Opening ------------------------------------------------------------------------------------

static bool shard_unchanged(const struct shard *shard) {
    struct stat now;
    return fstat(shard->fd, &now) == 0 && (uint64_t)now.st_size == shard->bytes &&
           now.st_mtim.tv_sec == shard->modified.tv_sec &&
           now.st_mtim.tv_nsec == shard->modified.tv_nsec;
}

static enum status open_shard(struct safetensors *file, const char *path, struct error *err) {
    int fd;
    uint64_t bytes;
    enum status status = file_open_regular(path, &fd, &bytes, err);
    if (status != STATUS_OK) return status;
    const char *slash = strrchr(path, '/');
    file->shards = mem_realloc(file->shards, (size_t)(file->shard_count + 1) * sizeof *file->shards);
    struct shard *shard = &file->shards[file->shard_count++];
    *shard = (struct shard){.name = mem_strdup(slash ? slash + 1 : path), .fd = fd, .bytes = bytes};
    struct stat stat;
    if (fstat(fd, &stat) != 0)
        return error_set(err, STATUS_IO, "%s: cannot stat: %s", shard->name, strerror(errno));
    shard->modified = stat.st_mtim;
    status = read_header(file, shard, err);
    if (status == STATUS_INVALID) error_prefix(err, "%.120s", shard->name);
    return status;
}

static int compare_names(const void *left, const void *right) {
    const struct tensor_info *const *a = left, *const *b = right;
    return strcmp((*a)->name, (*b)->name);
}

// Sorts the names; one in two shards is an error (within a file the parser refuses it).
static enum status index_names(struct safetensors *file, struct error *err) {
    file->by_name = mem_alloc(file->count * sizeof *file->by_name);
    for (size_t i = 0; i < file->count; i++) file->by_name[i] = &file->tensors[i];
    if (file->count) qsort(file->by_name, file->count, sizeof *file->by_name, compare_names);
    for (size_t i = 1; i < file->count; i++) {
        const struct tensor_info *a = file->by_name[i - 1], *b = file->by_name[i];
        if (strcmp(a->name, b->name) == 0)
            return REFUSE_TENSOR(err, a->name, "it is in two files, %.64s and %.64s",
                                 file->shards[a->file].name, file->shards[b->file].name);
    }
    return STATUS_OK;
}

static struct safetensors *reader_create(void) {
    struct safetensors *file = mem_zalloc(1, sizeof *file);
    file->names = arena_create();
    return file;
}

static enum status hand_over(struct safetensors *file, enum status status, struct safetensors **out,
                             struct error *err) {
    if (status == STATUS_OK) status = index_names(file, err);
    if (status == STATUS_OK) *out = file;
    else safetensors_close(file);
    return status;
}

enum status safetensors_open_file(const char *path, struct safetensors **out, struct error *err) {
    struct safetensors *file = reader_create();
    return hand_over(file, open_shard(file, path, err), out, err);
}

// ---- Sharded checkpoints ------------------------------------------------------------------------

static enum status check_shard_name(const char *tensor, const json_t *value, struct error *err) {
    static const char suffix[] = ".safetensors";
    const char *name = json_string_value(value);
    size_t bytes = name ? strlen(name) : 0, suffix_bytes = sizeof suffix - 1;
    if (!name) return REFUSE_TENSOR(err, tensor, "its shard must be a string");
    if (strchr(name, '/') || strstr(name, "..") || name[0] == '.')
        return REFUSE_TENSOR(err, tensor, "its shard '%.96s' must be a plain file name in the "
                             "model's folder", name);
    if (bytes <= suffix_bytes || bytes > 255 || strcmp(name + bytes - suffix_bytes, suffix) != 0)
        return REFUSE_TENSOR(err, tensor, "its shard '%.96s' must be a file name that ends in %s",
                             name, suffix);
    return STATUS_OK;
}

static int find_shard(const struct safetensors *file, const char *name) {
    for (int i = file->shard_count - 1; i >= 0; i--)
        if (strcmp(file->shards[i].name, name) == 0) return i;
    return -1;
}

static enum status open_listed(struct safetensors *file, const char *folder, json_t *map,
                               struct error *err) {
    const char *tensor;
    json_t *value;
    enum status status = STATUS_OK;
    json_object_foreach(map, tensor, value) {
        status = check_shard_name(tensor, value, err);
        if (status != STATUS_OK) return status;
        if (find_shard(file, json_string_value(value)) >= 0) continue;
        if (file->shard_count == SHARDS_MAX)
            return error_set(err, STATUS_INVALID, "more than %d shards", SHARDS_MAX);
        char *path = path_join(folder, json_string_value(value));
        status = open_shard(file, path, err);
        free(path);
        if (status != STATUS_OK) return status;
    }
    return status;
}

// Every tensor that the index lists must be where it says. Tensors it does not list are kept: what
// the shards hold is what counts.
static enum status check_listed(const struct safetensors *file, json_t *map, struct error *err) {
    const char *tensor;
    json_t *value;
    json_object_foreach(map, tensor, value) {
        const struct tensor_info *info = safetensors_find(file, tensor);
        if (!info || strcmp(file->shards[info->file].name, json_string_value(value)) != 0)
            return REFUSE_TENSOR(err, tensor, "the index places it in '%.96s', which does not hold "
                                 "it", json_string_value(value));
    }
    return STATUS_OK;
}

static enum status open_index(const char *folder, const char *text, size_t bytes,
                              struct safetensors **out, struct error *err) {
    json_t *root = NULL;
    enum status status = parse_json(text, bytes, &root, err);
    if (status != STATUS_OK) return status;
    json_t *map = json_object_get(root, "weight_map");
    struct safetensors *file = NULL;
    if (!json_is_object(map) || json_object_size(map) == 0) {
        status = error_set(err, STATUS_INVALID, "\"weight_map\" must be an object that maps tensors "
                           "to files");
    } else {
        file = reader_create();
        status = hand_over(file, open_listed(file, folder, map, err), &file, err);
        if (status != STATUS_OK) file = NULL;
    }
    if (status == STATUS_OK) status = check_listed(file, map, err);
    json_decref(root);
    if (status == STATUS_OK) *out = file;
    else safetensors_close(file);
    return status;
}

enum status safetensors_open_folder(const char *folder, struct safetensors **out,
                                    struct error *err) {
    char *path = path_join(folder, SINGLE_FILE);
    enum status status = safetensors_open_file(path, out, err);
    free(path);
    if (status != STATUS_NOT_FOUND) return status;
    char *text;
    size_t bytes;
    path = path_join(folder, INDEX_FILE);
    status = file_read_all(path, HEADER_BYTES_MAX, &text, &bytes, err);
    free(path);
    if (status == STATUS_NOT_FOUND)
        return error_set(err, status, "the folder has neither " SINGLE_FILE " nor " INDEX_FILE);
    if (status != STATUS_OK) return status;
    status = open_index(folder, text, bytes, out, err);
    free(text);
    if (status == STATUS_INVALID) error_prefix(err, INDEX_FILE);
    return status;
}

void safetensors_close(struct safetensors *file) {
    if (!file) return;
    for (int i = 0; i < file->shard_count; i++) {
        close(file->shards[i].fd);
        free(file->shards[i].name);
    }
    free(file->shards);
    free(file->tensors);
    free(file->by_name);
    arena_destroy(file->names);
    free(file);
}

// ---- Reading ------------------------------------------------------------------------------------

size_t safetensors_count(const struct safetensors *file) {
    return file->count;
}

const struct tensor_info *safetensors_at(const struct safetensors *file, size_t index) {
    return index < file->count ? &file->tensors[index] : NULL;
}

const struct tensor_info *safetensors_find(const struct safetensors *file, const char *name) {
    struct tensor_info key = {.name = name};
    const struct tensor_info *wanted = &key;
    const struct tensor_info **found =
        file->count ? bsearch(&wanted, file->by_name, file->count, sizeof wanted, compare_names)
                    : NULL;
    return found ? *found : NULL;
}

enum status safetensors_read(const struct safetensors *file, const struct tensor_info *info,
                             void *buffer, struct error *err) {
    const struct shard *shard = &file->shards[info->file];
    enum status status =
        file_read_at(shard->fd, buffer, info->bytes, info->offset, shard->name, err);
    if (status == STATUS_OK && !shard_unchanged(shard))
        status = error_set(err, STATUS_IO, "%s changed while it was being read", shard->name);
    return status;
}
