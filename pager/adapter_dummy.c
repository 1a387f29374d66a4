// Adapters without files: seeded numbers of the size that trained ones have, for tests and for
// benchmarks without a checkpoint. Any thread.
#include "pager/adapter_internal.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum status adapter_dummy_parse(const struct lora_geometry *geometry, const char *text,
                                struct adapter_dummy *dummy, struct error *err) {
    *dummy = (struct adapter_dummy){.rank = 16};
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

static int modules(const struct adapter_dummy *dummy) {
    return dummy->attention_only ? LORA_O + 1 : LORA_MODULES;
}

void adapter_dummy_ranks(const struct adapter_dummy *dummy, int32_t *ranks) {
    for (int module = 0; module < modules(dummy); module++) ranks[module] = dummy->rank;
}

void adapter_dummy_fill(const struct lora_geometry *geometry, const struct adapter *adapter,
                        const struct adapter_dummy *dummy, void *image,
                        const struct adapter_pause *pause) {
    uint64_t seeds = dummy->seed;
    size_t rank = (size_t)dummy->rank;
    for (int layer = 0; layer < geometry->layers; layer++)
        for (int module = 0; module < modules(dummy); module++) {
            size_t in = (size_t)geometry->in[module], out = (size_t)geometry->out[module];
            fill_uniform(adapter_image_at(geometry, adapter, image, layer,
                                          adapter->a_offset[module]),
                         geometry->dtype, rank * in, 1.0f / sqrtf((float)in), splitmix64(&seeds));
            adapter_pause(pause);
            fill_uniform(adapter_image_at(geometry, adapter, image, layer,
                                          adapter->b_offset[module]),
                         geometry->dtype, rank * out, 0.02f, splitmix64(&seeds));
            adapter_pause(pause);
        }
}
