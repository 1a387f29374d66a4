// One step under the rules of S-LoRA's released router (arXiv 2311.03285, sections 4 to 6, and the
// repository's behaviour as read): strictly first come first served; a batch decodes ten times
// before newcomers are looked at; newcomers are prefilled in a step of their own; their adapters
// are copied before it while nothing else runs; an adapter that no running request uses is dropped
// as soon as a request ends. The pool's page is one token, an adapter of rank r takes 4 r of them.
#include "sim/sim_internal.h"

#include "base/verify.h"

#include <stdlib.h>

enum { DECODES_BETWEEN_ADMISSIONS = 10, PREFILL_SHARE = 6, PREFILL_TOKENS_MIN = 3072 };

static int by_left_descending(const void *a, const void *b) {
    const struct sched_load *x = a, *y = b;
    return (x->left < y->left) - (x->left > y->left);
}

// Section 5's test over `loads` sorted here: does everybody fit at the predicted peak?
static bool fits(struct sched_load *loads, int count, int adapter_cells, int pool_cells) {
    qsort(loads, (size_t)count, sizeof *loads, by_left_descending);
    long long used = 0, peak = 0;
    for (int i = 0; i < count; i++) {
        used += loads[i].used;
        long long need = used + (long long)(i + 1) * loads[i].left;
        if (need > peak) peak = need;
    }
    return peak < pool_cells - adapter_cells;
}

static bool counted(const struct sim *sim, const struct sim_sequence *sequence, int admitted) {
    if (sim_adapter_of(sequence)->adapter.running > 0) return true;
    for (int i = 0; i < admitted; i++)
        if (sim_sequence_of(sim->waiting[i])->adapter[0] == sequence->adapter[0]) return true;
    return false;
}

// How many of the waiting, from the first, join now.
static int newcomers(const struct sim *sim) {
    struct sched_load loads[sim->options->sequences_max + 1];
    int count = 0, admitted = 0, prompt_tokens = 0;
    int cells = pool_counts(sim->pool).of[PAGE_ADAPTER];
    int prompt_max = sim->page_count / PREFILL_SHARE;
    if (prompt_max < PREFILL_TOKENS_MIN) prompt_max = PREFILL_TOKENS_MIN;
    for (int i = 0; i < sim->running_count; i++)
        loads[count++] = (struct sched_load){.used = sim->running[i]->tokens_total,
                                             .left = sim->running[i]->tokens_left};
    for (; admitted < sim->waiting_count && count < sim->options->sequences_max; admitted++) {
        const struct sim_sequence *sequence = sim_sequence_of(sim->waiting[admitted]);
        int prompt = sequence->item.tokens_total;
        loads[count++] =
            (struct sched_load){.used = prompt + 1, .left = sequence->item.tokens_left};
        if (sequence->item.adapter_count > 0 && !counted(sim, sequence, admitted))
            cells += sequence->adapter[0]->page_count;
        if (prompt_tokens + prompt > prompt_max || !fits(loads, count, cells, sim->page_count))
            break;
        prompt_tokens += prompt;
    }
    return admitted;
}

// Computes what is planned, in one step; ended sequences leave the running list.
static void run_planned(struct sim *sim, double ready_s) {
    struct sim_step step = {.modules = sim->options->modules};
    for (int i = 0; i < sim->running_count; i++) {
        struct sched_item *item = sim->running[i];
        if (item->planned == 0) continue;
        bool taken =
            sim_take_pages(sim, sim_sequence_of(item), item->tokens_cached + item->planned);
        VERIFY(taken); // outputs are as long as announced, so that the prediction holds
        sim_step_add(sim, &step, sim_sequence_of(item), item->planned);
    }
    sim_step_pass(sim, &step, ready_s);
    int running = sim->running_count;
    for (int i = 0; i < sim->running_count;) {
        struct sched_item *item = sim->running[i];
        int planned = item->planned, before = sim->running_count;
        item->planned = 0;
        if (planned > 0) sim_advance(sim, sim_sequence_of(item), planned);
        i += sim->running_count == before;
    }
    if (sim->running_count < running) sim_drop_idle(sim);
}

void sim_slora_step(struct sim *sim) {
    int admitted = 0;
    if (sim->running_count == 0 || sim->decodes_since_admission >= DECODES_BETWEEN_ADMISSIONS)
        admitted = newcomers(sim);
    VERIFY(admitted > 0 || sim->running_count > 0);
    double ready_s = sim->now_s;
    for (int i = 0; i < admitted; i++) {
        struct sim_sequence *sequence = sim_sequence_of(sim->waiting[0]);
        if (sequence->item.adapter_count > 0) {
            bool acquired = sim_acquire(sim, sim_adapter_of(sequence));
            VERIFY(acquired);
            if (sim_adapter_of(sequence)->ready_s > ready_s)
                ready_s = sim_adapter_of(sequence)->ready_s;
        }
        sim_start(sim, 0);
        sequence->item.planned = sequence->item.tokens_total;
    }
    if (admitted == 0)
        for (int i = 0; i < sim->running_count; i++) sim->running[i]->planned = 1;
    sim->decodes_since_admission = admitted > 0 ? 0 : sim->decodes_since_admission + 1;
    run_planned(sim, ready_s);
}
