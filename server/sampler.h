// From one row of logits to one token: bias, bans, penalties, temperature, min_p, top_k, top_p,
// a draw, and log-probabilities. Pure functions; the caller owns the scratch. Engine thread.
//
// The order is vLLM's, so that clients see the same meaning: logit_bias and banned tokens, then
// repetition (prompt and output), frequency and presence (output alone) penalties, temperature,
// min_p, top_k, top_p. Log-probabilities come from the raw logits, before all of these.
//
// The draw is a function of (seed, stream, position) and nothing else: Philox4x32-10, a
// counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// A request that is preempted and recomputed, or that moves in the batch, draws the same numbers.
#ifndef LORAD_SERVER_SAMPLER_H
#define LORAD_SERVER_SAMPLER_H

#include "kernels/backend.h"
#include "server/request.h"

struct token_logprob {
    int32_t id;
    float logprob;
};

struct sampler_scratch; // for one vocabulary size; used by one thread at a time
struct sampler_scratch *sampler_scratch_create(int vocabulary);
void sampler_scratch_destroy(struct sampler_scratch *scratch);

struct sampler_input {
    const float *logits; // [V], not written
    int vocabulary;
    const struct sampling *sampling;
    const int32_t *prompt, *output; // ids in [0, V)
    int prompt_count, output_count;
    const int32_t *banned; // never chosen (EOS before min_tokens); out-of-range ids are ignored
    int banned_count;
    uint64_t seed, position; // position: how many tokens stand before this one
    uint32_t stream;         // the choice's index: choices of one seed differ
};

struct sampler_result {
    int32_t token;
    float logprob;  // of token; 0 when logprobs are not wanted
    int top_count;  // 0 when not wanted
    struct token_logprob top[LOGPROBS_MAX];
};

// Greedy is the lowest id among the largest logits. NaN logits count as -inf; when no token is
// left, the token is 0.
void sampler_sample(const struct sampler_input *input, struct sampler_scratch *scratch,
                    struct sampler_result *result);

// How the input's token is drawn from its row, when no processor changes the row and nobody wants to
// know probabilities: then whoever has the logits may draw (kernels/draw.h).
bool sampler_draws_plainly(const struct sampler_input *input);
struct draw sampler_draw(const struct sampler_input *input);

// Log-probability of `token` and the `top` likeliest tokens, best first (ties: lowest id first).
// Never NaN; -INFINITY for a token that cannot be drawn.
void sampler_logprobs(const float *logits, int vocabulary, int32_t token, int top,
                      struct sampler_result *result);

void philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);
// Uniform in [0, 1), 53 bits.
double sampler_uniform(uint64_t seed, uint32_t stream, uint64_t position);

#endif
