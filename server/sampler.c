// The sampler of sampler.h. Greedy without processors is one pass over the raw row; anything else
// works on a copy in the scratch. Truncation (top_k, top_p) pops a max-heap, so its cost follows
// the tokens kept, not the vocabulary's size times its logarithm. The passes over a whole row are
// written in lanes, which compilers turn into vector code without being told to reorder sums.
#include "server/sampler.h"

#include "base/memory.h"
#include "base/verify.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// Below this, dividing by the temperature is no longer a distribution; vLLM's bound.
static const float GREEDY_BELOW = 1e-5f;
enum { LANES = 16 };

struct candidate {
    float logit;
    int32_t id;
};

struct sampler_scratch {
    int vocabulary;
    float *logits;          // [V]
    float *weights;         // [V] e^((logit - peak) / temperature), 0 for what cannot be drawn
    uint32_t *counts;       // [V], zero between calls
    struct candidate *heap; // [V]; the part that has been popped holds what was kept
};

struct sampler_scratch *sampler_scratch_create(int vocabulary) {
    VERIFY_OP(vocabulary, >, 0);
    struct sampler_scratch *scratch = mem_zalloc(1, sizeof *scratch);
    size_t n = (size_t)vocabulary;
    scratch->vocabulary = vocabulary;
    scratch->logits = mem_zalloc(n, sizeof *scratch->logits);
    scratch->weights = mem_zalloc(n, sizeof *scratch->weights);
    scratch->counts = mem_zalloc(n, sizeof *scratch->counts);
    scratch->heap = mem_zalloc(n, sizeof *scratch->heap);
    return scratch;
}

void sampler_scratch_destroy(struct sampler_scratch *scratch) {
    if (!scratch) return;
    free(scratch->logits);
    free(scratch->weights);
    free(scratch->counts);
    free(scratch->heap);
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

// The largest logit; NaN counts as -inf.
static float row_peak(const float *logits, int count) {
    float lane[LANES], peak = -INFINITY;
    for (int j = 0; j < LANES; j++) lane[j] = -INFINITY;
    int i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] = logits[i + j] > lane[j] ? logits[i + j] : lane[j]; // false for NaN
    for (int j = 0; j < LANES; j++) peak = lane[j] > peak ? lane[j] : peak;
    for (; i < count; i++) peak = logits[i] > peak ? logits[i] : peak;
    return peak;
}

static int32_t argmax(const float *logits, int count) {
    float peak = row_peak(logits, count);
    for (int32_t i = 0; peak > -INFINITY && i < count; i++)
        if (logits[i] == peak) return i;
    return 0;
}

// e^x for x <= 0 to about 2 units in the last place; 0 below -87 and for NaN. Cephes' polynomial.
static inline float exp_negative(float x) {
    float clamped = x > -87.0f ? x : -87.0f;
    float rounded = clamped * 1.44269504f + 12582912.0f; // adding 1.5 * 2^23 rounds to an integer
    float n = rounded - 12582912.0f;
    float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) * (1 << 23);
    float power;
    memcpy(&power, &bits, sizeof power);
    return x > -87.0f ? p * power : 0.0f;
}

static double row_sum(const float *values, int count) {
    double lane[LANES] = {0}, sum = 0;
    int i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += (double)values[i + j];
    for (int j = 0; j < LANES; j++) sum += lane[j];
    for (; i < count; i++) sum += (double)values[i];
    return sum;
}

static double row_exp_sum(const float *logits, int count, float peak) {
    float weights[256];
    double sum = 0;
    for (int i = 0; i < count; i += 256) {
        int part = count - i < 256 ? count - i : 256;
        for (int j = 0; j < part; j++) weights[j] = exp_negative(logits[i + j] - peak);
        sum += row_sum(weights, part);
    }
    return sum;
}

// With no finite peak, the likeliest tokens have 0 and all others -inf.
static float logprob_of(float logit, float peak, double log_sum) {
    double value = (double)logit - (double)peak - log_sum;
    if (isfinite(value)) return (float)value;
    return logit == peak && peak > -INFINITY ? 0.0f : -INFINITY;
}

void sampler_logprobs(const float *logits, int vocabulary, int32_t token, int top,
                      struct sampler_result *result) {
    VERIFY_OP(top, >=, 0);
    VERIFY_OP(top, <=, LOGPROBS_MAX);
    VERIFY_OP(token, >=, 0);
    VERIFY_OP(token, <, vocabulary);
    result->top_count = 0;
    for (int i = 0; top > 0 && i < vocabulary; i++) {
        float value = logits[i];
        int count = result->top_count;
        if (count == top && !(value > result->top[count - 1].logprob)) continue;
        if (isnan(value)) continue;
        int at = count < top ? count : top - 1;
        for (; at > 0 && result->top[at - 1].logprob < value; at--)
            result->top[at] = result->top[at - 1];
        result->top[at] = (struct token_logprob){.id = i, .logprob = value};
        if (count < top) result->top_count++;
    }
    float peak = row_peak(logits, vocabulary);
    double log_sum = log(row_exp_sum(logits, vocabulary, peak));
    result->logprob = logprob_of(logits[token], peak, log_sum);
    for (int i = 0; i < result->top_count; i++)
        result->top[i].logprob = logprob_of(result->top[i].logprob, peak, log_sum);
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

// Keeps the top_k largest candidates, and of those the fewest whose mass reaches top_p of theirs.
// They are popped to the heap's far end, largest last. Returns the index of the smallest one kept.
static int truncate_candidates(const struct sampling *sampling, struct sampler_scratch *scratch,
                               int count) {
    struct candidate *heap = scratch->heap;
    const float *weights = scratch->weights;
    bool cuts_k = sampling->top_k > 0 && sampling->top_k < count;
    int limit = cuts_k ? sampling->top_k : count, first = count;
    for (int i = count / 2 - 1; i >= 0; i--) sift_down(heap, count, i);
    // What top_p is a share of: all candidates, or those that top_k keeps, known once popped.
    bool sums = !cuts_k && sampling->top_p < 1;
    double mass = sums ? row_sum(weights, scratch->vocabulary) : INFINITY;
    double share = (double)sampling->top_p, reached = 0;
    for (int taken = 0; taken < limit && (taken == 0 || reached < mass * share); taken++) {
        struct candidate largest = heap[0];
        heap[0] = heap[--first];
        if (first) sift_down(heap, first, 0);
        heap[first] = largest;
        reached += (double)weights[largest.id];
    }
    if (!cuts_k || share >= 1) return first;
    double target = reached * share;
    int smallest = count;
    for (reached = 0; smallest > first && (smallest == count || reached < target);)
        reached += (double)weights[heap[--smallest].id];
    return smallest;
}

static int32_t draw(const struct sampler_input *input, struct sampler_scratch *scratch) {
    const struct sampling *sampling = input->sampling;
    const float *logits = scratch->logits;
    float *weights = scratch->weights;
    int vocabulary = input->vocabulary;
    float peak = row_peak(logits, vocabulary);
    if (!isfinite(peak)) return argmax(logits, vocabulary);
    float inverse = 1.0f / sampling->temperature;
    for (int i = 0; i < vocabulary; i++) {
        float weight = exp_negative((logits[i] - peak) * inverse);
        weights[i] = weight >= sampling->min_p ? weight : 0.0f; // the peak's weight is 1
    }
    double uniform = sampler_uniform(input->seed, input->stream, input->position), reached = 0;
    int32_t last = argmax(logits, vocabulary);
    if (sampling->top_k <= 0 && sampling->top_p >= 1) {
        double target = uniform * row_sum(weights, vocabulary);
        for (int32_t i = 0; i < vocabulary; i++) {
            if (!(weights[i] > 0)) continue;
            last = i;
            reached += (double)weights[i];
            if (reached > target) break;
        }
        return last;
    }
    int count = 0;
    for (int32_t i = 0; i < vocabulary; i++)
        if (weights[i] > 0) scratch->heap[count++] = (struct candidate){logits[i], i};
    int first = truncate_candidates(sampling, scratch, count);
    double total = 0;
    for (int i = first; i < count; i++) total += (double)weights[scratch->heap[i].id];
    for (int i = count - 1; i >= first; i--) {
        last = scratch->heap[i].id;
        reached += (double)weights[last];
        if (reached > uniform * total) break;
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
