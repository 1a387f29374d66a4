// Summaries of samples. Pure.
#ifndef LORAD_BENCH_STATS_H
#define LORAD_BENCH_STATS_H

#include <stddef.h>

struct samples { // zero-initialised is empty
    double *value;
    size_t count, room;
};
void samples_add(struct samples *samples, double value);
void samples_deinit(struct samples *samples);
void samples_sort(struct samples *samples);

struct summary {
    size_t count;
    double mean, p50, p90, p99, max; // 0 without samples
};
// Sorts them. A percentile is the nearest rank: the smallest value with at least p of all at or
// below it.
struct summary samples_summary(struct samples *samples);
double samples_percentile(const struct samples *sorted, double p); // p in (0, 1]

// Jain's fairness index (Jain, Chiu, Hawe 1984): 1 when all are equal, 1/n when one has all.
double stats_jain(const double *values, size_t count);

#endif
