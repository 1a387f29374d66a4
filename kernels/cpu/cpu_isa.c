// Which instruction set the inner kernels use. Asked once, when the backend opens. It never guesses:
// a set that LORAD_CPU_ISA names and the processor lacks is an error, not a fallback; and whether
// pairs of bf16 are multiplied faster than as f32 is tried, because on some processors they are
// not (on Zen 4 they take half the time, on Emerald Rapids twice).
#include "kernels/cpu/cpu_isa.h"

#include "base/file.h"
#include "base/memory.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <cpuid.h>
#endif

struct isa_choice {
    const struct cpu_kernels *kernels;
    bool available;
};

enum { ISA_MAX = 5 };

#ifdef __x86_64__
// The least seconds of several tries of one tile.
static double tile_seconds(const struct cpu_kernels *kernels, const struct cpu_tile *tile) {
    double begin = clock_seconds();
    kernels->tile_bf16(tile);
    return clock_seconds() - begin;
}

// In turn, so that what else the machine does meets both.
static bool pairs_are_faster(void) {
    enum { WORDS = 256, ROWS = 8, PANELS = 2, TRIES = 24 };
    const size_t w_bytes = PANELS * WORDS * PANEL * sizeof(float);
    char *memory = mem_alloc_aligned(2 * w_bytes);
    memset(memory, 0, 2 * w_bytes);
    float y[ROWS * PANELS * PANEL];
    struct cpu_tile tile = {.x = memory + w_bytes, .w = memory, .panel_stride = WORDS * PANEL,
                            .k_stride = PANEL, .k = WORDS, .rows = ROWS, .panels = PANELS, .y = y,
                            .y_stride = PANELS * PANEL};
    double pairs = 1.0, floats = 1.0;
    for (int i = 0; i < TRIES; i++) {
        pairs = fmin(pairs, tile_seconds(&cpu_kernels_avx512bf16, &tile));
        floats = fmin(floats, tile_seconds(&cpu_kernels_avx512vnni, &tile));
    }
    free(memory);
    return pairs < floats;
}
#endif

// Best first.
static int isa_list(struct isa_choice list[ISA_MAX]) {
    int count = 0;
#ifdef __x86_64__
    __builtin_cpu_init();
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("fma");
    bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") &&
                __builtin_cpu_supports("avx512vbmi");
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    list[count++] = (struct isa_choice){&cpu_kernels_avx512bf16, bf16 && vnni};
    list[count++] = (struct isa_choice){&cpu_kernels_avx512vnni, vnni};
    list[count++] = (struct isa_choice){&cpu_kernels_avx512, avx512};
    list[count++] = (struct isa_choice){&cpu_kernels_avx2, avx2};
#endif
    list[count++] = (struct isa_choice){&cpu_kernels_scalar, true};
    return count;
}

enum status cpu_isa_choose(const struct cpu_kernels **out, struct error *err) {
    struct isa_choice list[ISA_MAX];
    int count = isa_list(list);
    const char *wanted = getenv("LORAD_CPU_ISA");
    for (int i = 0; i < count; i++) {
        if (wanted && *wanted && strcmp(wanted, list[i].kernels->name) != 0) continue;
        if (!list[i].available) {
            if (!wanted || !*wanted) continue;
            return error_set(err, STATUS_UNSUPPORTED,
                             "LORAD_CPU_ISA=%s, but this processor does not have it", wanted);
        }
        *out = list[i].kernels;
#ifdef __x86_64__
        if (*out == &cpu_kernels_avx512bf16 && (!wanted || !*wanted) && !pairs_are_faster())
            *out = &cpu_kernels_avx512vnni;
#endif
        return STATUS_OK;
    }
    return error_set(err, STATUS_INVALID,
                     "LORAD_CPU_ISA=%.40s is not one of avx512bf16, avx512vnni, avx512, avx2, "
                     "scalar", wanted);
}

bool cpu_isa_has_amx(void) {
#ifdef __x86_64__
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    return (d >> 22 & 1) && (d >> 24 & 1); // AMX-BF16, AMX-TILE
#else
    return false;
#endif
}
