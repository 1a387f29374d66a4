// The planner of scheduler.h. The running set's (used, left) pairs are kept sorted by left, so
// that a candidate costs one insertion and one pass over at most sequences_max pairs.
#include "server/scheduler.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdlib.h>
#include <string.h>

struct sched_scratch {
    int sequences_max, load_count, adapter_count;
    struct sched_load *loads;         // [sequences_max + 1], left descending
    const struct adapter **adapters;  // [sequences_max * REQUEST adapters], admitted in this plan
    int adapters_max;
};

// The plan being made.
struct planner {
    const struct sched_limits *limits;
    struct sched_scratch *scratch;
    int running, fixed_pages;
    long long used_pages; // of the planned and the running, without growth: a bound on their peak
    int tokens, rows, admitted;
    int rows_kept; // one for each running sequence that has not been planned yet
};

enum { ADAPTERS_PER_SEQUENCE_MAX = 4 };

struct sched_scratch *sched_scratch_create(int sequences_max) {
    VERIFY_OP(sequences_max, >, 0);
    struct sched_scratch *scratch = mem_zalloc(1, sizeof *scratch);
    scratch->sequences_max = sequences_max;
    scratch->loads = mem_zalloc((size_t)sequences_max + 1, sizeof *scratch->loads);
    scratch->adapters_max = sequences_max * ADAPTERS_PER_SEQUENCE_MAX;
    scratch->adapters = mem_zalloc((size_t)scratch->adapters_max, sizeof *scratch->adapters);
    return scratch;
}

void sched_scratch_destroy(struct sched_scratch *scratch) {
    if (!scratch) return;
    free(scratch->loads);
    free(scratch->adapters);
    free(scratch);
}

bool sched_before(const struct sched_item *a, const struct sched_item *b) {
    if (a->priority != b->priority) return a->priority < b->priority;
    return a->arrival < b->arrival;
}

int sched_pages(int tokens) {
    return (tokens + PAGE_TOKENS - 1) / PAGE_TOKENS;
}

// ceil((used + left) / 16) summed over sequences = sum of used / 16 + sum over the 16 remainders,
// so one histogram of remainders makes each prefix cost 16 steps whatever its length.
int sched_peak_pages(const struct sched_load *loads, int count) {
    long long whole = 0, peak = 0;
    int remainders[PAGE_TOKENS] = {0};
    for (int i = 0; i < count; i++) {
        VERIFY(i == 0 || loads[i].left <= loads[i - 1].left);
        whole += loads[i].used / PAGE_TOKENS;
        remainders[loads[i].used % PAGE_TOKENS]++;
        long long pages = whole;
        for (int r = 0; r < PAGE_TOKENS; r++)
            pages += (long long)remainders[r] * sched_pages(r + loads[i].left);
        if (pages > peak) peak = pages;
    }
    return peak > INT32_MAX ? INT32_MAX : (int)peak;
}

// Inserts by left descending; returns where.
static int load_insert(struct sched_scratch *scratch, const struct sched_item *item) {
    VERIFY_OP(scratch->load_count, <=, scratch->sequences_max);
    int at = scratch->load_count++;
    for (; at > 0 && scratch->loads[at - 1].left < item->tokens_left; at--)
        scratch->loads[at] = scratch->loads[at - 1];
    scratch->loads[at] = (struct sched_load){.used = item->tokens_total - item->tokens_shared,
                                             .left = item->tokens_left};
    return at;
}

static void load_remove(struct sched_scratch *scratch, int at) {
    scratch->load_count--;
    memmove(&scratch->loads[at], &scratch->loads[at + 1],
            (size_t)(scratch->load_count - at) * sizeof *scratch->loads);
}

static int tokens_to_do(const struct sched_item *item) {
    return item->tokens_total - item->tokens_cached - item->tokens_hit;
}

static int min_int(int a, int b) {
    return a < b ? a : b;
}

// Gives `item` as many tokens as budget and rows allow.
static void plan_item(struct planner *planner, struct sched_item *item) {
    int tokens = min_int(tokens_to_do(item), planner->limits->step_tokens_max - planner->tokens);
    int rows_free = planner->limits->rows_max - planner->rows - planner->rows_kept;
    if (item->rows_all) tokens = min_int(tokens, rows_free);
    bool finishes = tokens == tokens_to_do(item);
    if (!item->rows_all && finishes && rows_free < 1) return;
    if (tokens <= 0) return;
    item->planned = tokens;
    planner->tokens += tokens;
    planner->rows += item->rows_all ? tokens : finishes;
}

static void plan_running(struct planner *planner, struct sched_item *const *running, int count,
                         bool decodes) {
    int candidates = 0;
    for (int i = 0; i < count; i++)
        candidates += (tokens_to_do(running[i]) == 1) == decodes;
    bool in_order = decodes && candidates <= planner->limits->step_tokens_max - planner->tokens;
    for (int done = 0; done < candidates; done++) {
        if (planner->tokens == planner->limits->step_tokens_max) return;
        struct sched_item *next = NULL;
        for (int i = 0; i < count; i++) {
            struct sched_item *item = running[i];
            if (item->admit || (tokens_to_do(item) == 1) != decodes) continue;
            if (!next || (decodes && item->last_step < next->last_step) ||
                ((!decodes || item->last_step == next->last_step) && sched_before(item, next)))
                next = item;
            if (in_order) break;
        }
        next->admit = true; // marks "visited" until sched_plan clears it
        planner->rows_kept--;
        plan_item(planner, next);
    }
}

bool sched_resident(const struct sched_item *item) {
    for (int i = 0; i < item->adapter_count; i++)
        if (!atomic_load_explicit(&item->adapters[i]->resident, memory_order_relaxed)) return false;
    return true;
}

// In use by a running sequence, or taken by an admission of this plan.
static bool adapter_counted(const struct planner *planner, const struct adapter *adapter) {
    if (adapter->running > 0) return true;
    for (int i = 0; i < planner->scratch->adapter_count; i++)
        if (planner->scratch->adapters[i] == adapter) return true;
    return false;
}

static bool try_admit(struct planner *planner, struct sched_item *item) {
    const struct sched_limits *limits = planner->limits;
    struct sched_scratch *scratch = planner->scratch;
    int saved = scratch->adapter_count, pages = planner->fixed_pages;
    for (int i = 0; i < item->adapter_count; i++)
        if (!adapter_counted(planner, item->adapters[i])) {
            VERIFY_OP(scratch->adapter_count, <, scratch->adapters_max);
            scratch->adapters[scratch->adapter_count++] = item->adapters[i];
            pages += item->adapters[i]->page_count;
        }
    int adapters = limits->adapters_running + scratch->adapter_count;
    bool crowded = limits->adapters_max > 0 && scratch->adapter_count > saved &&
                   adapters > limits->adapters_max && item->passed < limits->passes_max &&
                   planner->running > 0;
    long long used_pages = planner->used_pages +
                           sched_pages(item->tokens_total - item->tokens_shared);
    if (crowded || used_pages + pages > limits->page_count) { // spares most of a full pool's candidates
        scratch->adapter_count = saved;
        return false;
    }
    int at = load_insert(scratch, item);
    bool fits = (long long)sched_peak_pages(scratch->loads, scratch->load_count) + pages <=
                limits->page_count;
    if (fits) {
        plan_item(planner, item);
        fits = item->planned > 0;
    }
    if (!fits) {
        scratch->adapter_count = saved;
        load_remove(scratch, at);
        return false;
    }
    planner->fixed_pages = pages;
    planner->used_pages = used_pages;
    planner->running++;
    planner->admitted++;
    item->admit = true;
    return true;
}

// One walk over the window. An admission passes all earlier items that still wait; an item that
// has been passed often enough ends the walk.
static void admit_walk(struct planner *planner, struct sched_item *const *waiting, int count,
                       bool residents_only) {
    const struct sched_limits *limits = planner->limits;
    for (int i = 0; i < count; i++) {
        if (planner->running == limits->sequences_max || planner->tokens == limits->step_tokens_max)
            return;
        struct sched_item *item = waiting[i];
        if (item->admit) continue;
        if ((!residents_only || sched_resident(item)) && try_admit(planner, item)) {
            for (int j = 0; j < i; j++) waiting[j]->passed += !waiting[j]->admit;
            // One of them may now be at its bound; it ends the walk for all behind it.
            for (int j = 0; j < i; j++)
                if (!waiting[j]->admit && waiting[j]->passed >= limits->passes_max) return;
        } else if (item->passed >= limits->passes_max) {
            return;
        }
    }
}

// Each draft is a token and a row of logits.
static void plan_drafts(struct planner *planner, struct sched_item *const *running, int count) {
    const struct sched_limits *limits = planner->limits;
    for (int i = 0; i < count; i++) {
        struct sched_item *item = running[i];
        if (item->planned == 0 || item->planned < tokens_to_do(item) || item->rows_all)
            item->drafts = 0;
        item->drafts = min_int(item->drafts, limits->step_tokens_max - planner->tokens);
        item->drafts = min_int(item->drafts, limits->rows_max - planner->rows);
        planner->tokens += item->drafts;
        planner->rows += item->drafts;
    }
}

int sched_running_peak(struct sched_item *const *running, int running_count,
                       struct sched_scratch *scratch) {
    scratch->load_count = 0;
    for (int i = 0; i < running_count; i++) load_insert(scratch, running[i]);
    return sched_peak_pages(scratch->loads, scratch->load_count);
}

struct sched_plan sched_plan(struct sched_item *const *running, int running_count,
                             struct sched_item *const *waiting, int waiting_count,
                             const struct sched_limits *limits, struct sched_scratch *scratch) {
    VERIFY_OP(running_count, <=, limits->sequences_max);
    VERIFY_OP(limits->sequences_max, <=, scratch->sequences_max);
    VERIFY_OP(limits->sequences_max, <=, limits->rows_max);
    struct planner planner = {.limits = limits, .scratch = scratch, .running = running_count,
                              .fixed_pages = limits->fixed_pages, .rows_kept = running_count};
    scratch->load_count = scratch->adapter_count = 0;
    for (int i = 0; i < running_count; i++) {
        running[i]->planned = 0;
        running[i]->admit = false;
        VERIFY_OP(tokens_to_do(running[i]), >, 0);
        load_insert(scratch, running[i]);
        planner.used_pages += sched_pages(running[i]->tokens_total - running[i]->tokens_shared);
    }
    int window = min_int(waiting_count, limits->window);
    for (int i = 0; i < waiting_count; i++) {
        waiting[i]->planned = waiting[i]->drafts = 0;
        waiting[i]->admit = false;
    }
    plan_running(&planner, running, running_count, true);
    plan_running(&planner, running, running_count, false);
    for (int i = 0; i < running_count; i++) running[i]->admit = false;
    planner.rows_kept = 0;
    admit_walk(&planner, waiting, window, true);
    admit_walk(&planner, waiting, window, false);
    plan_drafts(&planner, running, running_count);
    VERIFY_OP(planner.tokens, <=, limits->step_tokens_max);
    VERIFY_OP(planner.rows, <=, limits->rows_max);
    return (struct sched_plan){.tokens = planner.tokens, .rows = planner.rows,
                               .admitted = planner.admitted};
}
