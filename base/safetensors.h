// Reader of safetensors files (single file, or a folder's model.safetensors.index.json with
// shards), after the format's README: 8-byte little-endian header length, JSON header, data.
// Every offset is checked before use; tensor bytes are pread() on demand, never mapped.
#ifndef LORAD_BASE_SAFETENSORS_H
#define LORAD_BASE_SAFETENSORS_H

#include "base/dtype.h"
#include "base/error.h"

#define SAFETENSORS_DIMS_MAX 8

struct tensor_info {
    const char *name; // owned by the reader
    enum dtype dtype; // DTYPE_OTHER for the types lorad does not compute with
    char dtype_text[16];
    int dims;
    int64_t shape[SAFETENSORS_DIMS_MAX];
    size_t elements;
    size_t bytes;
    int file; // which shard
    uint64_t offset; // absolute, in its file
};

struct safetensors;

// Opens one file. STATUS_NOT_FOUND, STATUS_INVALID (err says which rule), STATUS_IO.
MUST_CHECK enum status safetensors_open_file(const char *path, struct safetensors **out,
                                             struct error *err);
// Opens FOLDER/model.safetensors, or every shard of FOLDER/model.safetensors.index.json.
MUST_CHECK enum status safetensors_open_folder(const char *folder, struct safetensors **out,
                                               struct error *err);
void safetensors_close(struct safetensors *file); // NULL is allowed

size_t safetensors_count(const struct safetensors *file);
const struct tensor_info *safetensors_at(const struct safetensors *file, size_t index);
const struct tensor_info *safetensors_find(const struct safetensors *file, const char *name);
// Reads the tensor's raw bytes; `buffer` holds info->bytes.
MUST_CHECK enum status safetensors_read(const struct safetensors *file,
                                        const struct tensor_info *info, void *buffer,
                                        struct error *err);

#endif
