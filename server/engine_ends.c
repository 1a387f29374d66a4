// Who must end although tokens are left: cancelled, past a deadline, unloaded by force, shut down
// with the device or the server; and who cannot be in time any more. Engine thread only, at a
// step's beginning.
#include "server/engine_internal.h"

#include <math.h>

// Why a request must end now, or STATUS_OK.
static enum status must_end(const struct engine *engine, const struct request *request,
                            double now_s) {
    if (atomic_load(&engine->failed)) return STATUS_DEVICE;
    if (atomic_load(&request->cancelled)) return STATUS_CANCELLED;
    for (int i = 0; i < request->adapter_count; i++)
        if (atomic_load(&request->adapters[i]->forced)) return STATUS_NOT_FOUND;
    if (request->deadline_s > 0 && now_s >= request->deadline_s) return STATUS_DEADLINE;
    if (atomic_load(&engine->draining) && now_s >= atomic_load(&engine->drain_until_s))
        return STATUS_SHUTDOWN;
    return STATUS_OK;
}

static void end_where_due(struct engine *engine, struct sched_item **list, const int *count,
                          double now_s) {
    for (int i = 0; i < *count;) {
        struct sequence *sequence = sequence_of(list[i]);
        enum status status = must_end(engine, sequence->request, now_s);
        if (status == STATUS_OK) i++;
        else engine_end_early(engine, sequence, FINISH_ABORT, status, now_s); // shortens the list
    }
}

// ------------------------------------------------------------------ who cannot be in time

// By when the first token must come; INFINITY: whenever it does.
static double first_token_limit_s(const struct engine *engine, const struct sequence *sequence) {
    double limit_s = sequence->request->deadline_s > 0 ? sequence->request->deadline_s : INFINITY;
    double slo_s = engine->options.first_token_slo_s;
    if (slo_s > 0 && sequence->submitted_s + slo_s < limit_s)
        limit_s = sequence->submitted_s + slo_s;
    return limit_s;
}

double engine_first_token_wait_s(const struct engine *engine, int ahead) {
    return ahead * atomic_load(&engine->first_interval_s);
}

// Early abort (S-LoRA, arXiv 2311.03285, section 4.3): under load, first tokens come one every
// first_interval_s, so that whoever has i others before it is served i intervals from now. Who would
// be too late then makes room at once for those who can still be in time; the newest go first, for
// they wait longest.
static void end_hopeless(struct engine *engine, double now_s) {
    if (engine->options.first_token_slo_s <= 0 && !isfinite(engine->waiting_deadline_s)) return;
    if (atomic_load(&engine->first_interval_s) <= 0) return;
    for (int i = engine->waiting_count - 1; i >= 0; i--) {
        struct sequence *sequence = sequence_of(engine->waiting_list[i]);
        if (sequence->started) continue; // preempted: it has had its first token, or is about to
        double wait_s = engine_first_token_wait_s(engine, i);
        if (now_s + wait_s <= first_token_limit_s(engine, sequence)) continue;
        bool asked = sequence->request->deadline_s > 0;
        engine_end_with(engine, sequence, asked ? STATUS_DEADLINE : STATUS_FULL,
                        asked ? "the deadline cannot be met: too many wait before this request"
                              : "overloaded: the first token would come too late; try again later",
                        now_s);
        atomic_fetch_add(&engine->metrics->early_aborts, 1);
    }
}

// ------------------------------------------------------------------ who must end now

// Running ones are looked at in every step; the many that wait only when something happened.
void engine_end_due(struct engine *engine, bool cancels, double now_s) {
    end_where_due(engine, engine->running, &engine->running_count, now_s);
    end_hopeless(engine, now_s);
    if (!cancels && now_s < engine->waiting_deadline_s && !atomic_load(&engine->failed) &&
        !atomic_load(&engine->draining))
        return;
    end_where_due(engine, engine->waiting_list, &engine->waiting_count, now_s);
    engine->waiting_deadline_s = INFINITY;
    for (int i = 0; i < engine->waiting_count; i++) {
        double deadline_s = sequence_of(engine->waiting_list[i])->request->deadline_s;
        if (deadline_s > 0 && deadline_s < engine->waiting_deadline_s)
            engine->waiting_deadline_s = deadline_s;
    }
}
