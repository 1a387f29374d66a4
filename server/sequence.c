// The record of sequence.h: its state, its tokens and its text. It calls no backend and takes no
// pages; the engine does and tells it.
#include "server/sequence.h"

#include "base/memory.h"
#include "base/sha256.h"
#include "base/verify.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

// How far back a detokenizer looks to know how the first new token joins the prompt's text.
enum { PROMPT_TAIL = 8 };

struct sequence *sequence_of(struct sched_item *item) {
    return (struct sequence *)((char *)item - offsetof(struct sequence, item));
}

int sequence_generated(const struct sequence *sequence) {
    return sequence->item.tokens_total - sequence->request->prompt_count;
}

// The last token that may be generated is never computed, so it needs no slot.
static int growth(const struct sequence *sequence) {
    int left = sequence->request->sampling.max_tokens - sequence_generated(sequence) - 1;
    return left > 0 ? left : 0;
}

int sequence_pages_max(const struct request *request) {
    int max_tokens = request->sampling.max_tokens;
    return sched_pages(request->prompt_count + (max_tokens > 1 ? max_tokens - 1 : 0));
}

// Where the prompt has an activated adapter's tokens for the last time.
static int find_invocation(const struct request *request, const struct adapter *adapter) {
    const struct adapter_invocation *invocation = adapter->invocation;
    if (!invocation) return 0;
    for (int at = request->prompt_count - invocation->count; at >= 0; at--)
        if (memcmp(&request->prompt[at], invocation->tokens,
                   (size_t)invocation->count * sizeof *request->prompt) == 0)
            return at;
    return INT32_MAX;
}

// Pages may be shared within one tenant (and its cache_salt), and one list of adapter generations
// with weights and where they begin; what comes before they begin, with the base model.
static void hash_scope(const struct sequence *sequence, int adapters, uint8_t bytes[32]) {
    const struct request *request = sequence->request;
    struct sha256 hash;
    sha256_init(&hash);
    sha256_update(&hash, request->tenant, strlen(request->tenant) + 1);
    const char *salt = request->cache_salt ? request->cache_salt : "";
    sha256_update(&hash, salt, strlen(salt) + 1);
    for (int i = 0; i < adapters; i++) {
        sha256_update(&hash, &sequence->generations[i], sizeof(uint64_t));
        sha256_update(&hash, &request->adapter_weights[i], sizeof(float));
        sha256_update(&hash, &sequence->active_from[i], sizeof(int));
    }
    sha256_bytes(&hash, bytes);
}

static void set_scope(struct sequence *sequence) {
    struct prefix_scope *scope = &sequence->scope;
    int adapters = sequence->request->adapter_count, from = INT32_MAX;
    for (int i = 0; i < adapters; i++)
        if (sequence->active_from[i] < from) from = sequence->active_from[i];
    hash_scope(sequence, adapters, scope->bytes);
    scope->base_pages = from / PAGE_TOKENS;
    if (from > 0) hash_scope(sequence, 0, scope->base);
    memcpy(&sequence->scope_tag, scope->bytes, sizeof sequence->scope_tag);
    memcpy(&sequence->base_tag, scope->base, sizeof sequence->base_tag);
    if (adapters > 0) scope->list = &sequence->adapters[0]->prefixes;
}

static void set_adapter(struct sequence *sequence, int i, struct adapter *adapter) {
    sequence->adapters[i] = adapter;
    sequence->generations[i] = adapter->generation;
}

void sequence_part_twin(struct sequence *sequence, int i) {
    VERIFY_OP(sequence->state, ==, SEQUENCE_WAITING);
    VERIFY_OP(sequence->held_adapters, ==, 0);
    set_adapter(sequence, i, sequence->request->adapters[i]);
    set_scope(sequence);
    sequence->peek_step = 0;
    sequence->item.tokens_hit = 0;
}

static void prime_detokenizer(struct sequence *sequence) {
    int count = sequence->request->prompt_count;
    const char *text;
    size_t bytes;
    for (int i = count > PROMPT_TAIL ? count - PROMPT_TAIL : 0; i < count; i++)
        detokenizer_push(sequence->detokenizer, sequence->tokens[i], &text, &bytes);
}

struct sequence *sequence_create(struct request *request, const struct tokenizer *tokenizer,
                                 uint64_t arrival, uint64_t seed, double now_s) {
    VERIFY(request->sequence == NULL);
    VERIFY_OP(request->prompt_count, >, 0);
    VERIFY_OP(request->adapter_count, <=, REQUEST_ADAPTERS_MAX);
    const struct sampling *sampling = &request->sampling;
    struct sequence *sequence = mem_zalloc(1, sizeof *sequence);
    sequence->request = request;
    sequence->seed = sampling->seeded ? sampling->seed : seed;
    size_t prompt = (size_t)request->prompt_count;
    sequence->tokens = mem_alloc((prompt + (size_t)sampling->max_tokens) * sizeof(int32_t));
    memcpy(sequence->tokens, request->prompt, prompt * sizeof(int32_t));
    sequence->pages_max = sequence_pages_max(request);
    sequence->pages = mem_zalloc((size_t)sequence->pages_max, sizeof *sequence->pages);
    sequence->echoed = 1;
    sequence->draft_rate = DRAFT_RATE_UNKNOWN;
    for (int i = 0; i < request->adapter_count; i++) {
        set_adapter(sequence, i, request->twins[i] ? request->twins[i] : request->adapters[i]);
        sequence->active_from[i] = find_invocation(request, request->adapters[i]);
    }
    set_scope(sequence);
    sequence->item = (struct sched_item){.tokens_total = request->prompt_count,
                                         .rows_all = request->echo_logprobs &&
                                                     request->prompt_count > 1,
                                         .priority = request->priority,
                                         .arrival = arrival,
                                         .adapters = sequence->adapters,
                                         .adapter_count = request->adapter_count};
    sequence->item.tokens_left = growth(sequence);
    sequence->submitted_s = now_s;
    if (tokenizer) {
        sequence->detokenizer = detokenizer_create(tokenizer, true);
        prime_detokenizer(sequence);
    }
    stop_match_init(&sequence->stop, request->stop, request->stop_count);
    request->sequence = sequence;
    sequence_assert_state(sequence);
    return sequence;
}

void sequence_destroy(struct sequence *sequence) {
    VERIFY(sequence->state == SEQUENCE_ENDED ||
           (sequence->state == SEQUENCE_WAITING && !sequence->started));
    VERIFY(sequence->request->sequence == sequence);
    VERIFY(!sequence->swap);
    sequence->request->sequence = NULL;
    if (sequence->detokenizer) detokenizer_destroy(sequence->detokenizer);
    stop_match_deinit(&sequence->stop);
    free(sequence->held);
    free(sequence->tokens);
    free(sequence->pages);
    free(sequence);
}

void sequence_assert_state(const struct sequence *sequence) {
    const struct sched_item *item = &sequence->item;
    VERIFY_OP(item->tokens_total, >=, sequence->request->prompt_count);
    VERIFY_OP(sequence->page_count, <=, sequence->pages_max);
    switch (sequence->state) {
    case SEQUENCE_WAITING:
        VERIFY_OP(sequence->page_count, ==, 0);
        VERIFY_OP(item->tokens_cached, ==, 0);
        VERIFY_OP(sequence->shared_count, ==, 0);
        return;
    case SEQUENCE_RUNNING:
        VERIFY_OP(item->tokens_cached, <=, item->tokens_total);
        VERIFY(sequence->swap || sequence->page_count >= sched_pages(item->tokens_cached));
        VERIFY_OP(sequence->shared_count * PAGE_TOKENS, <=, item->tokens_cached);
        VERIFY_OP(item->tokens_hit, ==, 0);
        VERIFY_OP(sequence->held_adapters, ==, 0);
        for (int i = 0; i < item->adapter_count; i++) {
            VERIFY_OP(item->adapters[i]->running, >, 0);
            VERIFY_OP(item->adapters[i]->generation, ==, sequence->generations[i]);
        }
        return;
    case SEQUENCE_ENDED:
        VERIFY_OP(sequence->page_count, ==, 0);
        VERIFY_OP(sequence->held_adapters, ==, 0);
        return;
    }
    VERIFY(!"a sequence's state");
}

void sequence_start(struct sequence *sequence) {
    VERIFY_OP(sequence->state, ==, SEQUENCE_WAITING);
    sequence->state = SEQUENCE_RUNNING;
    sequence->started = true;
    sequence_assert_state(sequence);
}

void sequence_preempt(struct sequence *sequence) {
    VERIFY_OP(sequence->state, ==, SEQUENCE_RUNNING);
    sequence->state = SEQUENCE_WAITING;
    sequence->item.tokens_cached = 0;
    sequence->item.planned = sequence->item.drafts = 0;
    sequence->item.passed = 0;
    sequence->peek_step = 0;
    sequence->spared = true;
    sequence_assert_state(sequence);
}

void sequence_end(struct sequence *sequence) {
    VERIFY_OP(sequence->state, !=, SEQUENCE_ENDED);
    sequence->state = SEQUENCE_ENDED;
    sequence_assert_state(sequence);
}

void sequence_cached(struct sequence *sequence, int tokens) {
    struct sched_item *item = &sequence->item;
    VERIFY_OP(sequence->state, ==, SEQUENCE_RUNNING);
    VERIFY_OP(item->tokens_cached + tokens, <=, item->tokens_total);
    item->tokens_cached += tokens;
    VERIFY_OP(sequence->page_count, >=, sched_pages(item->tokens_cached));
}

void sequence_append(struct sequence *sequence, int32_t token) {
    struct sched_item *item = &sequence->item;
    VERIFY_OP(item->tokens_cached, ==, item->tokens_total);
    VERIFY_OP(sequence_generated(sequence), <, sequence->request->sampling.max_tokens);
    sequence->tokens[item->tokens_total++] = token;
    item->tokens_left = growth(sequence);
    sequence->spared = false;
}

// ------------------------------------------------------------------ text

// Appends to what is held; true when a stop string ended. Then what is held ends with it, or
// before it, as the request wants.
static bool hold(struct sequence *sequence, const char *text, size_t bytes, bool matches) {
    if (sequence->held_bytes + bytes > sequence->held_capacity) {
        sequence->held_capacity = 2 * (sequence->held_bytes + bytes) + 64;
        sequence->held = mem_realloc(sequence->held, sequence->held_capacity);
    }
    for (size_t i = 0; i < bytes; i++) {
        sequence->held[sequence->held_bytes++] = text[i];
        int stopped = matches ? stop_match_push(&sequence->stop, text[i]) : 0;
        if (stopped == 0) continue;
        VERIFY_OP(stopped, <=, sequence->held_bytes);
        if (!sequence->request->sampling.include_stop) sequence->held_bytes -= (size_t)stopped;
        return true;
    }
    return false;
}

bool sequence_take_text(struct sequence *sequence, bool silent, bool last, char **text,
                        size_t *bytes) {
    *text = NULL;
    *bytes = 0;
    if (!sequence->detokenizer) return false;
    const char *piece = NULL;
    size_t piece_bytes = 0;
    // As in vLLM, stop strings are looked for in what follows the min_tokens first tokens.
    bool matches = sequence_generated(sequence) > sequence->request->sampling.min_tokens;
    bool stopped = false;
    if (!silent) {
        int32_t token = sequence->tokens[sequence->item.tokens_total - 1];
        detokenizer_push(sequence->detokenizer, token, &piece, &piece_bytes);
        stopped = hold(sequence, piece, piece_bytes, matches);
    }
    if (last && !stopped) {
        detokenizer_finish(sequence->detokenizer, &piece, &piece_bytes);
        stopped = hold(sequence, piece, piece_bytes, matches);
    }
    size_t kept = stopped || last ? 0 : (size_t)stop_match_held(&sequence->stop);
    VERIFY_OP(kept, <=, sequence->held_bytes);
    *bytes = sequence->held_bytes - kept;
    if (*bytes == 0) return stopped;
    *text = mem_strndup(sequence->held, *bytes);
    memmove(sequence->held, sequence->held + *bytes, kept);
    sequence->held_bytes = kept;
    return stopped;
}
