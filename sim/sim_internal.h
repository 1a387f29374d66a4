// What the simulator's files share. Nobody else includes this.
//
//   sim_run.c     options, creation, arrivals, ends, accounting, results
//   sim_lorad.c   one step under lorad's scheduler
//   sim_slora.c   one step under S-LoRA's rules
#ifndef LORAD_SIM_SIM_INTERNAL_H
#define LORAD_SIM_SIM_INTERNAL_H

#include "pager/residency.h"
#include "server/scheduler.h"
#include "sim/sim.h"

enum sim_state { SIM_TO_COME, SIM_WAITING, SIM_RUNNING, SIM_FINISHED, SIM_ABORTED };

struct sim_adapter {
    struct adapter adapter; // first
    int rank;
    double ready_s; // when the copy that was begun last is complete
    uint64_t read_step; // the last step that read it
};

struct sim_sequence {
    struct sched_item item; // first
    const struct trace_request *request;
    struct adapter *adapter[1]; // what item.adapters points to
    enum sim_state state;
    bool holds; // while it waits: its adapter, whose copy was begun for it
    int32_t *pages; // taken when first admitted, kept until its end
    int page_count, pages_max;
    int generated;
    double first_token_s, end_s;
};

struct sim {
    const struct sim_options *options;
    struct sim_result *result;
    struct trace trace;
    struct pool *pool;
    struct eviction *eviction;
    struct residency *residency;
    struct sim_adapter *adapters;   // [trace.adapters]
    struct sim_sequence *sequences; // [trace.count], in order of arrival
    struct sched_item **waiting;    // [trace.count] by sched_before
    struct sched_item **running;    // [sequences_max]
    struct sched_item **eligible;   // [trace.count] scratch: those of `waiting` a plan may admit
    struct sched_scratch *scratch;
    int page_tokens, page_count;
    int next_arrival, waiting_count, running_count;
    double now_s, copy_free_s; // copy_free_s: when the bus is free again
    uint64_t step; // the one being made, from 1
    int decodes_since_admission; // SIM_SLORA
    uint64_t hits, asked;
    double running_sum, next_sample_s;
};

// One step at now_s, which it advances; somebody is waiting or running.
void sim_lorad_step(struct sim *sim);
void sim_slora_step(struct sim *sim);

static inline struct sim_sequence *sim_sequence_of(struct sched_item *item) {
    return (struct sim_sequence *)item;
}
static inline struct sim_adapter *sim_adapter_of(const struct sim_sequence *sequence) {
    return (struct sim_adapter *)sequence->adapter[0];
}

// Where it is not resident, takes the adapter's pages, evicting up to tier_max, and begins its
// copy. False: no pages.
bool sim_load(struct sim *sim, struct sim_adapter *adapter, enum eviction_tier tier_max);
bool sim_acquire(struct sim *sim, struct sim_adapter *adapter); // the same, and one more runs it
void sim_drop_idle(struct sim *sim);
// Pages for `tokens` cached tokens; false when the pool has too few, idle adapters counted.
bool sim_take_pages(struct sim *sim, struct sim_sequence *sequence, int tokens);
void sim_start(struct sim *sim, int waiting_index);  // waiting -> running; adapter acquired
void sim_preempt(struct sim *sim, int running_index); // running -> waiting
// Adds the work of computing `tokens` more tokens of `sequence` to `step`.
void sim_step_add(struct sim *sim, struct sim_step *step, struct sim_sequence *sequence,
                  int tokens);
// Makes time pass: the step's cost, and until `ready_s` for copies that it needs.
void sim_step_pass(struct sim *sim, struct sim_step *step, double ready_s);
// Advances by `tokens` computed; at the prompt's end and after each decode one token comes out.
// Ends the request at its last one: then `sequence` is no longer running.
void sim_advance(struct sim *sim, struct sim_sequence *sequence, int tokens);

#endif
