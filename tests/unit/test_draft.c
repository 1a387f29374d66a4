// Drafts: guessed tokens are computed with the token before them and change nothing but the number
// of steps, whatever the sampling, the end of a request, the pages left or a preemption.
#include "engine_rig.h"

enum { KINDS = 30, CYCLE = 7 };

struct totals {
    uint64_t drafts, accepted, steps, tokens;
};

// Every third prompt is made-up tokens; the others go round in a circle and may go on in three tokens
// alone, so that what comes has come before.
static void job_of(struct job *job, int kind, const struct rig *rig) {
    job_init(job, kind, 5 + 7 * (kind % 9), 1 + 17 * (kind % 8));
    struct request *request = job->request;
    for (int i = 0; kind % 3 > 0 && i < request->prompt_count; i++)
        request->prompt[i] = (int32_t)(philox_word(kind, i % CYCLE) % RIG_VOCABULARY);
    static const int32_t likely[] = {3, 40, 41};
    static const float likely_by[] = {30, 30, 30};
    if (kind % 3 > 0) {
        int32_t *ids = mem_alloc(sizeof likely); // the request's own
        float *values = mem_alloc(sizeof likely_by);
        memcpy(ids, likely, sizeof likely);
        memcpy(values, likely_by, sizeof likely_by);
        request->sampling.bias_ids = ids;
        request->sampling.bias_values = values;
        request->sampling.bias_count = 3;
    }
    if (kind % 5 > 0) job_adapter(job, rig->adapters[kind % RIG_ADAPTERS], 1);
    if (kind % 4 == 3) {
        request->sampling.temperature = 0.02f;
        request->sampling.seeded = true;
        request->sampling.seed = (uint64_t)kind;
    }
    if (kind % 7 == 6) request->sampling.repetition_penalty = 1.1f;
    if (kind % 6 == 5) request->echo_logprobs = true;
    if (kind % 10 == 9) request->stop_ids[request->stop_id_count++] = 40 + kind % 3;
    if (kind % 11 == 10) {
        request->stop[0] = mem_strdup("abc");
        request->stop_count = 1;
    }
}

// All kinds at once, or one after another.
static struct totals run(struct engine_options options, int pages, bool alone,
                         struct job jobs[KINDS]) {
    struct rig rig;
    int tokenizer; // an address is all that the rig's detokenizer looks at
    options.queue_max = KINDS;
    rig_open(&rig, options, pages, (const struct tokenizer *)(const void *)&tokenizer);
    struct totals totals = {0};
    for (int k = 0; k < KINDS; k++) {
        job_of(&jobs[k], k, &rig);
        rig_submit(&rig, &jobs[k]);
        if (alone) rig_run(&rig);
    }
    rig_run(&rig);
    rig_assert_idle(&rig);
    for (int k = 0; k < KINDS; k++) {
        assert_int_equal(jobs[k].terminals, 1);
        totals.tokens += (uint64_t)jobs[k].count;
        job_free(&jobs[k]);
    }
    totals.drafts = atomic_load(&rig.metrics.drafts);
    totals.accepted = atomic_load(&rig.metrics.drafts_accepted);
    totals.steps = atomic_load(&rig.metrics.steps);
    assert_int_equal(atomic_load(&rig.metrics.generation_tokens), totals.tokens);
    rig_close(&rig);
    return totals;
}

static void assert_same(const struct job *one, const struct job *other, int kind) {
    bool same = one->count == other->count && one->finish == other->finish &&
                one->prompt_count == other->prompt_count &&
                one->text_bytes == other->text_bytes &&
                memcmp(one->text, other->text, one->text_bytes) == 0;
    for (int t = 0; same && t < one->count; t++)
        same = one->tokens[t] == other->tokens[t] && one->logprobs[t] == other->logprobs[t];
    if (!same) fail_msg("kind %d: another output with drafts", kind);
}

// Catches: a draft taken for a token, a row that belongs to another place, the cache of a rejected
// draft read, a budget of rows, tokens or pages overrun.
static void test_output_unchanged(void **state) {
    (void)state;
    static struct job plain[KINDS], drafted[KINDS];
    static const struct {
        int sequences, step_tokens, pages, preempt_every;
        bool prefixes, alone;
    } worlds[] = {
        {8, 64, 400, 1000, true, false}, {8, 10, 400, 1000, false, false},
        {3, 32, 400, 1000, true, false}, {6, 48, 40, 1000, true, false},
        {6, 64, 60, 5, true, false},     {16, 64, 400, 1000, false, true}};
    uint64_t rejected = 0;
    for (size_t w = 0; w < sizeof worlds / sizeof *worlds; w++) {
        struct engine_options options = {.sequences_max = worlds[w].sequences,
                                         .step_tokens_max = worlds[w].step_tokens,
                                         .preempt_every = worlds[w].preempt_every,
                                         .prefix_cache = worlds[w].prefixes};
        struct totals without = run(options, worlds[w].pages, worlds[w].alone, plain);
        options.speculation = SPECULATION_ALWAYS;
        struct totals with = run(options, worlds[w].pages, worlds[w].alone, drafted);
        for (int k = 0; k < KINDS; k++) assert_same(&plain[k], &drafted[k], k);
        assert_int_equal(without.drafts, 0);
        assert_int_equal(without.tokens, with.tokens);
        if (worlds[w].alone) { // then each right draft is a step less
            assert_true(with.accepted > 50);
            assert_int_equal(with.steps + with.accepted, without.steps);
        }
        rejected += with.drafts - with.accepted;
    }
    assert_true(rejected > 50);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_output_unchanged)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
