// Writes adapter folders for tests: an adapter_config.json and an adapter_model.safetensors whose
// every element is a multiple of 1/64 below 2, and so exact in F32, F16 and BF16 alike.
#ifndef LORAD_TESTS_ADAPTER_FOLDER_H
#define LORAD_TESTS_ADAPTER_FOLDER_H

#include "base/file.h"
#include "pager/adapter.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { TENSORS_MAX = 40 };

static const char *const module_names[LORA_MODULES] = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj"};

// Two layers, hidden 8, 2 query heads and 1 kv head of 4, ffn 12.
static const struct lora_geometry small_geometry = {
    .layers = 2,
    .in = {8, 8, 8, 8, 8, 8, 12},
    .out = {8, 4, 4, 8, 12, 12, 8},
    .dtype = DTYPE_F32,
    .rank_max = 8,
    .page_elems = 2 * 4 * PAGE_TOKENS,
    .pool_pages = 100,
};

struct test_tensor {
    char name[160];
    const char *dtype; // as in the file
    int dims, shape[3];
    int special_at; // this element becomes `special`; -1: none
    float special;
};

struct test_weights {
    struct test_tensor tensors[TENSORS_MAX];
    int count;
};

static struct test_tensor *add_tensor(struct test_weights *w, const char *name, const char *dtype,
                                      int rows, int columns) {
    assert_in_range(w->count, 0, TENSORS_MAX - 1);
    struct test_tensor *tensor = &w->tensors[w->count++];
    *tensor = (struct test_tensor){
        .dtype = dtype, .dims = 2, .shape = {rows, columns, 1}, .special_at = -1};
    snprintf(tensor->name, sizeof tensor->name, "%s", name);
    return tensor;
}

// Both matrices of one module of one layer of small_geometry.
static void add_pair(struct test_weights *w, int layer, int module, int rank, const char *dtype) {
    char name[160];
    const char *form = "base_model.model.model.layers.%d.%s.lora_%c.weight";
    snprintf(name, sizeof name, form, layer, module_names[module], 'A');
    add_tensor(w, name, dtype, rank, small_geometry.in[module]);
    snprintf(name, sizeof name, form, layer, module_names[module], 'B');
    add_tensor(w, name, dtype, small_geometry.out[module], rank);
}

// What element `index` of the tensor of that name holds.
static float element(const char *name, int index) {
    unsigned hash = 2166136261u;
    for (; *name; name++) hash = (hash ^ (unsigned char)*name) * 16777619u;
    hash = (hash ^ (unsigned)index) * 2654435761u;
    return (float)((int)(hash >> 9 & 255) - 127) / 64.0f;
}

// IEEE half precision of a number that it represents exactly.
static uint16_t exact_half(float value) {
    if (value == 0) return 0;
    int exponent;
    float fraction = frexpf(fabsf(value), &exponent) * 2048.0f; // in [1024, 2048)
    assert_true(fraction == floorf(fraction));
    unsigned bits = (unsigned)(exponent + 14) << 10 | ((unsigned)fraction - 1024u);
    return (uint16_t)(bits | (value < 0 ? 0x8000u : 0u));
}

static size_t encode(const char *dtype, float value, unsigned char *to) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (strcmp(dtype, "F32") == 0) {
        memcpy(to, &bits, 4);
        return 4;
    }
    if (strcmp(dtype, "F16") == 0) {
        uint16_t half = exact_half(value);
        memcpy(to, &half, 2);
        return 2;
    }
    if (strcmp(dtype, "BF16") == 0) {
        uint16_t top = (uint16_t)(bits >> 16);
        memcpy(to, &top, 2);
        return 2;
    }
    size_t size = strcmp(dtype, "F64") == 0 ? 8 : 1; // types that must be refused
    memset(to, 0, size);
    return size;
}

static void write_text(const char *folder, const char *name, const char *text) {
    char *path = path_join(folder, name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, strlen(text), file), strlen(text));
    assert_int_equal(fclose(file), 0);
    free(path);
}

static void write_weights(const char *folder, const struct test_weights *w) {
    static char header[TENSORS_MAX * 320];
    static unsigned char data[1 << 18];
    size_t used = 0, offset = 0;
    used += (size_t)snprintf(header, sizeof header, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int i = 0; i < w->count; i++) {
        const struct test_tensor *t = &w->tensors[i];
        int elements = 1;
        char shape[64] = "";
        for (int d = 0; d < t->dims; d++) {
            size_t at = strlen(shape);
            snprintf(shape + at, sizeof shape - at, "%s%d", d ? "," : "", t->shape[d]);
            elements *= t->shape[d];
        }
        size_t begin = offset;
        for (int e = 0; e < elements; e++) {
            float value = e == t->special_at ? t->special : element(t->name, e);
            offset += encode(t->dtype, value, data + offset);
        }
        assert_true(offset < sizeof data);
        used += (size_t)snprintf(header + used, sizeof header - used,
                                 ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":"
                                 "[%zu,%zu]}", t->name, t->dtype, shape, begin, offset);
    }
    used += (size_t)snprintf(header + used, sizeof header - used, "}");
    assert_true(used < sizeof header);
    char *path = path_join(folder, "adapter_model.safetensors");
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    uint64_t length = used;
    assert_int_equal(fwrite(&length, 1, 8, file), 8);
    assert_int_equal(fwrite(header, 1, used, file), used);
    assert_int_equal(fwrite(data, 1, offset, file), offset);
    assert_int_equal(fclose(file), 0);
    free(path);
}

// {"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":["q_proj","v_proj"]} without one
// field (NULL: with all) and with more text at its end ("" or ",\"field\":value").
static void write_config(const char *folder, const char *without, const char *with) {
    static const char *const fields[][2] = {
        {"peft_type", "\"LORA\""},
        {"r", "2"},
        {"lora_alpha", "4"},
        {"target_modules", "[\"q_proj\",\"v_proj\"]"},
    };
    char text[4096] = "{\"peft_version\":\"0.1\"";
    for (size_t i = 0; i < 4; i++) {
        if (without && strcmp(without, fields[i][0]) == 0) continue;
        size_t at = strlen(text);
        snprintf(text + at, sizeof text - at, ",\"%s\":%s", fields[i][0], fields[i][1]);
    }
    size_t at = strlen(text);
    snprintf(text + at, sizeof text - at, "%s}", with);
    write_text(folder, "adapter_config.json", text);
}

// The weights that fit the configuration above.
static struct test_weights usual_weights(void) {
    struct test_weights w = {.count = 0};
    for (int layer = 0; layer < small_geometry.layers; layer++) {
        add_pair(&w, layer, LORA_Q, 2, "F32");
        add_pair(&w, layer, LORA_V, 2, "F32");
    }
    return w;
}

static void remove_tree(const char *folder) {
    char command[300];
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    assert_int_equal(system(command), 0);
}

#endif
