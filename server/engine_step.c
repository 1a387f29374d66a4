// One step of the engine: newcomers in, the ended out, a plan, adapters and pages for it, the model,
// tokens and events. Engine thread only (or the caller of engine_step, when there is no thread).
//
// Pages run short only when the scheduler's prediction was too low. Then idle adapters leave first,
// then the newest running sequence is preempted: its pages and adapters are given up, its tokens
// kept, and it waits again in its old place. The oldest is never preempted for a newer one, so
// somebody always advances; alone, everyone fits (engine_submit refuses who would not).
//
// It decides nothing about order (tenants.c) or admission (scheduler.c), computes nothing (model/), and holds
// no lock while it works.
#include "server/engine_internal.h"

#include "base/log.h"
#include "base/verify.h"

#include <math.h>
#include <string.h>

enum {
    SCHED_PASSES_MAX = 32, // how often one may be overtaken
    FULL_ASSERT_EVERY = 256,
};

// ------------------------------------------------------------------ the two lists

// Sequences with the same adapters stand together: by their adapters one after the other, then by
// arrival. Base-only ones come first.
static bool batched_before(const struct sched_item *a, const struct sched_item *b) {
    const struct request *x = sequence_of((struct sched_item *)a)->request;
    const struct request *y = sequence_of((struct sched_item *)b)->request;
    for (int i = 0; i < x->adapter_count && i < y->adapter_count; i++) {
        uint64_t left = a->adapters[i]->generation, right = b->adapters[i]->generation;
        if (left != right) return left < right;
        if (x->adapter_weights[i] != y->adapter_weights[i])
            return x->adapter_weights[i] < y->adapter_weights[i];
    }
    if (x->adapter_count != y->adapter_count) return x->adapter_count < y->adapter_count;
    return a->arrival < b->arrival;
}

static void list_insert(struct sched_item **list, int *count, int max, struct sched_item *item,
                        bool (*before)(const struct sched_item *, const struct sched_item *)) {
    VERIFY_OP(*count, <, max);
    int low = 0, high = *count;
    while (low < high) {
        int middle = (low + high) / 2;
        if (before(item, list[middle])) high = middle;
        else low = middle + 1;
    }
    memmove(&list[low + 1], &list[low], (size_t)(*count - low) * sizeof *list);
    list[low] = item;
    (*count)++;
}

static void list_remove(struct sched_item **list, int *count, const struct sched_item *item) {
    int at = 0;
    while (at < *count && list[at] != item) at++;
    VERIFY_OP(at, <, *count);
    (*count)--;
    memmove(&list[at], &list[at + 1], (size_t)(*count - at) * sizeof *list);
}

static void wait_insert(struct engine *engine, struct sequence *sequence) {
    list_insert(engine->waiting_list, &engine->waiting_count, engine->waiting_max, &sequence->item,
                sched_before);
    engine_want_adapters(engine, sequence, 1);
    tenants_wait(engine->tenants, &sequence->item);
    double deadline_s = sequence->request->deadline_s;
    if (deadline_s > 0 && deadline_s < engine->waiting_deadline_s)
        engine->waiting_deadline_s = deadline_s;
    engine->names_changed = true;
}

// ------------------------------------------------------------------ leaving

static void release_adapters(struct engine *engine, struct sequence *sequence, int count,
                             double now_s) {
    for (int i = 0; i < count; i++)
        residency_release(engine->residency, sequence->item.adapters[i], now_s);
}

void engine_release(struct engine *engine, struct sequence *sequence, double now_s) {
    sequence_assert_state(sequence);
    engine->names_changed = true;
    if (sequence->state == SEQUENCE_WAITING) {
        list_remove(engine->waiting_list, &engine->waiting_count, &sequence->item);
        tenants_unwait(engine->tenants, &sequence->item);
        engine_want_adapters(engine, sequence, -1);
        engine_release_held(engine, sequence, now_s);
        atomic_fetch_sub(&engine->waiting, 1);
        return;
    }
    list_remove(engine->running, &engine->running_count, &sequence->item);
    int shared = sequence->shared_count;
    if (shared > 0) prefix_leave(engine->prefix, sequence->pages, shared, now_s);
    pool_give(engine->pool, PAGE_KV, sequence->pages + shared, sequence->page_count - shared);
    sequence->page_count = sequence->shared_count = sequence->item.tokens_shared = 0;
    release_adapters(engine, sequence, sequence->item.adapter_count, now_s);
}

static void preempt(struct engine *engine, struct sequence *sequence, double now_s) {
    engine_swap_out(engine, sequence);
    engine_release(engine, sequence, now_s);
    sequence_preempt(sequence);
    wait_insert(engine, sequence);
    atomic_fetch_add(&engine->waiting, 1);
    atomic_fetch_add(&engine->metrics->preemptions, 1);
}

// ------------------------------------------------------------------ the step's parts

static void take_submissions(struct engine *engine) {
    int count = queue_pop(engine->submissions, engine->arrived, engine->options.queue_max);
    for (int i = 0; i < count; i++) {
        struct sequence *sequence = engine->arrived[i];
        sequence->item.tenant = tenants_enter(engine->tenants, sequence->request->tenant);
        wait_insert(engine, sequence);
    }
}

// The last in waiting order; with `forced`, only one that has advanced since its last preemption.
static struct sequence *newest_running(const struct engine *engine, bool forced) {
    struct sched_item *newest = NULL;
    for (int i = 0; i < engine->running_count; i++) {
        if (forced && sequence_of(engine->running[i])->spared) continue;
        if (!newest || sched_before(newest, engine->running[i])) newest = engine->running[i];
    }
    return newest ? sequence_of(newest) : NULL;
}

static void preempt_for_test(struct engine *engine, double now_s) {
    int every = engine->options.preempt_every;
    if (every <= 0 || engine->step % (uint64_t)every != 0) return;
    struct sequence *sequence = newest_running(engine, true);
    if (sequence) preempt(engine, sequence, now_s);
}

int engine_fixed_pages(const struct engine *engine) {
    return pool_counts(engine->pool).of[PAGE_ADAPTER] +
           (engine->prefix ? prefix_used(engine->prefix) : 0);
}

// What the plan may expect of the prefix cache. The answer changes slowly and costs a walk over the
// prompt, so that it is not asked for in every step.
static void peek(struct engine *engine, struct sequence *sequence) {
    enum { PEEK_STEPS = 16 };
    if (sequence->swap) sequence->item.tokens_hit = sequence->swap_tokens;
    if (sequence->swap) return;
    if (!engine->prefix || sequence->item.rows_all ||
        (sequence->peek_step > 0 && engine->step < sequence->peek_step + PEEK_STEPS))
        return;
    sequence->peek_step = engine->step;
    sequence->item.tokens_hit =
        PAGE_TOKENS * prefix_peek(engine->prefix, &sequence->scope, sequence->tokens,
                                  sequence->item.tokens_total);
}

static void plan(struct engine *engine) {
    struct sched_limits limits = {.step_tokens_max = engine->options.step_tokens_max,
                                  .sequences_max = engine->options.sequences_max,
                                  .rows_max = engine->options.sequences_max,
                                  .page_count = engine->geometry.pool_pages - engine->reserved_pages,
                                  .fixed_pages = engine_fixed_pages(engine),
                                  .adapters_max = engine->options.clusters_max,
                                  .adapters_running = residency_counts(engine->residency).running,
                                  .passes_max = SCHED_PASSES_MAX,
                                  .window = SCHED_WINDOW};
    engine->window_count = tenants_window(engine->tenants, false, engine->window, SCHED_WINDOW);
    for (int i = 0; i < engine->window_count; i++) peek(engine, sequence_of(engine->window[i]));
    engine_draft(engine);
    sched_plan(engine->running, engine->running_count, engine->window, engine->window_count,
               &limits, engine->sched_scratch);
}

static void tag_pages(struct engine *engine, const int32_t *pages, int count, uint64_t tag) {
    for (int i = 0; i < count; i++) engine->page_tags[pages[i]] = tag;
}

// Before its first token is computed: what the prefix cache has of it.
static void match_prefix(struct engine *engine, struct sequence *sequence) {
    struct sched_item *item = &sequence->item;
    item->tokens_hit = 0;
    if (sequence->swap) { // find_pages fills its pages with it
        item->tokens_cached = sequence->swap_tokens; // as the plan had it
        return;
    }
    if (!engine->prefix || item->rows_all) return;
    int count = prefix_match(engine->prefix, &sequence->scope, sequence->tokens,
                             item->tokens_total, sequence->pages);
    for (int i = 0; i < count; i++)
        VERIFY_OP(engine->page_tags[sequence->pages[i]], ==, page_tag_shared(sequence, i));
    sequence->page_count = sequence->shared_count = count;
    item->tokens_cached = item->tokens_shared = count * PAGE_TOKENS;
    if (item->planned > item->tokens_total - item->tokens_cached)
        item->planned = item->tokens_total - item->tokens_cached;
    atomic_fetch_add(&engine->metrics->prefix_queries, (uint64_t)item->tokens_total);
    atomic_fetch_add(&engine->metrics->prefix_hits, (uint64_t)item->tokens_cached);
    if (!sequence->started) sequence->hit_tokens = item->tokens_cached;
}

static void first_start(struct engine *engine, struct sequence *sequence, double now_s) {
    struct request *request = sequence->request;
    histogram_add(&engine->metrics->queue_time, now_s - sequence->submitted_s);
    atomic_fetch_add(&engine->metrics->prompt_tokens, (uint64_t)request->prompt_count);
    sequence->tenant_place = metrics_tenant(engine->metrics, request->tenant);
    atomic_fetch_add(&engine->metrics->tenants[sequence->tenant_place].prompt_tokens,
                     (uint64_t)request->prompt_count);
    for (int i = 0; i < request->adapter_count; i++)
        atomic_fetch_add(&request->adapters[i]->requests, 1);
    tenants_charge_prompt(engine->tenants, sequence->item.tenant, request->prompt_count);
    sequence->item.charged = true; // a preempted one is not charged again
}

// The window holds only those whose adapters are resident. Nothing is evicted before all of them
// have theirs.
static void admit(struct engine *engine, double now_s) {
    for (int i = 0; i < engine->window_count; i++) {
        struct sequence *sequence = sequence_of(engine->window[i]);
        struct sched_item *item = &sequence->item;
        if (!item->admit) continue;
        for (int j = 0; j < item->adapter_count; j++)
            residency_acquire(engine->residency, item->adapters[j], now_s);
        if (engine->passed_over) engine->passed_over->item.passed++;
        engine_release_held(engine, sequence, now_s);
        engine_want_adapters(engine, sequence, -1);
        list_remove(engine->waiting_list, &engine->waiting_count, item);
        tenants_unwait(engine->tenants, item);
        match_prefix(engine, sequence);
        list_insert(engine->running, &engine->running_count, engine->options.sequences_max, item,
                    batched_before);
        atomic_fetch_sub(&engine->waiting, 1);
        if (!sequence->started) first_start(engine, sequence, now_s);
        sequence_start(sequence);
        engine->names_changed = true;
    }
}

// The pages that `sequence` needs for what it has planned; false when there are too few.
static bool take_pages(struct engine *engine, struct sequence *sequence) {
    int wanted = sched_pages(sequence->item.tokens_cached + sequence->item.planned);
    int missing = wanted - sequence->page_count;
    if (missing <= 0) return true;
    VERIFY_OP(wanted, <=, sequence->pages_max);
    int32_t *pages = &sequence->pages[sequence->page_count];
    if (!eviction_reclaim(engine->eviction, missing, TIER_PINNED)) return false;
    if (pool_take(engine->pool, PAGE_KV, missing, pages) != STATUS_OK) return false;
    tag_pages(engine, pages, missing, page_tag_kv(sequence));
    sequence->page_count = wanted;
    return true;
}

static void find_pages(struct engine *engine, double now_s) {
    for (int i = 0; i < engine->running_count;) {
        struct sequence *sequence = sequence_of(engine->running[i]);
        if (sequence->item.planned == 0 || take_pages(engine, sequence)) {
            if (sequence->swap && sequence->page_count > 0) engine_swap_in(engine, sequence);
            i++;
            continue;
        }
        if (engine->running_count == 1 && engine->holder) { // who waits gives way
            engine_release_held(engine, engine->holder, now_s);
            continue;
        }
        // Alone, everyone fits, but for adapters that are just arriving.
        VERIFY(engine->running_count > 1 || residency_counts(engine->residency).arriving > 0);
        struct sequence *victim = newest_running(engine, false);
        // The list closes up behind the victim: what followed `i` may now stand at i - 1.
        if (victim != sequence && batched_before(&victim->item, &sequence->item)) i--;
        preempt(engine, victim, now_s);
    }
}

// Drafts get pages only while some are free: nobody leaves for a guess.
static void find_draft_pages(struct engine *engine) {
    for (int i = 0; i < engine->running_count; i++) {
        struct sequence *sequence = sequence_of(engine->running[i]);
        struct sched_item *item = &sequence->item;
        if (item->drafts == 0) continue;
        int end = item->tokens_cached + item->planned;
        int missing = sched_pages(end + item->drafts) - sequence->page_count;
        int32_t *pages = &sequence->pages[sequence->page_count];
        if (missing <= 0) continue;
        VERIFY_OP(sequence->page_count + missing, <=, sequence->pages_max);
        if (pool_take(engine->pool, PAGE_KV, missing, pages) != STATUS_OK) {
            item->drafts = sequence->page_count * PAGE_TOKENS - end;
            continue;
        }
        tag_pages(engine, pages, missing, page_tag_kv(sequence));
        sequence->page_count += missing;
    }
}

// While a device computes: who came in, and adapters on their way. Neither touches who runs, nor pages
// that the step uses: free ones and those of the idle alone are given to adapters.
static void work_beside_device(struct engine *engine) {
    if (engine->ops->computes_on_host) return;
    take_submissions(engine);
    engine_move_adapters(engine, engine_now_s());
}

static void compute(struct engine *engine) {
    engine_batch_build(engine);
    const struct engine_batch *batch = &engine->batch;
    VERIFY_OP(batch->step.token_count, >, 0); // who runs has work
    double before = engine_now_s();
    model_queue(engine->model, &batch->step);
    work_beside_device(engine);
    struct model_rows rows = model_wait(engine->model);
    double after = engine_now_s();
    if (!engine->ops->health(engine->backend)) {
        log_event(LOG_ERROR, "device_failed", "step=%llu", (unsigned long long)engine->step);
        atomic_store(&engine->failed, true);
        engine_end_due(engine, true, after);
        return;
    }
    engine_learn_step(engine, after - before);
    engine_take_rows(engine, &rows, after);
    engine_update_metrics(engine, after - before);
}

// Counts in every step; every page now and then, and always under test.
static void assert_pages(const struct engine *engine) {
    struct pool_counts counts = pool_counts(engine->pool);
    int held = 0;
    for (int i = 0; i < engine->running_count; i++)
        held += sequence_of(engine->running[i])->page_count -
                sequence_of(engine->running[i])->shared_count;
    if (engine->prefix) held += prefix_used(engine->prefix);
    VERIFY_OP(held, ==, counts.of[PAGE_KV]);
    VERIFY_OP(counts.of[PAGE_FREE] + counts.of[PAGE_KV] + counts.of[PAGE_ADAPTER] +
              counts.of[PAGE_CACHED], ==, counts.total);
    if (engine->options.preempt_every > 0 || engine->step % FULL_ASSERT_EVERY == 0)
        engine_assert(engine);
}

void engine_assert(const struct engine *engine) {
    pool_assert(engine->pool);
    for (int i = 0; i < engine->running_count; i++) {
        const struct sequence *sequence = sequence_of(engine->running[i]);
        VERIFY_OP(sequence->state, ==, SEQUENCE_RUNNING);
        VERIFY_OP(sequence->item.tokens_cached, <, sequence->item.tokens_total);
        sequence_assert_state(sequence);
        for (int page = 0; page < sequence->page_count; page++)
            VERIFY_OP(engine->page_tags[sequence->pages[page]], ==,
                      page < sequence->shared_count ? page_tag_shared(sequence, page)
                                                    : page_tag_kv(sequence));
    }
    for (int i = 0; i < engine->waiting_count; i++) {
        const struct sequence *sequence = sequence_of(engine->waiting_list[i]);
        VERIFY_OP(sequence->state, ==, SEQUENCE_WAITING);
        sequence_assert_state(sequence);
        VERIFY(i == 0 || sched_before(engine->waiting_list[i - 1], engine->waiting_list[i]));
    }
}

// ------------------------------------------------------------------ the step

bool engine_step(struct engine *engine) {
    if (queue_room(engine->events) < engine->step_events_max)
        return atomic_load(&engine->unfinished) > 0;
    double now_s = engine_now_s();
    bool cancels = atomic_exchange(&engine->cancels, false);
    take_submissions(engine);
    engine_end_due(engine, cancels, now_s);
    residency_sweep(engine->residency);
    if (engine->running_count + engine->waiting_count > 0) engine->step++;
    preempt_for_test(engine, now_s);
    engine_move_adapters(engine, now_s);
    plan(engine);
    admit(engine, now_s);
    bool works = engine->running_count > 0;
    // One who waits is worth few late tokens of others; when several do, steps run half empty.
    bool urgent = engine->cold_count > 1 && 4 * engine->cold_count >= engine->running_count;
    host_store_set_pace(engine->host_store, !works                  ? HOST_IDLE
                                            : urgent                ? HOST_URGENT
                                            : engine->cold_count > 0 ? HOST_WANTED
                                                                     : HOST_PACED);
    if (works) {
        find_pages(engine, now_s);
        find_draft_pages(engine);
        compute(engine);
        assert_pages(engine);
    } else {
        engine->finish_s = 0;
        engine_update_metrics(engine, 0);
    }
    bool more = engine->step_event_count > 0 ||
                (engine->waiting_count > 0 && engine->options.load_threads == 0);
    engine_flush_events(engine);
    return works || more;
}
