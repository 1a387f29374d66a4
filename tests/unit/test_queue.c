// server/queue.h: order, bounds, all-or-none, waiting and waking. The threads meet through the
// queue alone; nothing sleeps to be on time.
#include "server/queue.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

// Catches: an item lost or reordered where the ring wraps.
static void keeps_order_over_wraps(void **state) {
    struct queue *queue = queue_create(5, sizeof(int));
    int next_in = 0, next_out = 0;
    for (int round = 0; round < 100; round++) {
        int batch = 1 + round % 4, items[5];
        for (int i = 0; i < batch; i++) items[i] = next_in++;
        assert_true(queue_push(queue, items, batch));
        int count = queue_pop(queue, items, 5);
        assert_int_equal(count, batch);
        for (int i = 0; i < count; i++) assert_int_equal(items[i], next_out++);
    }
    queue_destroy(queue);
}

// Catches: half a group accepted; room miscounted.
static void pushes_all_or_none(void **state) {
    struct queue *queue = queue_create(4, sizeof(int));
    int items[5] = {1, 2, 3, 4, 5};
    assert_false(queue_push(queue, items, 5));
    assert_int_equal(queue_room(queue), 4);
    assert_true(queue_push(queue, items, 3));
    assert_false(queue_push(queue, items, 2));
    assert_int_equal(queue_room(queue), 1);
    int out[5];
    assert_int_equal(queue_pop(queue, out, 2), 2);
    assert_int_equal(out[1], 2);
    assert_true(queue_push(queue, items, 3));
    assert_int_equal(queue_pop(queue, out, 5), 4);
    assert_int_equal(out[0], 3);
    assert_int_equal(out[3], 3);
    assert_int_equal(queue_pop(queue, out, 5), 0);
    queue_destroy(queue);
}

// Catches: items lost at close; pushes accepted after it; a closed queue on which nobody can wait
// without spinning.
static void close_keeps_what_is_there(void **state) {
    struct queue *queue = queue_create(4, sizeof(int));
    int item = 7, out = 0;
    assert_true(queue_push(queue, &item, 1));
    queue_close(queue);
    assert_false(queue_push(queue, &item, 1));
    assert_int_equal(queue_room(queue), 0);
    assert_false(queue_wait_room(queue, 4));
    assert_int_equal(queue_pop(queue, &out, 1), 1);
    assert_int_equal(out, 7);
    queue_wait(queue, 100); // the close itself wakes once
    queue_wait(queue, 0);   // and then time alone
    queue_destroy(queue);
}

// Catches: a notification that came before the wait is forgotten (would wait 100 s).
static void notify_before_wait(void **state) {
    struct queue *queue = queue_create(1, sizeof(int));
    queue_notify(queue);
    queue_wait(queue, 100);
    queue_destroy(queue);
}

enum { ITEMS = 20000 };

static void *produce(void *argument) {
    struct queue *queue = argument;
    for (int32_t i = 0; i < ITEMS; i++) {
        if (!queue_wait_room(queue, 1) || !queue_push(queue, &i, 1)) return argument;
    }
    return NULL;
}

// Catches: lost wake-ups on either side (hangs), lost or doubled items.
static void two_threads(void **state) {
    struct queue *queue = queue_create(3, sizeof(int32_t));
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, produce, queue), 0);
    for (int32_t expected = 0; expected < ITEMS;) {
        int32_t items[2];
        queue_wait(queue, 100);
        int count = queue_pop(queue, items, 2);
        for (int i = 0; i < count; i++) assert_int_equal(items[i], expected++);
    }
    void *failed = NULL;
    pthread_join(thread, &failed);
    assert_null(failed);
    queue_destroy(queue);
}

// Catches: a thread that waits for room sleeps through the close.
static void close_wakes_who_waits_for_room(void **state) {
    struct queue *queue = queue_create(1, sizeof(int32_t));
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, produce, queue), 0);
    queue_wait(queue, 100); // the first item is there; the second waits for room, or will
    queue_close(queue);
    void *failed = NULL;
    pthread_join(thread, &failed);
    assert_non_null(failed);
    queue_destroy(queue);
}

// Catches: a wait for more that ends with what was there, forgets what came during it, or outlasts
// its time or the close.
static void waits_for_more(void **state) {
    struct queue *queue = queue_create(2, sizeof(int32_t));
    assert_int_equal(queue_wait_more(queue, 0, 0), 0);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, produce, queue), 0);
    assert_int_equal(queue_wait_more(queue, 1, 100), 2);
    assert_int_equal(queue_wait_more(queue, 0, 100), 2);
    assert_int_equal(queue_wait_more(queue, 2, 0.001), 2);
    queue_close(queue);
    assert_int_equal(queue_wait_more(queue, 2, 100), 2);
    pthread_join(thread, NULL);
    queue_destroy(queue);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keeps_order_over_wraps),
        cmocka_unit_test(pushes_all_or_none),
        cmocka_unit_test(close_keeps_what_is_there),
        cmocka_unit_test(notify_before_wait),
        cmocka_unit_test(two_threads),
        cmocka_unit_test(close_wakes_who_waits_for_room),
        cmocka_unit_test(waits_for_more),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
