// What a preempted sequence keeps. Its KV is copied to host memory and back when that takes less
// time than computing it again, by the rates measured so far; host memory for it comes out of
// --host-bytes, and where there is none, it is computed again. Engine thread only.
//
//   RUNNING --engine_swap_out (preempted)--> swapped, WAITING --engine_swap_plan (admitted)-->
//   RUNNING, its pages to be filled --engine_swap_in (pages found)--> RUNNING
//   swapped, WAITING --engine_swap_drop (ended, or the prefix cache has more)--> nothing kept
#include "server/engine_internal.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdlib.h>

static const double COPY_GUESS_BYTES_PER_S = 2e9, COMPUTE_GUESS_S = 1e-3; // until measured

static void smooth(double *known, double value) {
    *known = *known > 0 ? *known + (value - *known) / 8 : value;
}

// ------------------------------------------------------------------ rates

// What the last step tells: one in which everybody decoded, what a decode takes; one whose tokens were
// mostly of prompts, what one of those does.
void engine_learn_step(struct engine *engine, double step_s) {
    const struct step *step = &engine->batch.step;
    int tokens = step->token_count, drafts = engine->batch.drafts;
    if (tokens - drafts == step->span_count) {
        engine->rates.step_s = step_s;
        smooth(&engine->rates.decode_s, step_s / step->span_count);
    }
    if (tokens < 32 || tokens < 4 * step->logit_count) return;
    smooth(&engine->rates.token_s, step_s / tokens);
    if (engine->prefix) prefix_set_cost(engine->prefix, engine->rates.token_s * PAGE_TOKENS);
}

void engine_learn_copies(struct engine *engine, const struct host_store_counts *counts) {
    if (counts->bytes_read == 0 || counts->bytes_copied == 0) return;
    double page_bytes = (double)engine->geometry.page_elems * engine->geometry.layers *
                        (double)dtype_bytes(engine->geometry.dtype);
    residency_set_cost(engine->residency,
                       page_bytes * (counts->read_s / (double)counts->bytes_read +
                                     counts->copy_s / (double)counts->bytes_copied));
}

// ------------------------------------------------------------------ out and in

static size_t layer_bytes(const struct engine *engine, int tokens) {
    return (size_t)sched_pages(tokens) * engine->geometry.page_elems *
           dtype_bytes(engine->geometry.dtype);
}

static size_t swap_bytes(const struct engine *engine, int tokens) {
    return layer_bytes(engine, tokens) * (size_t)engine->geometry.layers;
}

static bool pays(const struct engine *engine, int tokens) {
    if (engine->options.preemption != PREEMPTION_AUTO)
        return engine->options.preemption == PREEMPTION_SWAP;
    double rate = engine->rates.swap_bytes_per_s, token_s = engine->rates.token_s;
    if (rate <= 0) rate = COPY_GUESS_BYTES_PER_S;
    if (token_s <= 0) token_s = COMPUTE_GUESS_S;
    return 2 * (double)swap_bytes(engine, tokens) / rate < tokens * token_s;
}

static void move(struct engine *engine, struct sequence *sequence, bool to_host) {
    int tokens = sequence->swap_tokens;
    size_t bytes = layer_bytes(engine, tokens);
    double begin_s = engine_now_s();
    for (int layer = 0; layer < engine->geometry.layers; layer++)
        engine->ops->pool_copy(engine->backend, layer, sequence->pages,
                               (char *)sequence->swap + (size_t)layer * bytes,
                               bytes / dtype_bytes(engine->geometry.dtype), to_host);
    engine->ops->synchronize(engine->backend);
    double seconds = engine_now_s() - begin_s;
    if (seconds > 0)
        smooth(&engine->rates.swap_bytes_per_s, (double)swap_bytes(engine, tokens) / seconds);
    atomic_fetch_add(&engine->metrics->swapped_bytes, swap_bytes(engine, tokens));
}

void engine_swap_out(struct engine *engine, struct sequence *sequence) {
    int tokens = sequence->item.tokens_cached;
    if (sequence->swap || tokens == 0 || !pays(engine, tokens)) return; // or still there from before
    if (!host_store_reserve(engine->host_store, swap_bytes(engine, tokens))) return;
    sequence->swap = mem_alloc_aligned(swap_bytes(engine, tokens));
    sequence->swap_tokens = tokens;
    move(engine, sequence, true);
    atomic_fetch_add(&engine->metrics->swaps, 1);
}

void engine_swap_drop(struct engine *engine, struct sequence *sequence) {
    if (!sequence->swap) return;
    host_store_release(engine->host_store, swap_bytes(engine, sequence->swap_tokens));
    free(sequence->swap);
    sequence->swap = NULL;
    sequence->swap_tokens = 0;
}

// The sequence has pages for its first swap_tokens tokens.
void engine_swap_in(struct engine *engine, struct sequence *sequence) {
    VERIFY_OP(sequence->page_count, >=, sched_pages(sequence->swap_tokens));
    VERIFY_OP(sequence->item.tokens_cached, ==, sequence->swap_tokens);
    move(engine, sequence, false);
    engine_swap_drop(engine, sequence);
}
