// What the engine's files share. Nobody else includes this.
//
//   engine.c         creation, the thread, and the calls of the API thread
//   engine_step.c    one step: who runs, with which pages and adapters
//   engine_adapters.c  adapters on their way to the device, before a step
//   engine_ends.c    who must end now, and who cannot be in time
//   engine_swap.c    what a preempted sequence keeps
//   engine_draft.c   guesses of what comes next, checked in the same step
//   engine_batch.c   the planned sequences as one struct step
//   engine_output.c  rows of logits -> tokens -> events; the end of a request
#ifndef LORAD_SERVER_ENGINE_INTERNAL_H
#define LORAD_SERVER_ENGINE_INTERNAL_H

#include "server/engine.h"
#include "pager/host_store.h"
#include "pager/prefix.h"
#include "pager/residency.h"
#include "server/queue.h"
#include "server/scheduler.h"
#include "server/sequence.h"
#include "server/tenants.h"

#include <pthread.h>

enum { SCHED_WINDOW = 64, ENGINE_HINTS_MAX = 64 }; // requests that one plan looks at; hints kept

// Host arrays of one step, allocated once for the largest.
struct engine_batch {
    int32_t *ids, *positions, *slots; // [step_tokens_max]
    struct attention_span *spans;     // [sequences_max]
    struct lora_segment *segments;    // [sequences_max * REQUEST_ADAPTERS_MAX]
    int32_t *logit_rows;              // [sequences_max]
    struct draw *draws;               // [sequences_max]
    struct step step;
    int drafts;   // of its tokens
    int adapters; // distinct ones
    uint64_t adapter_bytes; // of their images
};

struct engine {
    // Borrowed.
    const struct backend_ops *ops;
    struct backend *backend;
    struct model *model;
    const struct tokenizer *tokenizer;
    struct metrics *metrics;
    struct model_config config;
    struct engine_options options;
    struct lora_geometry geometry;

    // Between the threads.
    struct queue *submissions; // struct sequence *
    struct queue *events;      // struct engine_event
    pthread_t thread;
    bool has_thread;
    _Atomic bool stopping, draining, failed; // failed: the device is gone for good
    _Atomic bool cancels;      // some request was cancelled since the last look
    _Atomic double drain_until_s;
    _Atomic int waiting;       // requests that do not run, queued ones too
    _Atomic int unfinished;    // accepted and not ended
    _Atomic int undelivered;   // accepted, and the terminal event not polled
    _Atomic uint64_t arrivals;
    _Atomic double first_interval_s;  // between two first tokens while others wait; 0 = unknown
    _Atomic double finish_interval_s; // between two requests' ends under load; 0 = unknown

    // Engine thread only, from here on.
    void *pool_memory;
    struct pool *pool;
    struct eviction *eviction;
    struct prefix *prefix; // NULL: without a prefix cache
    struct residency *residency;
    struct host_store *host_store;
    struct queue *hint_queue; // struct adapter *, references, from the API thread
    struct adapter *hints[ENGINE_HINTS_MAX];
    int hint_count;
    uint64_t residency_changes;    // seen by who waits
    struct sequence *holder;       // engine_adapters.c; NULL mostly
    struct sequence *passed_over;  // in this step: the first cold one that found no pages
    int reserved_pages;            // for the holder
    int cold_count;                // who waits for adapters, as far as looked at
    // Invariant 4 of the server: who fills each page, so that no token is ever computed with
    // another sequence's KV or another adapter generation's weights. See page_tag_*.
    uint64_t *page_tags; // [page_count]
    struct sched_scratch *sched_scratch;
    struct sampler_scratch *sampler_scratch;
    struct sched_item **running;  // [sequences_max] by adapter, so that each is one segment
    struct sched_item **waiting_list; // [waiting_max] by sched_before
    struct tenants *tenants;
    struct sched_item **window; // [SCHED_WINDOW] who may be admitted in the step being made
    int window_count;
    struct sequence **arrived;    // [queue_max] scratch for the submission queue
    int running_count, waiting_count, waiting_max;
    struct engine_batch batch;
    struct engine_event *step_events; // [step_events_max] of the step being made
    int step_event_count, step_events_max;
    struct {
        double token_s;          // of a prompt's token
        double step_s;           // of a step in which all decode: the last one
        double decode_s;         // the same, a sequence
        double swap_bytes_per_s; // between pages and host memory
    } rates; // 0: not measured yet
    double waiting_deadline_s; // earliest of those that wait; INFINITY = none
    double first_s;            // the last first token; 0 after a moment in which nobody waited
    double finish_s;           // the last request's end; 0 after an idle moment
    uint64_t step;
    bool names_changed;
    struct residency_counts residency_seen; // what metrics have been told
};

double engine_now_s(void); // monotonic

static inline uint64_t page_tag_kv(const struct sequence *sequence) {
    return sequence->item.arrival << 2;
}
static inline uint64_t page_tag_adapter(uint64_t generation) {
    return generation << 2 | 1;
}
// Of its page number `page`, shared.
static inline uint64_t page_tag_shared(const struct sequence *sequence, int page) {
    bool base = page < sequence->scope.base_pages;
    return (base ? sequence->base_tag : sequence->scope_tag) << 2 | 2;
}

// engine_step.c: takes `sequence` out of the running or waiting list, its pages and adapters back.
void engine_release(struct engine *engine, struct sequence *sequence, double now_s);
void engine_assert(const struct engine *engine); // every invariant, walking every page
int engine_fixed_pages(const struct engine *engine); // that no sequence has to itself

// engine_ends.c; `cancels`: a request's own mark may have changed.
void engine_end_due(struct engine *engine, bool cancels, double now_s);
// How long a request with `ahead` others before it waits for its first token; 0: unknown.
double engine_first_token_wait_s(const struct engine *engine, int ahead);

// engine_swap.c
void engine_learn_step(struct engine *engine, double step_s);
void engine_learn_copies(struct engine *engine, const struct host_store_counts *counts);
void engine_swap_out(struct engine *engine, struct sequence *sequence);
void engine_swap_in(struct engine *engine, struct sequence *sequence);
void engine_swap_drop(struct engine *engine, struct sequence *sequence);

// engine_adapters.c
void engine_move_adapters(struct engine *engine, double now_s);
void engine_take_copies(struct engine *engine, double now_s);
void engine_forget_hint(struct engine *engine, const struct adapter *adapter);
// `sequence` begins (1) or stops (-1) to wait for its adapters; says whether it is cold.
void engine_want_adapters(struct engine *engine, struct sequence *sequence, int change);
void engine_release_held(struct engine *engine, struct sequence *sequence, double now_s);

// engine_draft.c
void engine_draft(struct engine *engine); // before a plan: item.drafts of who runs
// Of `drafts` that were computed for a sequence, `accepted` were right.
void engine_learn_drafts(struct sequence *sequence, int drafts, int accepted);

// engine_batch.c: what `running` has planned, as engine->batch.step.
void engine_batch_build(struct engine *engine);

// engine_output.c
// Advances every planned sequence by the step just computed; their rows become events.
void engine_take_rows(struct engine *engine, const struct model_rows *rows, double now_s);
// How the token `ahead` tokens after the sequence's next one is drawn; DRAW_NONE where that takes
// the row's logits on the host.
struct draw engine_draw_of(const struct engine *engine, const struct sequence *sequence, int ahead);
// Ends a request without a token: FINISH_ABORT with a status, or FINISH_LENGTH with STATUS_OK.
void engine_end_early(struct engine *engine, struct sequence *sequence, enum finish_reason finish,
                      enum status status, double now_s);
void engine_end_with(struct engine *engine, struct sequence *sequence, enum status status,
                     const char *text, double now_s); // the same, aborted for a reason of its own
void engine_flush_events(struct engine *engine);
void engine_update_metrics(struct engine *engine, double step_s);

#endif
