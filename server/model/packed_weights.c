// See packed_weights.h.
#include "server/model/packed_weights.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_BYTES_MAX = 128, WORD_BITS = 32 };
static const char weight_end[] = ".weight";
enum part { QWEIGHT, QZEROS, SCALES, G_IDX, BIAS, PARTS };
static const char *const part_names[PARTS] = {"qweight", "qzeros", "scales", "g_idx", "bias"};

// "NAME.weight" -> "NAME.PART".
static void part_name(const char *name, enum part part, char text[NAME_BYTES_MAX]) {
    size_t length = strlen(name), end = strlen(weight_end);
    VERIFY(length > end && strcmp(name + length - end, weight_end) == 0);
    snprintf(text, NAME_BYTES_MAX, "%.*s.%s", (int)(length - end), name, part_names[part]);
}

static const struct tensor_info *find_part(const struct safetensors *file, const char *name,
                                           enum part part) {
    char text[NAME_BYTES_MAX];
    part_name(name, part, text);
    return safetensors_find(file, text);
}

bool packed_has(const struct safetensors *file, const char *name) {
    return !safetensors_find(file, name) && find_part(file, name, QWEIGHT);
}

bool packed_part(const char *tensor, const char *name) {
    for (int part = 0; part < PARTS; part++) {
        char text[NAME_BYTES_MAX];
        part_name(name, (enum part)part, text);
        if (strcmp(tensor, text) == 0) return true;
    }
    return false;
}

static int group_size(const struct packing *packing, int in) {
    return packing->group > 0 ? packing->group : in;
}

// ------------------------------------------------------------------ checks

// dims[1] == 0: a vector. Words are I32, anything else a type that lorad computes with.
static enum status check_part(const struct safetensors *file, const char *name, enum part part,
                              int64_t rows, int64_t columns, bool words, struct error *err) {
    char text[NAME_BYTES_MAX];
    part_name(name, part, text);
    const struct tensor_info *info = safetensors_find(file, text);
    if (!info) return error_set(err, STATUS_INVALID, "model weights: tensor %s is missing", text);
    bool fits = info->dims == (columns ? 2 : 1) && info->shape[0] == rows &&
                (!columns || info->shape[1] == columns);
    char second[24] = "";
    if (columns) snprintf(second, sizeof second, ", %lld", (long long)columns);
    if (!fits)
        return error_set(err, STATUS_INVALID, "model weights: tensor %s must have shape [%lld%s] "
                         "(quantization_config in config.json)", text, (long long)rows, second);
    bool typed = words ? strcmp(info->dtype_text, "I32") == 0 : info->dtype != DTYPE_OTHER;
    if (typed) return STATUS_OK;
    return error_set(err, STATUS_UNSUPPORTED, "model weights: tensor %s has type %s; %s", text,
                     info->dtype_text, words ? "it must be I32" : "it must be F16, BF16 or F32");
}

enum status packed_check(const struct safetensors *file, const struct packing *packing,
                         const char *name, int out, int in, struct error *err) {
    if (packing->method == PACKING_NONE)
        return error_set(err, STATUS_INVALID, "model weights: %s is packed, but config.json has no "
                         "quantization_config", name);
    int numbers = WORD_BITS / packing->bits, group = group_size(packing, in);
    if (in % numbers != 0 || out % numbers != 0)
        return error_set(err, STATUS_UNSUPPORTED, "model weights: %s has %d x %d numbers, which do "
                         "not fill words of %d", name, out, in, numbers);
    int64_t groups = (in + group - 1) / group;
    bool gptq = packing->method == PACKING_GPTQ;
    enum status status = check_part(file, name, QWEIGHT, gptq ? in / numbers : in,
                                    gptq ? out : out / numbers, true, err);
    if (!status) status = check_part(file, name, QZEROS, groups, out / numbers, true, err);
    if (!status) status = check_part(file, name, SCALES, groups, out, false, err);
    if (!status && find_part(file, name, G_IDX))
        status = check_part(file, name, G_IDX, in, 0, true, err);
    if (!status && find_part(file, name, BIAS))
        status = check_part(file, name, BIAS, out, 0, false, err);
    return status;
}

// ------------------------------------------------------------------ reading

struct parts {
    uint32_t *weight, *zeros; // words
    float *scales;
    int32_t *group; // [in]
};

static enum status read_words(const struct safetensors *file, const char *name, enum part part,
                              void **words, struct error *err) {
    const struct tensor_info *info = find_part(file, name, part);
    *words = mem_alloc_aligned(info->bytes);
    return safetensors_read(file, info, *words, err);
}

static enum status read_floats(const struct safetensors *file, const char *name, enum part part,
                               float **values, struct error *err) {
    const struct tensor_info *info = find_part(file, name, part);
    void *raw = mem_alloc_aligned(info->bytes);
    *values = mem_alloc_aligned(info->elements * sizeof **values);
    enum status status = safetensors_read(file, info, raw, err);
    if (status == STATUS_OK) dtype_to_f32(*values, raw, info->dtype, info->elements);
    free(raw);
    return status;
}

static enum status read_groups(const struct safetensors *file, const struct packing *packing,
                               const char *name, int in, int32_t **group, struct error *err) {
    int size = group_size(packing, in), groups = (in + size - 1) / size;
    if (find_part(file, name, G_IDX)) {
        void *words;
        enum status status = read_words(file, name, G_IDX, &words, err);
        *group = words;
        for (int i = 0; status == STATUS_OK && i < in; i++)
            if ((*group)[i] < 0 || (*group)[i] >= groups)
                status = error_set(err, STATUS_INVALID, "model weights: %.80s: g_idx[%d] is %d; "
                                   "there are %d groups", name, i, (*group)[i], groups);
        return status;
    }
    *group = mem_alloc((size_t)in * sizeof **group);
    for (int i = 0; i < in; i++) (*group)[i] = i / size;
    return STATUS_OK;
}

static enum status check_bias(const struct safetensors *file, const char *name, int out,
                              struct error *err) {
    if (!find_part(file, name, BIAS)) return STATUS_OK;
    float *bias = NULL;
    enum status status = read_floats(file, name, BIAS, &bias, err);
    for (int o = 0; status == STATUS_OK && o < out; o++)
        if (bias[o] != 0.0f)
            status = error_set(err, STATUS_UNSUPPORTED, "model weights: %.80s comes with a bias; "
                               "linear layers with a bias are not supported", name);
    free(bias);
    return status;
}

// Which of the numbers of an AWQ word is output o of its eight.
static int awq_place(int o) {
    static const int place[] = {0, 4, 1, 5, 2, 6, 3, 7};
    return place[o % 8];
}

static uint32_t number_at(const uint32_t *words, size_t word, int place, int bits) {
    return words[word] >> (place * bits) & ((1u << bits) - 1);
}

static void unpack(const struct packing *packing, const struct parts *p, int out, int in,
                   float *to) {
    int bits = packing->bits, numbers = WORD_BITS / bits;
    bool gptq = packing->method == PACKING_GPTQ;
    for (int o = 0; o < out; o++)
        for (int i = 0; i < in; i++) {
            size_t group = (size_t)p->group[i], words = (size_t)(out / numbers);
            size_t zero_word = group * words + (size_t)(o / numbers);
            int zero_place = gptq ? o % numbers : awq_place(o);
            uint32_t zero = number_at(p->zeros, zero_word, zero_place, bits), number;
            if (gptq)
                number = number_at(p->weight, (size_t)(i / numbers) * (size_t)out + (size_t)o,
                                   i % numbers, bits);
            else
                number = number_at(p->weight, (size_t)i * words + (size_t)(o / numbers),
                                   awq_place(o), bits);
            float scale = p->scales[group * (size_t)out + (size_t)o];
            to[(size_t)o * (size_t)in + (size_t)i] =
                scale * (float)((int)number - (int)zero - packing->zero_offset);
        }
}

enum status packed_read(const struct safetensors *file, const struct packing *packing,
                        const char *name, int out, int in, float *to, struct error *err) {
    struct parts parts = {0};
    void *weight = NULL, *zeros = NULL;
    enum status status = check_bias(file, name, out, err);
    if (!status) status = read_words(file, name, QWEIGHT, &weight, err);
    if (!status) status = read_words(file, name, QZEROS, &zeros, err);
    if (!status) status = read_floats(file, name, SCALES, &parts.scales, err);
    if (!status) status = read_groups(file, packing, name, in, &parts.group, err);
    parts.weight = weight;
    parts.zeros = zeros;
    if (!status) unpack(packing, &parts, out, in, to);
    free(weight);
    free(zeros);
    free(parts.scales);
    free(parts.group);
    return status;
}
