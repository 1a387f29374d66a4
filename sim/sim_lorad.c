// One step under lorad's own scheduler: the parts of engine_step.c (plan, admit, find pages,
// compute) around the same sched_plan, pool and residency, with time from the cost model.
//
// A cold adapter is copied beside the running steps unless `load_blocks`: whose copy is under way
// is not shown to the scheduler until it is complete, so that it holds back nobody. Copies begin
// for the first `prefetch` waiting requests, as far as all of those fit without eviction of each
// other; otherwise when the scheduler would admit the request.
#include "sim/sim_internal.h"

#include "base/verify.h"

#include <math.h>

enum { WINDOW = 64, PASSES_MAX = 32 };       // as engine_step.c has them
static const double PREFETCH_AHEAD_S = 0.05; // of copies queued: about a step

static bool arriving(const struct sim *sim, const struct sched_item *item) {
    if (sim->options->load_blocks || item->adapter_count == 0) return false;
    const struct sim_adapter *adapter = sim_adapter_of(sim_sequence_of((struct sched_item *)item));
    return adapter->adapter.resident && adapter->ready_s > sim->now_s;
}

// The first waiting requests' adapters are copied while room and the bus allow; none that a waiting
// request wants is evicted for it.
static void prefetch(struct sim *sim) {
    if (sim->options->load_blocks) return;
    for (int i = 0; i < sim->waiting_count && i < sim->options->prefetch; i++) {
        if (sim->waiting[i]->adapter_count == 0) continue;
        if (sim->copy_free_s > sim->now_s + PREFETCH_AHEAD_S) return;
        if (!sim_load(sim, sim_adapter_of(sim_sequence_of(sim->waiting[i])), TIER_IDLE)) return;
    }
}

static int list_eligible(struct sim *sim) {
    int count = 0;
    for (int i = 0; i < sim->waiting_count && count < WINDOW; i++)
        if (!arriving(sim, sim->waiting[i])) sim->eligible[count++] = sim->waiting[i];
    return count;
}

static struct sched_plan plan(struct sim *sim) {
    struct sched_limits limits = {.step_tokens_max = sim->options->step_tokens_max,
                                  .sequences_max = sim->options->sequences_max,
                                  .rows_max = sim->options->sequences_max,
                                  .page_count = sim->page_count,
                                  .fixed_pages = pool_counts(sim->pool).of[PAGE_ADAPTER],
                                  .passes_max = PASSES_MAX,
                                  .window = WINDOW};
    int eligible = list_eligible(sim);
    return sched_plan(sim->running, sim->running_count, sim->eligible, eligible, &limits,
                      sim->scratch);
}

// Those whose adapter is not there begin its copy and wait for it, unless copies block. They hold
// it, so that nobody evicts it on its way.
static void admit(struct sim *sim, int admitted) {
    for (int i = 0; admitted > 0;) {
        VERIFY_OP(i, <, sim->waiting_count);
        struct sim_sequence *sequence = sim_sequence_of(sim->waiting[i]);
        bool start = sequence->item.admit;
        admitted -= start;
        sequence->item.admit = false;
        if (start && sequence->item.adapter_count > 0) {
            struct sim_adapter *adapter = sim_adapter_of(sequence);
            if (!sequence->holds) sequence->holds = sim_acquire(sim, adapter);
            start = sequence->holds && !arriving(sim, &sequence->item);
            if (start) sequence->holds = false; // as a running one it is counted from now on
        }
        if (start)
            sim_start(sim, i);
        else {
            sequence->item.planned = 0;
            i++;
        }
    }
}

static int newest_running(const struct sim *sim) {
    int newest = 0;
    for (int i = 1; i < sim->running_count; i++)
        if (sched_before(sim->running[newest], sim->running[i])) newest = i;
    return newest;
}

static void find_pages(struct sim *sim) {
    for (int i = 0; i < sim->running_count;) {
        struct sched_item *item = sim->running[i];
        if (item->planned == 0 ||
            sim_take_pages(sim, sim_sequence_of(item), item->tokens_cached + item->planned)) {
            i++;
            continue;
        }
        VERIFY_OP(sim->running_count, >, 1); // alone, everyone fits
        int victim = newest_running(sim);
        sim_preempt(sim, victim);
        if (victim < i) i--; // the list closes up behind the victim
    }
}

static void compute(struct sim *sim) {
    struct sim_step step = {.modules = sim->options->modules};
    double ready_s = sim->now_s;
    for (int i = 0; i < sim->running_count; i++) {
        struct sim_sequence *sequence = sim_sequence_of(sim->running[i]);
        if (sequence->item.planned == 0) continue;
        sequence->item.last_step = sim->step + 1;
        sim_step_add(sim, &step, sequence, sequence->item.planned);
        if (sequence->item.adapter_count > 0)
            ready_s = fmax(ready_s, sim_adapter_of(sequence)->ready_s);
    }
    if (step.tokens == 0) return; // everyone admitted waits for a copy
    sim_step_pass(sim, &step, ready_s);
    for (int i = 0; i < sim->running_count;) {
        struct sched_item *item = sim->running[i];
        int planned = item->planned, before = sim->running_count;
        item->planned = 0;
        if (planned > 0) sim_advance(sim, sim_sequence_of(item), planned);
        i += sim->running_count == before;
    }
    if (!sim->options->keep_idle) sim_drop_idle(sim);
}

// Nobody runs and all who wait are waiting for copies: to the end of the first.
static void sleep_until_copied(struct sim *sim) {
    double until_s = INFINITY;
    for (int i = 0; i < sim->waiting_count; i++)
        if (arriving(sim, sim->waiting[i]))
            until_s = fmin(until_s, sim_adapter_of(sim_sequence_of(sim->waiting[i]))->ready_s);
    VERIFY(isfinite(until_s));
    sim->now_s = until_s;
}

// Outputs are as long as announced, so that pages never run short by themselves.
static void preempt_for_test(struct sim *sim) {
    int every = sim->options->preempt_every;
    if (every <= 0 || sim->running_count < 2 || sim->step % (uint64_t)every != 0) return;
    sim_preempt(sim, newest_running(sim));
}

void sim_lorad_step(struct sim *sim) {
    preempt_for_test(sim);
    prefetch(sim);
    struct sched_plan planned = plan(sim);
    admit(sim, planned.admitted);
    if (sim->running_count == 0) {
        sleep_until_copied(sim);
        return;
    }
    find_pages(sim);
    compute(sim);
}
