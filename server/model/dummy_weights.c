// See dummy_weights.h. splitmix64 (Steele, Lea, Flood, OOPSLA 2014) is its state's counter finalized:
// any thread may begin anywhere.
#include "server/model/dummy_weights.h"

#include "base/thread.h"

#include <sched.h>
#include <string.h>

enum { THREADS_MAX = 64, EACH = 4, THREAD_ELEMENTS_MIN = 1 << 18 };
static const uint64_t GOLDEN = 0x9e3779b97f4a7c15u;

static uint64_t mix64(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
}

static uint64_t tensor_seed(uint64_t seed, const char *name) {
    uint64_t state = mix64(seed + GOLDEN);
    for (; *name; name++) state = mix64(state ^ (unsigned char)*name);
    return state;
}

struct part {
    pthread_t thread;
    uint16_t *to;
    size_t count;
    uint64_t state;
};

// Each 64-bit draw gives four elements.
static void *part_fill(void *argument) {
    const float scale = 0.034641016f / 32768.0f;
    const struct part *part = argument;
    uint64_t state = part->state;
    for (size_t i = 0; i < part->count; i += EACH) {
        state += GOLDEN;
        uint64_t draw = mix64(state);
        size_t left = part->count - i < EACH ? part->count - i : EACH;
        for (size_t j = 0; j < left; j++, draw >>= 16) {
            float value = ((float)(int32_t)(draw & 0xffff) - 32767.5f) * scale;
            uint32_t bits; // finite, so the rounding needs no NaN case
            memcpy(&bits, &value, 4);
            part->to[i + j] = (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
        }
    }
    return NULL;
}

static size_t threads_for(size_t count) {
    cpu_set_t set;
    int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    size_t threads = count / THREAD_ELEMENTS_MIN + 1, most = cores < THREADS_MAX ? cores : THREADS_MAX;
    return threads < most ? threads : most;
}

void dummy_weights(uint16_t *to, size_t count, uint64_t seed, const char *tensor) {
    struct part parts[THREADS_MAX];
    uint64_t state = tensor_seed(seed, tensor);
    size_t threads = threads_for(count), each = (count / threads + EACH) / EACH * EACH, used = 0;
    for (size_t at = 0; at < count; at += each, used++) {
        parts[used] = (struct part){.to = to + at, .count = count - at < each ? count - at : each,
                                    .state = state + at / EACH * GOLDEN};
        // The last part is this thread's own, and so is one that finds no thread.
        if (at + each < count && !thread_start(&parts[used].thread, part_fill, &parts[used])) continue;
        part_fill(&parts[used]);
        parts[used].count = 0;
    }
    for (size_t i = 0; i < used; i++)
        if (parts[i].count > 0) pthread_join(parts[i].thread, NULL);
}
