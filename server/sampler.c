// The sampler of sampler.h. Greedy without processors is one pass over the raw row; anything else
// works on a copy in the scratch. Truncation (top_k, top_p) pops a max-heap, so its cost follows
// the tokens kept, not the vocabulary's size times its logarithm.
#include "server/sampler.h"

#include "base/memory.h"
#include "base/verify.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// Below this, dividing by the temperature is no longer a distribution; vLLM's bound.
static const float GREEDY_BELOW = 1e-5f;

struct candidate {
    float logit;
    int32_t id;
};

struct sampler_scratch {
    int vocabulary;
    float *logits;           // [V]
    uint32_t *counts;        // [V], zero between calls
    struct candidate *heap;  // [V]
    struct candidate *kept;  // [V]
};

struct sampler_scratch *sampler_scratch_create(int vocabulary) {
    struct sampler_scratch *scratch = mem_zalloc(1, sizeof *scratch);
    size_t n = (size_t)vocabulary;
    scratch->vocabulary = vocabulary;
    scratch->logits = mem_zalloc(n, sizeof *scratch->logits);
    scratch->counts = mem_zalloc(n, sizeof *scratch->counts);
    scratch->heap = mem_zalloc(n, sizeof *scratch->heap);
    scratch->kept = mem_zalloc(n, sizeof *scratch->kept);
    return scratch;
}

void sampler_scratch_destroy(struct sampler_scratch *scratch) {
    if (!scratch) return;
    free(scratch->logits);
    free(scratch->counts);
    free(scratch->heap);
    free(scratch->kept);
    free(scratch);
}

void philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u; // the paper's Weyl constants
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

double sampler_uniform(uint64_t seed, uint32_t stream, uint64_t position) {
    uint32_t counter[4] = {(uint32_t)position, (uint32_t)(position >> 32), stream, 0}, out[4];
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    philox4x32_10(counter, key, out);
    uint64_t bits = ((uint64_t)out[0] << 32 | out[1]) >> 11;
    return (double)bits * 0x1p-53;
}

static int32_t argmax(const float *logits, int vocabulary) {
    int32_t best = 0;
    float value = -INFINITY;
    for (int i = 0; i < vocabulary; i++)
        if (logits[i] > value) { // false for NaN
            value = logits[i];
            best = i;
        }
    return best;
}

void sampler_logprobs(const float *logits, int vocabulary, int32_t token, int top,
                      struct sampler_result *result) {
    VERIFY_OP(top, <=, LOGPROBS_MAX);
    VERIFY_OP(token, <, vocabulary);
    float peak = -INFINITY;
    result->top_count = 0;
    for (int i = 0; i < vocabulary; i++) {
        float value = logits[i];
        if (value > peak) peak = value;
        int count = result->top_count;
        if (top == 0 || isnan(value) || (count == top && value <= result->top[count - 1].logprob))
            continue;
        int at = count < top ? count : top - 1;
        for (; at > 0 && result->top[at - 1].logprob < value; at--)
            result->top[at] = result->top[at - 1];
        result->top[at] = (struct token_logprob){.id = i, .logprob = value};
        if (count < top) result->top_count++;
    }
    double sum = 0;
    for (int i = 0; i < vocabulary; i++)
        if (!isnan(logits[i])) sum += exp((double)logits[i] - peak);
    double normal = peak + log(sum);
    result->logprob = (float)(logits[token] - normal);
    for (int i = 0; i < result->top_count; i++)
        result->top[i].logprob = (float)(result->top[i].logprob - normal);
}

static bool has_penalties(const struct sampling *sampling) {
    return sampling->repetition_penalty != 1 || sampling->frequency_penalty != 0 ||
           sampling->presence_penalty != 0;
}

// Each token once: the first visit applies the penalty and clears the count's mark.
static void apply_penalties(const struct sampler_input *input, struct sampler_scratch *scratch) {
    const struct sampling *sampling = input->sampling;
    enum { SEEN_IN_PROMPT = 1u << 31 };
    uint32_t *counts = scratch->counts;
    float *logits = scratch->logits;
    for (int i = 0; i < input->output_count; i++) counts[input->output[i]]++;
    for (int i = 0; i < input->prompt_count; i++) counts[input->prompt[i]] |= SEEN_IN_PROMPT;
    for (int list = 0; list < 2; list++) {
        const int32_t *ids = list ? input->prompt : input->output;
        int count = list ? input->prompt_count : input->output_count;
        for (int i = 0; i < count; i++) {
            uint32_t seen = counts[ids[i]];
            if (!seen) continue;
            float *logit = &logits[ids[i]];
            *logit = *logit > 0 ? *logit / sampling->repetition_penalty
                                : *logit * sampling->repetition_penalty;
            uint32_t outputs = seen & ~(uint32_t)SEEN_IN_PROMPT;
            *logit -= sampling->frequency_penalty * (float)outputs;
            if (outputs) *logit -= sampling->presence_penalty;
            counts[ids[i]] = 0;
        }
    }
}

// Heap order: larger logit first, then lower id.
static bool before(struct candidate a, struct candidate b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

static void sift_down(struct candidate *heap, int count, int at) {
    struct candidate item = heap[at];
    for (int child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && before(heap[child + 1], heap[child])) child++;
        if (!before(heap[child], item)) break;
        heap[at] = heap[child];
    }
    heap[at] = item;
}

// Pops from `count` candidates the top_k largest, then of those the fewest whose mass reaches
// top_p; kept[i].logit becomes a weight. Returns how many, *total their mass.
static int truncate_candidates(const struct sampling *sampling, struct sampler_scratch *scratch,
                               int count, float peak, double *total) {
    struct candidate *heap = scratch->heap, *kept = scratch->kept;
    int limit = sampling->top_k > 0 && sampling->top_k < count ? sampling->top_k : count;
    double inverse = 1.0 / (double)sampling->temperature, mass = 0;
    for (int i = count / 2 - 1; i >= 0; i--) sift_down(heap, count, i);
    // Without top_k the whole mass is a sum over all; with it, over what top_k keeps.
    if (limit == count)
        for (int i = 0; i < count; i++) mass += exp(((double)heap[i].logit - peak) * inverse);
    int taken = 0;
    double cumulative = 0;
    for (; taken < limit; taken++) {
        if (limit == count && cumulative >= mass * (double)sampling->top_p) break;
        kept[taken] = heap[0];
        heap[0] = heap[--count];
        if (count) sift_down(heap, count, 0);
        double weight = exp(((double)kept[taken].logit - peak) * inverse);
        kept[taken].logit = (float)weight;
        cumulative += weight;
    }
    if (sampling->top_p < 1 && mass == 0) { // top_k came first: cut its mass
        double target = cumulative * (double)sampling->top_p;
        int all = taken;
        cumulative = 0;
        for (taken = 0; taken < all && cumulative < target; taken++)
            cumulative += kept[taken].logit;
    }
    VERIFY_OP(taken, >, 0);
    *total = cumulative;
    return taken;
}

static int32_t draw(const struct sampler_input *input, struct sampler_scratch *scratch) {
    const struct sampling *sampling = input->sampling;
    const float *logits = scratch->logits;
    float peak = logits[argmax(logits, input->vocabulary)];
    if (!isfinite(peak)) return argmax(logits, input->vocabulary);
    double inverse = 1.0 / (double)sampling->temperature;
    double cutoff = sampling->min_p > 0 ? log((double)sampling->min_p) : -INFINITY;
    double uniform = sampler_uniform(input->seed, input->stream, input->position);
    int count = 0;
    for (int i = 0; i < input->vocabulary; i++) {
        double scaled = ((double)logits[i] - peak) * inverse;
        if (isnan(logits[i]) || isinf(logits[i]) || scaled < cutoff) continue;
        scratch->heap[count++] = (struct candidate){.logit = logits[i], .id = i};
    }
    double total = 0;
    struct candidate *kept = scratch->heap;
    bool truncates = (sampling->top_k > 0 && sampling->top_k < count) || sampling->top_p < 1;
    if (truncates) {
        count = truncate_candidates(sampling, scratch, count, peak, &total);
        kept = scratch->kept;
        total = 0;
    } else {
        for (int i = 0; i < count; i++)
            kept[i].logit = (float)exp(((double)kept[i].logit - peak) * inverse);
    }
    for (int i = 0; i < count; i++) total += kept[i].logit;
    double target = uniform * total, cumulative = 0;
    int32_t last = kept[0].id;
    for (int i = 0; i < count; i++) {
        if (kept[i].logit <= 0) continue;
        last = kept[i].id;
        cumulative += kept[i].logit;
        if (cumulative > target) break;
    }
    return last;
}

void sampler_sample(const struct sampler_input *input, struct sampler_scratch *scratch,
                    struct sampler_result *result) {
    const struct sampling *sampling = input->sampling;
    VERIFY_OP(input->vocabulary, ==, scratch->vocabulary);
    bool greedy = sampling->temperature < GREEDY_BELOW;
    result->logprob = 0;
    result->top_count = 0;
    if (greedy && !sampling->bias_count && !input->banned_count && !has_penalties(sampling)) {
        result->token = argmax(input->logits, input->vocabulary);
    } else {
        memcpy(scratch->logits, input->logits, (size_t)input->vocabulary * sizeof(float));
        for (int i = 0; i < sampling->bias_count; i++)
            if (sampling->bias_ids[i] >= 0 && sampling->bias_ids[i] < input->vocabulary)
                scratch->logits[sampling->bias_ids[i]] += sampling->bias_values[i];
        for (int i = 0; i < input->banned_count; i++)
            if (input->banned[i] >= 0 && input->banned[i] < input->vocabulary)
                scratch->logits[input->banned[i]] = -INFINITY;
        if (has_penalties(sampling)) apply_penalties(input, scratch);
        result->token = greedy ? argmax(scratch->logits, input->vocabulary)
                               : draw(input, scratch);
    }
    if (sampling->logprobs >= 0)
        sampler_logprobs(input->logits, input->vocabulary, result->token,
                         sampling->logprobs < LOGPROBS_MAX ? sampling->logprobs : LOGPROBS_MAX,
                         result);
}
