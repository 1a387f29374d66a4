// Drafts: guesses of a sequence's next tokens, taken from where its own text repeats itself, and
// computed in one step with the token before them ("prompt lookup decoding": Saxena 2023; verified
// as in Leviathan et al., 2211.17192). Each row of logits is sampled as it would have been alone, and
// drafts stand only as far as the samples are the same tokens, so the output does not change, with
// any sampling. Adapters do not matter to it: no second model drafts. Engine thread only.
//
// A right guess saves its sequence a step; a wrong one costs a token's computation. Both are measured
// (rates.decode_s, rates.token_s), and so is how often a sequence's guesses are right: where steps are
// bound by reading weights, guesses are nearly free; in a full batch only a text that repeats itself
// word for word gets them.
#include "server/engine_internal.h"

#include "base/verify.h"

#include <string.h>

enum { DRAFTS_MAX = 8, NGRAM_MAX = 3, NGRAM_MIN = 2 };
static const float RATE_WEIGHT = 0.25f, FORGET_WEIGHT = 1.0f / 64;

// Where the last `n` tokens stood before, as late as possible: the place behind them; 0: nowhere.
static int find_ngram(const int32_t *tokens, int count, int n) {
    const int32_t *last = tokens + count - n;
    for (int at = count - n - 1; at >= 0; at--)
        if (tokens[at] == last[0] && memcmp(&tokens[at], last, (size_t)n * sizeof *last) == 0)
            return at + n;
    return 0;
}

static int lookup(struct sequence *sequence, int most) {
    int count = sequence->item.tokens_total, from = 0;
    for (int n = NGRAM_MAX; n >= NGRAM_MIN && from == 0; n--)
        if (count > n) from = find_ngram(sequence->tokens, count, n);
    if (from == 0) return 0;
    // What follows may run into the end of the text: then it repeats.
    for (int i = 0; i < most; i++) sequence->tokens[count + i] = sequence->tokens[from + i];
    return most;
}

static bool pays(const struct engine *engine, const struct sequence *sequence) {
    if (engine->options.speculation == SPECULATION_ALWAYS) return true;
    double token_s = engine->rates.token_s, decode_s = engine->rates.decode_s;
    return token_s <= 0 || decode_s <= 0 || sequence->draft_rate * decode_s > token_s;
}

void engine_draft(struct engine *engine) {
    for (int i = 0; i < engine->running_count; i++) {
        struct sequence *sequence = sequence_of(engine->running[i]);
        struct sched_item *item = &sequence->item;
        item->drafts = 0;
        if (engine->options.speculation == SPECULATION_OFF || item->rows_all ||
            item->tokens_total - item->tokens_cached != 1)
            continue;
        if (!pays(engine, sequence)) {
            sequence->draft_rate += (DRAFT_RATE_UNKNOWN - sequence->draft_rate) * FORGET_WEIGHT;
            continue;
        }
        int most = 1 + (int)(sequence->draft_rate * (DRAFTS_MAX - 1));
        if (most > item->tokens_left) most = item->tokens_left;
        item->drafts = lookup(sequence, most);
    }
}

void engine_learn_drafts(struct sequence *sequence, int drafts, int accepted) {
    VERIFY_OP(accepted, <=, drafts);
    float rate = (float)accepted / (float)drafts;
    sequence->draft_rate += (rate - sequence->draft_rate) * RATE_WEIGHT;
}
