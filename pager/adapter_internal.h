// What the files that make an adapter share: adapter_load.c asks adapter_dummy.c or, through
// adapter_source.c, adapter_folder.c, which asks adapter_config.c.
#ifndef LORAD_PAGER_ADAPTER_INTERNAL_H
#define LORAD_PAGER_ADAPTER_INTERNAL_H

#include "pager/adapter.h"

#include <string.h>

#define ADAPTER_WEIGHTS "adapter_model.safetensors"

// "self_attn.q_proj" and so on, by enum lora_module.
extern const char *const lora_module_names[LORA_MODULES];

struct adapter_plan {
    struct adapter_plan_entry {
        int rank; // 0: the configuration does not target this module
        double scale;
    } *entry; // [layers * LORA_MODULES], malloc'd
    struct adapter_invocation invocation;
};

// Reads and checks FOLDER/adapter_config.json: for every module of every layer, whether the adapter
// changes it, at which rank, and how much. On failure plan->entry is NULL.
MUST_CHECK enum status adapter_config_load(const char *folder, const struct lora_geometry *geometry,
                                           struct adapter_plan *plan, struct error *err);

// Opens an adapter's folder: beneath `root` and nowhere else (openat2: no "..", no link that leads
// out; the same holds for the files in it), or anywhere when root is -1. `folder` is a path by which
// its files can be opened until adapter_source_close.
struct adapter_source {
    int fd; // -1: none
    char *folder;
};
MUST_CHECK enum status adapter_source_open(int root, const char *path,
                                           struct adapter_source *source, struct error *err);
void adapter_source_close(struct adapter_source *source);

// A PEFT folder whose tensors are checked by name, type and shape. ranks[LORA_MODULES] are the
// largest over layers.
struct adapter_files {
    struct adapter_plan plan;
    struct safetensors *file;
    struct adapter_pair {
        const struct tensor_info *a, *b; // a [r, in], b [out, r], as stored
    } *pairs; // [layers * LORA_MODULES]
};
MUST_CHECK enum status adapter_files_open(const struct lora_geometry *geometry, const char *folder,
                                          struct adapter_files *files, int32_t *ranks,
                                          struct error *err);
MUST_CHECK enum status adapter_files_read(const struct lora_geometry *geometry,
                                          const struct adapter *adapter,
                                          const struct adapter_files *files, void *image,
                                          const struct adapter_pause *pause, struct error *err);
void adapter_files_close(struct adapter_files *files);

// "rank=16,seed=7,modules=all|qkvo"
struct adapter_dummy {
    int rank;
    uint64_t seed;
    bool attention_only;
};
MUST_CHECK enum status adapter_dummy_parse(const struct lora_geometry *geometry, const char *text,
                                           struct adapter_dummy *dummy, struct error *err);
void adapter_dummy_ranks(const struct adapter_dummy *dummy, int32_t *ranks);
void adapter_dummy_fill(const struct lora_geometry *geometry, const struct adapter *adapter,
                        const struct adapter_dummy *dummy, void *image,
                        const struct adapter_pause *pause);

static inline void adapter_pause(const struct adapter_pause *pause) {
    if (pause) pause->call(pause->context);
}

// Element `offset` of one layer in a whole image.
static inline char *adapter_image_at(const struct lora_geometry *geometry,
                                     const struct adapter *adapter, void *image, int layer,
                                     int64_t offset) {
    size_t element = (size_t)layer * adapter->layer_elems + (size_t)offset;
    return (char *)image + element * dtype_bytes(geometry->dtype);
}

// Zeroes the matrices of one module of one layer, or, when both are about to be filled whole, only
// what lies between them and their successors.
static inline void adapter_image_clear(const struct lora_geometry *geometry,
                                       const struct adapter *adapter, void *image, int layer,
                                       int module, bool whole) {
    int64_t rank = adapter->rank[module], a = adapter->a_offset[module];
    int64_t b = adapter->b_offset[module], end = (int64_t)adapter->layer_elems;
    if (module + 1 < LORA_MODULES) end = adapter->a_offset[module + 1];
    int64_t a_end = whole ? a : a + rank * geometry->in[module];
    int64_t b_end = whole ? b : b + rank * geometry->out[module];
    size_t bytes = dtype_bytes(geometry->dtype);
    memset(adapter_image_at(geometry, adapter, image, layer, a_end), 0, (size_t)(b - a_end) * bytes);
    memset(adapter_image_at(geometry, adapter, image, layer, b_end), 0,
           (size_t)(end - b_end) * bytes);
}

#endif
