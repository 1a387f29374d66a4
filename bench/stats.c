// See stats.h.
#include "bench/stats.h"

#include "base/memory.h"

#include <math.h>
#include <stdlib.h>

void samples_add(struct samples *samples, double value) {
    if (samples->count == samples->room) {
        samples->room = 2 * samples->room + 64;
        samples->value = mem_realloc(samples->value, samples->room * sizeof *samples->value);
    }
    samples->value[samples->count++] = value;
}

void samples_deinit(struct samples *samples) {
    free(samples->value);
    *samples = (struct samples){0};
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

void samples_sort(struct samples *samples) {
    if (samples->count > 0)
        qsort(samples->value, samples->count, sizeof *samples->value, ascending);
}

double samples_percentile(const struct samples *sorted, double p) {
    if (sorted->count == 0) return 0;
    size_t rank = (size_t)ceil(p * (double)sorted->count - 1e-9);
    return sorted->value[rank > 0 ? rank - 1 : 0];
}

struct summary samples_summary(struct samples *samples) {
    struct summary summary = {.count = samples->count};
    if (samples->count == 0) return summary;
    samples_sort(samples);
    for (size_t i = 0; i < samples->count; i++) summary.mean += samples->value[i];
    summary.mean /= (double)samples->count;
    summary.p50 = samples_percentile(samples, 0.5);
    summary.p90 = samples_percentile(samples, 0.9);
    summary.p99 = samples_percentile(samples, 0.99);
    summary.max = samples->value[samples->count - 1];
    return summary;
}

double stats_jain(const double *values, size_t count) {
    double sum = 0, squares = 0;
    for (size_t i = 0; i < count; i++) {
        sum += values[i];
        squares += values[i] * values[i];
    }
    return squares > 0 ? sum * sum / ((double)count * squares) : 1.0;
}
