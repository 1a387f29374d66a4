// server/engine.h: what a request gets does not depend on who runs beside it, in which chunks, in
// how small a pool, or how often it is preempted. Expectations are runs of each request alone.
#include "engine_rig.h"
#include "server/engine_internal.h"

#include <pthread.h>
#include <semaphore.h>
#include <unistd.h>

enum { JOBS = 16 };

// Base-only, one adapter of each rank, the same adapter at other weights, mixing, sampled ones.
static void make_jobs(struct rig *rig, struct job *jobs) {
    static const int prompts[JOBS] = {5, 33, 1, 70, 16, 17, 40, 2, 31, 64, 8, 15, 48, 3, 20, 27};
    static const int outputs[JOBS] = {20, 7, 24, 12, 1, 16, 9, 30, 17, 5, 22, 18, 3, 40, 11, 14};
    for (int i = 0; i < JOBS; i++) {
        job_init(&jobs[i], i, prompts[i], outputs[i]);
        switch (i % 8) {
        case 0: case 4: break;
        case 1: job_adapter(&jobs[i], rig->adapters[0], 1); break;
        case 2: job_adapter(&jobs[i], rig->adapters[1], 1); break;
        case 3: job_adapter(&jobs[i], rig->adapters[2], 1); break;
        case 5: job_adapter(&jobs[i], rig->adapters[3], 1); break;
        case 6:
            job_adapter(&jobs[i], rig->adapters[1], 0.5f);
            job_adapter(&jobs[i], rig->adapters[2], 0.75f);
            break;
        case 7: job_adapter(&jobs[i], rig->adapters[0], i == 7 ? 1 : -0.5f); break;
        }
        if (i % 5 == 3) {
            jobs[i].request->sampling.temperature = 1.2f;
            jobs[i].request->sampling.seeded = true;
            jobs[i].request->sampling.seed = 77;
            jobs[i].request->sampling.frequency_penalty = 0.5f;
            jobs[i].request->choice = i;
        }
        jobs[i].request->echo_logprobs = i % 6 == 5;
    }
}

static void free_jobs(struct job *jobs) {
    for (int i = 0; i < JOBS; i++) job_free(&jobs[i]);
}

static void assert_same(const struct job *job, const struct job *alone, const char *what, int i) {
    bool same = job->count == alone->count && job->prompt_count == alone->prompt_count &&
                job->finish == alone->finish;
    for (int t = 0; same && t < job->count; t++)
        same = job->tokens[t] == alone->tokens[t] && job->logprobs[t] == alone->logprobs[t];
    for (int t = 0; same && t < job->prompt_count; t++)
        same = job->prompt_tokens[t] == alone->prompt_tokens[t] &&
               job->prompt_logprobs[t] == alone->prompt_logprobs[t];
    if (!same) fail_msg("%s: job %d differs from its run alone", what, i);
}

static struct job alone[JOBS]; // filled once; only read by the tests

static int run_alone(void **state) {
    for (int i = 0; i < JOBS; i++) {
        struct rig rig;
        struct job jobs[JOBS];
        rig_open(&rig, (struct engine_options){.sequences_max = 70, .step_tokens_max = 256}, 200,
                 NULL);
        make_jobs(&rig, jobs);
        rig_submit(&rig, &jobs[i]);
        rig_run(&rig);
        assert_int_equal(jobs[i].terminals, 1);
        alone[i] = jobs[i];
        alone[i].request = NULL;
        free_jobs(jobs);
        rig_close(&rig);
    }
    return 0;
}

// Catches: references that would agree whatever the engine did.
static void references_tell_jobs_apart(void **state) {
    struct rig rig;
    rig_open(&rig, (struct engine_options){.sequences_max = 8, .step_tokens_max = 64}, 100, NULL);
    struct job base, with[RIG_ADAPTERS], light;
    job_init(&base, 1, 20, 20);
    rig_submit(&rig, &base);
    for (int i = 0; i < RIG_ADAPTERS; i++) {
        job_init(&with[i], 1, 20, 20);
        job_adapter(&with[i], rig.adapters[i], 1);
        rig_submit(&rig, &with[i]);
    }
    job_init(&light, 1, 20, 20);
    job_adapter(&light, rig.adapters[3], 0.25f);
    rig_submit(&rig, &light);
    rig_run(&rig);
    size_t bytes = 20 * sizeof *base.tokens;
    for (int i = 0; i < RIG_ADAPTERS; i++) {
        assert_memory_not_equal(with[i].tokens, base.tokens, bytes);
        assert_memory_not_equal(with[i].tokens, light.tokens, bytes);
        for (int j = 0; j < i; j++) assert_memory_not_equal(with[i].tokens, with[j].tokens, bytes);
        job_free(&with[i]);
    }
    job_free(&base);
    job_free(&light);
    rig_close(&rig);
}

// Catches: a token's KV, position, adapter, weight, row or draw that depends on the batch.
static void batch_invariance(void **state) {
    static const int chunks[] = {1, 7, 16, 33, 256};
    static const struct {
        int sequences, pages, preempt_every;
    } worlds[] = {
        {JOBS, 200, 0}, {JOBS, 200, 1}, {JOBS, 200, 2}, {5, 40, 3}, {4, 25, 0},
        {JOBS, 25, 4},  {8, 24, 5},     {1, 24, 1},     {3, 24, 2},
    };
    for (size_t w = 0; w < sizeof worlds / sizeof *worlds; w++)
        for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++) {
            char what[64];
            snprintf(what, sizeof what, "%d sequences, %d pages, preempting %d, %d tokens",
                     worlds[w].sequences, worlds[w].pages, worlds[w].preempt_every, chunks[c]);
            struct rig rig;
            struct job jobs[JOBS];
            rig_open(&rig, (struct engine_options){.sequences_max = worlds[w].sequences,
                                                   .step_tokens_max = chunks[c],
                                                   .preempt_every = worlds[w].preempt_every},
                     worlds[w].pages, NULL);
            make_jobs(&rig, jobs);
            for (int i = 0; i < JOBS; i++) { // some come while others run
                rig_submit(&rig, &jobs[(i * 7 + (int)w) % JOBS]);
                if (i % 3 == 0) rig_step(&rig);
            }
            rig_run(&rig);
            for (int i = 0; i < JOBS; i++) {
                assert_int_equal(jobs[i].terminals, 1);
                assert_same(&jobs[i], &alone[i], what, i);
            }
            if (worlds[w].preempt_every) assert_true(atomic_load(&rig.metrics.preemptions) > 0);
            rig_assert_idle(&rig);
            free_jobs(jobs);
            rig_close(&rig);
        }
}

// Catches: a pool that runs dry for real. A long prompt in small chunks outlasts the prediction
// that a short answer made: 18 + 64 tokens beside 64 need 10 pages, foreseen were 7. With an
// adapter, the one who asks for pages stands behind the one who is preempted for them.
static void runs_out_of_pages(void **state) {
    for (int order = 0; order < 3; order++) {
        struct rig rig;
        struct job talker, listener, copies[2];
        rig_open(&rig, (struct engine_options){.sequences_max = 4, .step_tokens_max = 2},
                 order == 2 ? 9 : 7, NULL);
        job_init(&talker, 1, 18, 80);
        job_init(&listener, 2, 64, 1);
        if (order == 2) job_adapter(&talker, rig.adapters[0], 1);
        rig_submit(&rig, order ? &talker : &listener);
        if (order == 2) rig_step(&rig); // or the listener, with nothing to load, would pass
        rig_submit(&rig, order ? &listener : &talker);
        rig_run(&rig);
        if (order) assert_true(atomic_load(&rig.metrics.preemptions) > 0);
        job_init(&copies[0], 1, 18, 80);
        job_init(&copies[1], 2, 64, 1);
        if (order == 2) job_adapter(&copies[0], rig.adapters[0], 1);
        for (int i = 0; i < 2; i++) {
            rig_submit(&rig, &copies[i]);
            rig_run(&rig);
        }
        assert_same(&talker, &copies[0], "talker", order);
        assert_same(&listener, &copies[1], "listener", order);
        rig_assert_idle(&rig);
        job_free(&talker);
        job_free(&listener);
        for (int i = 0; i < 2; i++) job_free(&copies[i]);
        rig_close(&rig);
    }
}

// Catches: prompt log-probabilities of the wrong row. A prompt made of what greedy decoding said
// must be echoed with the log-probabilities it was said with.
static void echo_agrees_with_generation(void **state) {
    static const int chunks[] = {1, 5, 64};
    for (size_t c = 0; c < 3; c++)
        for (int every = 0; every < 3; every++) {
            struct rig rig;
            struct job said, echoed, none;
            rig_open(&rig, (struct engine_options){.sequences_max = 4, .step_tokens_max = chunks[c],
                                                   .preempt_every = every}, 60, NULL);
            job_init(&said, 9, 6, 30);
            job_adapter(&said, rig.adapters[1], 1);
            rig_submit(&rig, &said);
            rig_run(&rig);
            job_init(&echoed, 9, 36, 1);
            memcpy(echoed.request->prompt, said.request->prompt, 6 * sizeof(int32_t));
            memcpy(echoed.request->prompt + 6, said.tokens, 30 * sizeof(int32_t));
            job_adapter(&echoed, rig.adapters[1], 1);
            echoed.request->echo_logprobs = true;
            job_init(&none, 3, 12, 0); // nothing to generate: the prompt alone
            none.request->echo_logprobs = true;
            rig_submit(&rig, &echoed);
            rig_submit(&rig, &none);
            rig_run(&rig);
            assert_int_equal(echoed.prompt_count, 35);
            for (int i = 0; i < 30; i++) {
                assert_int_equal(echoed.prompt_tokens[5 + i], said.tokens[i]);
                assert_true(echoed.prompt_logprobs[5 + i] == said.logprobs[i]);
            }
            assert_int_equal(none.prompt_count, 11);
            assert_int_equal(none.count, 0);
            assert_int_equal(none.finish, FINISH_LENGTH);
            job_free(&said);
            job_free(&echoed);
            job_free(&none);
            rig_close(&rig);
        }
}

// ------------------------------------------------------------------ with the thread

static void post(void *context) {
    sem_post(context);
}

// Catches: a lost wake-up (hangs), a lost or doubled terminal event, a race (ThreadSanitizer).
// Some requests are cancelled, some adapters unloaded, while the engine runs.
static void threaded_load(void **state) {
    enum { ROUNDS = 6 };
    for (int round = 0; round < ROUNDS; round++) {
        struct rig rig;
        struct job jobs[JOBS];
        sem_t events;
        sem_init(&events, 0, 0);
        rig_open(&rig, (struct engine_options){.sequences_max = 6, .step_tokens_max = 24,
                                               .preempt_every = round % 3, .wake = post,
                                               .wake_context = &events}, 30 + 20 * round, NULL);
        struct error err = {0};
        assert_int_equal(engine_start(rig.engine, &err), STATUS_OK);
        make_jobs(&rig, jobs);
        for (int i = 0; i < JOBS; i++) rig_submit(&rig, &jobs[i]);
        atomic_store(&rig.adapters[1]->retired, true);
        adapter_unref(rig.adapters[1]);
        rig.adapters[1] = NULL;
        for (int i = round % 4; i < JOBS; i += 4) engine_cancel(rig.engine, jobs[i].request);
        for (int ended = 0; ended < JOBS;) {
            sem_wait(&events);
            rig_poll(&rig);
            ended = 0;
            for (int i = 0; i < JOBS; i++) ended += jobs[i].terminals;
        }
        for (int i = 0; i < JOBS; i++) {
            assert_int_equal(jobs[i].terminals, 1);
            if (jobs[i].finish != FINISH_ABORT) assert_same(&jobs[i], &alone[i], "threaded", i);
            else assert_int_equal(jobs[i].error, STATUS_CANCELLED);
            if (i % 4 != round % 4) assert_int_not_equal(jobs[i].finish, FINISH_ABORT);
        }
        char running[1024], waiting[1024];
        metrics_names(&rig.metrics, running, waiting);
        assert_true(engine_retry_after_s(rig.engine) >= 1);
        engine_drain(rig.engine, 60);
        assert_true(engine_drained(rig.engine));
        free_jobs(jobs);
        rig_close(&rig);
        sem_destroy(&events);
    }
}

// Catches: destroy hanging on a full event queue or an idle engine, or leaking who is inside.
static void destroy_with_requests_inside(void **state) {
    for (int round = 0; round < 4; round++) {
        struct rig rig;
        struct job jobs[JOBS];
        rig_open(&rig, (struct engine_options){.sequences_max = 4, .step_tokens_max = 16,
                                               .queue_max = JOBS}, 60, NULL);
        struct error err = {0};
        assert_int_equal(engine_start(rig.engine, &err), STATUS_OK);
        make_jobs(&rig, jobs);
        for (int i = 0; i < JOBS && round > 0; i++)
            if (engine_submit(rig.engine, &jobs[i].request, 1, &err) != STATUS_OK)
                assert_int_equal(err.status, STATUS_FULL);
        engine_destroy(rig.engine); // events were never polled
        rig.engine = NULL;
        free_jobs(jobs);
        rig_close(&rig);
    }
}

// Catches: an idle engine that computes the first of several requests alone, or waits for ever.
static void begins_together(void **state) {
    enum { N = 3, OUTPUT = 10 };
    struct rig rig;
    struct job jobs[N];
    sem_t events;
    sem_init(&events, 0, 0);
    rig_open(&rig, (struct engine_options){.sequences_max = N, .step_tokens_max = 64, .wake = post,
                                           .wake_context = &events}, 60, NULL);
    rig.engine->rates.step_s = 100; // as if steps were so long: requests may be 0.5 s apart, up to 5 s
    struct error err = {0};
    assert_int_equal(engine_start(rig.engine, &err), STATUS_OK);
    for (int i = 0; i < N; i++) {
        usleep(20000); // a hundred times what the tiny model's steps take; first, the engine gets idle
        job_init(&jobs[i], i, 5, OUTPUT);
        rig_submit(&rig, &jobs[i]);
    }
    for (int ended = 0; ended < N;) {
        sem_wait(&events);
        rig_poll(&rig);
        ended = 0;
        for (int i = 0; i < N; i++) ended += jobs[i].terminals;
    }
    assert_int_equal(atomic_load(&rig.metrics.steps), OUTPUT);
    for (int i = 0; i < N; i++) job_free(&jobs[i]);
    rig_close(&rig);
    sem_destroy(&events);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(references_tell_jobs_apart),
        cmocka_unit_test(batch_invariance),
        cmocka_unit_test(runs_out_of_pages),
        cmocka_unit_test(echo_agrees_with_generation),
        cmocka_unit_test(threaded_load),
        cmocka_unit_test(destroy_with_requests_inside),
        cmocka_unit_test(begins_together),
    };
    return cmocka_run_group_tests(tests, run_alone, NULL);
}
