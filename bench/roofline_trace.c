// A step on a time line. See roofline_internal.h; the format is that of chrome://tracing ("Trace
// Event Format": complete events, times in microseconds).
#include "bench/roofline_internal.h"

#include "base/file.h"

enum { EVENTS_MAX = STEP_MARKS_MAX / 2, HOST = 1, DEVICE = 2 };

struct tracer {
    struct rig *rig;
    int next, count; // operations of this step so far; of the last one that was queued
    enum operation operation[EVENTS_MAX];
    double begin_s[EVENTS_MAX], end_s[EVENTS_MAX]; // when the host began and ended to queue it
};

static void mark(struct tracer *t, int number) {
    if (t->rig->ops->mark) t->rig->ops->mark(t->rig->backend, number);
}

static void trace_begin(void *context, enum operation operation) {
    struct tracer *t = context;
    if (t->next == EVENTS_MAX) return;
    t->operation[t->next] = operation;
    mark(t, 2 * t->next);
    t->begin_s[t->next] = clock_seconds();
}

static void trace_end(void *context, enum operation operation) {
    struct tracer *t = context;
    (void)operation;
    if (t->next == EVENTS_MAX) return;
    t->end_s[t->next] = clock_seconds();
    mark(t, 2 * t->next + 1);
    t->next++;
}

static void event_add(json_t *events, const char *name, int process, int thread, double begin_s,
                      double seconds) {
    json_array_append_new(events, json_pack("{s:s,s:s,s:i,s:i,s:f,s:f}", "name", name, "ph", "X",
                                            "pid", process, "tid", thread, "ts", begin_s * 1e6,
                                            "dur", seconds * 1e6));
}

static void name_add(json_t *events, const char *what, int process, int thread, const char *name) {
    json_array_append_new(events, json_pack("{s:s,s:s,s:i,s:i,s:{s:s}}", "name", what, "ph", "M",
                                            "pid", process, "tid", thread, "args", "name", name));
}

static void host_add(json_t *events, const struct tracer *t, int process) {
    name_add(events, "thread_name", process, HOST, "host");
    for (int i = 0; i < t->count; i++)
        event_add(events, operation_names[t->operation[i]], process, HOST,
                  t->begin_s[i] - t->begin_s[0], t->end_s[i] - t->begin_s[i]);
}

// Time is counted from the device's first operation.
static void device_add(json_t *events, const struct tracer *t, int process) {
    const struct rig *rig = t->rig;
    name_add(events, "thread_name", process, DEVICE, "device");
    for (int i = 0; i < t->count; i++)
        event_add(events, operation_names[t->operation[i]], process, DEVICE,
                  rig->ops->mark_seconds(rig->backend, 0, 2 * i),
                  rig->ops->mark_seconds(rig->backend, 2 * i, 2 * i + 1));
}

// False: it came from a recording, and nothing was queued.
static bool step_trace(struct tracer *t, int T) {
    struct step_watch watch = {~0u, trace_begin, trace_end, t};
    t->next = 0;
    step_run(t->rig, T, &watch);
    t->rig->ops->synchronize(t->rig->backend);
    if (t->next > 0) t->count = t->next;
    return t->next > 0;
}

bool trace_write(const char *path, struct rig *rig, int T) {
    static struct tracer t;
    t.rig = rig;
    json_t *events = json_array();
    rig_step(rig, T);
    rig->step.marked = true;
    step_trace(&t, T); // warms up
    step_trace(&t, T);
    name_add(events, "process_name", 1, 0, "queued by the host");
    host_add(events, &t, 1);
    if (rig->ops->mark) device_add(events, &t, 1);
    rig->step.repeats = true; // queued, recorded, from the recording
    if (rig->ops->mark && step_trace(&t, T) && step_trace(&t, T) && !step_trace(&t, T)) {
        name_add(events, "process_name", 2, 0, "from a recording");
        device_add(events, &t, 2);
    }
    json_t *root = json_pack("{s:o,s:s}", "traceEvents", events, "displayTimeUnit", "ms");
    bool good = json_dump_file(root, path, JSON_INDENT(0) | JSON_REAL_PRECISION(9)) == 0;
    json_decref(root);
    return good;
}
