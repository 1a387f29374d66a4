// A PEFT folder's weights: which tensor is which matrix of which module, checked whole before any
// is read, and their values on the way into an image. Any thread; each call owns its files and
// memory. Pickled weights (adapter_model.bin) are never opened. Clients read the errors: they name
// files and tensors, never the folder on the host (base/file.h sees to that).
#include "pager/adapter_internal.h"

#include "base/file.h"
#include "base/memory.h"
#include "base/safetensors.h"
#include "base/verify.h"
#include "base/wide.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LARGEST_BF16 3.38953139e38f // larger values would round to infinity in a bf16 image

static bool take_prefix(const char **text, const char *prefix) {
    size_t length = strlen(prefix);
    if (strncmp(*text, prefix, length) != 0) return false;
    *text += length;
    return true;
}

// Digits without a sign or leading zeros, below `limit`; -1 otherwise.
static int take_layer(const char **text, int limit) {
    const char *start = *text;
    long layer = 0;
    while (**text >= '0' && **text <= '9') {
        if (layer < limit) layer = layer * 10 + (**text - '0');
        (*text)++;
    }
    bool padded = start[0] == '0' && *text - start > 1;
    return *text > start && !padded && layer < limit ? (int)layer : -1;
}

// Which matrix a tensor's name stands for: the index in the plan and 'A' or 'B'.
static enum status parse_tensor_name(const struct lora_geometry *geometry, const char *name,
                                     int *index, char *matrix, struct error *err) {
    const char *text = name;
    if (take_prefix(&text, "base_model.model.model.layers.")) {
        int layer = take_layer(&text, geometry->layers);
        if (layer < 0)
            return error_set(err, STATUS_INVALID, ADAPTER_WEIGHTS ": tensor %.120s: the model has layers 0 "
                             "to %d", name, geometry->layers - 1);
        for (int module = 0; take_prefix(&text, ".") && module < LORA_MODULES; module++, text--) {
            const char *rest = text;
            if (!take_prefix(&rest, lora_module_names[module])) continue;
            bool a = take_prefix(&rest, ".lora_A"), b = !a && take_prefix(&rest, ".lora_B");
            if (!a && !b) continue;
            if (strcmp(rest, ".weight") != 0 && strcmp(rest, ".default.weight") != 0) continue;
            *index = layer * LORA_MODULES + module;
            *matrix = a ? 'A' : 'B';
            return STATUS_OK;
        }
    }
    const char *hint = strstr(name, "lora_magnitude") ? " (DoRA is not supported)"
                       : strstr(name, "lora_embedding") ? " (LoRA on embeddings is not supported)"
                       : strstr(name, ".bias")          ? " (biases are not supported)"
                                                        : "";
    return error_set(err, STATUS_INVALID, ADAPTER_WEIGHTS ": unexpected tensor %.120s%s; expected names "
                     "like base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", name, hint);
}

static enum status check_shape(const struct tensor_info *info, int rows, int columns,
                               const char *meaning, struct error *err) {
    if (info->dtype == DTYPE_OTHER)
        return error_set(err, STATUS_UNSUPPORTED, ADAPTER_WEIGHTS ": tensor %.120s has type %s; F32, F16 "
                         "and BF16 are supported", info->name, info->dtype_text);
    if (info->dims != 2)
        return error_set(err, STATUS_INVALID, ADAPTER_WEIGHTS ": tensor %.120s has %d dimensions; it must "
                         "have 2", info->name, info->dims);
    if (info->shape[0] != rows || info->shape[1] != columns)
        return error_set(err, STATUS_INVALID, ADAPTER_WEIGHTS ": tensor %.120s is [%lld, %lld]; it must be "
                         "[%d, %d] (%s)", info->name, (long long)info->shape[0],
                         (long long)info->shape[1], rows, columns, meaning);
    return STATUS_OK;
}

static enum status collect_pairs(const struct lora_geometry *geometry,
                                 const struct safetensors *file, const struct adapter_plan *plan,
                                 struct adapter_pair *pairs, struct error *err) {
    if (safetensors_count(file) == 0)
        return error_set(err, STATUS_INVALID, ADAPTER_WEIGHTS ": holds no tensor");
    for (size_t i = 0; i < safetensors_count(file); i++) {
        const struct tensor_info *info = safetensors_at(file, i);
        int index = 0;
        char matrix = 0;
        enum status status = parse_tensor_name(geometry, info->name, &index, &matrix, err);
        if (status != STATUS_OK) return status;
        if (plan->entry[index].rank == 0)
            return error_set(err, STATUS_INVALID, ADAPTER_WEIGHTS ": unexpected tensor %.120s: "
                             "adapter_config.json does not target its module", info->name);
        const struct tensor_info **slot = matrix == 'A' ? &pairs[index].a : &pairs[index].b;
        if (*slot)
            return error_set(err, STATUS_INVALID, ADAPTER_WEIGHTS ": tensors %.100s and %.100s are one and the "
                             "same matrix", (*slot)->name, info->name);
        *slot = info;
    }
    return STATUS_OK;
}

static enum status check_pairs(const struct lora_geometry *geometry,
                               const struct adapter_plan *plan, const struct adapter_pair *pairs,
                               int32_t *ranks, struct error *err) {
    for (int i = 0; i < geometry->layers * LORA_MODULES; i++) {
        int layer = i / LORA_MODULES, module = i % LORA_MODULES, rank = plan->entry[i].rank;
        if (rank == 0) continue;
        if (!pairs[i].a || !pairs[i].b)
            return error_set(err, STATUS_INVALID, ADAPTER_WEIGHTS ": lora_%s of model.layers.%d.%s is "
                             "missing; adapter_config.json targets that module",
                             pairs[i].a ? "B" : "A", layer, lora_module_names[module]);
        enum status status = check_shape(pairs[i].a, rank, geometry->in[module],
                                         "the rank in adapter_config.json, the base model's input",
                                         err);
        if (status == STATUS_OK)
            status = check_shape(pairs[i].b, geometry->out[module], rank,
                                 "the base model's output, the rank in adapter_config.json", err);
        if (status != STATUS_OK) return status;
        if (rank > ranks[module]) ranks[module] = rank;
    }
    return STATUS_OK;
}

// Where matrices pass through, a block at a time.
enum { BLOCK_ELEMENTS = LORA_PANEL * LORA_RANK_MAX };
struct reader {
    const struct lora_geometry *geometry;
    const struct safetensors *file;
    const struct adapter_pause *pause;
    void *raw; // one whole tensor
    float *values;
};

// The block's values times `scale`; false: one of them is NaN, infinite or too large.
WIDE static bool scale_values(float *values, size_t count, float scale) {
    bool finite = true;
    for (size_t i = 0; i < count; i++) {
        values[i] *= scale;
        finite &= fabsf(values[i]) <= LARGEST_BF16; // false for NaN
    }
    return finite;
}

// None of `count` values is NaN, infinite or too large for bf16.
WIDE static bool all_finite(const void *values, enum dtype dtype, size_t count) {
    uint32_t bad = 0;
    if (dtype == DTYPE_BF16)
        for (size_t i = 0; i < count; i++)
            bad |= (((const uint16_t *)values)[i] & 0x7f80u) == 0x7f80u;
    else
        for (size_t i = 0; i < count; i++) bad |= !(fabsf(((const float *)values)[i]) <= LARGEST_BF16);
    return bad == 0;
}

static enum status not_finite(const struct tensor_info *info, struct error *err) {
    return error_set(err, STATUS_INVALID, ADAPTER_WEIGHTS ": tensor %.120s holds a value that is "
                     "NaN, infinite, or too large once scaled; all must be finite", info->name);
}

// A matrix that the image holds as the file does.
static enum status read_as_is(struct reader *r, const struct tensor_info *info, char *to,
                              struct error *err) {
    enum status status = safetensors_read(r->file, info, to, err);
    if (status == STATUS_OK && !all_finite(to, info->dtype, info->elements))
        status = not_finite(info, err);
    adapter_pause(r->pause);
    return status;
}

// Rows [first, first + count) of B [out, r] -> panels of the image (kernels/backend.h), which are for
// image_rank >= r. They are whole panels, or the last rows.
static void put_panels(struct reader *r, char *to, size_t image_rank, size_t out, size_t first,
                       size_t count, size_t rank) {
    enum dtype dtype = r->geometry->dtype;
    for (size_t row = 0; row < count; row += LORA_PANEL) {
        size_t left = out - first - row, columns = left < LORA_PANEL ? left : LORA_PANEL;
        char *panel = to + (first + row) * image_rank * dtype_bytes(dtype);
        for (size_t j = 0; j < rank; j++) {
            float column[LORA_PANEL];
            for (size_t i = 0; i < columns; i++) column[i] = r->values[(row + i) * rank + j];
            dtype_convert(panel + j * columns * dtype_bytes(dtype), dtype, column, DTYPE_F32,
                          columns);
        }
    }
}

// Reads one matrix, multiplied by `scale`: A as it is, or, with an image_rank, B into its panels.
static enum status read_matrix(struct reader *r, const struct tensor_info *info, char *to,
                               size_t image_rank, float scale, struct error *err) {
    if (image_rank == 0 && scale == 1.0f && info->dtype == r->geometry->dtype)
        return read_as_is(r, info, to, err);
    enum status status = safetensors_read(r->file, info, r->raw, err);
    if (status != STATUS_OK) return status;
    size_t rows = (size_t)info->shape[0], columns = (size_t)info->shape[1];
    size_t bytes = dtype_bytes(r->geometry->dtype), raw_bytes = dtype_bytes(info->dtype);
    size_t at_once = columns < BLOCK_ELEMENTS ? BLOCK_ELEMENTS / columns : 1;
    if (image_rank > 0) at_once = at_once / LORA_PANEL * LORA_PANEL;
    for (size_t row = 0; row < rows; row += at_once) {
        size_t count = rows - row < at_once ? rows - row : at_once;
        const char *from = (const char *)r->raw + row * columns * raw_bytes;
        dtype_to_f32(r->values, from, info->dtype, count * columns);
        if (!scale_values(r->values, count * columns, scale)) return not_finite(info, err);
        if (image_rank > 0) put_panels(r, to, image_rank, rows, row, count, columns);
        else
            dtype_convert(to + row * columns * bytes, r->geometry->dtype, r->values, DTYPE_F32,
                          count * columns);
        adapter_pause(r->pause);
    }
    return STATUS_OK;
}

enum status adapter_files_read(const struct lora_geometry *geometry, const struct adapter *adapter,
                               const struct adapter_files *files, void *image,
                               const struct adapter_pause *pause, struct error *err) {
    struct reader reader = {.geometry = geometry, .file = files->file, .pause = pause};
    size_t bytes_max = 0, columns_max = BLOCK_ELEMENTS;
    for (size_t i = 0; i < safetensors_count(files->file); i++) {
        const struct tensor_info *info = safetensors_at(files->file, i);
        if (info->bytes > bytes_max) bytes_max = info->bytes;
        if ((size_t)info->shape[1] > columns_max) columns_max = (size_t)info->shape[1];
    }
    reader.raw = mem_alloc(bytes_max);
    reader.values = mem_alloc(columns_max * sizeof *reader.values);
    enum status status = STATUS_OK;
    for (int i = 0; status == STATUS_OK && i < geometry->layers * LORA_MODULES; i++) {
        int layer = i / LORA_MODULES, module = i % LORA_MODULES;
        const struct adapter_pair *pair = &files->pairs[i];
        bool narrow = !pair->a || files->plan.entry[i].rank < adapter->rank[module];
        adapter_image_clear(geometry, adapter, image, layer, module, narrow);
        if (!pair->a) continue;
        status = read_matrix(&reader, pair->a, adapter_image_at(geometry, adapter, image, layer,
                                                                adapter->a_offset[module]),
                             0, 1.0f, err);
        if (status != STATUS_OK) break;
        status = read_matrix(&reader, pair->b, adapter_image_at(geometry, adapter, image, layer,
                                                                adapter->b_offset[module]),
                             (size_t)adapter->rank[module], (float)files->plan.entry[i].scale, err);
    }
    free(reader.values);
    free(reader.raw);
    return status;
}

static enum status open_weights(const char *folder, struct safetensors **file, struct error *err) {
    char *path = path_join(folder, ADAPTER_WEIGHTS), *pickle = path_join(folder, "adapter_model.bin");
    enum status status = safetensors_open_file(path, file, err);
    if (status == STATUS_NOT_FOUND && access(pickle, F_OK) == 0)
        error_set(err, status = STATUS_UNSUPPORTED, "adapter_model.bin is a pickle, which can run "
                  "code when opened, and was not opened; convert it to " ADAPTER_WEIGHTS);
    else if (status == STATUS_NOT_FOUND)
        error_set(err, status = STATUS_INVALID, ADAPTER_WEIGHTS ": there is no such file in the adapter's "
                  "folder");
    free(pickle);
    free(path);
    return status;
}

enum status adapter_files_open(const struct lora_geometry *geometry, const char *folder,
                               struct adapter_files *files, int32_t *ranks, struct error *err) {
    *files = (struct adapter_files){0};
    enum status status = adapter_config_load(folder, geometry, &files->plan, err);
    if (status != STATUS_OK) return status;
    files->pairs = mem_zalloc((size_t)geometry->layers * LORA_MODULES, sizeof *files->pairs);
    status = open_weights(folder, &files->file, err);
    if (status == STATUS_OK)
        status = collect_pairs(geometry, files->file, &files->plan, files->pairs, err);
    if (status == STATUS_OK)
        status = check_pairs(geometry, &files->plan, files->pairs, ranks, err);
    if (status != STATUS_OK) adapter_files_close(files);
    return status;
}

void adapter_files_close(struct adapter_files *files) {
    safetensors_close(files->file);
    free(files->pairs);
    free(files->plan.entry);
    *files = (struct adapter_files){0};
}
