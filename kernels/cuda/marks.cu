// Marks: events between the operations of a step, in recordings too. See backend.h.
#include "kernels/cuda/cuda_internal.cuh"

void cuda_mark(struct backend *b, int number) {
    VERIFY(number >= 0 && number < STEP_MARKS_MAX);
    if (!b->marks) b->marks = (cudaEvent_t *)mem_zalloc(STEP_MARKS_MAX, sizeof *b->marks);
    cudaEvent_t *event = &b->marks[number];
    if (!*event) cuda_check(b, cudaEventCreateWithFlags(event, cudaEventDefault), "an event");
    if (b->failed) return;
    // External: a node of the recording, which notes the time whenever it is replayed.
    unsigned flags = b->recording ? cudaEventRecordExternal : cudaEventRecordDefault;
    cuda_check(b, cudaEventRecordWithFlags(*event, b->stream, flags), "a mark");
}

double cuda_mark_seconds(struct backend *b, int from, int to) {
    VERIFY(b->marks && b->marks[from] && b->marks[to]);
    float milliseconds = 0;
    cuda_check(b, cudaEventElapsedTime(&milliseconds, b->marks[from], b->marks[to]), "a mark");
    return 1e-3 * milliseconds;
}

void cuda_marks_close(struct backend *b) {
    for (int i = 0; b->marks && i < STEP_MARKS_MAX; i++)
        if (b->marks[i]) cudaEventDestroy(b->marks[i]);
    free(b->marks);
}
