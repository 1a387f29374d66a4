// Adapters that come from disk and go again, prefixes that are shared, and a pool in which not
// everybody fits, under requests whose results are known: what each gets alone, to the last bit,
// without a prefix cache and with every adapter loaded. The engine asserts its accounts in every
// step here (preempt_every > 0), each page's tag before every forward pass.
#include "engine_rig.h"

#include <unistd.h>

enum { ADAPTERS = 7, KINDS = 24, PROMPT_GROUPS = 3 };
static const int ranks[ADAPTERS] = {2, 4, 4, 8, 8, 16, 3};

// A kind is a request: its prompt, length, adapters and salt.
struct kind {
    int prompt, output, group, adapters[2], adapter_count;
    const char *salt;
};
static struct kind kinds[KINDS];
static struct job alone[KINDS];
static struct adapter *adapters[ADAPTERS];
static struct lora_geometry geometry;

static void adapters_open(const struct lora_geometry *from) {
    geometry = *from; // loaders outlive no engine, but the records do
    geometry.pool_pages = 1000;
    geometry.host_bytes_max = 0;
    for (int i = 0; i < ADAPTERS; i++) {
        char name[16], source[64];
        snprintf(name, sizeof name, "a%d", i);
        snprintf(source, sizeof source, "dummy:rank=%d,seed=%d", ranks[i], 100 + (i == 2 ? 1 : i));
        assert_int_equal(adapter_open(&geometry, name, -1, source, &adapters[i], NULL), STATUS_OK);
        if (i < 4) continue; // the others are activated ones: by a token that prompts of a group have
        adapters[i]->invocation = mem_zalloc(1, sizeof *adapters[i]->invocation);
        adapters[i]->invocation->count = 1;
        adapters[i]->invocation->tokens[0] =
            (int32_t)(philox_word(i % PROMPT_GROUPS, 9 + 11 * (i - 4)) % RIG_VOCABULARY);
    }
}

static void adapters_close(void) {
    for (int i = 0; i < ADAPTERS; i++) {
        assert_int_equal(atomic_load(&adapters[i]->refs), 1);
        adapter_unref(adapters[i]);
    }
}

// Prompts of one group begin alike, for longer or shorter.
static void job_of(struct job *job, int k) {
    const struct kind *kind = &kinds[k];
    job_init(job, kind->group, kind->prompt, kind->output);
    for (int i = kind->prompt * 3 / 4; i < kind->prompt; i++)
        job->request->prompt[i] = (job->request->prompt[i] + k) % RIG_VOCABULARY;
    for (int i = 0; i < kind->adapter_count; i++) {
        job_adapter(job, adapters[kind->adapters[i]], i ? 0.5f : 1);
        if (kind->adapters[i] == 2 && k % 3 > 0) // 1 and 2 are the same but for their names
            job->request->twins[i] = adapter_ref(adapters[1]);
    }
    if (kind->salt) job->request->cache_salt = mem_strdup(kind->salt);
}

static void kinds_make(void) {
    for (int k = 0; k < KINDS; k++) {
        kinds[k] = (struct kind){.prompt = 1 + (int)(philox_word(9, k) % 90),
                                 .output = 1 + (int)(philox_word(10, k) % 24),
                                 .group = k % PROMPT_GROUPS,
                                 .salt = k % 5 == 4 ? "salted" : NULL};
        if (k % 4 == 0) continue; // the base model
        kinds[k].adapters[kinds[k].adapter_count++] = (int)(philox_word(11, k) % ADAPTERS);
        if (k % 8 == 7) kinds[k].adapters[kinds[k].adapter_count++] = k % ADAPTERS;
    }
}

static int run_alone(void **state) {
    (void)state;
    kinds_make();
    for (int k = 0; k < KINDS; k++) {
        struct rig rig;
        rig_open(&rig, (struct engine_options){.sequences_max = 4, .step_tokens_max = 256}, 200,
                 NULL);
        adapters_open(engine_lora_geometry(rig.engine));
        job_of(&alone[k], k);
        rig_submit(&rig, &alone[k]);
        rig_run(&rig);
        assert_int_equal(alone[k].terminals, 1);
        job_free(&alone[k]);
        rig_close(&rig);
        adapters_close();
    }
    return 0;
}

static void assert_as_alone(const struct job *job, int k, const char *what) {
    bool same = job->terminals == 1 && job->error == STATUS_OK && job->count == alone[k].count;
    for (int t = 0; same && t < job->count; t++)
        same = job->tokens[t] == alone[k].tokens[t] && job->logprobs[t] == alone[k].logprobs[t];
    if (!same) fail_msg("%s: a request of kind %d differs from its run alone", what, k);
}

// Steps until nobody is inside; where loaders have threads, an idle step waits for them.
static long run_all(struct rig *rig, long steps_max) {
    long steps = 0;
    for (; atomic_load(&rig->metrics.waiting) + atomic_load(&rig->metrics.running) > 0 ||
           steps == 0;
         steps++) {
        assert_true(steps < steps_max);
        if (!rig_step(rig) && rig->options.load_threads > 0) usleep(100);
    }
    return steps;
}

static size_t image_bytes_of_all(void) {
    size_t bytes = 0;
    for (int i = 0; i < ADAPTERS; i++) bytes += adapters[i]->image_bytes;
    return bytes;
}

// Catches, on random arrivals in small pools with little host memory: a page of another sequence,
// another scope or another adapter; a prefix that outlives its adapter's pages; pages, references
// or reservations that stay behind; waiting without end.
static void random_traffic(void **state) {
    (void)state;
    static const struct {
        int pages, sequences, step_tokens, threads, host_share, preempt_every;
        enum engine_preemption preemption;
        bool prefixes;
    } worlds[] = {
        {60, 6, 64, 0, 100, 1000, PREEMPTION_AUTO, true},
        {30, 6, 64, 0, 40, 7, PREEMPTION_RECOMPUTE, true},
        {26, 4, 16, 0, 30, 5, PREEMPTION_SWAP, true},
        {200, 16, 96, 0, 150, 3, PREEMPTION_SWAP, false},
        {30, 6, 64, 2, 60, 7, PREEMPTION_SWAP, true},
        {60, 8, 64, 1, 35, 11, PREEMPTION_RECOMPUTE, true},
    };
    enum { INSIDE = 20, REQUESTS = 1200 };
    long steps = 0;
    uint64_t hits = 0, loads = 0, reads = 0, swaps = 0;
    for (size_t w = 0; w < sizeof worlds / sizeof *worlds; w++) {
        struct rig rig;
        // Opened twice: the first tells the geometry, and so what share of the images is.
        rig_open(&rig, (struct engine_options){.sequences_max = 4, .step_tokens_max = 16}, 60, NULL);
        adapters_open(engine_lora_geometry(rig.engine));
        rig_close(&rig);
        size_t host_bytes = image_bytes_of_all() * (size_t)worlds[w].host_share / 100;
        rig_open(&rig, (struct engine_options){.sequences_max = worlds[w].sequences,
                                               .step_tokens_max = worlds[w].step_tokens,
                                               .speculation = SPECULATION_ALWAYS,
                                               .prefix_cache = worlds[w].prefixes,
                                               .preemption = worlds[w].preemption,
                                               .host_bytes = host_bytes,
                                               .load_threads = worlds[w].threads,
                                               .preempt_every = worlds[w].preempt_every},
                 worlds[w].pages, NULL);
        static struct job jobs[INSIDE];
        int kind_of[INSIDE], sent = 0, ended = 0;
        bool inside[INSIDE] = {false};
        unsigned seed = (unsigned)w + 1;
        while (ended < REQUESTS) {
            int at = (int)(rand_r(&seed) % INSIDE);
            if (!inside[at] && sent < REQUESTS) {
                kind_of[at] = (int)(rand_r(&seed) % KINDS);
                job_of(&jobs[at], kind_of[at]);
                jobs[at].request->priority = (int)(rand_r(&seed) % 3);
                rig_submit(&rig, &jobs[at]);
                inside[at] = true;
                sent++;
            } else if (inside[at] && rand_r(&seed) % 200 == 0) {
                engine_cancel(rig.engine, jobs[at].request);
            }
            steps++;
            if (!rig_step(&rig) && worlds[w].threads > 0) usleep(50);
            for (int i = 0; i < INSIDE; i++) {
                if (!inside[i] || jobs[i].terminals == 0) continue;
                if (jobs[i].error != STATUS_CANCELLED)
                    assert_as_alone(&jobs[i], kind_of[i], "random traffic");
                job_free(&jobs[i]);
                inside[i] = false;
                ended++;
            }
        }
        run_all(&rig, 10);
        rig_assert_idle(&rig);
        hits += atomic_load(&rig.metrics.prefix_hits);
        loads += atomic_load(&rig.metrics.adapter_loads);
        reads += atomic_load(&rig.metrics.host_reads);
        swaps += atomic_load(&rig.metrics.swaps);
        rig_close(&rig);
        adapters_close();
    }
    print_message("%ld steps, %llu tokens from the prefix cache, %llu loads, %llu reads, %llu swaps\n",
                  steps, (unsigned long long)hits, (unsigned long long)loads,
                  (unsigned long long)reads, (unsigned long long)swaps);
    assert_true(steps > 100000 && hits > 1000 && loads > 100 && reads > 60 && swaps > 100);
}

// Catches: a cold request that waits for ever because others keep the pages busy; a stream of
// resident ones that stops for it.
static void the_cold_one_has_its_turn(void **state) {
    (void)state;
    struct rig rig;
    rig_open(&rig, (struct engine_options){.sequences_max = 4, .step_tokens_max = 64,
                                           .preempt_every = 1000000}, 26, NULL);
    adapters_open(engine_lora_geometry(rig.engine));
    struct job big, stream[400];
    int sent = 0, ended_before = 0;
    job_init(&big, 1, 40, 20);
    job_adapter(&big, adapters[5], 1); // rank 16: 15 of 26 pages
    for (int step = 0; !big.terminals; step++) {
        assert_true(step < 4000);
        while (sent < 400 && atomic_load(&rig.metrics.waiting) < 6) {
            job_init(&stream[sent], sent, 60, 12);
            job_adapter(&stream[sent], adapters[sent % 2 ? 3 : 4], 1); // rank 8: 8 pages each
            rig_submit(&rig, &stream[sent++]);
            if (sent == 8) rig_submit(&rig, &big);
            engine_step(rig.engine); // so that `waiting` is as it is
            rig_poll(&rig);
        }
        rig_step(&rig);
    }
    for (int i = 0; i < sent; i++) ended_before += stream[i].terminals;
    assert_true(ended_before > 8); // others went on meanwhile
    assert_true(sent < 400);       // and it did not wait for the end of the stream
    run_all(&rig, 100000);
    for (int i = 0; i < sent; i++) {
        assert_int_equal(stream[i].error, STATUS_OK);
        job_free(&stream[i]);
    }
    job_free(&big);
    rig_assert_idle(&rig);
    rig_close(&rig);
    adapters_close();
}

// Catches: a failed read that ends others, that leaves something behind, or that is for ever.
static void a_failed_read_ends_its_requests_alone(void **state) {
    (void)state;
    // With loaders it depends on their haste whether the pages were there before the read failed.
    for (int round = 0; round < 5; round++) {
        int threads = round == 0 ? 0 : 2;
        struct rig rig;
        rig_open(&rig, (struct engine_options){.sequences_max = 8, .step_tokens_max = 64,
                                               .load_threads = threads, .preempt_every = 100000},
                 100, NULL);
        adapters_open(engine_lora_geometry(rig.engine));
        struct job jobs[4];
        for (int i = 0; i < 4; i++) {
            job_init(&jobs[i], i, 20, 8);
            if (i > 0) job_adapter(&jobs[i], adapters[i == 3 ? 1 : i], 1); // 1, 2, 1
        }
        char *path = adapters[1]->path, gone[] = "/nonexistent/adapter";
        adapters[1]->path = gone;
        for (int i = 0; i < 4; i++) rig_submit(&rig, &jobs[i]);
        log_configure(LOG_ERROR + 1, false);
        run_all(&rig, 100000);
        assert_int_equal(jobs[0].error, STATUS_OK);
        assert_int_equal(jobs[2].error, STATUS_OK);
        assert_int_equal(jobs[1].error, STATUS_IO);
        assert_int_equal(jobs[3].error, STATUS_IO);
        assert_int_equal(atomic_load(&adapters[1]->tier), ADAPTER_ON_DISK);
        rig_assert_idle(&rig);
        adapters[1]->path = path; // the files are back: so is the adapter
        struct job again;
        job_init(&again, 1, 20, 8);
        job_adapter(&again, adapters[1], 1);
        rig_submit(&rig, &again);
        run_all(&rig, 100000);
        assert_int_equal(again.error, STATUS_OK);
        assert_int_equal(again.count, 8);
        for (int i = 0; i < 4; i++) job_free(&jobs[i]);
        job_free(&again);
        rig_close(&rig);
        adapters_close();
    }
    log_configure(LOG_WARN, false);
}

// Catches: hints that do nothing, that evict, or that keep a reference.
static void hints_bring_adapters(void **state) {
    (void)state;
    struct rig rig;
    rig_open(&rig, (struct engine_options){.sequences_max = 4, .step_tokens_max = 64}, 26, NULL);
    adapters_open(engine_lora_geometry(rig.engine));
    assert_int_equal(engine_prefetch(rig.engine, adapters[5], NULL), STATUS_OK); // 15 pages
    assert_int_equal(engine_prefetch(rig.engine, adapters[3], NULL), STATUS_OK); // 8 pages
    assert_int_equal(engine_prefetch(rig.engine, adapters[4], NULL), STATUS_OK); // 8: no room
    for (int i = 0; i < 3; i++) rig_step(&rig);
    int resident = 0;
    for (int i = 3; i < 6; i++) resident += atomic_load(&adapters[i]->resident);
    assert_int_equal(resident, 2);
    for (int i = 3; i < 6; i++) assert_int_equal(atomic_load(&adapters[i]->tier), ADAPTER_IN_HOST);
    assert_int_equal(atomic_load(&rig.metrics.pages[PAGE_ADAPTER]), 0);
    rig_step(&rig);
    // A pinned one stays when another must go.
    atomic_store(&adapters[3]->pinned, true);
    assert_int_equal(engine_prefetch(rig.engine, adapters[3], NULL), STATUS_OK);
    rig_step(&rig);
    struct job job;
    job_init(&job, 1, 20, 4);
    job_adapter(&job, adapters[4], 1);
    rig_submit(&rig, &job);
    run_all(&rig, 1000);
    assert_int_equal(job.error, STATUS_OK);
    job_free(&job);
    if (atomic_load(&adapters[3]->tier) == ADAPTER_IN_HOST)
        assert_true(atomic_load(&adapters[3]->resident));
    rig_close(&rig);
    adapters_close();
}

// Catches: hits that are not reported, and hits across salts, adapters or generations.
static void hits_are_told_and_kept_apart(void **state) {
    (void)state;
    struct rig rig;
    rig_open(&rig, (struct engine_options){.sequences_max = 4, .step_tokens_max = 64,
                                           .speculation = SPECULATION_ALWAYS,
                                           .prefix_cache = true, .preempt_every = 100000}, 200,
             NULL);
    adapters_open(engine_lora_geometry(rig.engine));
    struct adapter *again = NULL; // the same content under another generation
    assert_int_equal(adapter_open(&geometry, "a0", -1, adapters[0]->path, &again, NULL), STATUS_OK);
    const struct {
        struct adapter *adapter;
        const char *salt, *tenant;
        int hits; // of 48 tokens
        float weight;
    } asked[] = {
        {NULL, NULL, "", 0, 1},          {NULL, NULL, "", 32, 1},          {NULL, "x", "", 0, 1},
        {NULL, "x", "", 32, 1},          {NULL, NULL, "them", 0, 1},       {adapters[0], NULL, "", 0, 1},
        {adapters[0], NULL, "", 32, 1},  {adapters[1], NULL, "", 0, 1},    {again, NULL, "", 0, 1},
        {NULL, NULL, "them", 32, 1},     {adapters[0], NULL, "", 0, 0.5f}, {adapters[0], NULL, "", 32, 0.5f},
    };
    uint64_t before = 0;
    for (size_t i = 0; i < sizeof asked / sizeof *asked; i++) {
        struct job job;
        job_init(&job, 1, 48, 3);
        if (asked[i].adapter) job_adapter(&job, asked[i].adapter, asked[i].weight);
        if (asked[i].salt) job.request->cache_salt = mem_strdup(asked[i].salt);
        snprintf(job.request->tenant, sizeof job.request->tenant, "%s", asked[i].tenant);
        rig_submit(&rig, &job);
        run_all(&rig, 1000);
        uint64_t now = atomic_load(&rig.metrics.prefix_hits);
        if ((int)(now - before) != asked[i].hits)
            fail_msg("request %zu: %d tokens from the cache, %d expected", i, (int)(now - before),
                     asked[i].hits);
        before = now;
        job_free(&job);
    }
    rig_close(&rig);
    adapter_unref(again);
    adapters_close();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_traffic),
        cmocka_unit_test(the_cold_one_has_its_turn),
        cmocka_unit_test(a_failed_read_ends_its_requests_alone),
        cmocka_unit_test(hints_bring_adapters),
        cmocka_unit_test(hits_are_told_and_kept_apart),
    };
    return cmocka_run_group_tests(tests, run_alone, NULL);
}
