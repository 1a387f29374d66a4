// Adapters without files: seeded numbers of the size that trained ones have, for tests and for
// benchmarks without a checkpoint. Any thread.
#include "pager/adapter_internal.h"

#include "base/wide.h"

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

enum { LANES = 16, BLOCK = 8192 };

// Uniform in [-limit, limit), in steps of limit / 2^15: LANES generators of xorshift (Marsaglia,
// Journal of Statistical Software 8(14), 2003), two elements a number, as loops that compilers turn
// into vectors.
struct generator {
    uint32_t lane[LANES];
    float scale;
};

static struct generator generator_create(float limit, uint64_t seed) {
    struct generator generator = {.scale = limit * 0x1p-15f};
    for (int i = 0; i < LANES; i++) generator.lane[i] = (uint32_t)(splitmix64(&seed) >> 32) | 1;
    return generator;
}

WIDE static void generate(struct generator *generator, float *values, size_t count) {
    for (size_t at = 0; at < count; at += 2 * LANES) {
        float block[2 * LANES];
        for (int i = 0; i < LANES; i++) {
            uint32_t x = generator->lane[i];
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            generator->lane[i] = x;
            block[i] = (float)((int32_t)x >> 16) * generator->scale;
            block[LANES + i] = (float)((int32_t)(x << 16) >> 16) * generator->scale;
        }
        size_t left = count - at < 2 * LANES ? count - at : 2 * LANES;
        memcpy(values + at, block, left * sizeof *block);
    }
}

static void fill_uniform(char *to, enum dtype dtype, size_t count, float limit, uint64_t seed,
                         const struct adapter_pause *pause) {
    struct generator generator = generator_create(limit, seed);
    float values[BLOCK];
    for (size_t at = 0; at < count; at += BLOCK) {
        size_t part = count - at < BLOCK ? count - at : BLOCK;
        generate(&generator, values, part);
        dtype_convert(to + at * dtype_bytes(dtype), dtype, values, DTYPE_F32, part);
        adapter_pause(pause);
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
            adapter_image_clear(geometry, adapter, image, layer, module, false);
            size_t in = (size_t)geometry->in[module], out = (size_t)geometry->out[module];
            fill_uniform(adapter_image_at(geometry, adapter, image, layer,
                                          adapter->a_offset[module]),
                         geometry->dtype, rank * in, 1.0f / sqrtf((float)in), splitmix64(&seeds),
                         pause);
            fill_uniform(adapter_image_at(geometry, adapter, image, layer,
                                          adapter->b_offset[module]),
                         geometry->dtype, rank * out, 0.02f, splitmix64(&seeds), pause);
        }
}
