// The sampler of sampler.h. Greedy without processors is one pass over the raw row; anything else
// works on a copy in the scratch, by the rule of kernels/draw.h. The passes over a whole row are
// written in lanes, which compilers turn into vector code without being told to reorder sums.
#include "server/sampler.h"

#include "base/memory.h"
#include "base/verify.h"
#include "base/wide.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// Below this, dividing by the temperature is no longer a distribution; vLLM's bound.
static const float GREEDY_BELOW = 1e-5f;
enum { LANES = 16 };

struct sampler_scratch {
    int vocabulary;
    float *logits;    // [V]
    int32_t *depths;  // [V] below the peak
    float *weights;   // [V] 0 for what cannot be drawn
    uint32_t *counts; // [V], zero between calls
    uint64_t *places; // [V] of the bin that is looked at
};

struct sampler_scratch *sampler_scratch_create(int vocabulary) {
    VERIFY_OP(vocabulary, >, 0);
    VERIFY_OP(vocabulary, <=, 1 << DRAW_ID_BITS);
    struct sampler_scratch *scratch = mem_zalloc(1, sizeof *scratch);
    size_t n = (size_t)vocabulary;
    scratch->vocabulary = vocabulary;
    scratch->logits = mem_zalloc(n, sizeof *scratch->logits);
    scratch->depths = mem_zalloc(n, sizeof *scratch->depths);
    scratch->weights = mem_zalloc(n, sizeof *scratch->weights);
    scratch->counts = mem_zalloc(n, sizeof *scratch->counts);
    scratch->places = mem_zalloc(n, sizeof *scratch->places);
    return scratch;
}

void sampler_scratch_destroy(struct sampler_scratch *scratch) {
    if (!scratch) return;
    free(scratch->logits);
    free(scratch->depths);
    free(scratch->weights);
    free(scratch->counts);
    free(scratch->places);
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

static double row_sum(const float *values, int count) {
    double lane[LANES] = {0}, sum = 0;
    int i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += (double)values[i + j];
    for (int j = 0; j < LANES; j++) sum += lane[j];
    for (; i < count; i++) sum += (double)values[i];
    return sum;
}

WIDE static double row_exp_sum(const float *logits, int count, float peak) {
    float weights[256];
    double sum = 0;
    for (int i = 0; i < count; i += 256) {
        int part = count - i < 256 ? count - i : 256;
        for (int j = 0; j < part; j++) weights[j] = draw_exp(logits[i + j] - peak);
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

// How many tokens, and how much mass, have places with each value of some of their bits.
struct draw_bins {
    uint64_t count[DRAW_BINS], mass[DRAW_BINS];
};

static void bins_add(struct draw_bins *bins, unsigned bin, uint64_t mass) {
    bins->count[bin]++;
    bins->mass[bin] += mass;
}

// All tokens by the highest bits of their places. Weights too small for a mass become 0.
static void bins_fill(struct draw_bins *bins, struct sampler_scratch *scratch, uint64_t *count,
                      uint64_t *total) {
    *bins = (struct draw_bins){0};
    *count = *total = 0;
    for (int i = 0; i < scratch->vocabulary; i++) {
        uint64_t mass = draw_mass(scratch->weights[i]);
        if (mass == 0) scratch->weights[i] = 0;
        if (mass == 0) continue;
        bins_add(bins, (unsigned)(scratch->depths[i] >> (DRAW_FIRST_SHIFT - DRAW_ID_BITS)), mass);
        *total += mass;
        (*count)++;
    }
}

// The bin into which `threshold` falls, of counts or masses; `before` grows by what lies before it.
static unsigned bin_find(const struct draw_bins *bins, bool counts, uint64_t threshold,
                         uint64_t before[2]) {
    unsigned bin = 0;
    for (; bin + 1 < DRAW_BINS; bin++) {
        uint64_t after[2] = {before[0] + bins->count[bin], before[1] + bins->mass[bin]};
        if (after[counts ? 0 : 1] > threshold) break;
        memcpy(before, after, sizeof after);
    }
    return bin;
}

// The first place at which the sum of counts or masses, itself included, exceeds `threshold`, which
// is less than all; *mass: that of all places up to it. `first` has all by their highest bits.
static uint64_t place_find(struct sampler_scratch *scratch, const struct draw_bins *first,
                           bool counts, uint64_t threshold, uint64_t *mass) {
    uint64_t before[2] = {0}, place = bin_find(first, counts, threshold, before);
    int shift = DRAW_FIRST_SHIFT, count = 0;
    for (int32_t i = 0; i < scratch->vocabulary; i++)
        if (scratch->weights[i] > 0 &&
            (uint64_t)scratch->depths[i] >> (DRAW_FIRST_SHIFT - DRAW_ID_BITS) == place)
            scratch->places[count++] = draw_place(scratch->depths[i], i);
    while (count > 1) { // ids differ: one is left when the last bits have been looked at
        int next = draw_next_shift(shift), kept = 0;
        struct draw_bins bins = {0};
        for (int i = 0; i < count; i++) {
            uint64_t at = scratch->places[i];
            bins_add(&bins, at >> next & ((1u << (shift - next)) - 1),
                     draw_mass(scratch->weights[at & ((1u << DRAW_ID_BITS) - 1)]));
        }
        place = place << (shift - next) | bin_find(&bins, counts, threshold, before);
        shift = next;
        for (int i = 0; i < count; i++)
            if (scratch->places[i] >> shift == place) scratch->places[kept++] = scratch->places[i];
        count = kept;
    }
    place = scratch->places[0];
    *mass = before[1] + draw_mass(scratch->weights[place & ((1u << DRAW_ID_BITS) - 1)]);
    return place;
}

WIDE static void row_weights(int32_t *restrict depths, float *restrict weights,
                             const float *restrict logits, int count, float peak,
                             const struct draw *draw) {
    float inverse = draw->inverse_temperature, min_p = draw->min_p;
    for (int i = 0; i < count; i++) depths[i] = draw_depth(logits[i], peak, inverse);
    for (int i = 0; i < count; i++) weights[i] = draw_weight(depths[i], min_p);
}

static int32_t draw_token(const struct draw *draw, struct sampler_scratch *scratch) {
    const float *logits = scratch->logits;
    int vocabulary = scratch->vocabulary;
    float peak = row_peak(logits, vocabulary);
    if (draw->kind == DRAW_GREEDY || !isfinite(peak)) return argmax(logits, vocabulary);
    row_weights(scratch->depths, scratch->weights, logits, vocabulary, peak, draw);
    struct draw_bins bins;
    uint64_t count, total;
    bins_fill(&bins, scratch, &count, &total);
    if (draw->top_k > 0 && (uint64_t)draw->top_k < count)
        place_find(scratch, &bins, true, (uint64_t)draw->top_k - 1, &total);
    if (draw->top_p < 1) {
        uint64_t reaches = draw_threshold(total, (double)draw->top_p);
        place_find(scratch, &bins, false, reaches > 0 ? reaches - 1 : 0, &total);
    }
    uint64_t place = place_find(scratch, &bins, false, draw_threshold(total, draw->uniform), &total);
    return (int32_t)(place & ((1u << DRAW_ID_BITS) - 1));
}

struct draw sampler_draw(const struct sampler_input *input) {
    const struct sampling *sampling = input->sampling;
    struct draw draw = {.kind = DRAW_GREEDY};
    if (sampling->temperature < GREEDY_BELOW) return draw;
    return (struct draw){.kind = DRAW_RANDOM, .top_k = sampling->top_k, .top_p = sampling->top_p,
                         .min_p = sampling->min_p,
                         .inverse_temperature = 1.0f / sampling->temperature,
                         .uniform = sampler_uniform(input->seed, input->stream, input->position)};
}

bool sampler_draws_plainly(const struct sampler_input *input) {
    return !input->sampling->bias_count && !input->banned_count &&
           !has_penalties(input->sampling) && input->sampling->logprobs < 0;
}

void sampler_sample(const struct sampler_input *input, struct sampler_scratch *scratch,
                    struct sampler_result *result) {
    const struct sampling *sampling = input->sampling;
    VERIFY_OP(input->vocabulary, ==, scratch->vocabulary);
    struct draw draw = sampler_draw(input);
    result->logprob = 0;
    result->top_count = 0;
    if (draw.kind == DRAW_GREEDY && !sampling->bias_count && !input->banned_count && !has_penalties(sampling)) {
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
        result->token = draw_token(&draw, scratch);
    }
    if (sampling->logprobs >= 0)
        sampler_logprobs(input->logits, input->vocabulary, result->token,
                         sampling->logprobs < LOGPROBS_MAX ? sampling->logprobs : LOGPROBS_MAX,
                         result);
}
