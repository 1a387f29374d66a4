// server/engine.h: all the ways in which a request is refused or ends, and what is left behind.
#include "engine_rig.h"

static const struct engine_options roomy = {.sequences_max = 8, .step_tokens_max = 64};

static int pages(const struct rig *rig, enum page_owner owner) {
    return atomic_load(&rig->metrics.pages[owner]);
}

// ------------------------------------------------------------------ refusals

static void refuses_what_never_fits(void **state) {
    static const struct {
        const char *catches;
        int prompt, max_tokens, adapters;
        enum status status;
    } cases[] = {
        {"fits the pool exactly: 10 pages", 100, 61, 0, STATUS_OK},
        {"one token too many for the pool", 100, 62, 0, STATUS_TOO_LARGE},
        {"with an adapter's 8 pages beside 2", 10, 23, 1, STATUS_OK},
        {"one token too many beside an adapter", 10, 24, 1, STATUS_TOO_LARGE},
        {"the same adapter twice counts once", 10, 23, 2, STATUS_OK},
        {"more than the context", 200, 57, 0, STATUS_TOO_LARGE},
        {"sums that overflow", 100, INT32_MAX, 0, STATUS_TOO_LARGE},
        {"negative max_tokens", 10, -1, 0, STATUS_INVALID},
    };
    struct rig rig;
    rig_open(&rig, roomy, 10, NULL);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct job job;
        struct error err = {0};
        job_init(&job, 1, cases[i].prompt, cases[i].max_tokens);
        for (int j = 0; j < cases[i].adapters; j++) job_adapter(&job, rig.adapters[2], 1);
        enum status status = engine_submit(rig.engine, &job.request, 1, &err);
        if (status != cases[i].status)
            fail_msg("%s: %s", cases[i].catches, status_name(status));
        if (status != STATUS_OK) assert_true(err.text[0] != 0);
        rig_run(&rig);
        if (status == STATUS_OK) assert_int_equal(job.count, cases[i].max_tokens);
        job_free(&job);
    }
    struct job bad[2];
    struct request *both[2];
    struct error err = {0};
    for (int i = 0; i < 2; i++) {
        job_init(&bad[i], i, 4, 4);
        both[i] = bad[i].request;
    }
    bad[1].request->prompt[2] = RIG_VOCABULARY;
    assert_int_equal(engine_submit(rig.engine, both, 2, &err), STATUS_INVALID);
    bad[1].request->prompt[2] = -1;
    assert_int_equal(engine_submit(rig.engine, both, 2, &err), STATUS_INVALID);
    assert_false(rig_step(&rig)); // the good one of the two was not taken either
    assert_int_equal(bad[0].terminals, 0);
    job_free(&bad[0]);
    job_free(&bad[1]);
    rig_assert_idle(&rig);
    rig_close(&rig);
}

// Catches: a limit that is off by one, or places never given back.
static void refuses_when_the_queue_is_full(void **state) {
    enum { QUEUE = 5 };
    struct rig rig;
    struct job jobs[QUEUE + 2];
    rig_open(&rig, (struct engine_options){.sequences_max = 2, .step_tokens_max = 16,
                                           .queue_max = QUEUE}, 60, NULL);
    for (int i = 0; i < QUEUE + 2; i++) job_init(&jobs[i], i, 4, 5);
    struct error err = {0};
    for (int i = 0; i < QUEUE; i++) rig_submit(&rig, &jobs[i]);
    assert_int_equal(engine_submit(rig.engine, &jobs[QUEUE].request, 1, &err), STATUS_FULL);
    rig_step(&rig); // two start
    struct request *three[3] = {jobs[QUEUE].request, jobs[QUEUE + 1].request, NULL};
    assert_int_equal(engine_submit(rig.engine, three, 2, &err), STATUS_OK);
    struct job extra;
    job_init(&extra, 9, 4, 5);
    assert_int_equal(engine_submit(rig.engine, &extra.request, 1, &err), STATUS_FULL);
    assert_true(engine_retry_after_s(rig.engine) >= 1);
    rig_run(&rig);
    for (int i = 0; i < QUEUE + 2; i++) {
        assert_int_equal(jobs[i].terminals, 1);
        assert_int_equal(jobs[i].count, 5);
        job_free(&jobs[i]);
    }
    rig_submit(&rig, &extra);
    rig_run(&rig);
    assert_int_equal(extra.count, 5);
    job_free(&extra);
    rig_assert_idle(&rig);
    rig_close(&rig);
}

// ------------------------------------------------------------------ early ends

// Catches: pages of a gone client kept longer than a step; a second terminal event.
static void cancel_frees_pages_at_the_next_step(void **state) {
    struct rig rig;
    struct job running, waiting, other;
    rig_open(&rig, (struct engine_options){.sequences_max = 2, .step_tokens_max = 64}, 40, NULL);
    job_init(&running, 1, 40, 50);
    job_adapter(&running, rig.adapters[3], 1);
    job_init(&other, 2, 10, 50);
    job_init(&waiting, 3, 10, 50);
    rig_submit(&rig, &running);
    rig_step(&rig); // or the base-only ones, with nothing to load, would pass it
    rig_submit(&rig, &other);
    rig_submit(&rig, &waiting);
    for (int i = 0; i < 5; i++) rig_step(&rig);
    assert_int_equal(atomic_load(&rig.metrics.running), 2);
    assert_int_equal(pages(&rig, PAGE_ADAPTER), 15);
    assert_int_equal(pages(&rig, PAGE_KV), 3 + 1); // 45 and 14 tokens computed
    engine_cancel(rig.engine, waiting.request);
    engine_cancel(rig.engine, running.request);
    engine_cancel(rig.engine, running.request);
    rig_step(&rig);
    assert_int_equal(running.terminals, 1);
    assert_int_equal(running.error, STATUS_CANCELLED);
    assert_int_equal(waiting.terminals, 1);
    assert_int_equal(waiting.count, 0);
    assert_int_equal(pages(&rig, PAGE_ADAPTER), 0);
    assert_int_equal(pages(&rig, PAGE_KV), 1);
    engine_cancel(rig.engine, running.request); // after its end: nothing happens
    rig_run(&rig);
    assert_int_equal(other.finish, FINISH_LENGTH);
    assert_int_equal(other.count, 50);
    rig_assert_idle(&rig);
    assert_int_equal(atomic_load(&rig.metrics.aborted), 2);
    job_free(&running);
    job_free(&waiting);
    job_free(&other);
    rig_close(&rig);
}

static void deadlines(void **state) {
    struct rig rig;
    struct job before, during, queued, fine;
    rig_open(&rig, (struct engine_options){.sequences_max = 2, .step_tokens_max = 64}, 40, NULL);
    job_init(&before, 1, 10, 50);
    before.request->deadline_s = 1e-9; // long ago
    job_init(&during, 2, 10, 50);
    during.request->deadline_s = 1e15; // never
    job_init(&fine, 3, 10, 50);
    job_init(&queued, 4, 10, 50);
    queued.request->deadline_s = 1e15;
    rig_submit(&rig, &before);
    rig_submit(&rig, &during);
    rig_submit(&rig, &fine);
    rig_submit(&rig, &queued);
    for (int i = 0; i < 4; i++) rig_step(&rig);
    assert_int_equal(before.error, STATUS_DEADLINE);
    assert_int_equal(before.count, 0);
    assert_int_equal(during.terminals, 0);
    during.request->deadline_s = 1e-9; // no thread runs, so the clock may be moved like this
    rig_step(&rig);
    assert_int_equal(during.error, STATUS_DEADLINE);
    assert_int_equal(during.count, 4);
    rig_run(&rig);
    assert_int_equal(fine.finish, FINISH_LENGTH);
    assert_int_equal(queued.finish, FINISH_LENGTH);
    assert_int_equal(atomic_load(&rig.metrics.failed), 2);
    rig_assert_idle(&rig);
    job_free(&before);
    job_free(&during);
    job_free(&fine);
    job_free(&queued);
    rig_close(&rig);
}

// Catches: early aborts that never come, that take the oldest, or that hit a queue in time.
static void hopeless_ones_end_early(void **state) {
    // On a machine five times slower than this expects, a fifth as many are in time.
    enum { JOBS = 300 };
    struct rig rig;
    static struct job jobs[JOBS];
    struct job patient;
    rig_open(&rig, (struct engine_options){.sequences_max = 1, .step_tokens_max = 64,
                                           .queue_max = JOBS, .first_token_slo_s = 2}, 60, NULL);
    struct error err = {0};
    int refused = 0;
    for (int i = 0; i < JOBS; i++) {
        job_init(&jobs[i], i, 4, 2);
        rig_submit(&rig, &jobs[i]); // nothing is known yet: all are taken
    }
    for (int i = 0; i < 8; i++) { // a request takes two steps: first tokens come every 20 ms
        rig_step(&rig);
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
    for (int i = 0; i < 40; i++) rig_step(&rig); // those who are left move up
    job_init(&patient, 99, 4, 2);
    assert_int_equal(engine_submit(rig.engine, &patient.request, 1, &err), STATUS_OK);
    rig_run(&rig);
    int oldest_refused = JOBS;
    for (int i = 0; i < JOBS; i++) {
        assert_int_equal(jobs[i].terminals, 1);
        if (jobs[i].error == STATUS_FULL) {
            refused++;
            if (i < oldest_refused) oldest_refused = i;
        }
        job_free(&jobs[i]);
    }
    assert_int_equal(patient.error, STATUS_OK); // the queue is short again
    assert_true(refused >= 20 && refused < JOBS - 4);
    assert_int_equal(refused, JOBS - oldest_refused); // the newest, and only they
    assert_int_equal(atomic_load(&rig.metrics.early_aborts), refused);
    job_free(&patient);
    rig_assert_idle(&rig);
    rig_close(&rig);
}

static void drains(void **state) {
    for (int late = 0; late < 2; late++) {
        struct rig rig;
        struct job jobs[4], refused;
        struct error err = {0};
        rig_open(&rig, (struct engine_options){.sequences_max = 2, .step_tokens_max = 64}, 40,
                 NULL);
        for (int i = 0; i < 4; i++) {
            job_init(&jobs[i], i, 10, 20);
            rig_submit(&rig, &jobs[i]);
        }
        for (int i = 0; i < 3; i++) rig_step(&rig);
        engine_drain(rig.engine, 1000);
        if (late) engine_drain(rig.engine, 0); // brings the deadline forward
        job_init(&refused, 9, 4, 4);
        assert_int_equal(engine_submit(rig.engine, &refused.request, 1, &err), STATUS_SHUTDOWN);
        assert_false(engine_drained(rig.engine));
        while (engine_step(rig.engine)) {
            assert_false(engine_drained(rig.engine));
            rig_poll(&rig);
        }
        assert_true(engine_drained(rig.engine));
        for (int i = 0; i < 4; i++) {
            assert_int_equal(jobs[i].terminals, 1);
            assert_int_equal(jobs[i].finish, late ? FINISH_ABORT : FINISH_LENGTH);
            assert_int_equal(jobs[i].error, late ? STATUS_SHUTDOWN : STATUS_OK);
            job_free(&jobs[i]);
        }
        job_free(&refused);
        rig_assert_idle(&rig);
        rig_close(&rig);
    }
}

// Catches: a broken device that goes on producing tokens, or leaves requests without an end.
static void device_failure_ends_everyone(void **state) {
    struct rig rig;
    struct job jobs[4];
    struct error err = {0};
    rig_open(&rig, (struct engine_options){.sequences_max = 2, .step_tokens_max = 64}, 40, NULL);
    for (int i = 0; i < 4; i++) job_init(&jobs[i], i, 10, 20);
    for (int i = 0; i < 3; i++) rig_submit(&rig, &jobs[i]);
    rig_step(&rig);
    assert_true(engine_healthy(rig.engine));
    atomic_store(&rig.backend->broken, true);
    rig_step(&rig);
    assert_false(engine_healthy(rig.engine));
    for (int i = 0; i < 3; i++) {
        assert_int_equal(jobs[i].terminals, 1);
        assert_int_equal(jobs[i].error, STATUS_DEVICE);
        assert_int_equal(jobs[i].count, i < 2 ? 1 : 0);
    }
    assert_int_equal(engine_submit(rig.engine, &jobs[3].request, 1, &err), STATUS_DEVICE);
    assert_false(rig_step(&rig));
    rig_assert_idle(&rig);
    for (int i = 0; i < 4; i++) job_free(&jobs[i]);
    rig_close(&rig);
}

// Catches: events lost, or the engine stuck for good, when nobody polls for a while.
static void slow_receiver_loses_nothing(void **state) {
    enum { N = 20 };
    struct rig rig;
    struct job jobs[N];
    rig_open(&rig, (struct engine_options){.sequences_max = 8, .step_tokens_max = 64,
                                           .queue_max = N}, 100, NULL);
    for (int i = 0; i < N; i++) {
        job_init(&jobs[i], i, 5, 60);
        rig_submit(&rig, &jobs[i]);
    }
    long long steps = -1;
    while (rig.backend->steps != steps) { // until it stops by itself, its queue being full
        steps = rig.backend->steps;
        assert_true(engine_step(rig.engine));
    }
    assert_true(atomic_load(&rig.metrics.running) > 0);
    assert_true(rig_poll(&rig) > 0);
    rig_run(&rig);
    for (int i = 0; i < N; i++) {
        assert_int_equal(jobs[i].count, 60);
        assert_int_equal(jobs[i].terminals, 1);
        job_free(&jobs[i]);
    }
    rig_close(&rig);
}

// ------------------------------------------------------------------ adapters

// Catches: an unloaded adapter that is taken from a request in flight, or whose pages stay; a
// request that moves to the generation that replaced its own.
// One that runs, one that waits and one that arrives later end; a neighbour's tokens stay the same.
static void forced_adapter_ends_its_requests_alone(void **state) {
    struct rig rig;
    struct job alone, other, running, waiting, late;
    rig_open(&rig, (struct engine_options){.sequences_max = 2, .step_tokens_max = 64}, 60, NULL);
    struct job *jobs[] = {&alone, &other, &running, &waiting, &late};
    for (int i = 0; i < 5; i++) {
        job_init(jobs[i], 1, 20, 20);
        job_adapter(jobs[i], rig.adapters[i < 2 ? 2 : 3], 1);
    }
    rig_submit(&rig, &alone);
    rig_run(&rig);
    rig_submit(&rig, &other);
    rig_submit(&rig, &running);
    rig_submit(&rig, &waiting);
    for (int i = 0; i < 3; i++) rig_step(&rig);
    atomic_store(&rig.adapters[3]->retired, true);
    engine_force_out(rig.engine, rig.adapters[3]);
    adapter_unref(rig.adapters[3]);
    rig.adapters[3] = NULL;
    rig_step(&rig);
    rig_submit(&rig, &late);
    rig_run(&rig);
    for (int i = 2; i < 5; i++) {
        assert_int_equal(jobs[i]->finish, FINISH_ABORT);
        assert_int_equal(jobs[i]->error, STATUS_NOT_FOUND);
    }
    assert_int_equal(other.finish, FINISH_LENGTH);
    assert_memory_equal(other.tokens, alone.tokens, 20 * sizeof *alone.tokens);
    for (int i = 0; i < 5; i++) job_free(jobs[i]);
    rig_step(&rig);
    assert_int_equal(pages(&rig, PAGE_KV), 0);
    assert_int_equal(pages(&rig, PAGE_ADAPTER), 0);
    rig_close(&rig);
}

static void retired_adapter_finishes_in_flight(void **state) {
    struct rig rig;
    struct job first, second, replaced, waiting;
    rig_open(&rig, (struct engine_options){.sequences_max = 2, .step_tokens_max = 64}, 60, NULL);
    job_init(&first, 1, 20, 20);
    job_adapter(&first, rig.adapters[3], 1);
    rig_submit(&rig, &first);
    rig_run(&rig);
    assert_int_equal(pages(&rig, PAGE_CACHED), 15);

    job_init(&second, 1, 20, 20);
    job_adapter(&second, rig.adapters[3], 1);
    job_init(&waiting, 1, 20, 20);
    job_adapter(&waiting, rig.adapters[3], 1);
    job_init(&replaced, 1, 20, 20);
    struct lora_geometry geometry = *engine_lora_geometry(rig.engine);
    struct adapter *newer = rig_adapter(&geometry, 16, 999);
    rig_submit(&rig, &second);
    for (int i = 0; i < 3; i++) rig_step(&rig);
    job_adapter(&replaced, newer, 1);
    rig_submit(&rig, &replaced);
    rig_submit(&rig, &waiting); // accepted before the unload, starts long after it
    atomic_store(&rig.adapters[3]->retired, true);
    adapter_unref(rig.adapters[3]);
    rig.adapters[3] = NULL;
    rig_run(&rig);
    rig_step(&rig);
    size_t bytes = 20 * sizeof *first.tokens;
    assert_memory_equal(second.tokens, first.tokens, bytes);
    assert_memory_equal(waiting.tokens, first.tokens, bytes);
    assert_memory_not_equal(replaced.tokens, first.tokens, bytes);
    assert_int_equal(pages(&rig, PAGE_CACHED), newer->page_count);
    atomic_store(&newer->retired, true);
    adapter_unref(newer);
    job_free(&first);
    job_free(&second);
    job_free(&replaced);
    job_free(&waiting);
    assert_false(rig_step(&rig)); // an idle step still sweeps
    assert_int_equal(pages(&rig, PAGE_FREE), 60);
    assert_int_equal(atomic_load(&rig.metrics.adapters_resident), 0);
    rig_close(&rig);
}

// Catches: idle adapters that keep others from running; requests behind one that cannot start.
static void idle_adapters_make_room(void **state) {
    struct rig rig;
    struct job jobs[RIG_ADAPTERS], large, small;
    rig_open(&rig, (struct engine_options){.sequences_max = 4, .step_tokens_max = 64}, 30, NULL);
    for (int i = 0; i < RIG_ADAPTERS; i++) { // 29 pages of adapters stay cached
        job_init(&jobs[i], i, 10, 4);
        job_adapter(&jobs[i], rig.adapters[i], 1);
        rig_submit(&rig, &jobs[i]);
        rig_run(&rig);
    }
    job_init(&large, 1, 200, 50); // 16 pages
    job_adapter(&large, rig.adapters[2], 1);
    rig_submit(&rig, &large);
    rig_step(&rig);
    assert_int_equal(atomic_load(&rig.metrics.running), 1);
    job_init(&small, 2, 10, 4); // base only: runs beside it at once
    struct job blocked;
    job_init(&blocked, 3, 10, 4); // 15 more pages: must wait, and hold nobody up
    job_adapter(&blocked, rig.adapters[3], 1);
    rig_submit(&rig, &blocked);
    rig_submit(&rig, &small);
    for (int i = 0; i < 6; i++) rig_step(&rig);
    assert_int_equal(small.finish, FINISH_LENGTH);
    assert_int_equal(blocked.count, 0);
    rig_run(&rig);
    assert_int_equal(blocked.finish, FINISH_LENGTH);
    assert_int_equal(large.count, 50);
    assert_true(atomic_load(&rig.metrics.adapter_evictions) > 0);
    rig_assert_idle(&rig);
    for (int i = 0; i < RIG_ADAPTERS; i++) job_free(&jobs[i]);
    job_free(&large);
    job_free(&small);
    job_free(&blocked);
    rig_close(&rig);
}

static void metrics_tell_the_step(void **state) {
    struct rig rig;
    struct job jobs[6];
    char running[1024], waiting[1024];
    rig_open(&rig, (struct engine_options){.sequences_max = 5, .step_tokens_max = 64}, 100, NULL);
    for (int i = 0; i < 6; i++) job_init(&jobs[i], i, 5, 10);
    job_adapter(&jobs[1], rig.adapters[0], 1);
    job_adapter(&jobs[2], rig.adapters[0], 0.5f);
    job_adapter(&jobs[3], rig.adapters[1], 1);
    job_adapter(&jobs[4], rig.adapters[0], 0.5f);
    job_adapter(&jobs[4], rig.adapters[2], 0.5f);
    job_adapter(&jobs[5], rig.adapters[3], 1);
    for (int i = 0; i < 6; i++) rig_submit(&rig, &jobs[i]);
    rig_step(&rig);
    assert_int_equal(atomic_load(&rig.metrics.running), 5);
    assert_int_equal(atomic_load(&rig.metrics.waiting), 1);
    assert_int_equal(atomic_load(&rig.metrics.step_tokens), 25);
    assert_int_equal(atomic_load(&rig.metrics.step_adapters), 3);
    metrics_names(&rig.metrics, running, waiting);
    assert_string_equal(running, "rank2-100,rank8-102,rank4-101");
    assert_string_equal(waiting, "rank16-103");
    rig_run(&rig);
    rig_step(&rig);
    metrics_names(&rig.metrics, running, waiting);
    assert_string_equal(running, "");
    assert_string_equal(waiting, "");
    assert_int_equal(atomic_load(&rig.metrics.prompt_tokens), 30);
    assert_int_equal(atomic_load(&rig.metrics.generation_tokens), 60);
    assert_int_equal(atomic_load(&rig.metrics.ttft.count), 6);
    assert_int_equal(atomic_load(&rig.metrics.itl.count), 54);
    assert_int_equal(atomic_load(&rig.metrics.e2e.count), 6);
    assert_int_equal(atomic_load(&rig.metrics.queue_time.count), 6);
    assert_int_equal(atomic_load(&rig.adapters[0]->requests), 3);
    assert_int_equal(atomic_load(&rig.adapters[0]->tokens), 30);
    rig_assert_idle(&rig);
    for (int i = 0; i < 6; i++) job_free(&jobs[i]);
    rig_close(&rig);
}

// ------------------------------------------------------------------ reasons to stop

// A greedy run without any reason to stop; the others are prefixes of it.
static void run_plain(struct rig *rig, struct job *job) {
    job_init(job, 21, 12, 60);
    rig_submit(rig, job);
    rig_run(rig);
    assert_int_equal(job->count, 60);
    job_free(job);
}

// The first place from `from` on where `id` stands, or the length.
static int find_id(const struct job *job, int32_t id, int from) {
    while (from < job->count && job->tokens[from] != id) from++;
    return from;
}

// Catches: an end id that is not the first to count, or counts too early, or not at all.
static void ends_at_ids(void **state) {
    struct rig rig;
    struct job plain;
    rig_open(&rig, roomy, 60, NULL);
    run_plain(&rig, &plain);
    int32_t id = plain.tokens[7];
    int first = find_id(&plain, id, 0);
    for (int eos = 0; eos < 2; eos++)
        for (int ignore = 0; ignore < 2; ignore++) {
            struct rig one;
            struct job job;
            rig_open(&one, roomy, 60, NULL);
            engine_destroy(one.engine);
            struct error err = {0};
            if (eos) one.config.eos_ids[one.config.eos_count++] = id;
            assert_int_equal(engine_create(one.ops, one.backend, one.model, &one.config, DTYPE_F32,
                                           NULL, &one.metrics, &one.options, &one.engine, &err),
                             STATUS_OK);
            job_init(&job, 21, 12, 60);
            job.request->sampling.ignore_eos = ignore;
            if (!eos) job.request->stop_ids[job.request->stop_id_count++] = id;
            rig_submit(&one, &job);
            rig_run(&one);
            bool goes_on = eos && ignore;
            assert_int_equal(job.finish, goes_on ? FINISH_LENGTH : FINISH_STOP);
            assert_int_equal(job.count, goes_on ? 60 : first + 1);
            assert_memory_equal(job.tokens, plain.tokens, (size_t)job.count * sizeof(int32_t));
            job_free(&job);

            job_init(&job, 21, 12, 60); // banned until min_tokens
            job.request->stop_ids[job.request->stop_id_count++] = id;
            job.request->sampling.min_tokens = first + 3;
            rig_submit(&one, &job);
            rig_run(&one);
            int at = find_id(&job, id, 0);
            assert_true(at >= first + 3);
            assert_memory_equal(job.tokens, plain.tokens, (size_t)first * sizeof(int32_t));
            assert_int_equal(job.finish, at < job.count ? FINISH_STOP : FINISH_LENGTH);
            job_free(&job);
            rig_close(&one);
        }
    rig_close(&rig);
}

// Where `stop` first ends in text that began to count at `from`, or the length.
static size_t find_end(const struct job *plain, const char *stop) {
    const char *at = strstr(plain->text, stop);
    return at ? (size_t)(at - plain->text) + strlen(stop) : plain->text_bytes;
}

// Catches: stop strings that are missed over token borders, text sent that should have been held
// back, text lost that was held back in vain, half characters in an event.
static void ends_at_strings(void **state) {
    struct rig rig;
    struct job plain;
    static const char never_read[1];
    const struct tokenizer *tokenizer = (const struct tokenizer *)never_read;
    rig_open(&rig, roomy, 60, tokenizer);
    run_plain(&rig, &plain);
    assert_true(plain.text_bytes > 40);
    int found = 0;
    for (size_t start = 0; start + 12 < plain.text_bytes; start += 1)
        for (int bytes = 1; bytes <= 9; bytes += 2)
            for (int include = 0; include < 2; include++) {
                char stop[16] = {0};
                memcpy(stop, plain.text + start, (size_t)bytes);
                if (!utf8_complete(stop, (size_t)bytes)) continue;
                struct job job;
                job_init(&job, 21, 12, 60);
                job.request->sampling.include_stop = include;
                job.request->stop[job.request->stop_count++] = mem_strdup("never\x01there");
                job.request->stop[job.request->stop_count++] = mem_strdup(stop);
                rig_submit(&rig, &job);
                rig_run(&rig);
                size_t end = find_end(&plain, stop) - (include ? 0 : (size_t)bytes);
                assert_int_equal(job.finish, FINISH_STOP);
                assert_int_equal(job.text_bytes, end);
                assert_memory_equal(job.text, plain.text, end);
                found++;
                job_free(&job);
            }
    assert_true(found > 100);
    // Held back in vain: the text ends with the beginning of a stop string.
    struct job job;
    char tail[64];
    size_t keep = 8;
    while (!utf8_complete(plain.text + plain.text_bytes - keep, keep)) keep--;
    snprintf(tail, sizeof tail, "%.*s and more", (int)keep,
             plain.text + plain.text_bytes - keep);
    job_init(&job, 21, 12, 60);
    job.request->stop[job.request->stop_count++] = mem_strdup(tail);
    rig_submit(&rig, &job);
    rig_run(&rig);
    assert_int_equal(job.finish, FINISH_LENGTH);
    assert_int_equal(job.text_bytes, plain.text_bytes);
    assert_memory_equal(job.text, plain.text, plain.text_bytes);
    job_free(&job);
    rig_close(&rig);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refuses_what_never_fits),
        cmocka_unit_test(refuses_when_the_queue_is_full),
        cmocka_unit_test(cancel_frees_pages_at_the_next_step),
        cmocka_unit_test(deadlines),
        cmocka_unit_test(drains),
        cmocka_unit_test(hopeless_ones_end_early),
        cmocka_unit_test(device_failure_ends_everyone),
        cmocka_unit_test(slow_receiver_loses_nothing),
        cmocka_unit_test(retired_adapter_finishes_in_flight),
        cmocka_unit_test(forced_adapter_ends_its_requests_alone),
        cmocka_unit_test(idle_adapters_make_room),
        cmocka_unit_test(metrics_tell_the_step),
        cmocka_unit_test(ends_at_ids),
        cmocka_unit_test(ends_at_strings),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
