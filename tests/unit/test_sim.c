// sim/: the cost model against the physical limit worked out by hand, the trace against NumPy and
// the C++ standard, runs of both policies with every account checked in each step, and the
// published rows. No expectation here is the simulator's own output.
#include "bench/workload.h"
#include "sim/sim_report.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static void assert_near(double value, double expected, double tolerance) {
    if (fabs(value - expected) > tolerance) print_error("%.9g is not %.9g\n", value, expected);
    assert_true(fabs(value - expected) <= tolerance);
}

// ------------------------------------------------------------------ cost

// Llama-2-7B, bf16, 512-token contexts, H200 (4.8 TB/s), a distinct rank-16 adapter a request:
// milliseconds rounded to 0.01, as bytes over bandwidth give them on paper.
static void decode_costs_what_its_bytes_take(void **state) {
    static const struct {
        int batch;
        int modules; // -1: base model alone
        double ms;
    } cases[] = {{1, -1, 2.81},         {1, SIM_QKVO, 2.82},     {1, SIM_ALL, 2.83},
                 {32, -1, 4.55},        {32, SIM_QKVO, 4.77},    {32, SIM_ALL, 5.08},
                 {128, -1, 9.93},       {128, SIM_QKVO, 10.82},  {128, SIM_ALL, 12.06}};
    const struct sim_model *model = sim_model_find("llama-7b");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        double batch = cases[i].batch, ranks = cases[i].modules < 0 ? 0 : 16 * batch;
        struct sim_step step = {.tokens = batch,
                                .rows = batch,
                                .kv_tokens = 513 * batch,
                                .attention_pairs = 513 * batch,
                                .lora_read_rank = ranks,
                                .lora_token_rank = ranks,
                                .modules = cases[i].modules == SIM_ALL ? SIM_ALL : SIM_QKVO};
        struct sim_cost cost = sim_cost_of(model, sim_device_find("h200"),
                                           sim_engine_find("roofline"), &step);
        assert_near(1e3 * cost.total_s, cases[i].ms, 0.0051);
    }
    assert_near(sim_weight_bytes(model) / 1e9, 13.215, 0.0005);
    assert_near(sim_kv_bytes(model), 524288, 0);
    assert_near(sim_adapter_bytes(model, SIM_QKVO, 1) / 1e6, 2.097, 0.0005);
    assert_near(sim_adapter_bytes(model, SIM_ALL, 1) / 1e6, 4.997, 0.0005);
}

// A long prefill is bound by operations: 2 x 6,476,005,376 weights of 32 layers a token, and the
// head for one row; attention in 32 x 4 x 4096 operations a pair; both at 312 TFLOP/s.
static void prefill_costs_what_its_operations_take(void **state) {
    double tokens = 4096, pairs = tokens * (tokens + 1) / 2;
    struct sim_step step = {.tokens = tokens, .rows = 1, .kv_tokens = tokens,
                            .attention_pairs = pairs};
    struct sim_engine engine = *sim_engine_find("roofline");
    const struct sim_model *model = sim_model_find("llama-7b");
    struct sim_cost cost = sim_cost_of(model, sim_device_find("a100-80g"), &engine, &step);
    double linear_s = (2 * tokens * 6476005376.0 + 2 * 131072000.0) / 312e12;
    double attention_s = pairs * 524288 / 312e12;
    assert_near(cost.linear_s, linear_s, 1e-9);
    assert_near(cost.attention_s, attention_s, 1e-9);
    engine.efficiency = 0.5;
    engine.step_s = 0.25;
    cost = sim_cost_of(model, sim_device_find("a100-80g"), &engine, &step);
    assert_near(cost.total_s, 0.25 + 2 * (linear_s + attention_s), 1e-9);
}

// Punica's published batch of 64 distinct adapters on an A100: 75 us at rank 16, 118 at rank 64,
// for one module of 4096 x 4096; the engine "slora" takes both from one line.
static void lora_operations_cost_what_was_published(void **state) {
    static const struct {
        int rank;
        double us;
    } cases[] = {{16, 75}, {64, 118}};
    const struct sim_model *model = sim_model_find("llama-7b");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        double ranks = 64.0 * cases[i].rank;
        struct sim_step step = {.tokens = 64, .rows = 64, .lora_read_rank = ranks,
                                .lora_token_rank = ranks, .modules = SIM_QKVO};
        struct sim_cost cost = sim_cost_of(model, sim_device_find("a100-80g"),
                                           sim_engine_find("slora"), &step);
        assert_near(1e6 * cost.lora_s / (4 * 32), cases[i].us, 0.5);
    }
}

// ------------------------------------------------------------------ trace

// C++17 [rand.predef]: the 10000th value of mt19937 with its default seed is 4123659995.
static void random_is_mt19937(void **state) {
    struct trace_random random;
    uint32_t value = 0;
    trace_random_seed(&random, 5489);
    for (int i = 0; i < 10000; i++) value = trace_random_u32(&random);
    assert_int_equal(value, 4123659995u);
}

// numpy.random.seed(s), power, randint, randint, gamma in this order; printed by NumPy 2.4.6.
static void trace_is_numpys(void **state) {
    static const struct {
        struct trace_options options;
        int count, at[3];
        struct trace_request requests[3];
        long long adapters, prompts, outputs; // sums
    } cases[] = {
        {{TRACE_NUMPY, 2000, 1, 10, 1, 120, 8, 512, 8, 512, 42}, 1200, {0, 600, 1199},
         {{0.0503244877027261, 749, 388, 268}, {62.97699410052192, 337, 489, 387},
          {124.98691596483738, 260, 268, 241}}, 1197370, 314805, 315809},
        {{TRACE_NUMPY, 100, 0.3, 2, 4, 300, 8, 512, 8, 512, 42}, 600, {1, 300, 599},
         {{9.483359034175847e-06, 84, 473, 43}, {203.84698661108203, 0, 74, 453},
          {353.7552165951454, 0, 388, 489}}, 14252, 153447, 155474},
        {{TRACE_NUMPY, 100, 2, 2, 0.5, 60, 8, 512, 8, 512, 7}, 120, {0, 60, 119},
         {{0.5269475636632471, 27, 432, 435}, {28.880112153132522, 97, 17, 101},
          {56.44324404591343, 36, 372, 392}}, 8088, 32151, 32919}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct trace trace = trace_create(&cases[i].options);
        long long adapters = 0, prompts = 0, outputs = 0;
        assert_int_equal(trace.count, cases[i].count);
        for (int j = 0; j < trace.count; j++) {
            adapters += trace.requests[j].adapter;
            prompts += trace.requests[j].prompt_tokens;
            outputs += trace.requests[j].output_tokens;
        }
        assert_int_equal(adapters, cases[i].adapters);
        assert_int_equal(prompts, cases[i].prompts);
        assert_int_equal(outputs, cases[i].outputs);
        for (int j = 0; j < 3; j++) {
            const struct trace_request *got = &trace.requests[cases[i].at[j]];
            const struct trace_request *want = &cases[i].requests[j];
            assert_int_equal(got->adapter, want->adapter);
            assert_int_equal(got->prompt_tokens, want->prompt_tokens);
            assert_int_equal(got->output_tokens, want->output_tokens);
            assert_near(got->arrival_s, want->arrival_s, 1e-9 * want->arrival_s + 1e-15);
        }
        trace_destroy(&trace);
    }
}

// The same requests as the load generator's, for the same seed.
static void bench_trace_is_the_load_generators(void **state) {
    struct trace_options options = {TRACE_BENCH, 50, 0.5, 3, 2, 40, 8, 512, 4, 100, 9};
    struct workload_options same = {.adapters = 50, .alpha = 0.5, .rate = 3, .cv = 2,
                                    .duration_s = 40, .input_min = 8, .input_max = 511,
                                    .output_min = 4, .output_max = 99, .seed = 9};
    struct workload_request *made;
    struct trace trace = trace_create(&options);
    assert_int_equal(workload_make(&same, &made), 120);
    assert_int_equal(trace.count, 120);
    for (int i = 0; i < trace.count; i++) {
        assert_int_equal(trace.requests[i].adapter, made[i].adapter);
        assert_int_equal(trace.requests[i].prompt_tokens, made[i].input_tokens);
        assert_int_equal(trace.requests[i].output_tokens, made[i].output_tokens);
        assert_near(trace.requests[i].arrival_s, made[i].at_s, 0);
    }
    free(made);
    trace_destroy(&trace);
}

// ------------------------------------------------------------------ runs

static struct sim_result result, again;

static void run(const struct sim_options *options, struct sim_result *out) {
    struct error err = {0};
    enum status status = sim_run(options, out, &err);
    if (status != STATUS_OK) print_error("%s\n", err.text);
    assert_int_equal(status, STATUS_OK);
}

// sim_run itself asserts pages, states and single ends; here: that tokens are conserved, that a
// run repeats to the last bit, and that another seed is another run.
static void runs_keep_their_accounts(void **state) {
    static const struct {
        const char *catches, *workload;
        enum sim_policy policy;
        int adapters, pool_tokens, sequences_max, step_tokens_max;
        double rate;
        bool blocks, discard, abort;
        int preempt_every;
    } cases[] = {
        {"base model alone", "S1", SIM_LORAD, 0, 125000, 100, 512, 10, 0, 0, 0, 0},
        {"chunks smaller than prompts", "S1", SIM_LORAD, 50, 125000, 16, 64, 4, 0, 0, 0, 0},
        {"pool of a few requests", "S2", SIM_LORAD, 500, 4000, 64, 512, 20, 0, 0, 0, 0},
        {"the same, copies block", "S2", SIM_LORAD, 500, 4000, 64, 512, 20, 1, 0, 0, 0},
        {"idle adapters dropped", "S2", SIM_LORAD, 500, 9000, 64, 512, 20, 0, 1, 0, 0},
        {"late ones aborted", "S4", SIM_LORAD, 100, 20000, 64, 512, 20, 0, 0, 1, 0},
        {"S-LoRA's rules", "S2", SIM_SLORA, 500, 20000, 64, 0, 20, 1, 0, 0, 0},
        {"S-LoRA's rules, late ones aborted", "S4", SIM_SLORA, 100, 20000, 64, 0, 20, 1, 0, 1, 0},
        {"preempted and computed again", "S2", SIM_LORAD, 500, 9000, 64, 512, 20, 0, 0, 0, 7},
        {"preempted, copies block, idle dropped", "S2", SIM_LORAD, 99, 9000, 64, 64, 9, 1, 1, 0, 5},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct sim_options options;
        sim_options_default(&options);
        assert_true(sim_workload(&options, cases[i].workload));
        options.policy = cases[i].policy;
        options.trace.adapters = cases[i].adapters;
        options.trace.rate = cases[i].rate;
        options.trace.duration_s = 30;
        options.pool_tokens = cases[i].pool_tokens;
        options.sequences_max = cases[i].sequences_max;
        options.step_tokens_max = cases[i].step_tokens_max;
        options.load_blocks = cases[i].blocks;
        options.keep_idle = !cases[i].discard;
        options.early_abort = cases[i].abort;
        options.preempt_every = cases[i].preempt_every;
        options.prefetch = 8;
        options.check = true;
        run(&options, &result);
        assert_int_equal(result.finished + result.aborted, result.requests);
        assert_true(cases[i].abort ? result.aborted > 0 : result.aborted == 0);
        struct trace trace = trace_create(&options.trace);
        uint64_t prompts = 0, outputs = 0;
        for (int j = 0; j < trace.count; j++) {
            prompts += (uint64_t)trace.requests[j].prompt_tokens;
            outputs += (uint64_t)trace.requests[j].output_tokens;
        }
        trace_destroy(&trace);
        if (!cases[i].abort) {
            assert_int_equal(result.prompt_tokens, prompts);
            assert_int_equal(result.output_tokens, outputs);
        }
        // The last token of an output is never fed back; preempted ones compute some twice.
        uint64_t fed = result.prompt_tokens + result.output_tokens - (uint64_t)result.finished;
        assert_int_equal(result.preemptions > 0, cases[i].preempt_every > 0);
        if (result.preemptions == 0) assert_int_equal(result.computed_tokens, fed);
        else assert_true(result.computed_tokens > fed);
        run(&options, &again);
        assert_int_equal(result.digest, again.digest);
        assert_int_equal(result.steps, again.steps);
        assert_int_equal(result.bytes_moved, again.bytes_moved);
        assert_memory_equal(&result.total_s, &again.total_s, sizeof result.total_s);
        options.trace.seed++;
        run(&options, &again);
        assert_true(result.digest != again.digest);
    }
}

// One request alone: nothing but its own bytes and operations pass the time.
static void one_request_takes_its_own_time(void **state) {
    struct sim_options options;
    sim_options_default(&options);
    options.engine = *sim_engine_find("roofline");
    options.device = sim_device_find("h200");
    options.load_blocks = true;
    options.trace.rate = 1;
    options.trace.duration_s = 1;
    options.trace.input_min = 100, options.trace.input_end = 101;
    options.trace.output_min = 50, options.trace.output_end = 51;
    for (int policy = SIM_LORAD; policy <= SIM_SLORA; policy++) {
        options.policy = (enum sim_policy)policy;
        run(&options, &result);
        double adapter = 8 * 8.0 * 4096 * 32 * 2, weights = 13214687232.0, kv = 524288;
        double copy_s = adapter / 50e9;
        // A prompt of 100 is still bound by bytes: weights, its KV, its adapter once.
        double first_s = (weights + 100 * kv + adapter) / 4800e9, rest_s = 0;
        for (int context = 101; context < 150; context++)
            rest_s += (weights + context * kv + adapter) / 4800e9;
        assert_near(result.ttft_mean_s, copy_s + first_s, 1e-9);
        assert_near(result.latency_mean_s, copy_s + first_s + rest_s, 1e-9);
        assert_int_equal(result.bytes_moved, (uint64_t)adapter);
    }
}

static void idle_adapters_stay_or_go(void **state) {
    struct sim_options options;
    sim_options_default(&options);
    options.trace.adapters = 5;
    options.trace.rate = 0.5; // most requests run alone
    options.trace.duration_s = 200;
    run(&options, &result);
    assert_int_equal(result.loads, 5);
    assert_int_equal(result.evictions, 0);
    options.policy = SIM_SLORA;
    options.load_blocks = true;
    run(&options, &again);
    assert_true(again.loads > 5);
    assert_int_equal(again.evictions, again.loads);
    assert_int_equal(again.bytes_moved, again.loads * 8 * 8 * 4096 * 32 * 2);
    assert_true(again.waiting_copy_s > result.waiting_copy_s);
}

static void impossible_options_are_refused(void **state) {
    struct error err = {0};
    struct sim_options options;
    sim_options_default(&options);
    options.pool_tokens = 0;
    options.device = sim_device_find("cpu"); // 24 GB
    options.model = sim_model_find("llama-13b");
    assert_int_equal(sim_run(&options, &result, &err), STATUS_INVALID);
    assert_non_null(strstr(err.text, "no memory is left for a pool"));
    sim_options_default(&options);
    options.pool_tokens = 500;
    assert_int_equal(sim_run(&options, &result, &err), STATUS_INVALID);
    assert_non_null(strstr(err.text, "more than the pool's 31"));
}

// ------------------------------------------------------------------ published rows, files

static void published_rows_within_15_percent(void **state) {
    struct error err = {0};
    bool within = false;
    FILE *out = tmpfile();
    assert_non_null(out);
    assert_int_equal(sim_reproduce(out, NULL, &within, &err), STATUS_OK);
    fclose(out);
    assert_true(within);
}

static void many_adapters_cost_ours_at_most_2_percent(void **state) {
    struct sim_options options;
    sim_options_default(&options);
    options.trace.adapters = 5;
    run(&options, &result);
    options.trace.adapters = 2000;
    run(&options, &again);
    assert_true(again.requests_per_s >= 0.98 * result.requests_per_s);
}

static void files_hold_the_result(void **state) {
    char path[] = "/tmp/lorad-test-sim-XXXXXX";
    struct error err = {0};
    struct sim_options options;
    sim_options_default(&options);
    options.trace.duration_s = 20;
    run(&options, &result);
    int file = mkstemp(path);
    assert_true(file >= 0);
    close(file);
    json_t *value = sim_json(&options, &result);
    assert_int_equal(sim_write_json(path, value, &err), STATUS_OK);
    json_decref(value);
    value = json_load_file(path, 0, NULL);
    assert_string_equal(json_string_value(json_object_get(value, "kind")),
                        "simulation, not a measurement");
    assert_int_equal(json_integer_value(json_object_get(value, "finished")), 200);
    json_t *pages = json_object_get(value, "pages"), *row;
    size_t i;
    assert_true(json_array_size(pages) > 10);
    json_array_foreach(pages, i, row) {
        json_int_t sum = 0;
        for (size_t owner = 1; owner <= 4; owner++)
            sum += json_integer_value(json_array_get(row, owner));
        assert_int_equal(sum, result.page_count);
    }
    json_decref(value);
    assert_int_equal(sim_write_svg(path, &result, &err), STATUS_OK);
    assert_int_equal(sim_write_csv(path, &result, &err), STATUS_OK);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(sim_write_csv("/nonexistent/pages.csv", &result, &err), STATUS_IO);
    assert_non_null(strstr(err.text, "/nonexistent/pages.csv"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(decode_costs_what_its_bytes_take),
        cmocka_unit_test(prefill_costs_what_its_operations_take),
        cmocka_unit_test(lora_operations_cost_what_was_published),
        cmocka_unit_test(random_is_mt19937),
        cmocka_unit_test(trace_is_numpys),
        cmocka_unit_test(bench_trace_is_the_load_generators),
        cmocka_unit_test(runs_keep_their_accounts),
        cmocka_unit_test(one_request_takes_its_own_time),
        cmocka_unit_test(idle_adapters_stay_or_go),
        cmocka_unit_test(impossible_options_are_refused),
        cmocka_unit_test(published_rows_within_15_percent),
        cmocka_unit_test(many_adapters_cost_ours_at_most_2_percent),
        cmocka_unit_test(files_hold_the_result),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
