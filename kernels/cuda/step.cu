// A step on the device: its metadata goes over in one copy, and the operations of steps that come
// again are recorded in a CUDA graph and replayed, so that the host queues one launch instead of a
// few hundred.
//
// DESIGN. Everything that differs between two steps lies in the metadata block; kernels get
// addresses in it and counts. So steps with equal counts can share a recording. Counts are rounded
// up for that, to four steps an octave; surplus entries do nothing. A shape is queued
// directly the first time (scratch grows, cuBLASLt chooses its algorithms), recorded the second, and
// replayed from then on. Recordings are dropped when memory they know moves, the least recently used
// one when there are too many. Prefills are not recorded: their shapes do not come again, and their
// kernels are longer than a launch.
#include "kernels/cuda/cuda_internal.cuh"

// ------------------------------------------------------------------ which steps share a recording

// Up to 8 as it is; then to multiples of a quarter of the power of two below.
static int32_t rounded_up(int32_t n) {
    int32_t step = 1;
    while (n > 8 * step) step *= 2;
    return (n + step - 1) / step * step;
}

// Of every step: so that a few shapes of matmuls serve all.
static int32_t rounded_rows(int32_t n) {
    int32_t step = n <= 8 ? 1 : n <= 64 ? 8 : STEP_ROUND;
    return (n + step - 1) / step * step;
}

static bool may_record(const struct backend *b, const struct step *step) {
    if (!b->records || !step->repeats || step->token_count > RECORDED_TOKENS_MAX) return false;
    int end = 0;
    for (int i = 0; i < step->span_count; i++)
        if (step->spans[i].token_count > RECORDED_SPAN_MAX) return false;
    for (int s = 0; s < step->segment_count; s++) { // in one wave
        if (step->segments[s].token_first < end) return false;
        end = step->segments[s].token_first + step->segments[s].token_count;
    }
    return true;
}

static void round_counts(struct step_counts *n) {
    int32_t *others[] = {&n->narrow_items, &n->wide_items, &n->merges, &n->partials, &n->kv_pages,
                         &n->lora_items, &n->lora_pages, &n->rank_max, &n->v_rows};
    for (int32_t *count : others) *count = rounded_up(*count);
}

void cuda_recordings_drop(struct backend *b) {
    VERIFY(!b->recording);
    for (int i = 0; i < RECORDINGS_MAX; i++)
        if (b->recordings[i].graph) cudaGraphExecDestroy(b->recordings[i].graph);
    memset(b->recordings, 0, sizeof b->recordings);
    b->recorded = NULL;
}

// The place of steps with these counts; the least recently used one's where they are new.
static struct recording *recording_find(struct backend *b, const struct step_counts *counts) {
    struct recording *oldest = &b->recordings[0];
    for (int i = 0; i < RECORDINGS_MAX; i++) {
        struct recording *r = &b->recordings[i];
        if (r->used > 0 && memcmp(&r->counts, counts, sizeof *counts) == 0) return r;
        if (r->used < oldest->used) oldest = r;
    }
    if (oldest->graph) cudaGraphExecDestroy(oldest->graph);
    *oldest = {*counts, NULL, 0};
    return oldest;
}

// ------------------------------------------------------------------ one copy

static void step_send(struct backend *b, const struct step *step, bool rounds) {
    struct device_step *plan = &b->step;
    plan->source = *step;
    plan->counts = cuda_step_count(b, step);
    plan->counts.tokens = rounded_rows(plan->counts.tokens);
    plan->counts.logits = rounded_rows(plan->counts.logits);
    plan->counts.marked = step->marked;
    if (rounds) round_counts(&plan->counts);
    size_t bytes = cuda_step_bytes(&plan->counts);
    // The block may still be read by the copy before.
    cuda_check(b, cudaStreamSynchronize(b->stream), "a step");
    if (b->step_device.bytes < bytes + 1) cuda_recordings_drop(b); // they know where it lies
    if (b->step_host.bytes < bytes) {
        cudaFreeHost(b->step_host.memory);
        b->step_host = {};
        size_t room = bytes + bytes / 2 + 256;
        cudaError_t error = cudaMallocHost(&b->step_host.memory, room);
        cuda_check(b, error, "page-locked memory for a step");
        if (error != cudaSuccess) return;
        b->step_host.bytes = room;
    }
    cuda_grow(b, b->stream, &b->step_device, bytes + 1);
    if (b->failed) return;
    cuda_step_fill(b, plan, b->step_host.memory, b->step_device.memory);
    cuda_check(b, cudaMemcpyAsync(b->step_device.memory, b->step_host.memory, bytes,
                                  cudaMemcpyHostToDevice, b->stream), "a step's metadata");
}

static bool has_arrays(const struct step *step, const struct step *wanted) {
    return (!wanted->ids || wanted->ids == step->ids) &&
           (!wanted->positions || wanted->positions == step->positions) &&
           (!wanted->slots || wanted->slots == step->slots) &&
           (!wanted->spans || wanted->spans == step->spans) &&
           (!wanted->segments || wanted->segments == step->segments) &&
           (!wanted->draws || wanted->draws == step->draws) &&
           (!wanted->logit_rows || wanted->logit_rows == step->logit_rows);
}

const struct device_step *cuda_step(struct backend *b, const struct step *wanted) {
    if (b->in_step) VERIFY(has_arrays(&b->step.source, wanted));
    else step_send(b, wanted, false);
    return &b->step;
}

// ------------------------------------------------------------------ begin and end

struct step_rows cuda_step_begin(struct backend *b, const struct step *step) {
    VERIFY(!b->in_step);
    bool records = may_record(b, step);
    step_send(b, step, records);
    b->in_step = true;
    b->recorded = NULL;
    struct step_rows rows = {b->step.counts.tokens, b->step.counts.logits, false};
    if (!records || b->failed) return rows;
    struct recording *r = b->recorded = recording_find(b, &b->step.counts);
    rows.recorded = r->graph;
    if (!r->graph && r->used > 0) {
        b->recording = true;
        cuda_check(b, cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal),
                   "the begin of a recording");
    }
    r->used = ++b->step_number;
    return rows;
}

static void recording_end(struct backend *b) {
    cudaGraph_t graph = NULL;
    cudaError_t error = cudaStreamEndCapture(b->stream, &graph);
    if (error == cudaSuccess) error = cudaGraphInstantiate(&b->recorded->graph, graph, 0);
    if (graph) cudaGraphDestroy(graph);
    if (error == cudaSuccess) return;
    b->recorded->graph = NULL;
    cuda_check(b, error, "a recording (LORAD_CUDA_GRAPHS=0 does without)");
}

void cuda_step_end(struct backend *b) {
    VERIFY(b->in_step);
    if (b->recording) recording_end(b);
    b->in_step = b->recording = false;
    if (b->recorded && b->recorded->graph)
        cuda_check(b, cudaGraphLaunch(b->recorded->graph, b->stream), "a recorded step");
}
