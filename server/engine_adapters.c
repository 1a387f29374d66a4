// Adapters on their way to the device, beside the steps: engine thread only, once a step, before
// the plan. Whoever waits for an adapter that is not resident is "cold" (tenants.h) and holds up
// nobody; here the cold ones, in the order of their turns, get their adapters read and copied.
//
// A copy needs pages beside the predicted peak of those who run, and evicts only what nobody waits
// for. So that nobody waits for ever, there may be one holder: the first of the cold when nothing
// runs, or when it was passed over too often. It may evict what others wait for, keeps what it has
// got, and the pages that it still lacks are kept from new admissions.
#include "server/engine_internal.h"

#include <stdio.h>

enum { COLD_WINDOW = 64, HOLDER_PASSES = 32 };

// ------------------------------------------------------------------ who waits

void engine_want_adapters(struct engine *engine, struct sequence *sequence, int change) {
    struct sched_item *item = &sequence->item;
    for (int i = 0; i < item->adapter_count; i++)
        residency_want(engine->residency, item->adapters[i], change);
    if (change > 0) item->cold = !sched_resident(item);
}

void engine_release_held(struct engine *engine, struct sequence *sequence, double now_s) {
    for (int i = 0; i < sequence->item.adapter_count; i++)
        if (sequence->held_adapters & 1u << i)
            residency_release(engine->residency, sequence->item.adapters[i], now_s);
    sequence->held_adapters = 0;
    if (engine->holder == sequence) engine->holder = NULL;
}

// Into the queue where it belongs now.
static void sort_one(struct engine *engine, struct sched_item *item) {
    bool cold = !sched_resident(item);
    if (cold != item->cold) tenants_set_cold(engine->tenants, item, cold);
}

// Adapters have come or gone: who waits for them changes queues.
static void sort_waiting(struct engine *engine) {
    struct residency_counts counts = residency_counts(engine->residency);
    uint64_t changes = counts.loads + counts.evictions;
    if (changes == engine->residency_changes) return;
    engine->residency_changes = changes;
    for (int i = 0; i < engine->waiting_count; i++) sort_one(engine, engine->waiting_list[i]);
}

// ------------------------------------------------------------------ what the loaders did

static bool uses(const struct sched_item *item, const struct adapter *adapter) {
    for (int i = 0; i < item->adapter_count; i++)
        if (item->adapters[i] == adapter) return true;
    return false;
}

// Files of a twin may be gone with its registration: then the request's own adapter serves. false:
// the one that cannot be read is the request's own.
static bool part_twins(struct engine *engine, struct sequence *sequence, struct adapter *adapter,
                       double now_s) {
    struct sched_item *item = &sequence->item;
    for (int i = 0; i < item->adapter_count; i++) {
        struct adapter *own = sequence->request->adapters[i];
        if (item->adapters[i] != adapter || own == adapter) continue;
        engine_release_held(engine, sequence, now_s);
        residency_want(engine->residency, adapter, -1);
        sequence_part_twin(sequence, i);
        residency_want(engine->residency, own, 1);
        sort_one(engine, item);
    }
    return !uses(item, adapter);
}

// The client did nothing wrong: whatever it was, to the client it is the server's failure.
static void read_failed(struct engine *engine, const struct host_event *event, double now_s) {
    char text[sizeof event->text];
    snprintf(text, sizeof text, "the adapter cannot be read: %.*s", (int)sizeof text - 32,
             event->text);
    for (int i = 0; i < engine->waiting_count;) {
        struct sequence *sequence = sequence_of(engine->waiting_list[i]);
        if (!uses(&sequence->item, event->adapter) ||
            part_twins(engine, sequence, event->adapter, now_s))
            i++;
        else engine_end_with(engine, sequence, STATUS_IO, text, now_s);
    }
    engine_forget_hint(engine, event->adapter);
}

static void copied(struct engine *engine, struct adapter *adapter, double now_s) {
    for (int i = 0; i < adapter->page_count; i++)
        engine->page_tags[adapter->pages[i]] = page_tag_adapter(adapter->generation);
    residency_arrived(engine->residency, adapter, now_s);
}

void engine_take_copies(struct engine *engine, double now_s) {
    struct host_event events[16];
    int count;
    while ((count = host_store_poll(engine->host_store, events, 16)) > 0)
        for (int i = 0; i < count; i++) {
            if (!events[i].copied) {
                if (events[i].adapter->arriving)
                    residency_cancel(engine->residency, events[i].adapter);
                read_failed(engine, &events[i], now_s);
            } else if (events[i].status == STATUS_OK) copied(engine, events[i].adapter, now_s);
            else residency_cancel(engine->residency, events[i].adapter);
            adapter_unref(events[i].adapter);
        }
    sort_waiting(engine);
}

// ------------------------------------------------------------------ what they shall do

struct placer {
    struct engine *engine;
    int room; // pages that adapters may still take beside the running sequences' peak
    bool full; // somebody found no pages: nobody behind it takes them
    struct adapter *wanted[HOST_WANTED_MAX];
    int wanted_count;
};

static void want(struct placer *placer, struct adapter *adapter) {
    for (int i = 0; i < placer->wanted_count; i++)
        if (placer->wanted[i] == adapter) return;
    if (placer->wanted_count < HOST_WANTED_MAX) placer->wanted[placer->wanted_count++] = adapter;
}

// Begins the copy of one adapter whose image is in host memory, or follows its read; false: there
// are no pages.
static bool place(struct placer *placer, struct adapter *adapter, enum eviction_tier tier_max) {
    struct engine *engine = placer->engine;
    if (residency_place(engine->residency, adapter, tier_max) != STATUS_OK) return false;
    placer->room -= adapter->page_count;
    if (!host_store_copy(engine->host_store, adapter)) // the image has left: it is wanted again
        residency_cancel(engine->residency, adapter);
    return true;
}

static bool away(const struct adapter *adapter) {
    return !atomic_load(&adapter->resident) && !adapter->arriving;
}

// Nobody has begun to bring it.
static bool on_disk(const struct adapter *adapter) {
    return atomic_load(&adapter->tier) == ADAPTER_ON_DISK;
}

static void want_cold(struct placer *placer, const struct sequence *sequence) {
    for (int i = 0; i < sequence->item.adapter_count; i++)
        if (away(sequence->item.adapters[i])) want(placer, sequence->item.adapters[i]);
}

static void place_cold(struct placer *placer, struct sequence *sequence) {
    bool holds = placer->engine->holder == sequence;
    for (int i = 0; i < sequence->item.adapter_count; i++) {
        struct adapter *adapter = sequence->item.adapters[i];
        if (!away(adapter) || on_disk(adapter) || (placer->full && !holds)) continue;
        bool fits = holds || adapter->page_count <= placer->room;
        if (!fits || !place(placer, adapter, holds ? TIER_PINNED : TIER_IDLE)) {
            placer->full = true;
            if (!placer->engine->passed_over) placer->engine->passed_over = sequence;
        }
    }
}

// The holder keeps what has come; what it lacks is reserved.
static void hold(struct engine *engine, double now_s) {
    struct sequence *sequence = engine->holder;
    engine->reserved_pages = 0;
    if (!sequence) return;
    for (int i = 0; i < sequence->item.adapter_count; i++) {
        struct adapter *adapter = sequence->item.adapters[i];
        if (away(adapter)) engine->reserved_pages += adapter->page_count;
        if (!atomic_load(&adapter->resident) || sequence->held_adapters & 1u << i) continue;
        residency_acquire(engine->residency, adapter, now_s);
        sequence->held_adapters |= (uint8_t)(1u << i);
    }
}

static void choose_holder(struct engine *engine, struct sched_item *const *cold, int count) {
    if (engine->holder || count == 0) return;
    struct sequence *first = sequence_of(cold[0]);
    struct sched_item *other;
    bool nothing_else = engine->running_count == 0 &&
                        tenants_window(engine->tenants, false, &other, 1) == 0;
    if (nothing_else || first->item.passed >= HOLDER_PASSES) engine->holder = first;
}

// ------------------------------------------------------------------ hints

static void hint_remove(struct engine *engine, int i) {
    adapter_unref(engine->hints[i]);
    engine->hints[i] = engine->hints[--engine->hint_count];
}

void engine_forget_hint(struct engine *engine, const struct adapter *adapter) {
    for (int i = engine->hint_count - 1; i >= 0; i--)
        if (engine->hints[i] == adapter) hint_remove(engine, i);
}

static void take_hints(struct engine *engine) {
    struct adapter *adapter;
    while (engine->hint_count < ENGINE_HINTS_MAX && queue_pop(engine->hint_queue, &adapter, 1)) {
        residency_pin(engine->residency, adapter);
        engine->hints[engine->hint_count++] = adapter;
    }
}

static void want_hints(struct placer *placer) {
    struct engine *engine = placer->engine;
    for (int i = engine->hint_count - 1; i >= 0; i--) {
        struct adapter *adapter = engine->hints[i];
        if (!away(adapter) || atomic_load(&adapter->retired)) hint_remove(engine, i);
        else want(placer, adapter);
    }
}

// Hinted adapters take pages that are free, and nobody's turn.
static void place_hints(struct placer *placer) {
    struct engine *engine = placer->engine;
    for (int i = engine->hint_count - 1; i >= 0; i--) {
        struct adapter *adapter = engine->hints[i];
        if (!away(adapter) || atomic_load(&adapter->tier) != ADAPTER_IN_HOST) continue;
        bool fits = !placer->full && adapter->page_count <= placer->room &&
                    adapter->page_count <= pool_counts(engine->pool).of[PAGE_FREE];
        if (fits) place(placer, adapter, TIER_IDLE);
        else hint_remove(engine, i); // in host memory is as near as it gets now
    }
}

// ------------------------------------------------------------------ the step's part

void engine_move_adapters(struct engine *engine, double now_s) {
    engine_take_copies(engine, now_s);
    take_hints(engine);
    struct sched_item *cold[COLD_WINDOW];
    int count = tenants_window(engine->tenants, true, cold, COLD_WINDOW);
    engine->passed_over = NULL;
    engine->cold_count = count;
    struct placer placer = {.engine = engine};
    choose_holder(engine, cold, count);
    hold(engine, now_s);
    if (engine->holder) want_cold(&placer, engine->holder);
    for (int i = 0; i < count; i++) want_cold(&placer, sequence_of(cold[i]));
    want_hints(&placer);
    host_store_want(engine->host_store, placer.wanted, placer.wanted_count);
    if (placer.wanted_count > 0) {
        int peak = sched_running_peak(engine->running, engine->running_count,
                                      engine->sched_scratch);
        placer.room = engine->geometry.pool_pages - peak - engine_fixed_pages(engine);
        if (engine->holder) place_cold(&placer, engine->holder);
        for (int i = 0; i < count; i++) place_cold(&placer, sequence_of(cold[i]));
        place_hints(&placer);
    }
    engine_take_copies(engine, now_s); // where there are no loaders, all has happened already
    hold(engine, now_s);
}
