// The engine's life and its calls from outside: creation, the thread, submissions, cancellations,
// polling, draining. What happens in a step is in engine_step.c.
//
// Why a thread of its own: a step takes milliseconds and must not hold up sockets, and the backend,
// the pool and the scheduler need no locks when one thread owns them. It sleeps on the submission
// queue when there is nothing to do, and on the event queue when the receiver is behind by more
// than a whole step; it never waits in the middle of a step.
#include "server/engine_internal.h"

#include "base/log.h"
#include "base/memory.h"
#include "base/verify.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

enum { RETRY_AFTER_MAX_S = 600 };
// An idle engine still looks now and then for unloaded adapters whose pages it can free.
static const double IDLE_WAKE_S = 0.5;
static const double LOAD_SHARE_DEFAULT = 0.1;

double engine_now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

// ------------------------------------------------------------------ creation

static enum status pool_memory_create(struct engine *engine, enum dtype dtype, struct error *err) {
    struct lora_geometry *geometry = &engine->geometry;
    size_t page_bytes = geometry->page_elems * dtype_bytes(dtype) * (size_t)geometry->layers;
    size_t count = engine->options.pool_bytes / page_bytes;
    if (count > INT32_MAX / PAGE_TOKENS) count = INT32_MAX / PAGE_TOKENS;
    if (count == 0)
        return error_set(err, STATUS_INVALID, "the pool has %zu bytes; one page of %d tokens in "
                         "%d layers takes %zu", engine->options.pool_bytes, PAGE_TOKENS,
                         geometry->layers, page_bytes);
    geometry->pool_pages = (int)count;
    engine->pool_memory = engine->ops->memory_create(engine->backend, count * page_bytes);
    if (!engine->pool_memory)
        return error_set(err, STATUS_NO_MEMORY, "no backend memory for a pool of %zu bytes; ask "
                         "for a smaller one", count * page_bytes);
    struct pool_shape shape = {.layers = geometry->layers, .page_count = geometry->pool_pages,
                               .kv_heads = engine->config.kv_heads,
                               .head_size = engine->config.head_size,
                               .page_elems = geometry->page_elems,
                               .elem_bytes = dtype_bytes(dtype)};
    engine->ops->pool_attach(engine->backend, engine->pool_memory, &shape);
    engine->pool = pool_create(geometry->pool_pages);
    engine->eviction =
        eviction_create(engine->pool, engine->options.eviction, geometry->pool_pages);
    if (engine->options.prefix_cache)
        engine->prefix = prefix_create(engine->pool, engine->eviction, geometry->pool_pages);
    engine->page_tags = mem_zalloc(count, sizeof *engine->page_tags);
    engine->residency = residency_create(engine->pool, engine->eviction, engine->prefix);
    return STATUS_OK;
}

static void wake_engine(void *context) {
    queue_notify(((struct engine *)context)->submissions);
}

static enum status create_host_store(struct engine *engine, struct error *err) {
    size_t bytes = engine->options.host_bytes;
    engine->geometry.host_bytes_max = bytes;
    struct host_store_options options = {.bytes_max = bytes ? bytes : SIZE_MAX / 2,
                                         .paced_share = engine->options.load_share > 0
                                                            ? engine->options.load_share
                                                            : LOAD_SHARE_DEFAULT,
                                         .threads = engine->options.load_threads,
                                         .wake = wake_engine,
                                         .wake_context = engine};
    return host_store_create(&engine->geometry, engine->ops, engine->backend, &options,
                             &engine->host_store, err);
}

static void batch_create(struct engine_batch *batch, const struct engine_options *options) {
    size_t tokens = (size_t)options->step_tokens_max, sequences = (size_t)options->sequences_max;
    batch->ids = mem_zalloc(tokens, sizeof *batch->ids);
    batch->positions = mem_zalloc(tokens, sizeof *batch->positions);
    batch->slots = mem_zalloc(tokens, sizeof *batch->slots);
    batch->spans = mem_zalloc(sequences, sizeof *batch->spans);
    batch->segments = mem_zalloc(sequences * REQUEST_ADAPTERS_MAX, sizeof *batch->segments);
    batch->logit_rows = mem_zalloc(sequences, sizeof *batch->logit_rows);
    batch->draws = mem_zalloc(sequences, sizeof *batch->draws);
}

static void batch_destroy(struct engine_batch *batch) {
    free(batch->ids);
    free(batch->positions);
    free(batch->slots);
    free(batch->spans);
    free(batch->segments);
    free(batch->logit_rows);
    free(batch->draws);
}

// Everything that the steps will ever need.
static void scratch_create(struct engine *engine) {
    const struct engine_options *options = &engine->options;
    engine->sched_scratch = sched_scratch_create(options->sequences_max);
    engine->sampler_scratch = sampler_scratch_create(engine->config.vocabulary);
    engine->waiting_max = options->queue_max + options->sequences_max;
    engine->tenants =
        tenants_create(engine->waiting_max + options->sequences_max, options->tenant_weights,
                       options->tenant_weight_count);
    engine->window = mem_zalloc(SCHED_WINDOW, sizeof *engine->window);
    engine->running = mem_zalloc((size_t)options->sequences_max, sizeof *engine->running);
    engine->waiting_list = mem_zalloc((size_t)engine->waiting_max, sizeof *engine->waiting_list);
    engine->arrived = mem_zalloc((size_t)options->queue_max, sizeof *engine->arrived);
    batch_create(&engine->batch, options);
    // At most: an event for each row, and the end of everyone inside.
    engine->step_events_max = 2 * options->sequences_max + engine->waiting_max;
    engine->step_events =
        mem_zalloc((size_t)engine->step_events_max, sizeof *engine->step_events);
    engine->submissions = queue_create(options->queue_max, sizeof(struct sequence *));
    engine->hint_queue = queue_create(ENGINE_HINTS_MAX, sizeof(struct adapter *));
    engine->events = queue_create(2 * engine->step_events_max, sizeof(struct engine_event));
    engine->waiting_deadline_s = INFINITY;
}

static enum status options_check(const struct engine_options *options, struct error *err) {
    struct {
        const char *name;
        int value;
    } bounds[] = {{"sequences", options->sequences_max},
                  {"tokens in a step", options->step_tokens_max},
                  {"waiting requests", options->queue_max},
                  {"tokens of context", options->context_max}};
    for (size_t i = 0; i < sizeof bounds / sizeof *bounds; i++)
        if (bounds[i].value < 1 || bounds[i].value > 1 << 24)
            return error_set(err, STATUS_INVALID, "the limit of %s is %d; it must be 1 to %d",
                             bounds[i].name, bounds[i].value, 1 << 24);
    return STATUS_OK;
}

enum status engine_create(const struct backend_ops *ops, struct backend *backend,
                          struct model *model, const struct model_config *config,
                          enum dtype dtype, const struct tokenizer *tokenizer,
                          struct metrics *metrics, const struct engine_options *options,
                          struct engine **out, struct error *err) {
    *out = NULL;
    enum status status = options_check(options, err);
    if (status != STATUS_OK) return status;
    struct engine *engine = mem_zalloc(1, sizeof *engine);
    engine->ops = ops;
    engine->backend = backend;
    engine->model = model;
    engine->config = *config;
    engine->tokenizer = tokenizer;
    engine->metrics = metrics;
    engine->options = *options;
    engine->geometry = model_lora_geometry(config, dtype);
    status = pool_memory_create(engine, dtype, err);
    if (status != STATUS_OK) {
        free(engine);
        return status;
    }
    scratch_create(engine);
    if ((status = create_host_store(engine, err))) {
        engine_destroy(engine);
        return status;
    }
    atomic_store(&metrics->pages_total, engine->geometry.pool_pages);
    engine_update_metrics(engine, 0);
    *out = engine;
    return STATUS_OK;
}

// Whoever is still inside leaves without an event.
static void abandon_all(struct engine *engine) {
    struct sequence *sequence;
    struct engine_event event;
    while (queue_pop(engine->submissions, &sequence, 1)) sequence_destroy(sequence);
    double now = engine_now_s();
    while (engine->running_count + engine->waiting_count > 0) {
        struct sched_item *item = engine->running_count ? engine->running[0]
                                                        : engine->waiting_list[0];
        sequence = sequence_of(item);
        engine_release(engine, sequence, now);
        engine_swap_drop(engine, sequence);
        tenants_leave(engine->tenants, sequence->item.tenant);
        sequence_end(sequence);
        sequence_destroy(sequence);
    }
    while (queue_pop(engine->events, &event, 1)) free(event.text);
}

// What is on its way ends; then hints go.
static void stop_loading(struct engine *engine) {
    if (engine->host_store) {
        host_store_stop(engine->host_store);
        engine_take_copies(engine, engine_now_s());
    }
    struct adapter *adapter;
    while (queue_pop(engine->hint_queue, &adapter, 1)) adapter_unref(adapter);
    while (engine->hint_count > 0) adapter_unref(engine->hints[--engine->hint_count]);
}

void engine_destroy(struct engine *engine) {
    if (!engine) return;
    atomic_store(&engine->stopping, true);
    queue_close(engine->submissions);
    queue_close(engine->events);
    if (engine->has_thread) pthread_join(engine->thread, NULL);
    abandon_all(engine);
    stop_loading(engine);
    engine_assert(engine);
    residency_destroy(engine->residency);
    prefix_destroy(engine->prefix);
    eviction_destroy(engine->eviction);
    host_store_destroy(engine->host_store);
    VERIFY_OP(pool_counts(engine->pool).of[PAGE_FREE], ==, engine->geometry.pool_pages);
    pool_destroy(engine->pool);
    engine->ops->memory_destroy(engine->backend, engine->pool_memory);
    queue_destroy(engine->submissions);
    queue_destroy(engine->events);
    queue_destroy(engine->hint_queue);
    sched_scratch_destroy(engine->sched_scratch);
    sampler_scratch_destroy(engine->sampler_scratch);
    batch_destroy(&engine->batch);
    free(engine->page_tags);
    free(engine->running);
    free(engine->waiting_list);
    tenants_destroy(engine->tenants);
    free(engine->window);
    free(engine->arrived);
    free(engine->step_events);
    free(engine);
}

// ------------------------------------------------------------------ the thread

// Requests that come together begin together: else the first of them would be computed alone, and the
// others wait for a whole step. An idle engine waits as long as another one comes within a 200th of a
// decode step, and at most a 20th of one. Where steps are too short for timers, it does not wait.
static void gather(struct engine *engine) {
    static const double GAP_MIN_S = 50e-6;
    double gap_s = engine->rates.step_s / 200, until_s = engine_now_s() + engine->rates.step_s / 20;
    if (gap_s < GAP_MIN_S) return;
    int count = 0, there = queue_wait_more(engine->submissions, 0, 0);
    while (there > count && engine_now_s() < until_s) {
        count = there;
        there = queue_wait_more(engine->submissions, count, gap_s);
    }
}

static void *engine_thread(void *argument) {
    struct engine *engine = argument;
    while (!atomic_load(&engine->stopping)) {
        if (!queue_wait_room(engine->events, engine->step_events_max)) break; // being destroyed
        if (engine_step(engine)) continue;
        queue_wait(engine->submissions, IDLE_WAKE_S);
        gather(engine);
    }
    return NULL;
}

enum status engine_start(struct engine *engine, struct error *err) {
    VERIFY(!engine->has_thread);
    int failure = pthread_create(&engine->thread, NULL, engine_thread, engine);
    if (failure)
        return error_set(err, STATUS_NO_MEMORY, "cannot start the engine's thread: %s",
                         strerror(failure));
    engine->has_thread = true;
    return STATUS_OK;
}

// ------------------------------------------------------------------ calls of the API thread

const struct lora_geometry *engine_lora_geometry(const struct engine *engine) {
    return &engine->geometry;
}

bool engine_healthy(const struct engine *engine) {
    return !atomic_load(&engine->failed);
}

// Pages that its adapters take, each once.
static long long adapter_pages(const struct request *request) {
    long long pages = 0;
    for (int i = 0; i < request->adapter_count; i++) {
        bool counted = false;
        for (int j = 0; j < i; j++) counted |= request->adapters[j] == request->adapters[i];
        if (!counted) pages += request->adapters[i]->page_count;
    }
    return pages;
}

int engine_output_room(const struct engine *engine, const struct request *request) {
    long long context = engine->options.context_max;
    long long pages = engine->geometry.pool_pages - adapter_pages(request);
    long long tokens = pages * PAGE_TOKENS + 1; // the last one needs no page
    long long room = (tokens < context ? tokens : context) - request->prompt_count;
    return room > 1 ? (int)room : 1;
}

static enum status check_size(const struct engine *engine, const struct request *request,
                              struct error *err) {
    long long longest = (long long)request->prompt_count + request->sampling.max_tokens;
    if (longest > engine->options.context_max)
        return error_set(err, STATUS_TOO_LARGE, "%d prompt tokens and max_tokens %d are more than "
                         "the context of %d tokens", request->prompt_count,
                         request->sampling.max_tokens, engine->options.context_max);
    long long pages = sequence_pages_max(request) + adapter_pages(request);
    if (pages > engine->geometry.pool_pages)
        return error_set(err, STATUS_TOO_LARGE, "%d prompt tokens, max_tokens %d and the adapters "
                         "need %lld pages of memory; there are %d", request->prompt_count,
                         request->sampling.max_tokens, pages, engine->geometry.pool_pages);
    return STATUS_OK;
}

static enum status check_request(const struct engine *engine, const struct request *request,
                                 struct error *err) {
    if (request->prompt_count < 1)
        return error_set(err, STATUS_INVALID, "the prompt has no token");
    if (request->sampling.max_tokens < 0)
        return error_set(err, STATUS_INVALID, "max_tokens is %d; it must not be negative",
                         request->sampling.max_tokens);
    for (int i = 0; i < request->prompt_count; i++)
        if (request->prompt[i] < 0 || request->prompt[i] >= engine->config.vocabulary)
            return error_set(err, STATUS_INVALID, "the prompt's token %d is %d; ids go from 0 to "
                             "%d", i, request->prompt[i], engine->config.vocabulary - 1);
    return check_size(engine, request, err);
}

// Places for `count` more; false: too many wait already.
static bool reserve(struct engine *engine, int count) {
    const struct engine_options *options = &engine->options;
    if (count > options->queue_max) return false;
    int waiting = atomic_fetch_add(&engine->waiting, count);
    int unfinished = atomic_fetch_add(&engine->unfinished, count);
    if (waiting + count <= options->queue_max && unfinished + count <= engine->waiting_max)
        return true;
    atomic_fetch_sub(&engine->waiting, count);
    atomic_fetch_sub(&engine->unfinished, count);
    return false;
}

static uint64_t random_seed(void) {
    uint64_t seed = 0;
    VERIFY_OP(getrandom(&seed, sizeof seed, 0), ==, sizeof seed);
    return seed;
}

enum status engine_submit(struct engine *engine, struct request **requests, int count,
                          struct error *err) {
    VERIFY_OP(count, >, 0);
    if (atomic_load(&engine->failed))
        return error_set(err, STATUS_DEVICE, "the device has failed; the server must be restarted");
    for (int i = 0; i < count; i++) {
        enum status status = check_request(engine, requests[i], err);
        if (status != STATUS_OK) return status;
    }
    if (atomic_load(&engine->draining))
        return error_set(err, STATUS_SHUTDOWN, "the server is shutting down");
    double wait_s = engine_first_token_wait_s(engine, atomic_load(&engine->waiting));
    if (engine->options.first_token_slo_s > 0 && wait_s > engine->options.first_token_slo_s) {
        atomic_fetch_add(&engine->metrics->early_aborts, (uint64_t)count);
        return error_set(err, STATUS_FULL, "overloaded: the first token would come in %.1f s, more "
                         "than the %.1f s allowed; try again in %d s", wait_s,
                         engine->options.first_token_slo_s, engine_retry_after_s(engine));
    }
    if (!reserve(engine, count))
        return error_set(err, STATUS_FULL, "%d requests wait already, the limit is %d; try again "
                         "in %d s", atomic_load(&engine->waiting), engine->options.queue_max,
                         engine_retry_after_s(engine));
    struct sequence **sequences = mem_alloc((size_t)count * sizeof *sequences);
    double now = engine_now_s();
    uint64_t arrival = atomic_fetch_add(&engine->arrivals, (uint64_t)count) + 1;
    for (int i = 0; i < count; i++)
        sequences[i] = sequence_create(requests[i], engine->tokenizer, arrival + (uint64_t)i,
                                       random_seed(), now);
    atomic_fetch_add(&engine->undelivered, count);
    bool pushed = queue_push(engine->submissions, sequences, count);
    if (pushed) {
        atomic_fetch_add(&engine->metrics->started, (uint64_t)count);
    } else { // a drain began meanwhile
        for (int i = 0; i < count; i++) sequence_destroy(sequences[i]);
        atomic_fetch_sub(&engine->undelivered, count);
        atomic_fetch_sub(&engine->waiting, count);
        atomic_fetch_sub(&engine->unfinished, count);
    }
    free(sequences);
    return pushed ? STATUS_OK : error_set(err, STATUS_SHUTDOWN, "the server is shutting down");
}

void engine_cancel(struct engine *engine, struct request *request) {
    atomic_store(&request->cancelled, true);
    atomic_store(&engine->cancels, true); // after the request's own mark: see drop_ended
    queue_notify(engine->submissions);
}

void engine_force_out(struct engine *engine, struct adapter *adapter) {
    atomic_store(&adapter->forced, true);
    atomic_store(&engine->cancels, true);
    queue_notify(engine->submissions);
}

enum status engine_prefetch(struct engine *engine, struct adapter *adapter, struct error *err) {
    adapter_ref(adapter);
    if (!queue_push(engine->hint_queue, &adapter, 1)) {
        adapter_unref(adapter);
        return error_set(err, STATUS_FULL, "%d adapters are being prefetched already; try again",
                         ENGINE_HINTS_MAX);
    }
    queue_notify(engine->submissions);
    return STATUS_OK;
}

void engine_adopt(struct engine *engine, struct adapter *adapter) {
    host_store_adopt(engine->host_store, adapter);
}

int engine_poll(struct engine *engine, struct engine_event *events, int max) {
    int count = queue_pop(engine->events, events, max), ended = 0;
    for (int i = 0; i < count; i++) ended += events[i].finish != FINISH_NONE;
    int undelivered = atomic_fetch_sub(&engine->undelivered, ended);
    VERIFY_OP(undelivered, >=, ended);
    return count;
}

void engine_drain(struct engine *engine, double deadline_s) {
    double until = engine_now_s() + (deadline_s > 0 ? deadline_s : 0);
    if (!atomic_load(&engine->draining) || until < atomic_load(&engine->drain_until_s))
        atomic_store(&engine->drain_until_s, until);
    atomic_store(&engine->draining, true);
    queue_close(engine->submissions);
}

bool engine_drained(const struct engine *engine) {
    return atomic_load(&engine->draining) && atomic_load(&engine->undelivered) == 0;
}

int engine_retry_after_s(const struct engine *engine) {
    double wait = (double)atomic_load(&engine->waiting) * atomic_load(&engine->finish_interval_s);
    double slo_s = engine->options.first_token_slo_s;
    if (slo_s > 0) // until the queue is short enough again
        wait = fmax(0, engine_first_token_wait_s(engine, atomic_load(&engine->waiting)) - slo_s);
    if (!(wait > 1)) return 1;
    return wait < RETRY_AFTER_MAX_S ? (int)ceil(wait) : RETRY_AFTER_MAX_S;
}
