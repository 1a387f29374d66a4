// Every operation of the CPU backend against a plain double-precision computation, for each
// instruction set the machine has, f32 and bf16, one and two threads, our own matmul and oneDNN's;
// then what a batch must not change: a row's bits. Shapes are random but the seed is fixed.
//
// In bf16 the reference rounds what the backend rounds (weights, pool elements, x of a matmul), so
// that the tolerances bound accumulation alone (attention's say what else they allow for).
#include "backend_attention.h"
#include "backend_lora.h"

// ------------------------------------------------------------------ linear

struct matrix {
    int out, in;
    float *values;  // [out, in] as the reference sees them
    struct linear *linear;
};

static struct matrix matrix_create(struct backend *b, int out, int in, enum dtype stored,
                                   enum dtype dtype) {
    size_t count = (size_t)out * (size_t)in;
    struct matrix m = {.out = out, .in = in, .values = random_floats(count)};
    void *bytes = mem_alloc(count * 4);
    dtype_convert(bytes, stored, m.values, DTYPE_F32, count);
    dtype_to_f32(m.values, bytes, stored, count);
    for (size_t i = 0; i < count; i++) m.values[i] = (float)rounded(m.values[i], dtype);
    struct error err = {0};
    if (ops->linear_create(b, bytes, stored, out, in, &m.linear, &err) != STATUS_OK)
        fail_msg("%s", err.text);
    free(bytes);
    return m;
}

static void matrix_destroy(struct backend *b, struct matrix *m) {
    ops->linear_destroy(b, m->linear);
    free(m->values);
}

static void linear_check(struct backend *b, const struct setup *setup, const struct matrix *m,
                         int tokens) {
    size_t in = (size_t)m->in, out = (size_t)m->out;
    float *x = random_floats((size_t)tokens * in), *y = random_floats((size_t)tokens * out + 1);
    y[(size_t)tokens * out] = 7.0f;
    void *input = input_of(setup, x, (size_t)tokens * in);
    ops->linear(b, m->linear, y, input, tokens);
    ops->synchronize(b);
    free(input);
    for (size_t t = 0; t < (size_t)tokens; t++)
        for (size_t o = 0; o < out; o++) {
            double sum = 0, size = 0;
            for (size_t i = 0; i < in; i++) {
                double product = rounded(x[t * in + i], setup->dtype) * m->values[o * in + i];
                sum += product;
                size += fabs(product);
            }
            expect_near(y[t * out + o], sum, 1e-5 * size + 1e-6, "linear", t * out + o);
        }
    assert_true(y[(size_t)tokens * out] == 7.0f); // nothing is written past the end
    free(x);
    free(y);
}

static void test_linear(void **state) {
    (void)state;
    static const struct {
        int out, in;
        enum dtype stored;
    } shapes[] = {{1, 1, DTYPE_F32},     {16, 16, DTYPE_BF16},  {17, 33, DTYPE_F16},
                  {100, 64, DTYPE_BF16}, {160, 600, DTYPE_F32}, {255, 1031, DTYPE_F16}};
    static const int tokens[] = {1, 2, 3, 5, 7, 13, 16, 28, 29, 57, 65};
    for (int s = 0; s < SETUPS; s++) {
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            struct matrix m = matrix_create(b, shapes[i].out, shapes[i].in, shapes[i].stored,
                                            setups[s].dtype);
            for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++)
                linear_check(b, &setups[s], &m, tokens[t]);
            matrix_destroy(b, &m);
        }
        ops->close(b);
    }
}

#if !defined LORAD_EMULATE && !defined LORAD_GPU
// As wide as a head: a thread's chunk has more panels than it keeps sums for, unless it is cut.
static void test_linear_wide(void **state) {
    (void)state;
    for (int s = 0; s < SETUPS; s++) {
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        struct matrix m = matrix_create(b, 50001, 16, DTYPE_BF16, setups[s].dtype);
        linear_check(b, &setups[s], &m, 1);
        linear_check(b, &setups[s], &m, 9);
        matrix_destroy(b, &m);
        ops->close(b);
    }
}
#endif

// A row has the same bits alone, at any place and in any batch: our own tiles promise it.
static void test_linear_rows_invariant(void **state) {
    (void)state;
    enum { ROWS = 80 };
    static const int shapes[][2] = {{150, 1100}, {160, 1104}}; // the second is kept compact
    for (int s = 0; s < SETUPS; s++) {
        if (strcmp(setups[s].linear, "own") != 0 && strcmp(setups[s].linear, "plain") != 0) continue;
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        for (int i = 0; i < 2; i++) {
            int out = shapes[i][0], in = shapes[i][1];
            struct matrix m = matrix_create(b, out, in, DTYPE_F32, setups[s].dtype);
            size_t count = ROWS * (size_t)in;
            float *x = random_floats(count);
            void *input = input_of(&setups[s], x, count);
            expect_rows_alike(ops, b, m.linear, input, ROWS, out, in, input_bytes(&setups[s]));
            free(input);
            free(x);
            matrix_destroy(b, &m);
        }
        ops->close(b);
    }
}

// ------------------------------------------------------------------ rows of activations

static void test_rms_norm_and_silu(void **state) {
    (void)state;
    static const int widths[] = {1, 15, 16, 64, 100, 2048};
    for (int s = 0; s < SETUPS; s++) {
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
            size_t n = (size_t)widths[w], T = 19;
            float *x = random_floats(T * n), *residual = random_floats(T * n);
            float *before = mem_alloc(T * n * sizeof *before);
            float *gain = random_floats(n), *y = random_floats(T * n);
            memcpy(before, x, T * n * sizeof *x);
            bool with = w % 2 == 0;
            ops->rms_norm(b, y, x, with ? residual : NULL, gain, 1e-5f, (int)T, (int)n);
            ops->synchronize(b);
            double off = (double)input_back(&setups[s], y, T * n);
            for (size_t t = 0; t < T; t++) {
                double squares = 0;
                for (size_t i = t * n; i < (t + 1) * n; i++) {
                    double sum = (double)before[i] + (with ? (double)residual[i] : 0.0);
                    expect_near(x[i], sum, 1e-6, "x + residual", i);
                    squares += sum * sum;
                }
                double scale = 1 / sqrt(squares / (double)n + 1e-5);
                for (size_t i = 0; i < n; i++) {
                    double expected = x[t * n + i] * scale * gain[i];
                    expect_near(y[t * n + i], expected, 1e-5 + off * fabs(expected), "rms_norm", i);
                }
            }
            float *gate_up = random_floats(T * 2 * n);
            for (size_t i = 0; i < T * 2 * n; i++) gate_up[i] *= i % 3 ? 5.0f : 100.0f;
            ops->silu_mul(b, y, gate_up, (int)T, (int)n);
            ops->synchronize(b);
            input_back(&setups[s], y, T * n);
            for (size_t t = 0; t < T; t++)
                for (size_t i = 0; i < n; i++) {
                    double gate = gate_up[t * 2 * n + i], up = gate_up[t * 2 * n + n + i];
                    double expected = gate / (1 + exp(-gate)) * up;
                    expect_near(y[t * n + i], expected, (1e-6 + off) * fabs(expected) + 1e-30,
                                "silu", i);
                }
            free(x);
            free(residual);
            free(before);
            free(gain);
            free(y);
            free(gate_up);
        }
        ops->close(b);
    }
}

static void test_embed_and_gather(void **state) {
    (void)state;
    enum { V = 37, H = 83, T = 50 };
    int32_t ids[T];
    for (int s = 0; s < SETUPS; s++) {
        struct backend *b = open_setup(&setups[s]);
        if (!b) continue;
        float *table = random_floats(V * H), *y = random_floats(T * H), *z = random_floats(T * H);
        void *stored = ops->memory_create(b, V * H * 4);
        for (int dtype = DTYPE_F32; dtype <= DTYPE_F16; dtype++) {
            uint8_t bytes[V * H * 4];
            dtype_convert(bytes, (enum dtype)dtype, table, DTYPE_F32, V * H);
            ops->upload(b, stored, bytes, V * H * dtype_bytes((enum dtype)dtype));
            for (int t = 0; t < T; t++) ids[t] = random_between(0, V - 1);
            int32_t others[T];
            for (int t = 0; t < T; t++) others[t] = (ids[t] + 1) % V;
            ops->embed(b, y, stored, (enum dtype)dtype, ids, T, H);
            ops->embed(b, z, stored, (enum dtype)dtype, others, T, H); // nobody waits in between
            ops->synchronize(b);
            float expected[V * H];
            dtype_to_f32(expected, bytes, (enum dtype)dtype, V * H);
            for (int t = 0; t < T; t++)
                assert_memory_equal(y + t * H, expected + ids[t] * H, H * sizeof *y);
            for (int t = 0; t < T; t++)
                assert_memory_equal(z + t * H, expected + others[t] * H, H * sizeof *z);
            for (int t = 0; t < T; t++) ids[t] = random_between(0, T - 1);
            ops->gather_rows(b, z, y, ids, T, H);
            ops->synchronize(b);
            for (int t = 0; t < T; t++)
                assert_memory_equal(z + t * H, y + ids[t] * H, H * sizeof *y);
        }
        ops->memory_destroy(b, stored);
        free(table);
        free(y);
        free(z);
        ops->close(b);
    }
}

// Catches: a mark that a recording does not take anew each time, or that is passed too early.
static void test_marks(void **state) {
    (void)state;
    if (!ops->mark) return; // operations are done when they return
    enum { HIDDEN = 64, EMBEDDED = 0, DONE, BEFORE };
    struct backend *b = open_setup(&setups[0]);
    float *table = ops->memory_create(b, HIDDEN * sizeof *table);
    float *y = ops->memory_create(b, HIDDEN * sizeof *y);
    int32_t id = 0, position = 0, slot = -1;
    struct step step = {.token_count = 1, .query_heads = 1, .ids = &id, .positions = &position,
                        .slots = &slot, .repeats = true, .marked = true};
    struct pool_rig pool;
    pool_rig_init(&pool, b, setups[0].dtype, 1, 8, 1, 1);
    for (int round = 0; round < 3; round++) { // queued, recorded, from the recording
        ops->mark(b, BEFORE);
        struct step_rows rows = ops->step_begin(b, &step);
        assert_int_equal(rows.recorded, round == 2);
        if (!rows.recorded) {
            ops->mark(b, EMBEDDED);
            ops->embed(b, y, table, DTYPE_F32, &id, rows.tokens, HIDDEN);
            ops->mark(b, DONE);
        }
        ops->step_end(b);
        ops->synchronize(b);
        assert_true(ops->mark_seconds(b, BEFORE, EMBEDDED) > 0);
        assert_true(ops->mark_seconds(b, EMBEDDED, DONE) > 0);
    }
    ops->memory_destroy(b, pool.pool);
    ops->memory_destroy(b, table);
    ops->memory_destroy(b, y);
    ops->close(b);
}

// ------------------------------------------------------------------ draws

enum { DRAW_ROWS = 24 };

// A row of some shape: smooth, full of ties, nearly all one, with what is no number.
static void draw_row_fill(float *row, int vocabulary, int shape) {
    for (int i = 0; i < vocabulary; i++) {
        float value = random_float();
        if (shape % 6 == 0) row[i] = value * 20;
        else if (shape % 6 == 1) row[i] = (float)random_between(0, 3);
        else if (shape % 6 == 2) row[i] = i == vocabulary / 2 ? 60 : value * 10;
        else if (shape % 6 == 3) row[i] = 1;
        else if (shape % 6 == 4) row[i] = i % 3 ? value * 5 : i % 2 ? NAN : -INFINITY;
        else row[i] = shape == 5 ? NAN : shape == 11 ? -INFINITY : value * 200;
    }
    if (shape == 17) row[vocabulary - 1] = INFINITY;
}

// Whatever a request asks for: the token is the one that the server's sampler draws of the same row.
static void draw_check(struct backend *b, int vocabulary, struct sampler_scratch *scratch) {
    struct sampling sampling[DRAW_ROWS];
    struct draw draws[DRAW_ROWS];
    int32_t expected[DRAW_ROWS], ids[DRAW_ROWS];
    float *logits = random_floats((size_t)DRAW_ROWS * (size_t)vocabulary);
    for (int r = 0; r < DRAW_ROWS; r++) {
        float *row = logits + (size_t)r * (size_t)vocabulary;
        draw_row_fill(row, vocabulary, r);
        sampling[r] = (struct sampling){
            .temperature = random_between(0, 3) ? 0.3f + (random_float() + 1) : 0,
            .top_k = random_between(0, 2) ? random_between(1, vocabulary + 3) : 0,
            .top_p = random_between(0, 2) ? (random_float() + 1) / 2 + 1e-6f : 1,
            .min_p = random_between(0, 2) ? 0 : (random_float() + 1) / 4,
            .repetition_penalty = 1, .logprobs = -1};
        struct sampler_input input = {.logits = row, .vocabulary = vocabulary,
                                      .sampling = &sampling[r], .seed = random_bits(),
                                      .position = (uint64_t)r};
        struct sampler_result result;
        sampler_sample(&input, scratch, &result);
        expected[r] = result.token;
        assert_true(sampler_draws_plainly(&input));
        draws[r] = sampler_draw(&input);
        ids[r] = -7;
    }
    draws[3].kind = DRAW_NONE;
    expected[3] = -7;
    ops->draw(b, ids, logits, draws, DRAW_ROWS, vocabulary);
    ops->synchronize(b);
    for (int r = 0; r < DRAW_ROWS; r++)
        if (ids[r] != expected[r])
            fail_msg("vocabulary %d, row %d: %d, the server draws %d (temperature %g, top_k %d, "
                     "top_p %g, min_p %g)", vocabulary, r, ids[r], expected[r],
                     (double)sampling[r].temperature, sampling[r].top_k, (double)sampling[r].top_p,
                     (double)sampling[r].min_p);
    free(logits);
}

static void test_draw(void **state) {
    (void)state;
    static const int vocabularies[] = {1, 2, 31, 500, 1500};
    if (!ops->draw) return; // the host draws
    struct backend *b = open_setup(&setups[0]);
    for (size_t v = 0; v < sizeof vocabularies / sizeof *vocabularies; v++) {
        struct sampler_scratch *scratch = sampler_scratch_create(vocabularies[v]);
        for (int round = 0; round < 4; round++) draw_check(b, vocabularies[v], scratch);
        sampler_scratch_destroy(scratch);
    }
    ops->close(b);
}

#if !defined LORAD_EMULATE && !defined LORAD_GPU
// ------------------------------------------------------------------ opening, and the threads

static void test_open_refuses(void **state) {
    (void)state;
    static const struct {
        const char *isa, *linear;
        struct backend_options options;
        enum status status;
        const char *says;
    } cases[] = {
        {"mmx", "own", {1, DTYPE_F32, 0}, STATUS_INVALID, "mmx"},
        {"scalar", "mkl", {1, DTYPE_F32, 0}, STATUS_INVALID, "mkl"},
        {"scalar", "own", {1, DTYPE_F16, 0}, STATUS_UNSUPPORTED, "f16"},
        {"scalar", "own", {-1, DTYPE_F32, 0}, STATUS_INVALID, "-1 threads"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        setenv("LORAD_CPU_ISA", cases[i].isa, 1);
        setenv("LORAD_CPU_LINEAR", cases[i].linear, 1);
        struct backend *b = NULL;
        struct error err = {0};
        assert_int_equal(ops->open(&cases[i].options, &b, &err), cases[i].status);
        assert_null(b);
        assert_non_null(strstr(err.text, cases[i].says));
    }
}

struct chunks_seen {
    struct cpu_threads *threads;
    atomic_int runs[64];
    atomic_int ends; // chunks behind which no thread's share goes on
    atomic_int faults;
};

static void count_chunk(void *context, int chunk, int thread) {
    struct chunks_seen *seen = context;
    int count = cpu_threads_count(seen->threads), go_on = 0, others = 0;
    for (int i = 0; i < count; i++) {
        int next = cpu_threads_next(seen->threads, chunk, i);
        go_on += next == chunk + 1;
        others += next != chunk + 1 && next != -1;
    }
    atomic_fetch_add(&seen->runs[chunk], 1);
    if (go_on == 0) atomic_fetch_add(&seen->ends, 1);
    if (thread < 0 || thread >= count || go_on > 1 || others > 0)
        atomic_fetch_add(&seen->faults, 1);
}

// Every chunk of every job runs once, and no job's chunk runs in another's time. Chunks follow each
// other in as many shares as there are threads.
static void test_threads(void **state) {
    (void)state;
    static const int thread_counts[] = {1, 2, 5};
    static struct chunks_seen seen;
    for (size_t i = 0; i < sizeof thread_counts / sizeof *thread_counts; i++) {
        int count = thread_counts[i];
        struct cpu_threads *threads = seen.threads = cpu_threads_create(count);
        assert_int_equal(cpu_threads_count(threads), count);
        for (int job = 0; job < 3000; job++) {
            int chunks = job % 64, shares = chunks < count ? chunks : count;
            cpu_threads_run(threads, count_chunk, &seen, chunks);
            for (int c = 0; c < 64; c++)
                if (atomic_exchange(&seen.runs[c], 0) != (c < chunks))
                    fail_msg("job %d, chunk %d of %d", job, c, chunks);
            assert_int_equal(atomic_exchange(&seen.ends, 0), shares);
            assert_int_equal(atomic_load(&seen.faults), 0);
        }
        cpu_threads_destroy(threads);
    }
}

#endif

int main(void) {
#ifdef LORAD_EMULATE
    const char *seed = getenv("EMULATE_SEED"); // another order of the threads
    if (seed) emulate_seed = strtoull(seed, NULL, 10);
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear),
        cmocka_unit_test(test_linear_rows_invariant),
#if !defined LORAD_EMULATE && !defined LORAD_GPU
        cmocka_unit_test(test_linear_wide),
#endif
        cmocka_unit_test(test_rms_norm_and_silu),
        cmocka_unit_test(test_embed_and_gather),
        cmocka_unit_test(test_marks),
        cmocka_unit_test(test_draw),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_pool_many_pages),
        cmocka_unit_test(test_lora),
#if !defined LORAD_EMULATE && !defined LORAD_GPU
        cmocka_unit_test(test_open_refuses),
        cmocka_unit_test(test_threads),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
