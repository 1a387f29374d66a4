// The virtual token counter against the bounds that arXiv 2401.00588 proves, on a server reduced to
// its batch: what is admitted gives one token a step until it is done.
#include "server/tenants.h"

#include "base/memory.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { TENANTS = 5, REQUESTS = 4000, BATCH = 8, PROMPT_MAX = 60, OUTPUT_MAX = 40, WINDOW = 64 };

struct job {
    struct sched_item item; // first
    int output_left, tenant;
};

struct world {
    struct tenants *tenants;
    struct job jobs[REQUESTS];
    int job_count;
    struct job *running[BATCH];
    int running_count;
    double served[TENANTS];  // w_p prompt + w_q output tokens
    int waiting[TENANTS];
    int place[TENANTS];
    uint64_t random;
};

static struct world world;

static int random_between(int low, int high) {
    world.random = world.random * 6364136223846793005u + 1442695040888963407u;
    return low + (int)((world.random >> 33) % (uint64_t)(high - low + 1));
}

static void world_open(uint64_t seed, const struct tenant_weight *weights, int count) {
    memset(&world, 0, sizeof world);
    world.random = seed;
    world.tenants = tenants_create(REQUESTS, weights, count);
}

static void arrive(int tenant, int prompt, int output) {
    char name[8];
    snprintf(name, sizeof name, "t%d", tenant);
    struct job *job = &world.jobs[world.job_count++];
    assert_true(world.job_count <= REQUESTS);
    *job = (struct job){.output_left = output, .tenant = tenant};
    job->item.arrival = (uint64_t)world.job_count;
    job->item.tokens_total = prompt;
    world.place[tenant] = job->item.tenant = tenants_enter(world.tenants, name);
    tenants_wait(world.tenants, &job->item);
    world.waiting[tenant]++;
}

static void step(void) {
    struct sched_item *window[WINDOW];
    int count = tenants_window(world.tenants, false, window, WINDOW);
    for (int i = 0; i < count && world.running_count < BATCH; i++) {
        struct job *job = (struct job *)window[i];
        tenants_unwait(world.tenants, window[i]);
        tenants_charge_prompt(world.tenants, window[i]->tenant, window[i]->tokens_total);
        world.served[job->tenant] += window[i]->tokens_total;
        world.waiting[job->tenant]--;
        world.running[world.running_count++] = job;
    }
    for (int i = 0; i < world.running_count;) {
        struct job *job = world.running[i];
        tenants_charge_output(world.tenants, job->item.tenant, 1);
        world.served[job->tenant] += 2;
        if (--job->output_left > 0) {
            i++;
            continue;
        }
        tenants_leave(world.tenants, job->item.tenant);
        world.running[i] = world.running[--world.running_count];
    }
}

static void world_close(void) {
    while (world.running_count > 0 || tenants_active(world.tenants) > 0) step();
    tenants_destroy(world.tenants);
}

// 2 max(w_p longest prompt, w_q tokens of a full batch).
static double bound(void) {
    double batch = 2.0 * BATCH * (PROMPT_MAX + OUTPUT_MAX);
    return 2 * (batch > PROMPT_MAX ? batch : PROMPT_MAX);
}

// Catches: the counter ignored in the order.
// Over every stretch in which two tenants both wait, their service differs by at most the bound.
static void backlogged_get_the_same(void **state) {
    (void)state;
    double widest = 0;
    for (uint64_t seed = 1; seed <= 20; seed++) {
        world_open(seed, NULL, 0);
        double low[TENANTS][TENANTS], high[TENANTS][TENANTS];
        bool both[TENANTS][TENANTS] = {{false}};
        for (int t = 0; t < 600; t++) {
            for (int i = 0; i < TENANTS; i++) // i floods more than i - 1, with longer requests
                if (world.job_count < REQUESTS && random_between(0, 9) < 2 * i + 1 && t % 200 < 150)
                    arrive(i, random_between(1, 12 * (i + 1)), random_between(1, 8 * (i + 1)));
            step();
            for (int a = 0; a < TENANTS; a++)
                for (int b = a + 1; b < TENANTS; b++) {
                    double gap = world.served[a] - world.served[b];
                    if (world.waiting[a] == 0 || world.waiting[b] == 0) {
                        both[a][b] = false;
                        continue;
                    }
                    if (!both[a][b]) low[a][b] = high[a][b] = gap;
                    both[a][b] = true;
                    low[a][b] = fmin(low[a][b], gap);
                    high[a][b] = fmax(high[a][b], gap);
                    widest = fmax(widest, high[a][b] - low[a][b]);
                    assert_true(high[a][b] - low[a][b] <= bound());
                }
        }
        world_close();
    }
    print_message("service differs by %.0f at most; the bound is %.0f\n", widest, bound());
    assert_true(widest > 0);
}

// Catches: either charge left out. One tenant's service is prompts, the other's is output.
static void prompts_and_output_count(void **state) {
    (void)state;
    world_open(9, NULL, 0);
    for (int i = 0; i < 1900; i++) {
        arrive(0, 50, 5);
        arrive(1, 2, 30);
    }
    for (int t = 0; t < 2000; t++) {
        step();
        assert_true(world.waiting[0] > 0 && world.waiting[1] > 0);
        assert_true(fabs(world.served[0] - world.served[1]) <= 2 * 2.0 * BATCH * 30);
    }
    assert_true(world.served[0] > 20000);
    world_close();
}

// Catches: no lift. A tenant that slept has no credit: the others go on getting their share.
static void idleness_earns_nothing(void **state) {
    (void)state;
    world_open(7, NULL, 0);
    arrive(0, 5, 5); // so that it is known, and served next to nothing
    for (int t = 0; t < 20; t++) step();
    for (int i = 0; i < 600; i++) arrive(1, 20, 20);
    for (int t = 0; t < 1000; t++) step();
    assert_true(world.served[1] > 5 * bound());
    for (int i = 0; i < 200; i++) arrive(0, 20, 20);
    double before[2] = {world.served[0], world.served[1]};
    for (int t = 0; t < 200; t++) step();
    double got[2] = {world.served[0] - before[0], world.served[1] - before[1]};
    assert_true(world.waiting[0] > 0 && world.waiting[1] > 0);
    assert_true(fabs(got[0] - got[1]) <= bound()); // without the lift tenant 0 got all of it
    world_close();
}

// Catches: a window that only sees who came first.
static void polite_one_is_not_behind_the_flood(void **state) {
    (void)state;
    world_open(3, NULL, 0);
    for (int i = 0; i < 1000; i++) arrive(0, 20, 20);
    for (int t = 0; t < 100; t++) step();
    arrive(1, 20, 20);
    struct sched_item *window[WINDOW];
    assert_int_equal(tenants_window(world.tenants, false, window, WINDOW), WINDOW);
    bool seen = false; // within the first two: the lift may make it a tie
    for (int i = 0; i < 2; i++) seen |= window[i]->tenant == world.place[1];
    assert_true(seen);
    world_close();
}

// Catches: weights that are not divided by. With weight 3 a backlogged tenant gets three times.
static void weights_share(void **state) {
    (void)state;
    static const struct tenant_weight weights[] = {{"t1", 3}};
    world_open(5, weights, 1);
    for (int i = 0; i < 1500; i++) {
        arrive(0, 20, 20);
        arrive(1, 20, 20);
    }
    for (int t = 0; t < 3000; t++) step();
    assert_true(world.waiting[0] > 0 && world.waiting[1] > 0);
    assert_true(fabs(world.served[1] / world.served[0] - 3) < 0.1);
    world_close();
}

// Within a tenant: priority, then age; who was preempted goes before who came later.
static void order_within_a_tenant(void **state) {
    (void)state;
    world_open(1, NULL, 0);
    for (int i = 0; i < 6; i++) arrive(0, 1, 1);
    tenants_unwait(world.tenants, &world.jobs[2].item);
    world.jobs[4].item.priority = 0;
    tenants_unwait(world.tenants, &world.jobs[5].item);
    world.jobs[5].item.priority = -1;
    tenants_wait(world.tenants, &world.jobs[5].item);
    tenants_wait(world.tenants, &world.jobs[2].item);
    static const int expected[] = {5, 0, 1, 2, 3, 4};
    struct sched_item *window[WINDOW];
    assert_int_equal(tenants_window(world.tenants, false, window, WINDOW), 6);
    for (int i = 0; i < 6; i++) assert_ptr_equal(window[i], &world.jobs[expected[i]].item);
    assert_int_equal(tenants_window(world.tenants, false, window, 3), 3);
    world_close();
}

// Catches: places that are never given back. Names without end, few inside at a time.
static void places_are_used_again(void **state) {
    (void)state;
    struct tenants *tenants = tenants_create(4, NULL, 0);
    for (int i = 0; i < 10000; i++) {
        char name[80];
        snprintf(name, sizeof name, "%d-%070d", i, i); // longer than what is kept
        int a = tenants_enter(tenants, name), b = tenants_enter(tenants, "always");
        assert_int_equal(a == b, false);
        assert_int_equal(tenants_enter(tenants, name), a);
        assert_int_equal(tenants_active(tenants), 2);
        tenants_leave(tenants, a);
        tenants_leave(tenants, a);
        tenants_leave(tenants, b);
    }
    assert_int_equal(tenants_active(tenants), 0);
    tenants_destroy(tenants);
}

// Catches: a place in use given to a newcomer because its counter is the lowest.
static void places_in_use_are_kept(void **state) {
    (void)state;
    struct tenants *tenants = tenants_create(3, NULL, 0);
    int idle = tenants_enter(tenants, "idle"), busy = tenants_enter(tenants, "busy");
    int other = tenants_enter(tenants, "other");
    tenants_charge_output(tenants, idle, 50);
    tenants_charge_output(tenants, other, 70); // busy, at 0, has the least
    tenants_leave(tenants, idle);
    int newcomer = tenants_enter(tenants, "newcomer");
    assert_int_equal(newcomer, idle);
    assert_int_equal(tenants_enter(tenants, "busy"), busy);
    tenants_leave(tenants, busy);
    tenants_leave(tenants, busy);
    tenants_leave(tenants, other);
    tenants_leave(tenants, newcomer);
    tenants_destroy(tenants);
}

// Catches: no lift when nobody else waits: then the last one whose queue emptied counts.
static void lift_to_who_left_last(void **state) {
    (void)state;
    struct tenants *tenants = tenants_create(2, NULL, 0);
    struct sched_item first = {.tokens_total = 10}, second = {.tokens_total = 1, .arrival = 1};
    first.tenant = tenants_enter(tenants, "first");
    tenants_wait(tenants, &first);
    tenants_unwait(tenants, &first);
    tenants_charge_prompt(tenants, first.tenant, 10);
    tenants_charge_output(tenants, first.tenant, 20); // it runs on
    second.tenant = tenants_enter(tenants, "second");
    assert_true(tenants_counter(tenants, second.tenant) == 0);
    tenants_wait(tenants, &second);
    assert_true(tenants_counter(tenants, second.tenant) == 10 + 2 * 20);
    tenants_unwait(tenants, &second);
    tenants_leave(tenants, first.tenant);
    tenants_leave(tenants, second.tenant);
    tenants_destroy(tenants);
}

// Catches: a preempted request, already charged for its prompt, charged again in the window's
// order: its tenant's next request would stand behind another's.
static void the_charged_are_not_charged_again(void **state) {
    (void)state;
    struct tenants *tenants = tenants_create(4, NULL, 0);
    struct sched_item items[3] = {{.tokens_total = 1000, .arrival = 1, .charged = true},
                                  {.tokens_total = 1, .arrival = 2},
                                  {.tokens_total = 1, .arrival = 3}};
    for (int i = 0; i < 3; i++) {
        items[i].tenant = tenants_enter(tenants, i < 2 ? "a" : "b");
        tenants_wait(tenants, &items[i]);
    }
    tenants_charge_output(tenants, items[2].tenant, 100); // b has got 200, a nothing
    struct sched_item *window[3];
    assert_int_equal(tenants_window(tenants, false, window, 3), 3);
    for (int i = 0; i < 3; i++) assert_ptr_equal(window[i], &items[i]);
    for (int i = 0; i < 3; i++) {
        tenants_unwait(tenants, &items[i]);
        tenants_leave(tenants, items[i].tenant);
    }
    tenants_destroy(tenants);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(places_in_use_are_kept),
        cmocka_unit_test(lift_to_who_left_last),
        cmocka_unit_test(the_charged_are_not_charged_again),
        cmocka_unit_test(backlogged_get_the_same),
        cmocka_unit_test(prompts_and_output_count),
        cmocka_unit_test(idleness_earns_nothing),
        cmocka_unit_test(polite_one_is_not_behind_the_flood),
        cmocka_unit_test(weights_share),
        cmocka_unit_test(order_within_a_tenant),
        cmocka_unit_test(places_are_used_again),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
