// Which instruction set the inner kernels use. Asked once, when the backend opens. It never guesses:
// a set that LORAD_CPU_ISA names and the processor lacks is an error, not a fallback.
#include "kernels/cpu/cpu_isa.h"

#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <cpuid.h>
#endif

struct isa_choice {
    const struct cpu_kernels *kernels;
    bool available;
};

enum { ISA_MAX = 4 };

// Best first.
static int isa_list(struct isa_choice list[ISA_MAX]) {
    int count = 0;
#ifdef __x86_64__
    __builtin_cpu_init();
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("fma");
    bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    list[count++] = (struct isa_choice){&cpu_kernels_avx512bf16, bf16};
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
        return STATUS_OK;
    }
    return error_set(err, STATUS_INVALID,
                     "LORAD_CPU_ISA=%.40s is not one of avx512bf16, avx512, avx2, scalar", wanted);
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
