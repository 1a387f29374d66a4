// The forward pass against HF transformers + PEFT (tests/reference/make_tiny_models.py): logits in
// f32 to 1e-4 and greedy tokens exactly, for each architecture variant and adapter, alone, in
// chunks, and in batches of everything at once. Then the weights that must be refused, and dummy
// weights. `plain` is the tests' own backend in plain C: what fails there is wrong in the model, what
// fails with backend_cpu alone is wrong in kernels/cpu.
#include "model_rig.h"
#include "plain_backend.h"

#include <sys/stat.h>
#include <unistd.h>

static const struct fixture {
    const char *name, *adapters[RIG_ADAPTERS_MAX]; // adapters in order of name
} fixtures[] = {
    {"mha", {"every", "qv"}},          {"gqa_tied", {"patterns", "rslora"}},
    {"llama3_rope", {"every"}},        {"linear_rope", {"qv"}},
    {"wide_head", {"every", "one_layer"}}, {"mistral", {"rslora"}},
    {"bf16_stored", {"qv"}},           {"f16_stored", {"every"}},
    {"sharded", {"qv"}},
};
enum { FIXTURES = sizeof fixtures / sizeof *fixtures };

#ifdef LORAD_EMULATE // whole models on the CUDA backend's kernels: tests/emulation
#define TESTED_BACKEND backend_cuda
static const struct backend_ops *const backends[] = {&backend_cuda};
#else
#define TESTED_BACKEND backend_cpu
static struct backend_ops blocked_backend; // the CPU's, with the FFN in blocks of few rows
static const struct backend_ops *const backends[] = {&plain_backend, &backend_cpu, &blocked_backend};
#endif
enum { BACKENDS = sizeof backends / sizeof *backends };

static void open_fixture(struct model_rig *rig, const struct backend_ops *ops, int i) {
    rig_open(rig, ops, DTYPE_F32, fixtures[i].name, fixtures[i].adapters);
}

static bool within_1e_4(struct model_rig *rig, const struct run *run, const float *logits,
                        const float *expected) {
    for (int i = 0; i < rig->config.vocabulary; i++) {
        double difference = fabs((double)logits[i] - (double)expected[i]);
        if (!(difference <= rig->worst)) rig->worst = difference;
        if (!(difference <= 1e-4)) return false; // NaN fails too
    }
    return true;
}

// "base", the fixture's adapters, and "mix" where there is one; NULL beyond.
static const char *variant_at(const struct model_rig *rig, int i) {
    if (i == 0) return "base";
    if (i <= rig->adapter_count) return rig->adapter_names[i - 1];
    return i == rig->adapter_count + 1 && rig_has(rig, "mix") ? "mix" : NULL;
}

static void decode(struct model_rig *rig, struct run *runs, int count) {
    int ones[RUNS_MAX];
    for (int i = 0; i < count; i++) ones[i] = 1;
    for (int token = 1; token < GREEDY; token++) rig_step(rig, runs, ones, count, within_1e_4);
    for (int i = 0; i < count; i++) expect_greedy(rig, &runs[i]);
}

// One sequence a step: a wrong layer, scale, rope or mask shows here first.
static void alone(void **state) {
    for (int b = 0; b < BACKENDS; b++)
        for (int f = 0; f < FIXTURES; f++) {
            struct model_rig rig;
            open_fixture(&rig, backends[b], f);
            for (int v = 0; variant_at(&rig, v); v++)
                for (int p = 0; p < PROMPTS; p++) {
                    struct run run;
                    run_open(&rig, &run, variant_at(&rig, v), prompt_lengths[p]);
                    rig_step(&rig, &run, &run.length, 1, within_1e_4);
                    decode(&rig, &run, 1);
                    run_close(&rig, &run);
                }
            rig_close(&rig);
        }
}

// Prompts in chunks: positions, page borders, causality across steps, steps without any logits.
static void chunked_prefill(void **state) {
    static const int chunks[] = {1, 3, 16, 17};
    for (int b = 0; b < BACKENDS; b++)
        for (int f = 0; f < FIXTURES; f++) {
            struct model_rig rig;
            open_fixture(&rig, backends[b], f);
            for (int v = 0; variant_at(&rig, v); v++)
                for (int c = 0; c < 4; c++) {
                    struct run run;
                    run_open(&rig, &run, variant_at(&rig, v), 50);
                    while (run.done < run.length) {
                        int left = run.length - run.done;
                        int count = left < chunks[c] ? left : chunks[c];
                        rig_step(&rig, &run, &count, 1, within_1e_4);
                    }
                    decode(&rig, &run, 1);
                    run_close(&rig, &run);
                }
            rig_close(&rig);
        }
}

static int open_all_runs(struct model_rig *rig, struct run *runs) {
    int count = 0;
    for (int v = 0; variant_at(rig, v); v++)
        for (int p = 0; p < PROMPTS; p++)
            run_open(rig, &runs[count++], variant_at(rig, v), prompt_lengths[p]);
    assert_true(count <= RUNS_MAX);
    return count;
}

static void close_runs(struct model_rig *rig, struct run *runs, int count) {
    for (int i = 0; i < count; i++) run_close(rig, &runs[i]);
}

// Every variant and prompt in one step, then all of them decode together: a base-only sequence
// beside adapters, two sequences of one adapter, two adapters on one token.
static void all_in_one_batch(void **state) {
    static struct run runs[RUNS_MAX];
    for (int b = 0; b < BACKENDS; b++)
        for (int f = 0; f < FIXTURES; f++) {
            struct model_rig rig;
            open_fixture(&rig, backends[b], f);
            int count = open_all_runs(&rig, runs), lengths[RUNS_MAX];
            for (int i = 0; i < count; i++) lengths[i] = runs[i].length;
            rig_step(&rig, runs, lengths, count, within_1e_4);
            decode(&rig, runs, count);
            close_runs(&rig, runs, count);
            rig_close(&rig);
        }
}

// Sequences in any order, each step feeding a random part of some: prefill chunks and decodes of
// different adapters mixed, segments in any order.
#ifdef LORAD_EMULATE
extern uint64_t emulate_replays;

static bool is_base(const struct model_rig *rig, const struct run *run) {
    for (int i = 0; i < rig->adapter_count; i++)
        if (run->weights[i] != 0) return false;
    return true;
}

// Steps of one token, recorded; then one so large that the block of metadata moves (and nothing else
// does: no adapters); then small ones.
static void recordings_end_when_memory_moves(void **state) {
    static struct run runs[RUNS_MAX];
    (void)state;
    struct model_rig rig;
    open_fixture(&rig, backends[0], 0);
    int count = open_all_runs(&rig, runs), longest = -1, counts[RUNS_MAX] = {0};
    for (int i = 0; i < count; i++)
        if (is_base(&rig, &runs[i]) && (longest < 0 || runs[i].length > runs[longest].length))
            longest = i;
    struct run *run = &runs[longest];
    counts[longest] = 1;
    while (run->done < run->length / 2) rig_step(&rig, runs, counts, count, within_1e_4);
    uint64_t before = emulate_replays;
    for (int i = 0; i < count; i++) {
        int left = is_base(&rig, &runs[i]) ? runs[i].known - runs[i].done : 0;
        counts[i] = left < 20 ? left : 20;
    }
    rig_step(&rig, runs, counts, count, within_1e_4);
    for (int i = 0; i < count; i++) counts[i] = i == longest;
    while (run->known < run->length + GREEDY) rig_step(&rig, runs, counts, count, within_1e_4);
    expect_greedy(&rig, run);
    assert_true(before > 0 && emulate_replays > before);
    close_runs(&rig, runs, count);
    rig_close(&rig);
}
#endif

static void random_batches(void **state) {
    static struct run runs[RUNS_MAX];
    for (int b = 0; b < BACKENDS; b++)
        for (unsigned seed = 1; seed <= 2 * FIXTURES; seed++) {
            unsigned random = seed;
            struct model_rig rig;
            open_fixture(&rig, backends[b], (int)seed % FIXTURES);
            int count = open_all_runs(&rig, runs), ended = 0;
            for (int i = count - 1; i > 0; i--) {
                int j = (int)(rand_r(&random) % (unsigned)(i + 1));
                struct run other = runs[i];
                runs[i] = runs[j];
                runs[j] = other;
            }
            while (ended < count) {
                int counts[RUNS_MAX], tokens = 0;
                ended = 0;
                for (int i = 0; i < count; i++) {
                    int left = runs[i].known - runs[i].done;
                    counts[i] = 0;
                    if (runs[i].known >= runs[i].length + GREEDY) ended++;
                    else if (rand_r(&random) % 3) counts[i] = 1 + (int)(rand_r(&random) % 20);
                    if (counts[i] > left) counts[i] = left;
                    tokens += counts[i];
                }
                if (tokens) rig_step(&rig, runs, counts, count, within_1e_4);
            }
            for (int i = 0; i < count; i++) expect_greedy(&rig, &runs[i]);
            close_runs(&rig, runs, count);
            rig_close(&rig);
        }
#ifdef LORAD_EMULATE
    assert_true(emulate_replays > 0); // steps of a shape that came again
#endif
}

// bf16 keeps 8 significant bits: a rounding errs by 2^-9 at most. About 12 of them a layer (weights,
// inputs and results of four matmuls) and 3 outside add up in quadrature when independent; 4 is the
// room given to norms and softmax for making an error larger.
static bool close_for_bf16(struct model_rig *rig, const struct run *run, const float *logits,
                           const float *expected) {
    double difference = 0, size = 0;
    for (int i = 0; i < rig->config.vocabulary; i++) {
        difference += pow((double)logits[i] - (double)expected[i], 2);
        size += pow((double)expected[i], 2);
    }
    double error = sqrt(difference / size);
    if (!(error <= rig->worst)) rig->worst = error;
    return error <= 4 * sqrt(12.0 * rig->config.layers + 3) * 0x1p-9;
}

// Everything in 16 bits: weights, adapters' images and the KV cache; prompts in chunks of 16.
static void bf16_stays_close(void **state) {
    static struct run runs[RUNS_MAX];
    for (int f = 0; f < FIXTURES; f++) {
        struct model_rig rig;
        rig_open(&rig, &TESTED_BACKEND, DTYPE_BF16, fixtures[f].name, fixtures[f].adapters);
        int count = open_all_runs(&rig, runs), tokens = 1;
        while (tokens > 0) {
            int counts[RUNS_MAX];
            tokens = 0;
            for (int i = 0; i < count; i++) {
                int left = runs[i].length - runs[i].done;
                tokens += counts[i] = left < 16 ? left : 16;
            }
            if (tokens) rig_step(&rig, runs, counts, count, close_for_bf16);
        }
        close_runs(&rig, runs, count);
        rig_close(&rig);
    }
}

// ---- weights that do not fit the configuration -------------------------------------------------

static void three_layers(struct model_config *c) { c->layers = 3; }
static void one_layer(struct model_config *c) { c->layers = 1; }
static void fewer_words(struct model_config *c) { c->vocabulary = 255; }
static void more_words(struct model_config *c) { c->vocabulary = 257; }
static void one_kv_head(struct model_config *c) { c->kv_heads = 1; }
static void wider_heads(struct model_config *c) { c->head_size = 16; }
static void wider_ffn(struct model_config *c) { c->ffn = 64; }
static void wider_hidden(struct model_config *c) { c->hidden = 64; }
static void untied(struct model_config *c) { c->tied_embeddings = false; }
static void long_context(struct model_config *c) { c->context_max = RIG_CONTEXT - 1; }

static enum status create(const char *folder, const struct model_config *config, bool is_dummy,
                          uint64_t seed, struct backend *backend, struct model **model,
                          struct error *err) {
    struct model_options options = {.folder = folder, .dummy = is_dummy, .seed = seed,
                                    .tokens_max = 4, .sequences_max = 4, .segments_max = 4,
                                    .context_max = RIG_CONTEXT};
    return model_create(&plain_backend, backend, config, DTYPE_F32, &options, model, err);
}

static void expect_refusal(const char *folder, const struct model_config *config,
                           enum status wanted, const char *says) {
    struct backend *backend = NULL;
    struct backend_options options = {.dtype = DTYPE_F32};
    assert_int_equal(plain_backend.open(&options, &backend, NULL), STATUS_OK);
    struct model *model = (struct model *)1;
    struct error err = {0};
    enum status status = create(folder, config, false, 0, backend, &model, &err);
    if (status != wanted || !strstr(err.text, says))
        fail_msg("%s \"%s\"; expected %s \"%s\"", status_name(status), err.text,
                 status_name(wanted), says);
    assert_null(model);
    plain_backend.close(backend);
}

static void names_the_tensor_that_does_not_fit(void **state) {
    static const struct {
        const char *fixture;
        void (*change)(struct model_config *c);
        const char *says;
    } cases[] = {
        {"mha", three_layers, "model.layers.2.self_attn.q_proj.weight is missing"},
        {"sharded", three_layers, "model.layers.2.self_attn.q_proj.weight is missing"},
        {"mha", one_layer, "model.layers.1."},
        {"mha", fewer_words, "model.embed_tokens.weight has shape [256, 32]; config.json asks for "
                             "[255, 32]"},
        {"mha", more_words, "model.embed_tokens.weight has shape [256, 32]; config.json asks for "
                            "[257, 32]"},
        {"mha", one_kv_head, "model.layers.0.self_attn.k_proj.weight has shape [32, 32]; "
                             "config.json asks for [8, 32]"},
        {"mha", wider_heads, "self_attn.q_proj.weight has shape [32, 32]"},
        {"mha", wider_ffn, "mlp.gate_proj.weight has shape [48, 32]; config.json asks for "
                           "[64, 32]"},
        {"mha", wider_hidden, "model.embed_tokens.weight has shape [256, 32]"},
        {"gqa_tied", untied, "lm_head.weight is missing"},
        {"mha", long_context, "a context of 128 tokens was asked for; config.json allows 1 to 127"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *folder = fixture_path(cases[i].fixture, "");
        struct model_config config;
        assert_int_equal(model_config_load(folder, &config, NULL), STATUS_OK);
        cases[i].change(&config);
        expect_refusal(folder, &config, STATUS_INVALID, cases[i].says);
        free(folder);
    }
}

// A copy of a fixture's weights with a text of the header replaced by another of equal length.
static void refuses_changed_files(void **state) {
    static const struct {
        const char *from, *to;
        enum status status;
        const char *says;
    } cases[] = {
        {"model.norm.weight", "model.nrom.weight", STATUS_INVALID, "model.norm.weight is missing"},
        {"layers.1.mlp.up_proj", "layers.1.mlp.uq_proj", STATUS_INVALID,
         "model.layers.1.mlp.up_proj.weight is missing"},
        {"lm_head.weight", "lm_haed.weight", STATUS_INVALID, "lm_head.weight is missing"},
        {"\"lm_head.weight\":{\"dtype\":\"F32\"", "\"lm_head.weight\":{\"dtype\":\"I32\"",
         STATUS_UNSUPPORTED, "lm_head.weight has type I32"},
        {"\"model.norm.weight\":{\"dtype\":\"F32\",\"shape\":[32]",
         "\"model.norm.weight\":{\"dtype\":\"F16\",\"shape\":[64]", STATUS_INVALID,
         "model.norm.weight has shape [64]; config.json asks for [32]"},
        {"\"__metadata__\"", "\"__metadata_X\"", STATUS_INVALID, "__metadata_X"},
    };
    char folder[] = "/tmp/lorad-model-XXXXXX", path[64], command[128];
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    char *from = fixture_path("mha", "/model.safetensors"), *mha = fixture_path("mha", "");
    struct model_config config;
    assert_int_equal(model_config_load(mha, &config, NULL), STATUS_OK);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *bytes = NULL;
        size_t count = 0, length = strlen(cases[i].from);
        assert_int_equal(file_read_all(from, 1 << 24, &bytes, &count, NULL), STATUS_OK);
        assert_int_equal(strlen(cases[i].to), length);
        char *at = memmem(bytes, count, cases[i].from, length);
        if (!at) fail_msg("the fixture has no %s", cases[i].from);
        memcpy(at, cases[i].to, length);
        FILE *file = fopen(path, "wb");
        assert_non_null(file);
        assert_int_equal(fwrite(bytes, 1, count, file), count);
        assert_int_equal(fclose(file), 0);
        free(bytes);
        expect_refusal(folder, &config, cases[i].status, cases[i].says);
    }
    assert_int_equal(unlink(path), 0);
    expect_refusal(folder, &config, STATUS_NOT_FOUND, "model.safetensors");
    snprintf(command, sizeof command, "rm -r '%s'", folder);
    assert_int_equal(system(command), 0);
    free(from);
    free(mha);
}

// ---- dummy weights -----------------------------------------------------------------------------

// The logits of one token of a dummy model, for `logits` of [vocabulary].
static void dummy_logits(const struct model_config *config, uint64_t seed, float *logits) {
    struct backend *backend = NULL;
    struct backend_options options = {.dtype = DTYPE_F32};
    assert_int_equal(plain_backend.open(&options, &backend, NULL), STATUS_OK);
    struct model *model = NULL;
    struct error err = {0};
    if (create(NULL, config, true, seed, backend, &model, &err) != STATUS_OK)
        fail_msg("%s", err.text);
    size_t page_elems = model_lora_geometry(config, DTYPE_F32).page_elems;
    struct pool_shape shape = {.layers = config->layers, .page_count = 1,
                               .kv_heads = config->kv_heads, .head_size = config->head_size,
                               .page_elems = page_elems, .elem_bytes = 4};
    void *pool = plain_backend.memory_create(backend, (size_t)config->layers * page_elems * 4);
    plain_backend.pool_attach(backend, pool, &shape);
    const int32_t id = 9, zero = 0;
    struct attention_span span = {.token_count = 1, .context = 1, .pages = &zero};
    struct step step = {.token_count = 1, .query_heads = config->query_heads, .ids = &id,
                        .positions = &zero, .slots = &zero, .spans = &span, .span_count = 1,
                        .logit_rows = &zero, .logit_count = 1};
    memcpy(logits, model_forward(model, &step).logits, (size_t)config->vocabulary * sizeof *logits);
    plain_backend.memory_destroy(backend, pool);
    model_destroy(model);
    plain_backend.close(backend);
}

static void dummy_weights_depend_on_the_seed(void **state) {
    static const char *const names[] = {"mha", "gqa_tied"};
    for (int i = 0; i < 2; i++) {
        char *folder = fixture_path(names[i], "");
        struct model_config config;
        assert_int_equal(model_config_load(folder, &config, NULL), STATUS_OK);
        float one[256], again[256], two[256];
        dummy_logits(&config, 1, one);
        dummy_logits(&config, 1, again);
        dummy_logits(&config, 2, two);
        assert_memory_equal(one, again, sizeof one);
        assert_memory_not_equal(one, two, sizeof one);
        float low = one[0], high = one[0];
        for (int v = 0; v < 256; v++) {
            assert_true(isfinite(one[v]));
            low = fminf(low, one[v]), high = fmaxf(high, one[v]);
        }
        assert_true(high > low);
        free(folder);
    }
}

// in and out of every module, from the shapes transformers gives a model of head_dim 24, 3 heads,
// hidden 36, ffn 56 and one kv head.
static void adapter_geometry(void **state) {
    char *folder = fixture_path("wide_head", "");
    struct model_config config;
    assert_int_equal(model_config_load(folder, &config, NULL), STATUS_OK);
    struct lora_geometry g = model_lora_geometry(&config, DTYPE_BF16);
    static const int in[LORA_MODULES] = {36, 36, 36, 72, 36, 36, 56};
    static const int out[LORA_MODULES] = {72, 24, 24, 36, 56, 56, 36};
    for (int m = 0; m < LORA_MODULES; m++) {
        assert_int_equal(g.in[m], in[m]);
        assert_int_equal(g.out[m], out[m]);
    }
    assert_int_equal(g.layers, 2);
    assert_int_equal(g.page_elems, 2 * 1 * PAGE_TOKENS * 24);
    assert_int_equal(g.dtype, DTYPE_BF16);
    free(folder);
}

int main(void) {
#ifndef LORAD_EMULATE
    blocked_backend = backend_cpu;
    blocked_backend.ffn_rows = 10; // 15 rows and more are cut, into blocks of 16
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(alone),
        cmocka_unit_test(chunked_prefill),
        cmocka_unit_test(all_in_one_batch),
        cmocka_unit_test(random_batches),
#ifdef LORAD_EMULATE
        cmocka_unit_test(recordings_end_when_memory_moves),
#endif
        cmocka_unit_test(bf16_stays_close),
        cmocka_unit_test(names_the_tensor_that_does_not_fit),
        cmocka_unit_test(refuses_changed_files),
        cmocka_unit_test(dummy_weights_depend_on_the_seed),
        cmocka_unit_test(adapter_geometry),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
