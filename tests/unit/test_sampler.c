// server/sampler.h. Distributions are compared with ones computed here from the definitions, by
// sorting in double precision; the generator with the known answers published with Random123.
#include "server/sampler.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static const struct sampling defaults = {
    .temperature = 1, .top_p = 1, .repetition_penalty = 1, .logprobs = -1};

static int32_t sample_once(const struct sampler_input *input) {
    struct sampler_scratch *scratch = sampler_scratch_create(input->vocabulary);
    struct sampler_result result;
    sampler_sample(input, scratch, &result);
    sampler_scratch_destroy(scratch);
    return result.token;
}

// Random123 1.14, tests/kat_vectors, "philox4x32 10".
static void philox_known_answers(void **state) {
    static const struct {
        uint32_t counter[4], key[2], out[4];
    } cases[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint32_t out[4];
        philox4x32_10(cases[i].counter, cases[i].key, out);
        assert_memory_equal(out, cases[i].out, sizeof out);
    }
}

// Catches: a draw that ignores one of its arguments, or leaves [0, 1), or is not uniform.
static void uniform_draws(void **state) {
    assert_true(sampler_uniform(1, 2, 3) == sampler_uniform(1, 2, 3));
    assert_true(sampler_uniform(1, 2, 3) != sampler_uniform(2, 2, 3));
    assert_true(sampler_uniform(1, 2, 3) != sampler_uniform(1ull << 32 | 1, 2, 3));
    assert_true(sampler_uniform(1, 2, 3) != sampler_uniform(1, 3, 3));
    assert_true(sampler_uniform(1, 2, 3) != sampler_uniform(1, 2, 4));
    assert_true(sampler_uniform(1, 2, 3) != sampler_uniform(1, 2, 1ull << 32 | 3));
    int bins[16] = {0};
    for (uint64_t i = 0; i < 16000; i++) {
        double value = sampler_uniform(99, 0, i);
        assert_true(value >= 0 && value < 1);
        bins[(int)(value * 16)]++;
    }
    double chi = 0;
    for (int i = 0; i < 16; i++) chi += (bins[i] - 1000.0) * (bins[i] - 1000.0) / 1000.0;
    assert_true(chi < 45); // 15 degrees of freedom: 1 in 13,000
}

static void greedy(void **state) {
    static const struct {
        float logits[6];
        int32_t token;
        const char *catches;
    } cases[] = {
        {{0, 3, 1, 3, 3, 2}, 1, "a tie that is not the lowest id's"},
        {{5, 3, 1, 3, 3, 5}, 0, "a tie with the last"},
        {{-5, -3, -1, -3, -3, -2}, 2, "negative logits against a zero start"},
        {{NAN, 1, NAN, 2, 0, NAN}, 3, "NaN taken for the largest"},
        {{NAN, NAN, NAN, NAN, NAN, NAN}, 0, "no token left"},
        {{-INFINITY, -INFINITY, -INFINITY, -2, -INFINITY, -INFINITY}, 3, "-inf"},
        {{1, INFINITY, 2, INFINITY, 0, 0}, 1, "+inf"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct sampling sampling = defaults;
        struct sampler_input input = {
            .logits = cases[i].logits, .vocabulary = 6, .sampling = &sampling};
        sampling.temperature = 0;
        int32_t plain = sample_once(&input);
        // Through the copying path as well.
        int32_t outside = 999;
        input.banned = &outside;
        input.banned_count = 1;
        int32_t copied = sample_once(&input);
        if (plain != cases[i].token || copied != cases[i].token)
            fail_msg("%s: %d and %d, not %d", cases[i].catches, plain, copied, cases[i].token);
    }
    // The largest at every place of rows longer and shorter than the lanes.
    for (int size = 1; size < 70; size++)
        for (int at = 0; at < size; at++) {
            float row[70];
            for (int i = 0; i < size; i++) row[i] = -1.0f - (float)(i % 3);
            row[at] = -0.5f;
            struct sampling sampling = defaults;
            sampling.temperature = 0;
            struct sampler_input input = {
                .logits = row, .vocabulary = size, .sampling = &sampling};
            assert_int_equal(sample_once(&input), at);
        }
}

// ------------------------------------------------------------------ distributions

enum { V = 40, DRAWS = 20000 };

struct weighted {
    double weight;
    int id;
};

static int heavier(const void *left, const void *right) {
    const struct weighted *a = left, *b = right;
    if (a->weight != b->weight) return a->weight > b->weight ? -1 : 1;
    return a->id - b->id;
}

// The definition: softmax at the temperature, min_p, top_k, renormalize, top_p, renormalize.
static void expected_distribution(const float *logits, const struct sampling *sampling,
                                  double *probability) {
    struct weighted list[V];
    double peak = -INFINITY, sum = 0;
    for (int i = 0; i < V; i++)
        if (!isnan(logits[i]) && logits[i] > peak) peak = logits[i];
    for (int i = 0; i < V; i++) {
        double weight =
            isnan(logits[i]) ? 0 : exp(((double)logits[i] - peak) / (double)sampling->temperature);
        if (weight < (double)sampling->min_p) weight = 0;
        list[i] = (struct weighted){weight, i};
    }
    qsort(list, V, sizeof *list, heavier);
    int count = sampling->top_k > 0 && sampling->top_k < V ? sampling->top_k : V;
    for (int i = 0; i < count; i++) sum += list[i].weight;
    double reached = 0;
    int kept = 0;
    while (kept < count && (kept == 0 || reached < sum * (double)sampling->top_p - 1e-12))
        reached += list[kept++].weight;
    for (int i = 0; i < V; i++) probability[i] = 0;
    for (int i = 0; i < kept; i++) probability[list[i].id] = list[i].weight / reached;
}

static void make_logits(float *logits, uint64_t seed, float scale) {
    for (int i = 0; i < V; i++)
        logits[i] = ((float)sampler_uniform(seed, 7, (uint64_t)i) - 0.5f) * scale;
}

static void distributions(void **state) {
    static const struct {
        float temperature, top_p, min_p;
        int top_k;
        const char *catches;
    } cases[] = {
        {1, 1, 0, 0, "plain softmax"},
        {0.5f, 1, 0, 0, "temperature below 1"},
        {1.8f, 1, 0, 0, "temperature above 1"},
        {1, 0.6f, 0, 0, "top_p alone does not cut"},
        {1, 0.01f, 0, 0, "top_p keeps one at least"},
        {1, 1, 0, 5, "top_k alone"},
        {1, 1, 0, 1, "top_k of one"},
        {1, 0.7f, 0, 8, "top_p is a share of what top_k kept"},
        {1, 1, 0.2f, 0, "min_p alone"},
        {1.3f, 0.8f, 0.05f, 12, "all together"},
        {1, 0.9f, 0, V, "top_k of the whole vocabulary"},
        {1, 1, 0, V + 5, "top_k beyond the vocabulary"},
        {1e-3f, 0.9f, 0, 0, "almost greedy"},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct sampling sampling = defaults;
        sampling.temperature = cases[c].temperature;
        sampling.top_p = cases[c].top_p;
        sampling.min_p = cases[c].min_p;
        sampling.top_k = cases[c].top_k;
        float logits[V];
        make_logits(logits, 1000 + c, 6);
        logits[3] = NAN;
        logits[4] = -INFINITY;
        double probability[V], chi = 0;
        expected_distribution(logits, &sampling, probability);
        struct sampler_scratch *scratch = sampler_scratch_create(V);
        int seen[V] = {0}, degrees = -1;
        for (int i = 0; i < DRAWS; i++) {
            struct sampler_input input = {.logits = logits, .vocabulary = V, .sampling = &sampling,
                                          .seed = 42 + c, .position = (uint64_t)i};
            struct sampler_result result;
            sampler_sample(&input, scratch, &result);
            seen[result.token]++;
        }
        sampler_scratch_destroy(scratch);
        for (int i = 0; i < V; i++) {
            if (probability[i] == 0 && seen[i] > 0)
                fail_msg("%s: token %d has no mass but was drawn", cases[c].catches, i);
            double wanted = probability[i] * DRAWS;
            if (wanted < 5) continue; // too few for the statistic
            chi += (seen[i] - wanted) * (seen[i] - wanted) / wanted;
            degrees++;
        }
        // Five standard deviations above the mean of chi squared.
        if (degrees > 0 && chi > degrees + 5 * sqrt(2.0 * degrees))
            fail_msg("%s: chi squared is %.1f with %d degrees", cases[c].catches, chi, degrees);
    }
}

// Catches: a large row whose top_p is cut wrongly by rounding or by the heap.
static void top_p_of_a_large_row(void **state) {
    enum { LARGE = 50000 };
    float *logits = malloc(LARGE * sizeof *logits);
    for (int i = 0; i < LARGE; i++) logits[i] = -20.0f;
    for (int i = 0; i < 10; i++) logits[i * 4999] = 0; // ten tokens share all but 1e-5 of the mass
    struct sampling sampling = defaults;
    sampling.top_p = 0.45f; // five of them: the lowest ids
    struct sampler_scratch *scratch = sampler_scratch_create(LARGE);
    bool seen[10] = {0};
    for (int i = 0; i < 300; i++) {
        struct sampler_input input = {.logits = logits, .vocabulary = LARGE, .seed = 5,
                                      .sampling = &sampling, .position = (uint64_t)i};
        struct sampler_result result;
        sampler_sample(&input, scratch, &result);
        assert_int_equal(result.token % 4999, 0);
        seen[result.token / 4999] = true;
    }
    for (int i = 0; i < 10; i++) assert_int_equal(seen[i], i < 5);
    sampler_scratch_destroy(scratch);
    free(logits);
}

// ------------------------------------------------------------------ processors

static void processors(void **state) {
    static const int32_t prompt[] = {0, 1}, output[] = {2, 2, 2, 3};
    static const int32_t bias_ids[] = {5, 77}, banned[] = {0, -4, 4000};
    static const float bias_values[] = {10, 100};
    static const struct {
        float logits[6], repetition, frequency, presence;
        bool bias, ban;
        int32_t token;
        const char *catches;
    } cases[] = {
        {{4, 0, 0, 0, 3, 0}, 1, 0, 0, 0, 0, 0, "nothing asked, nothing done"},
        {{4, 0, 0, 0, 3, 0}, 1.5f, 0, 0, 0, 0, 4, "repetition counts the prompt: 4 / 1.5 < 3"},
        {{-9, -9, 4, -9, 3, -9}, 1.5f, 0, 0, 0, 0, 4, "repetition counts the output"},
        {{-1.2f, -9, -9, -9, -1.3f, -9}, 1.5f, 0, 0, 0, 0, 4, "negative logits: multiplied"},
        {{4, 0, 0, 0, 3, 0}, 1, 2, 2, 0, 0, 0, "frequency and presence spare the prompt"},
        {{0, 0, 4, 0, 3, 0}, 1, 0.3f, 0, 0, 0, 2, "frequency too weak: 4 - 0.9"},
        {{0, 0, 4, 0, 3, 0}, 1, 0.4f, 0, 0, 0, 4, "frequency counts each time: 4 - 1.2"},
        {{0, 0, 4, 0, 3, 0}, 1, 0, 0.9f, 0, 0, 2, "presence counts once: 4 - 0.9"},
        {{0, 0, 4, 0, 3, 0}, 1, 0, 1.1f, 0, 0, 4, "presence: 4 - 1.1"},
        {{0, 0, 0, 2, 3, 0}, 1, -2, 0, 0, 0, 2, "negative penalties reward: 0 + 3 * 2"},
        {{4, 0, 0, 0, 3, 0}, 1, 0, 0, 1, 0, 5, "bias; its id out of range is ignored"},
        {{4, 0, 0, 0, 3, 0}, 1, 0, 0, 0, 1, 4, "banned; ids out of range are ignored"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct sampling sampling = defaults;
        sampling.temperature = 0;
        sampling.repetition_penalty = cases[i].repetition;
        sampling.frequency_penalty = cases[i].frequency;
        sampling.presence_penalty = cases[i].presence;
        sampling.bias_ids = bias_ids;
        sampling.bias_values = bias_values;
        sampling.bias_count = cases[i].bias ? 2 : 0;
        struct sampler_input input = {
            .logits = cases[i].logits, .vocabulary = 6, .sampling = &sampling, .prompt = prompt,
            .prompt_count = 2, .output = output, .output_count = 4, .banned = banned,
            .banned_count = cases[i].ban ? 3 : 0};
        struct sampler_scratch *scratch = sampler_scratch_create(6);
        for (int again = 0; again < 2; again++) { // twice: counts left behind would show
            struct sampler_result result;
            sampler_sample(&input, scratch, &result);
            if (result.token != cases[i].token)
                fail_msg("%s: token %d, not %d", cases[i].catches, result.token, cases[i].token);
        }
        sampler_scratch_destroy(scratch);
    }
}

// ------------------------------------------------------------------ log-probabilities

static void logprobs(void **state) {
    float logits[V];
    make_logits(logits, 77, 20);
    logits[9] = NAN;
    logits[11] = logits[12] = 10.5f; // the two likeliest, equal
    double sum = 0;
    for (int i = 0; i < V; i++)
        if (i != 9) sum += exp((double)logits[i]);
    struct sampler_result result;
    for (int32_t token = 0; token < V; token++) {
        sampler_logprobs(logits, V, token, 5, &result);
        assert_int_equal(result.top_count, 5);
        assert_int_equal(result.top[0].id, 11);
        assert_int_equal(result.top[1].id, 12);
        for (int i = 1; i < 5; i++) {
            assert_true(result.top[i].logprob <= result.top[i - 1].logprob);
            double wanted = (double)logits[result.top[i].id] - log(sum);
            assert_true(fabs((double)result.top[i].logprob - wanted) < 1e-5);
        }
        for (int i = 0; i < V; i++) { // nobody outside is likelier than the last inside
            bool inside = i == 9;
            for (int j = 0; j < 5; j++) inside |= result.top[j].id == i;
            if (!inside) assert_true((double)logits[i] - log(sum) <= result.top[4].logprob + 1e-5);
        }
        if (token == 9) assert_true(result.logprob == -INFINITY);
        else assert_true(fabs((double)result.logprob - ((double)logits[token] - log(sum))) < 1e-5);
    }
    sampler_logprobs(logits, V, 0, 0, &result);
    assert_int_equal(result.top_count, 0);
    for (int i = 0; i < V; i++) logits[i] = i ? -INFINITY : NAN;
    sampler_logprobs(logits, V, 0, 3, &result);
    assert_true(result.logprob == -INFINITY);
    logits[5] = INFINITY;
    sampler_logprobs(logits, V, 5, 3, &result);
    assert_true(result.logprob == 0);
    assert_int_equal(result.top[0].id, 5);
    assert_true(result.top[0].logprob == 0 && result.top[1].logprob == -INFINITY);
}

// Catches: log-probabilities of processed logits instead of the raw ones.
static void logprobs_are_raw(void **state) {
    float logits[4] = {0, 0, 0, 0};
    static const int32_t id = 2;
    static const float value = 50;
    struct sampling sampling = defaults;
    sampling.bias_ids = &id;
    sampling.bias_values = &value;
    sampling.bias_count = 1;
    sampling.logprobs = 0;
    sampling.temperature = 0.1f;
    struct sampler_scratch *scratch = sampler_scratch_create(4);
    struct sampler_input input = {.logits = logits, .vocabulary = 4, .sampling = &sampling};
    struct sampler_result result;
    sampler_sample(&input, scratch, &result);
    assert_int_equal(result.token, 2);
    assert_true(fabs((double)result.logprob - log(0.25)) < 1e-6);
    sampler_scratch_destroy(scratch);
}

// Catches: hidden state between calls; the choice's index without effect.
static void reproducible(void **state) {
    float logits[V];
    make_logits(logits, 3, 4);
    struct sampling sampling = defaults;
    sampling.top_p = 0.95f;
    int differ = 0;
    for (uint64_t position = 0; position < 50; position++) {
        struct sampler_input input = {.logits = logits, .vocabulary = V, .sampling = &sampling,
                                      .seed = 11, .position = position};
        int32_t first = sample_once(&input);
        assert_int_equal(sample_once(&input), first);
        input.stream = 1;
        differ += sample_once(&input) != first;
    }
    assert_true(differ > 10);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(philox_known_answers), cmocka_unit_test(uniform_draws),
        cmocka_unit_test(greedy),               cmocka_unit_test(distributions),
        cmocka_unit_test(top_p_of_a_large_row), cmocka_unit_test(processors),
        cmocka_unit_test(logprobs),             cmocka_unit_test(logprobs_are_raw),
        cmocka_unit_test(reproducible),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
