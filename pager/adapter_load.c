// From a PEFT folder, or a "dummy:" description, to one adapter generation with its host image.
// Called by loader threads; each call owns its files and memory. Everything about the tensors'
// names and shapes is checked before the image is allocated, everything about their values before
// the adapter is handed out. Pickled weights (adapter_model.bin) are never opened. Clients read the
// errors: they name files and tensors, never the folder on the host (base/file.h sees to that).
#include "pager/adapter_internal.h"

#include "base/file.h"
#include "base/memory.h"
#include "base/safetensors.h"
#include "base/sha256.h"
#include "base/verify.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WEIGHTS "adapter_model.safetensors"
#define LARGEST_BF16 3.38953139e38f // larger values would round to infinity in a bf16 image
enum { ALIGNMENT_BYTES = 16 };

// The two matrices of one module of one layer, as stored.
struct pair {
    const struct tensor_info *a, *b; // a [r, in], b [out, r]
};

static struct adapter *adapter_new(const char *name, const char *path) {
    // Generations must be unique in the process, however many registries it has.
    static _Atomic uint64_t generations;
    struct adapter *adapter = mem_zalloc(1, sizeof *adapter);
    adapter->name = mem_strdup(name);
    adapter->path = mem_strdup(path);
    adapter->generation = atomic_fetch_add(&generations, 1) + 1;
    atomic_init(&adapter->refs, 1);
    return adapter;
}

struct adapter *adapter_ref(struct adapter *adapter) {
    int before = atomic_fetch_add(&adapter->refs, 1);
    VERIFY_OP(before, >, 0);
    return adapter;
}

void adapter_unref(struct adapter *adapter) {
    if (!adapter) return;
    int before = atomic_fetch_sub(&adapter->refs, 1);
    VERIFY_OP(before, >, 0);
    if (before > 1) return;
    VERIFY(!atomic_load(&adapter->resident));
    VERIFY_OP(adapter->running, ==, 0);
    free(adapter->pages);
    free(adapter->image);
    free(adapter->name);
    free(adapter->path);
    free(adapter);
}

// Places the matrices of adapter->rank in the layer image and allocates it, zeroed.
static enum status layout(const struct lora_geometry *geometry, struct adapter *adapter,
                          struct error *err) {
    VERIFY(geometry->dtype == DTYPE_F32 || geometry->dtype == DTYPE_BF16);
    VERIFY_OP(geometry->page_elems, >, 0);
    int64_t step = ALIGNMENT_BYTES / (int64_t)dtype_bytes(geometry->dtype), elems = 0;
    for (int module = 0; module < LORA_MODULES; module++) {
        int64_t rank = adapter->rank[module];
        VERIFY_OP(rank, <=, geometry->rank_max);
        adapter->a_offset[module] = elems;
        elems += (rank * geometry->in[module] + step - 1) / step * step;
        adapter->b_offset[module] = elems;
        elems += (rank * geometry->out[module] + step - 1) / step * step;
    }
    int64_t page_elems = (int64_t)geometry->page_elems;
    int64_t pages = (elems + page_elems - 1) / page_elems;
    if (pages > geometry->pool_pages)
        return error_set(err, STATUS_TOO_LARGE, "the adapter needs %lld pages of the pool, which "
                         "has %d; use a smaller rank or fewer modules, or a larger pool",
                         (long long)pages, geometry->pool_pages);
    adapter->layer_elems = (size_t)elems;
    adapter->page_count = (int)pages;
    adapter->image_bytes = (size_t)elems * (size_t)geometry->layers * dtype_bytes(geometry->dtype);
    adapter->image = mem_alloc_aligned(adapter->image_bytes);
    memset(adapter->image, 0, adapter->image_bytes);
    adapter->pages = mem_zalloc((size_t)pages, sizeof *adapter->pages);
    return STATUS_OK;
}

static void digest(const struct lora_geometry *geometry, struct adapter *adapter) {
    struct sha256 hash;
    sha256_init(&hash);
    sha256_update(&hash, adapter->rank, sizeof adapter->rank);
    sha256_update(&hash, adapter->image, adapter->image_bytes);
    sha256_hex(&hash, adapter->digest);
}

static char *image_at(const struct lora_geometry *geometry, const struct adapter *adapter,
                      int layer, int64_t offset) {
    VERIFY_OP(offset, <=, adapter->layer_elems);
    size_t element = (size_t)layer * adapter->layer_elems + (size_t)offset;
    return (char *)adapter->image + element * dtype_bytes(geometry->dtype);
}

// ---- the dummy adapter -------------------------------------------------------------------------

struct dummy {
    int rank;
    uint64_t seed;
    bool attention_only;
};

static enum status dummy_parse(const struct lora_geometry *geometry, const char *text,
                               struct dummy *dummy, struct error *err) {
    *dummy = (struct dummy){.rank = 16};
    while (*text) {
        size_t length = strcspn(text, ",");
        char item[64], *end = NULL;
        snprintf(item, sizeof item, "%.*s", (int)(length < 63 ? length : 63), text);
        text += length + (text[length] == ',');
        char *value = strchr(item, '=');
        if (value) *value++ = 0;
        bool digits = value && *value >= '0' && *value <= '9';
        if (digits && strcmp(item, "rank") == 0) {
            long rank = strtol(value, &end, 10);
            if (*end == 0 && rank >= 1 && rank <= geometry->rank_max) {
                dummy->rank = (int)rank;
                continue;
            }
        } else if (digits && strcmp(item, "seed") == 0) {
            errno = 0;
            dummy->seed = strtoull(value, &end, 10);
            if (*end == 0 && errno == 0) continue;
        } else if (value && strcmp(item, "modules") == 0) {
            dummy->attention_only = strcmp(value, "qkvo") == 0;
            if (dummy->attention_only || strcmp(value, "all") == 0) continue;
        }
        return error_set(err, STATUS_INVALID, "dummy adapter: \"%.40s\" is wrong; write dummy:"
                         "rank=1..%d,seed=NUMBER,modules=all|qkvo", item, geometry->rank_max);
    }
    return STATUS_OK;
}

// splitmix64 (Steele, Lea, Flood, OOPSLA 2014): every 64-bit state yields one number.
static inline uint64_t splitmix64(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

// Uniform in [-limit, limit), two elements a number.
static void fill_uniform(char *to, enum dtype dtype, size_t count, float limit, uint64_t state) {
    for (size_t i = 0; i < count; i += 2) {
        uint64_t bits = splitmix64(&state);
        for (size_t j = i; j < i + 2 && j < count; j++, bits >>= 32) {
            float value = ((float)(bits & 0xffffff) * 0x1p-23f - 1.0f) * limit;
            if (dtype == DTYPE_F32)
                ((float *)to)[j] = value;
            else
                ((uint16_t *)to)[j] = f32_to_bf16(value);
        }
    }
}

static enum status dummy_load(const struct lora_geometry *geometry, struct adapter *adapter,
                              const char *text, struct error *err) {
    struct dummy dummy;
    enum status status = dummy_parse(geometry, text, &dummy, err);
    if (status != STATUS_OK) return status;
    int modules = dummy.attention_only ? LORA_O + 1 : LORA_MODULES;
    for (int module = 0; module < modules; module++) adapter->rank[module] = dummy.rank;
    status = layout(geometry, adapter, err);
    if (status != STATUS_OK) return status;
    uint64_t seeds = dummy.seed;
    for (int layer = 0; layer < geometry->layers; layer++)
        for (int module = 0; module < modules; module++) {
            size_t rank = (size_t)dummy.rank;
            size_t in = (size_t)geometry->in[module], out = (size_t)geometry->out[module];
            fill_uniform(image_at(geometry, adapter, layer, adapter->a_offset[module]),
                         geometry->dtype, rank * in, 1.0f / sqrtf((float)in), splitmix64(&seeds));
            fill_uniform(image_at(geometry, adapter, layer, adapter->b_offset[module]),
                         geometry->dtype, rank * out, 0.02f, splitmix64(&seeds));
        }
    return STATUS_OK;
}

// ---- the PEFT folder ---------------------------------------------------------------------------

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
            return error_set(err, STATUS_INVALID, WEIGHTS ": tensor %.120s: the model has layers 0 "
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
    return error_set(err, STATUS_INVALID, WEIGHTS ": unexpected tensor %.120s%s; expected names "
                     "like base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", name, hint);
}

static enum status check_shape(const struct tensor_info *info, int rows, int columns,
                               const char *meaning, struct error *err) {
    if (info->dtype == DTYPE_OTHER)
        return error_set(err, STATUS_UNSUPPORTED, WEIGHTS ": tensor %.120s has type %s; F32, F16 "
                         "and BF16 are supported", info->name, info->dtype_text);
    if (info->dims != 2)
        return error_set(err, STATUS_INVALID, WEIGHTS ": tensor %.120s has %d dimensions; it must "
                         "have 2", info->name, info->dims);
    if (info->shape[0] != rows || info->shape[1] != columns)
        return error_set(err, STATUS_INVALID, WEIGHTS ": tensor %.120s is [%lld, %lld]; it must be "
                         "[%d, %d] (%s)", info->name, (long long)info->shape[0],
                         (long long)info->shape[1], rows, columns, meaning);
    return STATUS_OK;
}

static enum status collect_pairs(const struct lora_geometry *geometry,
                                 const struct safetensors *file, const struct adapter_plan *plan,
                                 struct pair *pairs, struct error *err) {
    if (safetensors_count(file) == 0)
        return error_set(err, STATUS_INVALID, WEIGHTS ": holds no tensor");
    for (size_t i = 0; i < safetensors_count(file); i++) {
        const struct tensor_info *info = safetensors_at(file, i);
        int index = 0;
        char matrix = 0;
        enum status status = parse_tensor_name(geometry, info->name, &index, &matrix, err);
        if (status != STATUS_OK) return status;
        if (plan->entry[index].rank == 0)
            return error_set(err, STATUS_INVALID, WEIGHTS ": unexpected tensor %.120s: "
                             "adapter_config.json does not target its module", info->name);
        const struct tensor_info **slot = matrix == 'A' ? &pairs[index].a : &pairs[index].b;
        if (*slot)
            return error_set(err, STATUS_INVALID, WEIGHTS ": tensors %.100s and %.100s are one and the "
                             "same matrix", (*slot)->name, info->name);
        *slot = info;
    }
    return STATUS_OK;
}

static enum status check_pairs(const struct lora_geometry *geometry,
                               const struct adapter_plan *plan, const struct pair *pairs,
                               int32_t *ranks, struct error *err) {
    for (int i = 0; i < geometry->layers * LORA_MODULES; i++) {
        int layer = i / LORA_MODULES, module = i % LORA_MODULES, rank = plan->entry[i].rank;
        if (rank == 0) continue;
        if (!pairs[i].a || !pairs[i].b)
            return error_set(err, STATUS_INVALID, WEIGHTS ": lora_%s of model.layers.%d.%s is "
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

// Reads one matrix into rows of `stride` image elements, multiplied by `scale`.
static enum status read_matrix(const struct lora_geometry *geometry, const struct safetensors *file,
                               const struct tensor_info *info, char *to, size_t stride, float scale,
                               void *raw, float *values, struct error *err) {
    enum status status = safetensors_read(file, info, raw, err);
    if (status != STATUS_OK) return status;
    dtype_to_f32(values, raw, info->dtype, info->elements);
    bool finite = true;
    for (size_t i = 0; i < info->elements; i++) {
        values[i] *= scale;
        finite &= fabsf(values[i]) <= LARGEST_BF16; // false for NaN
    }
    if (!finite)
        return error_set(err, STATUS_INVALID, WEIGHTS ": tensor %.120s holds a value that is NaN, "
                         "infinite, or too large once scaled; all must be finite", info->name);
    size_t rows = (size_t)info->shape[0], columns = (size_t)info->shape[1];
    VERIFY_OP(columns, <=, stride);
    for (size_t row = 0; row < rows; row++)
        dtype_convert(to + row * stride * dtype_bytes(geometry->dtype), geometry->dtype,
                      values + row * columns, DTYPE_F32, columns);
    return STATUS_OK;
}

static enum status fill_image(const struct lora_geometry *geometry, const struct safetensors *file,
                              const struct adapter_plan *plan, const struct pair *pairs,
                              struct adapter *adapter, struct error *err) {
    size_t bytes_max = 0, elements_max = 0;
    for (size_t i = 0; i < safetensors_count(file); i++) {
        const struct tensor_info *info = safetensors_at(file, i);
        if (info->bytes > bytes_max) bytes_max = info->bytes;
        if (info->elements > elements_max) elements_max = info->elements;
    }
    void *raw = mem_alloc(bytes_max);
    float *values = mem_alloc(elements_max * sizeof *values);
    enum status status = STATUS_OK;
    for (int i = 0; status == STATUS_OK && i < geometry->layers * LORA_MODULES; i++) {
        int layer = i / LORA_MODULES, module = i % LORA_MODULES;
        if (!pairs[i].a) continue;
        status = read_matrix(geometry, file, pairs[i].a,
                             image_at(geometry, adapter, layer, adapter->a_offset[module]),
                             (size_t)geometry->in[module], 1.0f, raw, values, err);
        if (status != STATUS_OK) break;
        status = read_matrix(geometry, file, pairs[i].b,
                             image_at(geometry, adapter, layer, adapter->b_offset[module]),
                             (size_t)adapter->rank[module], (float)plan->entry[i].scale, raw,
                             values, err);
    }
    free(values);
    free(raw);
    return status;
}

static enum status open_weights(const char *folder, struct safetensors **file, struct error *err) {
    char *path = path_join(folder, WEIGHTS), *pickle = path_join(folder, "adapter_model.bin");
    enum status status = safetensors_open_file(path, file, err);
    if (status == STATUS_NOT_FOUND && access(pickle, F_OK) == 0)
        error_set(err, status = STATUS_UNSUPPORTED, "adapter_model.bin is a pickle, which can run "
                  "code when opened, and was not opened; convert it to " WEIGHTS);
    else if (status == STATUS_NOT_FOUND)
        error_set(err, status = STATUS_INVALID, WEIGHTS ": there is no such file in the adapter's "
                  "folder");
    free(pickle);
    free(path);
    return status;
}

static enum status folder_load(const struct lora_geometry *geometry, struct adapter *adapter,
                               const char *folder, struct error *err) {
    struct adapter_plan plan;
    enum status status = adapter_config_load(folder, geometry, &plan, err);
    if (status != STATUS_OK) return status;
    struct safetensors *file = NULL;
    struct pair *pairs = mem_zalloc((size_t)geometry->layers * LORA_MODULES, sizeof *pairs);
    status = open_weights(folder, &file, err);
    if (status == STATUS_OK) status = collect_pairs(geometry, file, &plan, pairs, err);
    if (status == STATUS_OK) status = check_pairs(geometry, &plan, pairs, adapter->rank, err);
    if (status == STATUS_OK) status = layout(geometry, adapter, err);
    if (status == STATUS_OK) status = fill_image(geometry, file, &plan, pairs, adapter, err);
    safetensors_close(file);
    free(pairs);
    free(plan.entry);
    return status;
}

enum status adapter_load(const struct lora_geometry *geometry, const char *name, const char *path,
                         struct adapter **out, struct error *err) {
    *out = NULL;
    struct adapter *adapter = adapter_new(name, path);
    const char *text = path;
    bool dummy = take_prefix(&text, "dummy:");
    enum status status = dummy ? dummy_load(geometry, adapter, text, err)
                               : folder_load(geometry, adapter, path, err);
    if (status != STATUS_OK) {
        adapter_unref(adapter);
        return status;
    }
    digest(geometry, adapter);
    *out = adapter;
    return STATUS_OK;
}
