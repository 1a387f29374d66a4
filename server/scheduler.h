// The scheduler: which sequences run in the next step, with how many tokens each. Pure: reads the
// items and adapters it is given, writes the plan into the items; no clock, no device, no pages.
//
// A step is planned as
//   1. decodes (one token to compute) of running sequences, least recently run first;
//   2. prefill chunks of running sequences, in waiting order, up to the step's token budget;
//   3. admissions from the waiting list, with a first chunk each, while budget, places and pages
//      allow;
//   4. drafts of decoding sequences (engine_draft.c), with what budget is left.
// Admission (S-LoRA, arXiv 2311.03285): with the sequences sorted by tokens left, the i-th
// finishes when those before it are still there and each has grown by left_i; the largest of
// those sums, in whole pages, must fit beside the adapters in use.
//
// With adapters_max, who would bring one adapter too many waits until fewer are in use, or until it
// was passed too often.
//
// Waiting order is the caller's: between tenants by what they got (tenants.h), within one by (priority,
// arrival). Requests whose adapters are resident may pass ones that
// must load, and requests that fit may pass ones that do not, but no request is passed more than
// `passes_max` times: then nothing behind it is admitted before it.
#ifndef LORAD_SERVER_SCHEDULER_H
#define LORAD_SERVER_SCHEDULER_H

#include "pager/adapter.h"

struct sched_item {
    int tokens_total;  // prompt and generated so far
    int tokens_cached; // of those, in the KV cache
    int tokens_left;   // by how many tokens the cache may still grow beyond tokens_total
    int tokens_hit;    // who waits: of its tokens, likely to be found in the prefix cache
    int drafts;        // guessed tokens behind the last one; out: those computed with a decode
    int tokens_shared; // tokens in pages that limits.fixed_pages counts
    bool rows_all;     // wants logits of every token, not of the last one alone
    int priority;      // smaller first
    uint64_t arrival;  // unique
    uint64_t last_step;
    struct adapter *const *adapters;
    int adapter_count;
    int passed;        // how many were admitted ahead of it
    int tenant;        // tenants.h: its place, its neighbours in the tenant's queue, and whether its
    struct sched_item *tenant_next, *tenant_previous; // prompt has been charged
    bool charged;
    bool cold;         // some adapter of it is not resident: it stands in its tenant's other queue
    int planned;       // out: tokens in this step
    bool admit;        // out: take it from waiting to running
};

struct sched_limits {
    int step_tokens_max, sequences_max, rows_max;
    int page_count;
    int fixed_pages; // of adapters in use or arriving, and of prefixes that sequences share
    int adapters_max;     // distinct ones in use at once; 0: any number (S-LoRA's clustering)
    int adapters_running; // of them, already in use
    int passes_max;
    int window; // waiting items looked at in one step
};

struct sched_scratch; // sized for sequences_max
struct sched_scratch *sched_scratch_create(int sequences_max);
void sched_scratch_destroy(struct sched_scratch *scratch);

struct sched_plan {
    int tokens, rows, admitted;
};

// `waiting` is in the order in which they are to be served. Items' planned and admit are reset first.
struct sched_plan sched_plan(struct sched_item *const *running, int running_count,
                             struct sched_item *const *waiting, int waiting_count,
                             const struct sched_limits *limits, struct sched_scratch *scratch);

// Every adapter of it is.
bool sched_resident(const struct sched_item *item);
bool sched_before(const struct sched_item *a, const struct sched_item *b);

// The predicted peak of the running sequences' own pages.
int sched_running_peak(struct sched_item *const *running, int running_count,
                       struct sched_scratch *scratch);
// Pages for `tokens` tokens of one sequence.
int sched_pages(int tokens);
// The predicted peak of KV pages for sequences sorted by tokens_left descending.
struct sched_load {
    int used, left;
};
int sched_peak_pages(const struct sched_load *loads, int count);

#endif
