// What the files of the roofline share: a step's operations, what each cost and must cost.
#ifndef LORAD_BENCH_ROOFLINE_INTERNAL_H
#define LORAD_BENCH_ROOFLINE_INTERNAL_H

#include "bench/machine_peak.h"
#include "bench/roofline_rig.h"

#include <jansson.h>

enum { BATCHES_MAX = 16 };

enum operation {
    OP_NORM, OP_QKV, OP_ROPE, OP_ATTENTION, OP_OUT, OP_GATE_UP, OP_SILU, OP_DOWN, OP_SHRINK,
    OP_EXPAND, OP_HEAD, OPERATIONS
};
extern const char *const operation_names[OPERATIONS];

struct roofline_options {
    struct rig_options rig;
    const char *json, *svg, *trace, *commit, *machine;
    char command[512]; // as typed, cut
    int rounds;
    int batch[BATCHES_MAX], batch_count;
};

struct cost {
    double seconds, bytes, flops; // seconds: in the fastest step
};
struct step_cost {
    int tokens;
    struct cost of[OPERATIONS];
    double whole_seconds; // of a step that nobody waits in; 0: the operations' sum
};

// ------------------------------------------------------------------ roofline_step.c

// Which of a step's operations are run, and who is called before and after each (NULL: nobody).
struct step_watch {
    unsigned wanted; // a bit an operation
    void (*begin)(void *context, enum operation operation);
    void (*end)(void *context, enum operation operation);
    void *context;
};

// A step of the T tokens that rig_step prepared. A device may still be at it on return.
void step_run(struct rig *rig, int T, const struct step_watch *watch);
int logit_rows(const struct rig *rig, int T);
// A device's limits through the operations that every backend has: lower bounds of its true ones.
struct machine_peak device_peak(struct rig *rig);
// Of an adapter's image from (page-locked) host memory into its pages, all layers; `bytes` of it.
// It may change what the adapter says.
double adapter_copy_seconds(struct rig *rig, double *bytes);
// Fills cost->of[].seconds and whole_seconds.
void step_measure(struct rig *rig, int T, int rounds, struct step_cost *cost);

// ------------------------------------------------------------------ roofline_report.c

// Fills cost->of[].bytes and .flops for the step that rig_step prepared.
void step_price(const struct rig *rig, int T, struct step_cost *cost);
// Prints a step's table; what it returns goes into the report's list of steps.
json_t *step_report(const struct rig *rig, const struct machine_peak *peak,
                    const struct step_cost *step);
// Takes over `steps`.
json_t *roofline_json(const struct roofline_options *o, const struct machine_peak *peak,
                      json_t *steps);
// One bar a step, as wide as its time in units of its limit, cut into operations.
bool svg_write(const char *path, const struct rig *rig, const struct machine_peak *peak,
               const struct step_cost *steps, int count);

// ------------------------------------------------------------------ roofline_trace.c

// A step of T tokens as a Chrome trace (chrome://tracing, Perfetto): when the host queued each
// operation and when the device was at it; then the same step from a recording, on a device that
// records. False: the file cannot be written.
bool trace_write(const char *path, struct rig *rig, int T);

#endif
