// From rows of logits to events: sampling, the reasons to stop, the end of a request, and what the
// metrics are told. Engine thread only. Events gather in step_events and go up in one push at the
// step's end; engine_step has made sure that there is room.
#include "server/engine_internal.h"

#include "base/log.h"
#include "base/memory.h"
#include "base/verify.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct engine_event *add_event(struct engine *engine, const struct sequence *sequence) {
    VERIFY_OP(engine->step_event_count, <, engine->step_events_max);
    struct engine_event *event = &engine->step_events[engine->step_event_count++];
    *event = (struct engine_event){.request = sequence->request,
                                   .token = -1,
                                   .prompt_tokens = sequence->request->prompt_count,
                                   .completion_tokens = sequence_generated(sequence),
                                   .cached_tokens = sequence->hit_tokens};
    return event;
}

void engine_flush_events(struct engine *engine) {
    if (engine->step_event_count == 0) return;
    if (!queue_push(engine->events, engine->step_events, engine->step_event_count)) {
        VERIFY(atomic_load(&engine->stopping)); // there was room: only destroy closes the queue
        for (int i = 0; i < engine->step_event_count; i++) free(engine->step_events[i].text);
    }
    engine->step_event_count = 0;
    if (engine->options.wake) engine->options.wake(engine->options.wake_context);
}

// ------------------------------------------------------------------ the end of a request

static const char *end_text(enum status status) {
    switch (status) {
    case STATUS_DEVICE: return "the device failed while the request ran";
    case STATUS_CANCELLED: return "the request was cancelled";
    case STATUS_NOT_FOUND: return "the adapter was unloaded by force while the request used it";
    case STATUS_DEADLINE: return "the request's deadline passed before it was finished";
    case STATUS_SHUTDOWN: return "the server is shutting down";
    default: return status_text(status);
    }
}

static void count_end(struct engine *engine, const struct sequence *sequence,
                      const struct engine_event *event, double now_s) {
    struct metrics *metrics = engine->metrics;
    if (event->finish == FINISH_STOP) atomic_fetch_add(&metrics->finished_stop, 1);
    else if (event->finish == FINISH_LENGTH) atomic_fetch_add(&metrics->finished_length, 1);
    else if (event->error == STATUS_CANCELLED || event->error == STATUS_SHUTDOWN ||
             event->error == STATUS_NOT_FOUND)
        atomic_fetch_add(&metrics->aborted, 1);
    else atomic_fetch_add(&metrics->failed, 1);
    if (event->finish == FINISH_ABORT) return;
    histogram_add(&metrics->e2e, now_s - sequence->submitted_s);
    if (engine->finish_s > 0) { // smoothed over about ten requests
        double interval = now_s - engine->finish_s, known = atomic_load(&engine->finish_interval_s);
        atomic_store(&engine->finish_interval_s,
                     known > 0 ? known + (interval - known) / 10 : interval);
    }
    engine->finish_s = now_s;
}

// `event` becomes the terminal one; the sequence is gone afterwards.
static void end_sequence(struct engine *engine, struct sequence *sequence,
                         struct engine_event *event, enum finish_reason finish, double now_s) {
    VERIFY_OP(finish, !=, FINISH_NONE);
    event->finish = finish;
    engine_release(engine, sequence, now_s);
    engine_swap_drop(engine, sequence);
    tenants_leave(engine->tenants, sequence->item.tenant);
    sequence_end(sequence);
    count_end(engine, sequence, event, now_s);
    sequence_destroy(sequence);
    int unfinished = atomic_fetch_sub(&engine->unfinished, 1);
    VERIFY_OP(unfinished, >, 0);
}

static void end_early(struct engine *engine, struct sequence *sequence, enum finish_reason finish,
                      enum status status, const char *text, double now_s) {
    struct engine_event *event = add_event(engine, sequence);
    event->error = status;
    snprintf(event->error_text, sizeof event->error_text, "%s", text);
    end_sequence(engine, sequence, event, finish, now_s);
}

void engine_end_early(struct engine *engine, struct sequence *sequence, enum finish_reason finish,
                      enum status status, double now_s) {
    end_early(engine, sequence, finish, status, status == STATUS_OK ? "" : end_text(status), now_s);
}

void engine_end_with(struct engine *engine, struct sequence *sequence, enum status status,
                     const char *text, double now_s) {
    end_early(engine, sequence, FINISH_ABORT, status, text, now_s);
}

// ------------------------------------------------------------------ tokens

static int banned_ids(const struct engine *engine, const struct sequence *sequence, int generated,
                      int32_t banned[EOS_IDS_MAX + STOP_IDS_MAX]) {
    const struct request *request = sequence->request;
    if (generated >= request->sampling.min_tokens) return 0;
    int count = 0;
    for (int i = 0; !request->sampling.ignore_eos && i < engine->config.eos_count; i++)
        banned[count++] = engine->config.eos_ids[i];
    for (int i = 0; i < request->stop_id_count; i++) banned[count++] = request->stop_ids[i];
    return count;
}

static bool is_stop_id(const struct engine *engine, const struct sequence *sequence,
                       int32_t token) {
    const struct request *request = sequence->request;
    if (sequence_generated(sequence) <= request->sampling.min_tokens) return false;
    for (int i = 0; !request->sampling.ignore_eos && i < engine->config.eos_count; i++)
        if (engine->config.eos_ids[i] == token) return true;
    for (int i = 0; i < request->stop_id_count; i++)
        if (request->stop_ids[i] == token) return true;
    return false;
}

// What the sampler is told of the token `ahead` tokens after the next one, but for the logits.
static struct sampler_input input_of(const struct engine *engine, const struct sequence *sequence,
                                     int ahead, int32_t banned[EOS_IDS_MAX + STOP_IDS_MAX]) {
    const struct request *request = sequence->request;
    int generated = sequence_generated(sequence) + ahead;
    return (struct sampler_input){
        .vocabulary = engine->config.vocabulary, .sampling = &request->sampling,
        .prompt = sequence->tokens, .output = sequence->tokens + request->prompt_count,
        .prompt_count = request->prompt_count, .output_count = generated,
        .banned = banned, .banned_count = banned_ids(engine, sequence, generated, banned),
        .seed = sequence->seed, .position = (uint64_t)(sequence->item.tokens_total + ahead),
        .stream = (uint32_t)request->choice};
}

struct draw engine_draw_of(const struct engine *engine, const struct sequence *sequence, int ahead) {
    int32_t banned[EOS_IDS_MAX + STOP_IDS_MAX];
    struct sampler_input input = input_of(engine, sequence, ahead, banned);
    return sampler_draws_plainly(&input) ? sampler_draw(&input) : (struct draw){.kind = DRAW_NONE};
}

static void sample(struct engine *engine, const struct sequence *sequence,
                   const struct model_rows *rows, int row, struct sampler_result *result) {
    *result = (struct sampler_result){0};
    if (rows->ids && engine->batch.draws[row].kind != DRAW_NONE) {
        result->token = rows->ids[row];
        return;
    }
    int32_t banned[EOS_IDS_MAX + STOP_IDS_MAX];
    struct sampler_input input = input_of(engine, sequence, 0, banned);
    input.logits = rows->logits + (size_t)row * (size_t)engine->config.vocabulary;
    sampler_sample(&input, engine->sampler_scratch, result);
}

static void event_logprobs(struct engine_event *event, const struct sampler_result *result) {
    event->logprob = result->logprob;
    event->top_count = result->top_count;
    memcpy(event->top, result->top, (size_t)result->top_count * sizeof *result->top);
}

// Smoothed over about ten first tokens. Those of one step share the time since the last.
static void first_token(struct engine *engine, double now_s) {
    if (engine->waiting_count == 0) {
        engine->first_s = 0;
        return;
    }
    double known = atomic_load(&engine->first_interval_s), before_s = engine->first_s;
    engine->first_s = now_s;
    if (before_s > 0)
        atomic_store(&engine->first_interval_s,
                     known > 0 ? known + (now_s - before_s - known) / 10 : now_s - before_s);
}

static void count_token(struct engine *engine, struct sequence *sequence, double now_s) {
    struct metrics *metrics = engine->metrics;
    bool first = sequence_generated(sequence) == 1;
    if (first) first_token(engine, now_s);
    if (first) histogram_add(&metrics->ttft, now_s - sequence->submitted_s);
    else histogram_add(&metrics->itl, now_s - sequence->token_s);
    sequence->token_s = now_s;
    tenants_charge_output(engine->tenants, sequence->item.tenant, 1);
    atomic_fetch_add(&metrics->generation_tokens, 1);
    atomic_fetch_add(&metrics->tenants[sequence->tenant_place].generation_tokens, 1);
    for (int i = 0; i < sequence->item.adapter_count; i++)
        atomic_fetch_add(&sequence->request->adapters[i]->tokens, 1);
}

// One new token: drawn, appended, turned into text, and maybe the last one.
static void generate(struct engine *engine, struct sequence *sequence,
                     const struct model_rows *rows, int row, double now_s) {
    const struct sampling *sampling = &sequence->request->sampling;
    struct sampler_result result;
    sample(engine, sequence, rows, row, &result);
    sequence_append(sequence, result.token);
    count_token(engine, sequence, now_s);
    struct engine_event *event = add_event(engine, sequence);
    event->token = result.token;
    event_logprobs(event, &result);

    bool stops = is_stop_id(engine, sequence, result.token);
    bool fills = sequence_generated(sequence) == sampling->max_tokens;
    bool silent = stops && !sampling->include_stop;
    stops |= sequence_take_text(sequence, silent, stops || fills, &event->text,
                                &event->text_bytes);
    if (stops) end_sequence(engine, sequence, event, FINISH_STOP, now_s);
    else if (fills) end_sequence(engine, sequence, event, FINISH_LENGTH, now_s);
}

// The row of the prompt's token p tells how likely its token p + 1 was.
static void echo(struct engine *engine, struct sequence *sequence, int position,
                 const float *logits) {
    const struct request *request = sequence->request;
    int next = position + 1;
    if (next != sequence->echoed || next >= request->prompt_count) return; // told before, or last
    struct sampler_result result;
    int top = request->sampling.logprobs;
    sampler_logprobs(logits, engine->config.vocabulary, sequence->tokens[next],
                     top < 0 ? 0 : top < LOGPROBS_MAX ? top : LOGPROBS_MAX, &result);
    struct engine_event *event = add_event(engine, sequence);
    event->prompt_token = true;
    event->token = sequence->tokens[next];
    event_logprobs(event, &result);
    sequence->echoed++;
}

// Its full pages become prefixes that others may share.
static void share_pages(struct engine *engine, struct sequence *sequence) {
    int full = sequence->item.tokens_cached / PAGE_TOKENS;
    if (!engine->prefix || full == sequence->shared_count) return;
    int before = sequence->shared_count;
    sequence->shared_count =
        prefix_add(engine->prefix, &sequence->scope, sequence->tokens,
                   sequence->item.tokens_cached, sequence->pages, sequence->shared_count);
    VERIFY_OP(sequence->shared_count, ==, full);
    sequence->item.tokens_shared = full * PAGE_TOKENS;
    for (int i = before; i < full; i++)
        engine->page_tags[sequence->pages[i]] = page_tag_shared(sequence, i);
}

// Pages that only drafts filled go back.
static void trim_pages(struct engine *engine, struct sequence *sequence) {
    int keep = sched_pages(sequence->item.tokens_total);
    if (sequence->page_count <= keep) return;
    pool_give(engine->pool, PAGE_KV, sequence->pages + keep, sequence->page_count - keep);
    sequence->page_count = keep;
}

// The first row gives the next token; as long as that is what was drafted, the row behind it was
// computed with the right tokens before it and gives the one after. Whatever else the rows hold is
// forgotten, and their places in the cache are written again.
static void generate_rows(struct engine *engine, struct sequence *sequence,
                          const struct model_rows *rows, int first, double now_s) {
    struct sched_item *item = &sequence->item;
    int drafts = item->drafts, accepted = 0, running = engine->running_count;
    for (;; accepted++) {
        int32_t draft = accepted < drafts ? sequence->tokens[item->tokens_total] : -1;
        generate(engine, sequence, rows, first + accepted, now_s);
        bool ended = engine->running_count < running;
        if (ended || sequence->tokens[item->tokens_total - 1] != draft) break;
        sequence_cached(sequence, 1);
        share_pages(engine, sequence);
    }
    atomic_fetch_add(&engine->metrics->drafts, (uint64_t)drafts);
    atomic_fetch_add(&engine->metrics->drafts_accepted, (uint64_t)accepted);
    if (engine->running_count < running) return; // it has ended
    if (drafts > 0) engine_learn_drafts(sequence, drafts, accepted);
    trim_pages(engine, sequence);
}

static void take_rows(struct engine *engine, struct sequence *sequence,
                      const struct model_rows *rows, double now_s) {
    struct sched_item *item = &sequence->item;
    size_t vocabulary = (size_t)engine->config.vocabulary;
    int first = item->tokens_cached;
    sequence_cached(sequence, item->planned);
    share_pages(engine, sequence);
    item->last_step = engine->step;
    for (int i = 0; item->rows_all && i < sequence->row_count; i++)
        echo(engine, sequence, first + i,
             rows->logits + (size_t)(sequence->row_first + i) * vocabulary);
    if (sequence->echoed == sequence->request->prompt_count) item->rows_all = false;
    if (item->tokens_cached < item->tokens_total) return; // more of the prompt is to come
    VERIFY_OP(sequence->row_count, >, item->drafts);
    if (sequence->request->sampling.max_tokens == 0)
        engine_end_early(engine, sequence, FINISH_LENGTH, STATUS_OK, now_s);
    else
        generate_rows(engine, sequence, rows,
                      sequence->row_first + sequence->row_count - 1 - item->drafts, now_s);
}

void engine_take_rows(struct engine *engine, const struct model_rows *rows, double now_s) {
    for (int i = 0; i < engine->running_count;) {
        struct sequence *sequence = sequence_of(engine->running[i]);
        int before = engine->running_count;
        if (sequence->item.planned > 0) take_rows(engine, sequence, rows, now_s);
        i += engine->running_count == before; // else it has ended, and the list closed up
    }
}

// ------------------------------------------------------------------ metrics

// Distinct names of the first items' adapters, comma-joined; what does not fit is left out.
static void join_names(struct sched_item *const *items, int count, char *text, size_t bytes) {
    enum { ITEMS_MAX = 256 };
    const struct adapter *seen[METRICS_ADAPTERS_MAX];
    int seen_count = 0;
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; i < count && i < ITEMS_MAX; i++)
        for (int j = 0; j < items[i]->adapter_count; j++) {
            const struct adapter *adapter = sequence_of(items[i])->request->adapters[j];
            int at = 0;
            while (at < seen_count && seen[at] != adapter) at++;
            size_t length = strlen(adapter->name);
            if (at < seen_count || used + length + 2 > bytes) continue;
            if (seen_count == METRICS_ADAPTERS_MAX) return;
            seen[seen_count++] = adapter;
            if (used) text[used++] = ',';
            memcpy(text + used, adapter->name, length + 1);
            used += length;
        }
}

static void update_residency(struct engine *engine) {
    struct metrics *metrics = engine->metrics;
    struct residency_counts now = residency_counts(engine->residency);
    struct residency_counts *seen = &engine->residency_seen;
    atomic_store(&metrics->adapters_resident, now.resident);
    atomic_fetch_add(&metrics->adapter_loads, now.loads - seen->loads);
    atomic_fetch_add(&metrics->adapter_evictions, now.evictions - seen->evictions);
    atomic_fetch_add(&metrics->adapter_bytes_moved, now.bytes_moved - seen->bytes_moved);
    *seen = now;
    struct host_store_counts host = host_store_counts(engine->host_store);
    engine_learn_copies(engine, &host);
    atomic_store(&metrics->host_images, host.images);
    atomic_store(&metrics->host_bytes, host.bytes_used);
    atomic_store(&metrics->host_reads, host.reads);
    atomic_store(&metrics->host_read_failures, host.read_failures);
    atomic_store(&metrics->host_read_us, (uint64_t)(host.read_s * 1e6));
    atomic_store(&metrics->host_copy_us, (uint64_t)(host.copy_s * 1e6));
}

void engine_update_metrics(struct engine *engine, double step_s) {
    struct metrics *metrics = engine->metrics;
    const struct engine_batch *batch = &engine->batch;
    struct pool_counts counts = pool_counts(engine->pool);
    for (int owner = 0; owner < PAGE_OWNERS; owner++)
        atomic_store(&metrics->pages[owner], counts.of[owner]);
    atomic_store(&metrics->running, engine->running_count);
    atomic_store(&metrics->waiting, engine->waiting_count);
    update_residency(engine);
    bool idle = step_s <= 0;
    atomic_store(&metrics->step_tokens, idle ? 0 : batch->step.token_count);
    atomic_store(&metrics->step_adapters, idle ? 0 : batch->adapters);
    if (batch->adapters > atomic_load(&metrics->step_adapters_max))
        atomic_store(&metrics->step_adapters_max, batch->adapters);
    if (!idle) {
        atomic_fetch_add(&metrics->steps, 1);
        atomic_fetch_add(&metrics->step_us, (uint64_t)(step_s * 1e6));
        atomic_fetch_add(&metrics->step_adapter_bytes, batch->adapter_bytes);
    }
    if (!engine->names_changed) return;
    engine->names_changed = false;
    char running[sizeof metrics->running_adapters], waiting[sizeof metrics->waiting_adapters];
    join_names(engine->running, engine->running_count, running, sizeof running);
    join_names(engine->waiting_list, engine->waiting_count, waiting, sizeof waiting);
    metrics_set_names(metrics, running, waiting);
}
