// What this machine can do at most, measured: how fast all threads together read memory, and how
// many floating-point operations a second its vector units do from registers. The two limits that
// a step's time is held against.
#ifndef LORAD_BENCH_MACHINE_PEAK_H
#define LORAD_BENCH_MACHINE_PEAK_H

#include <stdbool.h>
#include <stddef.h>

struct machine_peak {
    double read_bytes_per_s;
    double f32_flops_per_s;
    double bf16_flops_per_s; // equals f32's where the processor has no bf16 multiply
    bool has_bf16;
};

// Takes about a second. `threads` > 0. The best of several rounds, since a shared machine only
// ever makes a round slower.
struct machine_peak machine_peak_measure(int threads);

// The processor's name as /proc/cpuinfo has it, or "unknown"; cut to room - 1 bytes.
void machine_cpu_name(char *name, size_t room);

#endif
