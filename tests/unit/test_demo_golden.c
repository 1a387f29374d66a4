// demo/model and demo/adapters on the CPU backend in f32 against transformers + PEFT: logits to
// 1e-4, greedy tokens exactly, tokenizer ids exactly; each case alone, and all of them mixed, in
// chunks, in small pools and under forced preemption. A greedy token may differ only where the
// reference's two best logits lie within 1e-4; such places are counted and printed.
#include "demo_rig.h"

static const struct backend_ops *const ops = &backend_cpu;
static const double tolerance = 1e-4;
static struct demo demo; // opened once; the tests leave it as it was

static int open_demo(void **state) {
    demo_open(&demo, ops);
    return 0;
}

static int close_demo(void **state) {
    demo_close(&demo);
    return 0;
}

// ------------------------------------------------------------------ tokenizer

struct tokenizer_lines {
    json_t *strings;
    size_t at;
};

static void take_string(void *context, const json_t *line) {
    struct tokenizer_lines *lines = context;
    json_array_append(lines->strings, (json_t *)line);
}

static void expect_ids(const char *what, size_t line, const struct token_list *got,
                       const json_t *ids, size_t skip) {
    bool same = got->count == json_array_size(ids) + skip;
    for (size_t i = 0; same && i < json_array_size(ids); i++)
        same = got->ids[i + skip] == json_integer_value(json_array_get(ids, i));
    if (!same) fail_msg("line %zu of strings.jsonl: %s differ", line + 1, what);
}

static void check_string(void *context, const json_t *expected) {
    struct tokenizer_lines *lines = context;
    const json_t *string = json_array_get(lines->strings, lines->at);
    const char *text = json_string_value(string);
    size_t bytes = json_string_length(string), decoded_bytes;
    json_t *ids = json_object_get(expected, "ids"), *decoded = json_object_get(expected, "text");
    struct token_list list;
    struct error err = {0};
    if (tokenizer_encode(demo.tokenizer, text, bytes, false, true, &list, &err) != STATUS_OK)
        fail_msg("%s", err.text);
    expect_ids("ids", lines->at, &list, ids, 0);
    char *back = tokenizer_decode(demo.tokenizer, list.ids, list.count, true, &decoded_bytes);
    if (decoded) string = decoded;
    assert_int_equal(decoded_bytes, json_string_length(string));
    assert_memory_equal(back, json_string_value(string), decoded_bytes);
    free(back);
    free(list.ids);
    if (tokenizer_encode(demo.tokenizer, text, bytes, true, true, &list, &err) != STATUS_OK)
        fail_msg("%s", err.text);
    expect_ids("ids after BOS", lines->at, &list, ids, 1);
    assert_int_equal(list.ids[0], demo.config.bos_id);
    free(list.ids);
    lines->at++;
}

// Catches: a regex, merge, special token or byte of the demo's tokenizer read wrongly.
static void tokenizer_ids(void **state) {
    struct tokenizer_lines lines = {.strings = json_array()};
    demo_lines(LORAD_SOURCE_DIR "/tests/fixtures/tokenizers/strings.jsonl", take_string, &lines);
    demo_lines(DEMO_FIXTURES "/tokenizer.jsonl", check_string, &lines);
    assert_int_equal(lines.at, json_array_size(lines.strings));
    assert_true(lines.at >= 1000);
    json_decref(lines.strings);
}

// ------------------------------------------------------------------ logits

static double worst; // the largest difference of a logit so far

static const float *expect_logits(const struct demo_case *c, const float *got) {
    int vocabulary = demo.config.vocabulary;
    for (int p = 0; p < c->position_count; p++, got += vocabulary)
        for (int v = 0; v < vocabulary; v++) {
            double wanted = c->logits[p * vocabulary + v], difference = fabs(got[v] - wanted);
            if (!(difference <= tolerance))
                fail_msg("%s, position %d: logit %d is %.6f, expected %.6f", c->label,
                         c->positions[p], v, (double)got[v], wanted);
            worst = fmax(worst, difference);
        }
    return got;
}

// The goldens must tell adapters apart, or the tests below would pass with the wrong adapter.
static void goldens_tell_adapters_apart(void **state) {
    assert_true(demo.adapter_count >= 6);
    int compared = 0;
    for (int i = 0; i < demo.case_count; i++)
        for (int j = 0; j < i; j++) {
            const struct demo_case *a = &demo.cases[i], *b = &demo.cases[j];
            if (a->prompt_count != b->prompt_count ||
                memcmp(a->prompt, b->prompt, (size_t)a->prompt_count * sizeof *a->prompt) != 0)
                continue;
            double apart = 0;
            size_t last = (size_t)(a->position_count - 1) * (size_t)demo.config.vocabulary;
            size_t other = (size_t)(b->position_count - 1) * (size_t)demo.config.vocabulary;
            for (int v = 0; v < demo.config.vocabulary; v++)
                apart = fmax(apart, fabs((double)a->logits[last + (size_t)v] -
                                         (double)b->logits[other + (size_t)v]));
            if (apart < 0.1) fail_msg("%s and %s: logits %g apart", a->label, b->label, apart);
            compared++;
        }
    assert_true(compared > 100);
}

static struct demo_step step;

static void logits_alone(void **state) {
    struct demo_pool pool;
    demo_pool_open(&demo, &pool);
    int kv_first = pool.next;
    for (int i = 0; i < demo.case_count; i++) {
        memset(&step, 0, sizeof step);
        pool.next = kv_first;
        demo_step_add(&step, &pool, &demo.cases[i]);
        expect_logits(&demo.cases[i], demo_step_run(&demo, &step));
    }
    demo_pool_close(&demo, &pool);
    print_message("%d cases, largest difference of a logit %g\n", demo.case_count, worst);
}

// Catches: a segment, span, row or page that is another sequence's. `stride` is coprime to the
// number of cases, so that neighbours have different adapters and prompts.
static void logits_all_in_one_step(void **state) {
    static const int strides[] = {1, 7, 31};
    for (size_t s = 0; s < sizeof strides / sizeof *strides; s++) {
        struct demo_pool pool;
        demo_pool_open(&demo, &pool);
        memset(&step, 0, sizeof step);
        bool added[DEMO_CASES_MAX] = {0};
        int order[DEMO_CASES_MAX];
        for (int i = 0, at = 0; i < demo.case_count; i++, at = (at + strides[s]) % demo.case_count) {
            while (added[at]) at = (at + 1) % demo.case_count;
            added[at] = true;
            order[i] = at;
            demo_step_add(&step, &pool, &demo.cases[at]);
        }
        const float *logits = demo_step_run(&demo, &step);
        for (int i = 0; i < demo.case_count; i++)
            logits = expect_logits(&demo.cases[order[i]], logits);
        demo_pool_close(&demo, &pool);
    }
    print_message("largest difference of a logit %g\n", worst);
}

// ------------------------------------------------------------------ greedy tokens

// Returns whether the two ways part at a place where the reference cannot tell them apart.
static bool expect_tokens(const struct demo_job *job, const char *world) {
    const struct demo_case *c = job->wanted;
    assert_true(job->ended);
    assert_int_equal(job->count, DEMO_GREEDY);
    for (int i = 0; i < DEMO_GREEDY; i++) {
        if (job->tokens[i] == c->tokens[i]) continue;
        if (c->gaps[i] > tolerance)
            fail_msg("%s: %s: token %d is %d, expected %d (logits %g apart)", world, c->label, i,
                     job->tokens[i], c->tokens[i], c->gaps[i]);
        print_message("%s: %s: token %d parts, logits %g apart\n", world, c->label, i, c->gaps[i]);
        return true;
    }
    size_t bytes;
    char *text = tokenizer_decode(demo.tokenizer, c->tokens, DEMO_GREEDY, true, &bytes);
    if (bytes != job->text_bytes || memcmp(text, job->text, bytes) != 0)
        fail_msg("%s: %s: text is \"%.*s\", expected \"%s\"", world, c->label,
                 (int)job->text_bytes, job->text, text);
    free(text);
    return false;
}

struct world {
    const char *what;
    int sequences, step_tokens, pages, preempt_every;
};

static struct engine *engine_open(const struct world *world, struct metrics *metrics) {
    size_t page_bytes = demo.geometry.page_elems * 4 * (size_t)demo.config.layers;
    struct engine_options options = {
        .sequences_max = world->sequences, .step_tokens_max = world->step_tokens,
        .queue_max = DEMO_CASES_MAX, .context_max = DEMO_CONTEXT,
        .pool_bytes = page_bytes * (size_t)world->pages, .preempt_every = world->preempt_every};
    struct engine *engine;
    struct error err = {0};
    if (engine_create(ops, demo.backend, demo.model, &demo.config, DTYPE_F32, demo.tokenizer,
                      metrics, &options, &engine, &err) != STATUS_OK)
        fail_msg("%s: %s", world->what, err.text);
    return engine;
}

static void submit(struct engine *engine, struct demo_job *job) {
    struct error err = {0};
    if (engine_submit(engine, &job->request, 1, &err) != STATUS_OK)
        fail_msg("%s: %s", job->wanted->label, err.text);
}

static void greedy_alone(void **state) {
    static const struct world alone = {"alone", 1, 256, 400, 0};
    struct metrics metrics = {0};
    struct engine *engine = engine_open(&alone, &metrics);
    int ties = 0;
    for (int i = 0; i < demo.case_count; i++) {
        struct demo_job job;
        demo_job_open(&job, &demo.cases[i]);
        submit(engine, &job);
        demo_engine_run(engine);
        ties += expect_tokens(&job, alone.what);
        request_destroy(job.request);
    }
    engine_destroy(engine);
    print_message("%d cases, %d parted at a tie\n", demo.case_count, ties);
}

// Catches: chunked prefill, adapter swapping and preemption that change what a request gets.
static void greedy_in_any_mix(void **state) {
    static const struct world worlds[] = {
        {"all at once", DEMO_CASES_MAX, 4096, DEMO_PAGES, 0},
        {"chunks of 64", DEMO_CASES_MAX, 64, DEMO_PAGES, 0},
        {"chunks of 17, 8 sequences", 8, 17, 400, 0},
        {"one token a step", 2, 1, 300, 0},
        {"preempting every 5 steps", 24, 128, DEMO_PAGES, 5},
        {"preempting every 2 steps", 6, 33, 400, 2},
        {"adapters pushed out of a small pool", 16, 256, 130, 0},
        {"small pool, preempting every 3 steps", 12, 48, 130, 3},
    };
    static struct demo_job jobs[DEMO_CASES_MAX];
    for (size_t w = 0; w < sizeof worlds / sizeof *worlds; w++) {
        struct metrics metrics = {0};
        struct engine *engine = engine_open(&worlds[w], &metrics);
        int ties = 0;
        unsigned random = 17 + (unsigned)w;
        int order[DEMO_CASES_MAX];
        for (int i = 0; i < demo.case_count; i++) {
            int j = (int)(rand_r(&random) % (unsigned)(i + 1));
            order[i] = order[j];
            order[j] = i;
        }
        for (int i = 0; i < demo.case_count; i++) {
            demo_job_open(&jobs[i], &demo.cases[order[i]]);
            submit(engine, &jobs[i]);
        }
        demo_engine_run(engine);
        for (int i = 0; i < demo.case_count; i++) {
            ties += expect_tokens(&jobs[i], worlds[w].what);
            request_destroy(jobs[i].request);
        }
        int preemptions = (int)atomic_load(&metrics.preemptions);
        int loads = (int)atomic_load(&metrics.adapter_loads);
        print_message("%s: %d parted at a tie, %d preemptions, %d adapter loads, up to %d adapters "
                      "in a step\n", worlds[w].what, ties, preemptions, loads,
                      atomic_load(&metrics.step_adapters_max));
        if (worlds[w].preempt_every > 0) assert_true(preemptions > 10);
        if (worlds[w].pages < 200) assert_true(loads > demo.adapter_count);
        if (worlds[w].sequences == DEMO_CASES_MAX)
            assert_int_equal(atomic_load(&metrics.step_adapters_max), demo.adapter_count);
        engine_destroy(engine);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tokenizer_ids),
        cmocka_unit_test(goldens_tell_adapters_apart),
        cmocka_unit_test(logits_alone),
        cmocka_unit_test(logits_all_in_one_step),
        cmocka_unit_test(greedy_alone),
        cmocka_unit_test(greedy_in_any_mix),
    };
    return cmocka_run_group_tests(tests, open_demo, close_demo);
}
