// One accepted request inside the engine: its tokens, KV pages, and the text on its way out.
// Created by engine_submit on the API thread; from the submission queue on, the engine thread's.
//
//   WAITING --sequence_start--> RUNNING --sequence_preempt--> WAITING
//      |                           |
//      +-------sequence_end--------+--> ENDED --sequence_destroy
//
//   WAITING: no pages, nothing cached, no adapter held (but by the one holder). Its tokens (after a preemption: prompt and
//            all that was generated) and its text state stay, so that it goes on as if it had
//            never stopped: what it draws depends on its seed and its positions alone.
//   RUNNING: holds its adapters (residency_acquire) and pages for its cached tokens at least.
//   ENDED:   holds nothing of the pool; its terminal event is about to be pushed.
//
// Invariant: between steps tokens_cached < tokens_total while WAITING or RUNNING: the last token is
// always yet to be computed.
#ifndef LORAD_SERVER_SEQUENCE_H
#define LORAD_SERVER_SEQUENCE_H

#include "pager/prefix.h"
#include "server/request.h"
#include "server/scheduler.h"
#include "server/stop_match.h"
#include "server/text/tokenizer.h"

#define DRAFT_RATE_UNKNOWN 0.5f
enum sequence_state { SEQUENCE_WAITING, SEQUENCE_RUNNING, SEQUENCE_ENDED };

struct sequence {
    struct sched_item item; // first, so that the scheduler's items are sequences
    enum sequence_state state;
    struct request *request;
    struct adapter *adapters[REQUEST_ADAPTERS_MAX]; // whose pages serve: the request's, or twins
    uint64_t generations[REQUEST_ADAPTERS_MAX];     // theirs, as they were when it came
    int active_from[REQUEST_ADAPTERS_MAX]; // the first position that each changes
    uint64_t seed;
    int32_t *tokens; // [prompt_count + max_tokens], the first item.tokens_total are there, and
                     // behind them item.drafts
    int32_t *pages;  // [pages_max], the first page_count are its own
    int page_count, pages_max;
    int shared_count; // of them, the first that are nodes of the prefix cache
    struct prefix_scope scope; // with whom it may share
    uint64_t scope_tag, base_tag; // parts of it, for page tags
    int tenant_place;          // in the metrics
    int hit_tokens;            // of its prompt, found in the prefix cache when it first started
    uint64_t peek_step;        // when item.tokens_hit was last looked up
    void *swap;                // its KV in host memory (engine_swap.c), or NULL
    int swap_tokens;           // of how many tokens
    uint8_t held_adapters;     // WAITING: its adapters that it keeps, by bits (engine_adapters.c)
    float draft_rate; // share of its drafts that were right, smoothed
    int echoed; // prompt tokens that have had their event; the first has none

    // Text: detokenized, not yet sent.
    struct detokenizer *detokenizer; // NULL without a tokenizer
    struct stop_match stop;
    char *held;
    size_t held_bytes, held_capacity;

    double submitted_s, token_s; // when it came; when its last token was sampled
    bool started;                // has been admitted once
    bool spared;                 // forced preemptions skip it until it has one more token

    // In the step being made: its first token, and its rows of logits.
    int token_first, row_first, row_count;
};

// Copies the prompt; `seed` is used when the request brings none. tokenizer may be NULL.
struct sequence *sequence_create(struct request *request, const struct tokenizer *tokenizer,
                                 uint64_t arrival, uint64_t seed, double now_s);
void sequence_destroy(struct sequence *sequence); // ENDED, or WAITING and never started

struct sequence *sequence_of(struct sched_item *item);
int sequence_generated(const struct sequence *sequence);
// Pages that `request` fills when it is longest.
int sequence_pages_max(const struct request *request);

// From now on the request's own adapter serves in place of its twin `i`. WAITING, nothing held.
void sequence_part_twin(struct sequence *sequence, int i);

// Transitions of the record alone: the engine moves pages and adapters.
void sequence_start(struct sequence *sequence);
void sequence_preempt(struct sequence *sequence); // its pages must be given back before
void sequence_end(struct sequence *sequence);     // likewise

// `tokens` more of its tokens are in the cache.
void sequence_cached(struct sequence *sequence, int tokens);
// Appends a sampled token.
void sequence_append(struct sequence *sequence, int32_t token);
// Passes the last token's text on (none when `silent`) and says whether a stop string ended there.
// `last`: nothing follows, so that nothing is held back. *text is malloc'd, or NULL when no text
// can be sent yet.
bool sequence_take_text(struct sequence *sequence, bool silent, bool last, char **text,
                        size_t *bytes);

void sequence_assert_state(const struct sequence *sequence);

#endif
