// server/scheduler.h. The peak against a simulation token by token; plans as a table; and random
// workloads played to the end, with every promise of the header checked in each step.
#include "server/scheduler.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static uint32_t random_state;

static int random_below(int n) {
    random_state = random_state * 1664525u + 1013904223u;
    return (int)((random_state >> 8) % (uint32_t)n);
}

static int more_left(const void *left, const void *right) {
    return ((const struct sched_load *)right)->left - ((const struct sched_load *)left)->left;
}

// Everyone grows by one token a round until it has `left` more; then it is gone.
static int simulated_peak(const struct sched_load *loads, int count) {
    int peak = 0;
    for (int round = 0; round <= 400; round++) {
        int pages = 0;
        for (int i = 0; i < count; i++)
            if (round <= loads[i].left) pages += (loads[i].used + round + 15) / 16;
        if (pages > peak) peak = pages;
    }
    return peak;
}

static void peak_is_the_simulated_one(void **state) {
    random_state = 1;
    for (int round = 0; round < 2000; round++) {
        struct sched_load loads[12];
        int count = 1 + random_below(12);
        for (int i = 0; i < count; i++)
            loads[i] = (struct sched_load){.used = 1 + random_below(100), .left = random_below(300)};
        qsort(loads, (size_t)count, sizeof *loads, more_left);
        assert_int_equal(sched_peak_pages(loads, count), simulated_peak(loads, count));
    }
    assert_int_equal(sched_peak_pages(NULL, 0), 0);
    assert_int_equal(sched_pages(0), 0);
    assert_int_equal(sched_pages(16), 1);
    assert_int_equal(sched_pages(17), 2);
}

// ------------------------------------------------------------------ single plans

enum { ITEMS_MAX = 8 };

struct want {
    int total, cached, left;
    bool rows_all;
    int adapter; // 1..: index of a made-up adapter, 0 none
    int planned; // expected
    bool admit;  // expected, of waiting ones
};

static void single_plans(void **state) {
    static const struct {
        const char *catches;
        int tokens_max, sequences_max, pages;
        int running; // the first of the items
        struct want items[ITEMS_MAX];
    } cases[] = {
        {"decodes come before prefills", 4, 4, 100, 3,
         {{50, 10, 5, 0, 0, 2, 0}, {20, 19, 5, 0, 0, 1, 0}, {20, 19, 5, 0, 0, 1, 0}}},
        {"prefills in waiting order, not in the list's", 10, 4, 100, 2,
         {{8, 0, 5, 0, 0, 8, 0}, {8, 0, 5, 0, 0, 2, 0}}},
        {"a first chunk for an admission from what is left", 10, 4, 100, 1,
         {{20, 19, 5, 0, 0, 1, 0}, {30, 0, 5, 0, 0, 9, 1}}},
        {"no place", 10, 1, 100, 1, {{20, 19, 5, 0, 0, 1, 0}, {3, 0, 5, 0, 0, 0, 0}}},
        {"no pages for the predicted peak", 64, 4, 4, 1,
         {{16, 15, 32, 0, 0, 1, 0}, {17, 0, 20, 0, 0, 0, 0}}},
        {"the peak lies behind: the other is gone by then", 64, 4, 4, 1,
         {{16, 15, 1, 0, 0, 1, 0}, {16, 0, 30, 0, 0, 16, 1}}},
        {"an adapter's pages count beside the KV", 64, 4, 4, 0,
         {{16, 0, 16, 0, 1, 0, 0}, {16, 0, 16, 0, 0, 16, 1}}},
        {"an adapter shared by two counts once", 64, 4, 7, 0,
         {{16, 0, 16, 0, 1, 16, 1}, {16, 0, 16, 0, 1, 16, 1}}},
        {"all rows wanted: a chunk of at most rows_max", 64, 3, 100, 0,
         {{16, 0, 16, 1, 0, 3, 1}}},
        {"a running one keeps its row against those who want all", 64, 3, 100, 2,
         {{30, 0, 16, 1, 0, 2, 0}, {20, 19, 5, 0, 0, 1, 0}}},
        {"a finishing decode is not starved of rows by prefills", 64, 2, 100, 2,
         {{20, 0, 5, 0, 0, 20, 0}, {30, 0, 5, 0, 0, 30, 0}}},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct adapter adapters[3] = {{.page_count = 0}, {.page_count = 3}, {.page_count = 2}};
        struct adapter *pointers[3] = {&adapters[0], &adapters[1], &adapters[2]};
        struct sched_item items[ITEMS_MAX] = {0}, *list[ITEMS_MAX];
        int count = 0;
        for (; count < ITEMS_MAX && cases[c].items[count].total; count++) {
            const struct want *want = &cases[c].items[count];
            items[count] = (struct sched_item){
                .tokens_total = want->total, .tokens_cached = want->cached,
                .tokens_left = want->left, .rows_all = want->rows_all,
                .arrival = (uint64_t)count + 1, .adapters = &pointers[want->adapter],
                .adapter_count = want->adapter > 0};
            list[count] = &items[count];
        }
        int running = cases[c].running;
        if (c == 1) { // the list's order is not the waiting order
            list[0] = &items[1];
            list[1] = &items[0];
        }
        struct sched_limits limits = {.step_tokens_max = cases[c].tokens_max,
                                      .sequences_max = cases[c].sequences_max,
                                      .rows_max = cases[c].sequences_max,
                                      .page_count = cases[c].pages, .passes_max = 4, .window = 8};
        struct sched_scratch *scratch = sched_scratch_create(8);
        struct sched_plan plan = sched_plan(list, running, list + running, count - running,
                                            &limits, scratch);
        int tokens = 0, admitted = 0;
        for (int i = 0; i < count; i++) {
            const struct want *want = &cases[c].items[i];
            if (items[i].planned != want->planned || items[i].admit != want->admit)
                fail_msg("%s: item %d has %d tokens, admit %d", cases[c].catches, i,
                         items[i].planned, items[i].admit);
            tokens += items[i].planned;
            admitted += items[i].admit;
        }
        assert_int_equal(plan.tokens, tokens);
        assert_int_equal(plan.admitted, admitted);
        sched_scratch_destroy(scratch);
    }
}

// Catches: resident adapters not preferred; one that is overtaken without bound.
static void residents_pass_but_not_for_ever(void **state) {
    enum { LATER = 20, PASSES = 3 };
    struct adapter cold = {.page_count = 1}, warm = {.page_count = 1};
    atomic_store(&warm.resident, true);
    struct adapter *cold_list[] = {&cold}, *warm_list[] = {&warm};
    struct sched_item items[LATER + 1] = {0}, *list[LATER + 1];
    for (int i = 0; i <= LATER; i++) {
        items[i] = (struct sched_item){.tokens_total = 4, .tokens_left = 4,
                                       .arrival = (uint64_t)i + 1,
                                       .adapters = i ? warm_list : cold_list, .adapter_count = 1};
        list[i] = &items[i];
    }
    struct sched_limits limits = {.step_tokens_max = 4, .sequences_max = 1, .rows_max = 1,
                                  .page_count = 10, .passes_max = PASSES, .window = 32};
    struct sched_scratch *scratch = sched_scratch_create(1);
    int count = LATER + 1, passes = 0;
    for (; count > 0; passes++) { // each admitted one is done at once
        sched_plan(NULL, 0, list, count, &limits, scratch);
        int at = 0;
        while (at < count && !list[at]->admit) at++;
        assert_true(at < count);
        struct sched_item *admitted = list[at];
        memmove(&list[at], &list[at + 1], (size_t)(--count - at) * sizeof *list);
        if (admitted == &items[0]) break;
    }
    assert_int_equal(passes, PASSES);
    sched_scratch_destroy(scratch);
}

// ------------------------------------------------------------------ random workloads

enum { JOBS = 60, ADAPTERS = 5 };

struct job {
    struct sched_item item; // first
    int output, generated, waited;
    struct adapter *adapters[2];
};

struct world {
    struct job jobs[JOBS];
    struct adapter adapters[ADAPTERS];
    struct sched_item *running[JOBS], *waiting[JOBS];
    int running_count, waiting_count;
    struct sched_limits limits;
};

static int adapter_pages_in_use(const struct world *world) {
    int pages = 0;
    for (int i = 0; i < ADAPTERS; i++)
        if (world->adapters[i].running > 0) pages += world->adapters[i].page_count;
    return pages;
}

static void use_adapters(struct sched_item *item, int delta) {
    for (int i = 0; i < item->adapter_count; i++) {
        struct adapter *adapter = item->adapters[i];
        adapter->running += delta;
        atomic_store(&adapter->resident, true);
    }
}

static void world_init(struct world *world) {
    *world = (struct world){.limits = {.step_tokens_max = 1 + random_below(40),
                                       .sequences_max = 1 + random_below(6),
                                       .page_count = 20 + random_below(40),
                                       .passes_max = random_below(6), .window = 8}};
    world->limits.rows_max = world->limits.sequences_max + random_below(3);
    for (int i = 0; i < ADAPTERS; i++) world->adapters[i].page_count = 1 + random_below(6);
    for (int i = 0; i < JOBS; i++) {
        struct job *job = &world->jobs[i];
        job->output = 1 + random_below(40);
        int count = random_below(3);
        for (int j = 0; j < count; j++)
            job->adapters[j] = &world->adapters[random_below(ADAPTERS)];
        job->item = (struct sched_item){.tokens_total = 1 + random_below(80),
                                        .rows_all = random_below(6) == 0,
                                        .tokens_left = job->output - 1,
                                        .arrival = (uint64_t)i + 1,
                                        .adapters = job->adapters, .adapter_count = count};
        world->waiting[world->waiting_count++] = &job->item;
    }
}

// What every plan must keep to, whatever the world.
static void check_plan(const struct world *world, struct sched_plan plan) {
    const struct sched_limits *limits = &world->limits;
    int tokens = 0, rows = 0, admitted = 0, starved_rank = -1;
    for (int list = 0; list < 2; list++)
        for (int i = 0; i < (list ? world->waiting_count : world->running_count); i++) {
            const struct sched_item *item = list ? world->waiting[i] : world->running[i];
            int work = item->tokens_total - item->tokens_cached;
            assert_true(item->planned >= 0 && item->planned <= work);
            tokens += item->planned;
            rows += item->rows_all ? item->planned : item->planned == work;
            if (list) {
                assert_int_equal(item->admit, item->planned > 0);
                admitted += item->admit;
                if (!item->admit && item->passed > limits->passes_max) starved_rank = i;
            } else {
                assert_false(item->admit);
            }
        }
    assert_int_equal(starved_rank, -1);
    assert_int_equal(plan.tokens, tokens);
    assert_int_equal(plan.rows, rows);
    assert_int_equal(plan.admitted, admitted);
    assert_true(tokens <= limits->step_tokens_max);
    assert_true(rows <= limits->rows_max);
    assert_true(world->running_count + admitted <= limits->sequences_max);
    if (world->running_count + world->waiting_count > 0) assert_true(tokens > 0);
}

static void admit_planned(struct world *world) {
    int admitted = 0;
    for (int i = 0; i < world->waiting_count;) {
        struct sched_item *item = world->waiting[i];
        if (!item->admit) {
            i++;
            continue;
        }
        admitted++;
        use_adapters(item, 1);
        world->running[world->running_count++] = item;
        world->waiting_count--;
        memmove(&world->waiting[i], &world->waiting[i + 1],
                (size_t)(world->waiting_count - i) * sizeof *world->waiting);
    }
    if (!admitted) return;
    // Whoever was let in must have fitted beside everybody at the predicted peak.
    struct sched_load loads[JOBS];
    for (int i = 0; i < world->running_count; i++)
        loads[i] = (struct sched_load){world->running[i]->tokens_total,
                                       world->running[i]->tokens_left};
    qsort(loads, (size_t)world->running_count, sizeof *loads, more_left);
    assert_true(simulated_peak(loads, world->running_count) + adapter_pages_in_use(world) <=
                world->limits.page_count);
}

// Computes the plan: one token for whoever finished its work; the done leave.
static int advance(struct world *world, uint64_t step) {
    int finished = 0;
    for (int i = 0; i < world->running_count;) {
        struct sched_item *item = world->running[i];
        struct job *job = (struct job *)item;
        item->tokens_cached += item->planned;
        if (item->planned) item->last_step = step;
        if (item->tokens_cached == item->tokens_total) {
            item->rows_all = false;
            job->generated++;
            item->tokens_total++;
            item->tokens_left = job->output - job->generated - 1;
        }
        if (job->generated < job->output) {
            i++;
            continue;
        }
        finished++;
        use_adapters(item, -1);
        world->running[i] = world->running[--world->running_count];
    }
    return finished;
}

// Catches: a budget or row bound exceeded, an admission that cannot fit, somebody passed too
// often, a step without work while work is there, a job that never ends.
static void random_workloads(void **state) {
    for (uint32_t seed = 1; seed <= 150; seed++) {
        random_state = seed;
        struct world world;
        world_init(&world);
        struct sched_scratch *scratch = sched_scratch_create(world.limits.sequences_max);
        int finished = 0;
        for (uint64_t step = 1; finished < JOBS; step++) {
            if (step > 200000) fail_msg("seed %u: %d of %d jobs ended", seed, finished, JOBS);
            world.limits.fixed_pages = adapter_pages_in_use(&world);
            struct sched_plan plan = sched_plan(world.running, world.running_count, world.waiting,
                                                world.waiting_count, &world.limits, scratch);
            check_plan(&world, plan);
            admit_planned(&world);
            finished += advance(&world, step);
        }
        sched_scratch_destroy(scratch);
    }
}

// Catches: a decode left behind when there are more of them than tokens in a step. Of seven, three
// a step, each has its turn at least every third step.
static void decodes_take_turns(void **state) {
    enum { N = 7 };
    struct sched_item items[N] = {0}, *list[N];
    for (int i = 0; i < N; i++) {
        items[i] = (struct sched_item){.tokens_total = 5, .tokens_cached = 4, .tokens_left = 100,
                                       .arrival = (uint64_t)i + 1};
        list[i] = &items[i];
    }
    struct sched_limits limits = {.step_tokens_max = 3, .sequences_max = N, .rows_max = N,
                                  .page_count = 1000, .passes_max = 4, .window = 8};
    struct sched_scratch *scratch = sched_scratch_create(N);
    for (uint64_t step = 1; step <= 70; step++) {
        sched_plan(list, N, NULL, 0, &limits, scratch);
        for (int i = 0; i < N; i++) {
            assert_true(step - items[i].last_step <= 3);
            if (items[i].planned) items[i].last_step = step;
            items[i].tokens_total += items[i].planned;
            items[i].tokens_cached += items[i].planned;
        }
    }
    sched_scratch_destroy(scratch);
}

// Catches: clustering that admits one adapter too many, that keeps out who brings none, or that
// keeps somebody out for ever.
static void clusters_keep_adapters_few(void **state) {
    struct adapter adapters[3] = {{.page_count = 1}, {.page_count = 1}, {.page_count = 1}};
    struct adapter *of[5] = {&adapters[0], &adapters[1], &adapters[2], &adapters[0], NULL};
    struct sched_item items[5] = {0}, *list[5];
    for (int i = 0; i < 5; i++) {
        items[i] = (struct sched_item){.tokens_total = 4, .tokens_left = 4, .arrival = (uint64_t)i + 1,
                                       .adapters = &of[i], .adapter_count = of[i] != NULL};
        list[i] = &items[i];
        if (i < 3) atomic_store(&adapters[i].resident, true);
    }
    struct sched_limits limits = {.step_tokens_max = 100, .sequences_max = 8, .rows_max = 8,
                                  .page_count = 100, .passes_max = 4, .window = 8,
                                  .adapters_max = 2};
    struct sched_scratch *scratch = sched_scratch_create(8);
    struct sched_plan plan = sched_plan(NULL, 0, list, 5, &limits, scratch);
    assert_int_equal(plan.admitted, 4); // all but the third adapter's
    assert_false(items[2].admit);
    limits.adapters_running = 2; // both others run: it goes on waiting, until it was passed enough
    items[2].passed = 4;
    plan = sched_plan(NULL, 0, &list[2], 1, &limits, scratch);
    assert_int_equal(plan.admitted, 1);
    sched_scratch_destroy(scratch);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(clusters_keep_adapters_few),
        cmocka_unit_test(peak_is_the_simulated_one),
        cmocka_unit_test(single_plans),
        cmocka_unit_test(residents_pass_but_not_for_ever),
        cmocka_unit_test(random_workloads),
        cmocka_unit_test(decodes_take_turns),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
