// One simulated run: the pool and the adapters, arrivals, the clock, ends of requests, and the
// accounting that is asserted after every step. sim_lorad.c and sim_slora.c decide what a step
// holds; this file never does.
//
// The pager's bookkeeping is the real one; copies are counted and cost simulated time, and adapters
// have no image.
#include "sim/sim_internal.h"

#include "base/memory.h"
#include "base/verify.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { FULL_ASSERT_EVERY = 512 };
static const double ABORT_AHEAD_S = 0.5; // S-LoRA's guess of what a first token still takes
static const double ACTIVATION_BYTES = 2e9, MEMORY_USED = 0.9;

// ------------------------------------------------------------------ waiting and running

static void want(struct sim *sim, struct sim_sequence *sequence, int change) {
    if (sequence->item.adapter_count > 0)
        residency_want(sim->residency, sequence->adapter[0], change);
}

static void list_remove(struct sched_item **list, int *count, int at) {
    VERIFY(at >= 0 && at < *count);
    (*count)--;
    memmove(&list[at], &list[at + 1], (size_t)(*count - at) * sizeof *list);
}

static void waiting_insert(struct sim *sim, struct sim_sequence *sequence) {
    int at = sim->waiting_count++;
    for (; at > 0 && sched_before(&sequence->item, sim->waiting[at - 1]); at--)
        sim->waiting[at] = sim->waiting[at - 1];
    sim->waiting[at] = &sequence->item;
    sequence->state = SIM_WAITING;
    want(sim, sequence, 1);
}

static void waiting_remove(struct sim *sim, int at) {
    want(sim, sim_sequence_of(sim->waiting[at]), -1);
    list_remove(sim->waiting, &sim->waiting_count, at);
}

bool sim_load(struct sim *sim, struct sim_adapter *adapter, enum eviction_tier tier_max) {
    if (atomic_load(&adapter->adapter.resident)) return true;
    if (residency_place(sim->residency, &adapter->adapter, tier_max) != STATUS_OK) return false;
    residency_arrived(sim->residency, &adapter->adapter, sim->now_s); // ready_s says when, truly
    double begin_s = fmax(sim->now_s, sim->copy_free_s);
    adapter->ready_s =
        begin_s + sim_load_s(sim->options->model, sim->options->device, &sim->options->engine,
                             (double)adapter->adapter.image_bytes);
    sim->copy_free_s = adapter->ready_s;
    return true;
}

bool sim_acquire(struct sim *sim, struct sim_adapter *adapter) {
    if (!sim_load(sim, adapter, TIER_PINNED)) return false;
    residency_acquire(sim->residency, &adapter->adapter, sim->now_s);
    return true;
}

void sim_drop_idle(struct sim *sim) {
    (void)eviction_reclaim(sim->eviction, sim->page_count, TIER_PINNED);
}

bool sim_take_pages(struct sim *sim, struct sim_sequence *sequence, int tokens) {
    int wanted = (tokens + sim->page_tokens - 1) / sim->page_tokens;
    int missing = wanted - sequence->page_count;
    if (missing <= 0) return true;
    VERIFY_OP(wanted, <=, sequence->pages_max);
    if (!eviction_reclaim(sim->eviction, missing, TIER_PINNED)) return false;
    enum status status =
        pool_take(sim->pool, PAGE_KV, missing, &sequence->pages[sequence->page_count]);
    VERIFY_OP(status, ==, STATUS_OK);
    sequence->page_count = wanted;
    return true;
}

void sim_start(struct sim *sim, int waiting_index) {
    struct sim_sequence *sequence = sim_sequence_of(sim->waiting[waiting_index]);
    VERIFY_OP(sequence->state, ==, SIM_WAITING);
    VERIFY_OP(sim->running_count, <, sim->options->sequences_max);
    waiting_remove(sim, waiting_index);
    sim->running[sim->running_count++] = &sequence->item;
    sequence->state = SIM_RUNNING;
    if (sequence->pages) return;
    int tokens = sequence->request->prompt_tokens + sequence->request->output_tokens - 1;
    sequence->pages_max = (tokens + sim->page_tokens - 1) / sim->page_tokens;
    sequence->pages = mem_zalloc((size_t)sequence->pages_max, sizeof *sequence->pages);
}

static void leave_pool(struct sim *sim, struct sim_sequence *sequence, int running_index) {
    VERIFY_OP(sequence->state, ==, SIM_RUNNING);
    list_remove(sim->running, &sim->running_count, running_index);
    pool_give(sim->pool, PAGE_KV, sequence->pages, sequence->page_count);
    sequence->page_count = 0;
    if (sequence->item.adapter_count > 0)
        residency_release(sim->residency, sequence->adapter[0], sim->now_s);
}

void sim_preempt(struct sim *sim, int running_index) {
    struct sim_sequence *sequence = sim_sequence_of(sim->running[running_index]);
    leave_pool(sim, sequence, running_index);
    sequence->item.tokens_cached = sequence->item.planned = sequence->item.passed = 0;
    waiting_insert(sim, sequence);
    sim->result->preemptions++;
}

// ------------------------------------------------------------------ time and tokens

void sim_step_add(struct sim *sim, struct sim_step *step, struct sim_sequence *sequence,
                  int tokens) {
    const struct sched_item *item = &sequence->item;
    double cached = item->tokens_cached, computed = tokens;
    VERIFY_OP(tokens, >, 0);
    step->tokens += computed;
    step->rows += item->tokens_cached + tokens == item->tokens_total;
    step->kv_tokens += cached + computed;
    step->attention_pairs += computed * cached + computed * (computed + 1) / 2;
    if (item->adapter_count == 0) return;
    struct sim_adapter *adapter = sim_adapter_of(sequence);
    step->lora_token_rank += computed * adapter->rank;
    if (!sim->options->engine.lora_per_token && adapter->read_step == sim->step + 1) return;
    adapter->read_step = sim->step + 1;
    step->lora_read_rank += adapter->rank;
}

static void sample(struct sim *sim) {
    if (sim->now_s < sim->next_sample_s) return;
    struct sim_result *result = sim->result;
    sim->next_sample_s = sim->now_s + sim->options->trace.duration_s / (SIM_SAMPLES_MAX / 2);
    if (result->sample_count == SIM_SAMPLES_MAX) return;
    struct pool_counts counts = pool_counts(sim->pool);
    result->samples[result->sample_count++] =
        (struct sim_sample){.time_s = sim->now_s,
                            .free = counts.of[PAGE_FREE],
                            .kv = counts.of[PAGE_KV],
                            .adapter = counts.of[PAGE_ADAPTER],
                            .cached = counts.of[PAGE_CACHED],
                            .running = sim->running_count,
                            .waiting = sim->waiting_count};
}

void sim_step_pass(struct sim *sim, struct sim_step *step, double ready_s) {
    struct sim_result *result = sim->result;
    struct sim_cost cost =
        sim_cost_of(sim->options->model, sim->options->device, &sim->options->engine, step);
    double wait_s = fmax(0, ready_s - sim->now_s);
    VERIFY(cost.total_s > 0);
    sim->now_s += wait_s + cost.total_s;
    sim->step++;
    result->busy_s += wait_s + cost.total_s;
    result->waiting_copy_s += wait_s;
    result->linear_s += cost.linear_s;
    result->attention_s += cost.attention_s;
    result->lora_s += cost.lora_s;
    result->computed_tokens += (uint64_t)step->tokens;
    sim->running_sum += sim->running_count;
    sample(sim);
}

static void end(struct sim *sim, struct sim_sequence *sequence, enum sim_state state) {
    VERIFY(sequence->state == SIM_RUNNING || sequence->state == SIM_WAITING);
    VERIFY_OP(sequence->page_count, ==, 0);
    VERIFY(!sequence->holds);
    sequence->state = state;
    sequence->end_s = sim->now_s;
    free(sequence->pages);
    sequence->pages = NULL;
    if (state == SIM_ABORTED) {
        sim->result->aborted++;
        return;
    }
    sim->result->finished++;
    sim->result->prompt_tokens += (uint64_t)sequence->request->prompt_tokens;
    sim->result->output_tokens += (uint64_t)sequence->generated;
}

void sim_advance(struct sim *sim, struct sim_sequence *sequence, int tokens) {
    struct sched_item *item = &sequence->item;
    VERIFY_OP(item->tokens_cached + tokens, <=, item->tokens_total);
    item->tokens_cached += tokens;
    if (item->tokens_cached < item->tokens_total) return;
    if (sequence->generated++ == 0) sequence->first_token_s = sim->now_s;
    item->tokens_total++;
    item->tokens_left--;
    if (sequence->generated < sequence->request->output_tokens) return;
    int at = 0;
    while (sim->running[at] != item) at++;
    leave_pool(sim, sequence, at);
    end(sim, sequence, SIM_FINISHED);
}

static void arrive(struct sim *sim) {
    while (sim->next_arrival < sim->trace.count &&
           sim->trace.requests[sim->next_arrival].arrival_s <= sim->now_s) {
        struct sim_sequence *sequence = &sim->sequences[sim->next_arrival++];
        if (sequence->item.adapter_count > 0) {
            sim->asked++;
            sim->hits += atomic_load(&sequence->adapter[0]->resident);
        }
        waiting_insert(sim, sequence);
    }
}

// Who cannot have a first token in time any more. Preempted ones had theirs.
static void abort_late(struct sim *sim) {
    if (!sim->options->early_abort) return;
    for (int i = 0; i < sim->waiting_count;) {
        struct sim_sequence *sequence = sim_sequence_of(sim->waiting[i]);
        double waited_s = sim->now_s - sequence->request->arrival_s;
        if (sequence->generated > 0 || waited_s + ABORT_AHEAD_S < sim->options->slo_s) {
            i++;
            continue;
        }
        waiting_remove(sim, i);
        if (sequence->holds) residency_release(sim->residency, sequence->adapter[0], sim->now_s);
        sequence->holds = false;
        end(sim, sequence, SIM_ABORTED);
    }
}

static void assert_accounts(const struct sim *sim) {
    struct pool_counts counts = pool_counts(sim->pool);
    int held = 0, ended = sim->result->finished + sim->result->aborted;
    for (int i = 0; i < sim->running_count; i++) {
        const struct sim_sequence *sequence = sim_sequence_of(sim->running[i]);
        VERIFY_OP(sequence->state, ==, SIM_RUNNING);
        VERIFY_OP(sequence->item.tokens_cached, <, sequence->item.tokens_total);
        held += sequence->page_count;
    }
    VERIFY_OP(held, ==, counts.of[PAGE_KV]);
    VERIFY_OP(counts.of[PAGE_FREE] + counts.of[PAGE_KV] + counts.of[PAGE_ADAPTER] +
                  counts.of[PAGE_CACHED],
              ==, counts.total);
    VERIFY_OP(ended + sim->running_count + sim->waiting_count, ==, sim->next_arrival);
    if (sim->options->check || sim->step % FULL_ASSERT_EVERY == 0) pool_assert(sim->pool);
}

// ------------------------------------------------------------------ creation and results

static struct lora_geometry geometry_of(const struct sim *sim) {
    const struct sim_model *model = sim->options->model;
    return (struct lora_geometry){.layers = model->layers,
                                  .dtype = DTYPE_BF16,
                                  .rank_max = LORA_RANK_MAX,
                                  .page_elems = (size_t)2 * model->kv_heads * model->head_size *
                                                sim->page_tokens,
                                  .pool_pages = sim->page_count};
}

static void create_adapters(struct sim *sim, const struct lora_geometry *geometry) {
    const struct sim_options *options = sim->options;
    size_t count = (size_t)options->trace.adapters;
    sim->adapters = mem_zalloc(count + 1, sizeof *sim->adapters);
    for (size_t i = 0; i < count; i++) {
        struct sim_adapter *sim_adapter = &sim->adapters[i];
        struct adapter *adapter = &sim_adapter->adapter;
        sim_adapter->rank = options->ranks[i % (size_t)options->rank_count];
        adapter->generation = i + 1;
        adapter->prefixes = -1;
        adapter->layer_elems =
            (size_t)(sim_adapter->rank * sim_lora_dims(options->model, options->modules));
        adapter->page_count =
            (int)((adapter->layer_elems + geometry->page_elems - 1) / geometry->page_elems);
        adapter->image_bytes =
            (size_t)sim_adapter_bytes(options->model, options->modules, sim_adapter->rank);
        adapter->pages = mem_zalloc((size_t)adapter->page_count, sizeof *adapter->pages);
        atomic_store(&adapter->refs, 1);
    }
}

static void create_sequences(struct sim *sim) {
    size_t count = (size_t)sim->trace.count;
    sim->sequences = mem_zalloc(count + 1, sizeof *sim->sequences);
    for (size_t i = 0; i < count; i++) {
        struct sim_sequence *sequence = &sim->sequences[i];
        const struct trace_request *request = &sim->trace.requests[i];
        sequence->request = request;
        if (request->adapter >= 0) sequence->adapter[0] = &sim->adapters[request->adapter].adapter;
        sequence->item = (struct sched_item){.tokens_total = request->prompt_tokens,
                                             .tokens_left = request->output_tokens - 1,
                                             .arrival = i,
                                             .adapters = sequence->adapter,
                                             .adapter_count = request->adapter >= 0};
    }
}

static enum status create(struct sim *sim, struct error *err) {
    const struct sim_options *options = sim->options;
    double kv_bytes = sim_kv_bytes(options->model);
    double tokens = options->pool_tokens;
    if (tokens == 0)
        tokens = floor((options->device->memory_bytes * MEMORY_USED -
                        sim_weight_bytes(options->model) - ACTIVATION_BYTES) /
                       kv_bytes);
    sim->page_tokens = options->policy == SIM_LORAD ? PAGE_TOKENS : 1;
    if (tokens < sim->page_tokens)
        return error_set(err, STATUS_INVALID, "%s does not fit %s: no memory is left for a pool",
                         options->model->name, options->device->name);
    sim->page_count = (int)(tokens / sim->page_tokens);
    struct lora_geometry geometry = geometry_of(sim);
    sim->trace = trace_create(&options->trace);
    sim->pool = pool_create(sim->page_count);
    sim->eviction = eviction_create(sim->pool, options->eviction, sim->page_count);
    sim->residency = residency_create(sim->pool, sim->eviction, NULL);
    sim->scratch = sched_scratch_create(options->sequences_max);
    create_adapters(sim, &geometry);
    create_sequences(sim);
    size_t count = (size_t)sim->trace.count + 1;
    sim->waiting = mem_zalloc(count, sizeof *sim->waiting);
    sim->eligible = mem_zalloc(count, sizeof *sim->eligible);
    sim->running = mem_zalloc((size_t)options->sequences_max, sizeof *sim->running);
    for (int i = 0; i < sim->trace.count; i++) {
        const struct trace_request *request = &sim->trace.requests[i];
        int pages = (request->prompt_tokens + request->output_tokens) / sim->page_tokens + 2;
        if (request->adapter >= 0) pages += sim->adapters[request->adapter].adapter.page_count;
        if (pages > sim->page_count)
            return error_set(err, STATUS_INVALID,
                             "request %d needs %d pages, more than the pool's %d", i, pages,
                             sim->page_count);
    }
    return STATUS_OK;
}

static void destroy(struct sim *sim) {
    residency_destroy(sim->residency);
    eviction_destroy(sim->eviction);
    pool_destroy(sim->pool);
    sched_scratch_destroy(sim->scratch);
    for (int i = 0; sim->adapters && i < sim->options->trace.adapters; i++) {
        VERIFY_OP(atomic_load(&sim->adapters[i].adapter.refs), ==, 1);
        free(sim->adapters[i].adapter.pages);
    }
    for (int i = 0; sim->sequences && i < sim->trace.count; i++) free(sim->sequences[i].pages);
    free(sim->adapters);
    free(sim->sequences);
    free(sim->waiting);
    free(sim->running);
    free(sim->eligible);
    trace_destroy(&sim->trace);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// FNV-1a over the bits of a time.
static void digest_add(uint64_t *digest, double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    for (int i = 0; i < 8; i++) *digest = (*digest ^ (bits >> (8 * i) & 255)) * 1099511628211u;
}

// Nearest rank.
static double percentile(const double *sorted, int count, double fraction) {
    if (count == 0) return 0;
    int rank = (int)ceil(fraction * count);
    return sorted[rank > 0 ? rank - 1 : 0];
}

static void summarize(struct sim *sim) {
    struct sim_result *result = sim->result;
    double *ttft = mem_zalloc((size_t)sim->trace.count + 1, sizeof *ttft);
    int count = 0, attained = 0;
    result->digest = 14695981039346656037u;
    for (int i = 0; i < sim->trace.count; i++) {
        const struct sim_sequence *sequence = &sim->sequences[i];
        VERIFY(sequence->state == SIM_FINISHED || sequence->state == SIM_ABORTED);
        digest_add(&result->digest, sequence->first_token_s);
        digest_add(&result->digest, sequence->end_s);
        if (sequence->state == SIM_ABORTED) continue;
        VERIFY_OP(sequence->generated, ==, sequence->request->output_tokens);
        double latency_s = sequence->end_s - sequence->request->arrival_s;
        ttft[count] = sequence->first_token_s - sequence->request->arrival_s;
        attained += ttft[count] <= sim->options->slo_s;
        result->ttft_mean_s += ttft[count++];
        result->latency_mean_s += latency_s;
        result->per_token_mean_s += latency_s / sequence->generated;
    }
    qsort(ttft, (size_t)count, sizeof *ttft, by_value);
    double finished = count > 0 ? count : 1;
    result->ttft_mean_s /= finished;
    result->latency_mean_s /= finished;
    result->per_token_mean_s /= finished;
    result->ttft_p50_s = percentile(ttft, count, 0.5);
    result->ttft_p90_s = percentile(ttft, count, 0.9);
    result->ttft_p99_s = percentile(ttft, count, 0.99);
    free(ttft);
    struct residency_counts counts = residency_counts(sim->residency);
    result->requests = sim->trace.count;
    result->total_s = sim->now_s;
    result->requests_per_s = result->finished / sim->now_s;
    result->tokens_per_s = (double)result->output_tokens / sim->now_s;
    result->slo_attained = (double)attained / sim->trace.count;
    result->hit_rate = sim->asked ? (double)sim->hits / (double)sim->asked : 0;
    result->loads = counts.loads;
    result->evictions = counts.evictions;
    result->bytes_moved = counts.bytes_moved;
    result->steps = sim->step;
    result->running_mean = sim->step ? sim->running_sum / (double)sim->step : 0;
    result->page_count = sim->page_count;
    result->page_tokens = sim->page_tokens;
}

enum status sim_run(const struct sim_options *options, struct sim_result *result,
                    struct error *err) {
    struct sim sim = {.options = options, .result = result};
    *result = (struct sim_result){0};
    if (options->trace.rate * options->trace.duration_s < 1)
        return error_set(err, STATUS_INVALID, "rate x duration must give a request");
    enum status status = create(&sim, err);
    while (status == STATUS_OK) {
        arrive(&sim);
        abort_late(&sim);
        if (sim.waiting_count + sim.running_count > 0) {
            if (options->policy == SIM_LORAD)
                sim_lorad_step(&sim);
            else
                sim_slora_step(&sim);
            assert_accounts(&sim);
        } else if (sim.next_arrival < sim.trace.count) {
            sim.now_s = sim.trace.requests[sim.next_arrival].arrival_s;
        } else {
            break;
        }
    }
    if (status == STATUS_OK) {
        pool_assert(sim.pool);
        VERIFY_OP(pool_counts(sim.pool).of[PAGE_KV] + pool_counts(sim.pool).of[PAGE_ADAPTER], ==,
                  0);
        summarize(&sim);
    }
    destroy(&sim);
    return status;
}
