// A bounded first-in first-out queue between two threads: fixed-size items, one mutex, two
// condition variables, no allocation after queue_create. The engine has two: submissions down,
// events up.
#ifndef LORAD_SERVER_QUEUE_H
#define LORAD_SERVER_QUEUE_H

#include <stdbool.h>
#include <stddef.h>

struct queue;

struct queue *queue_create(int capacity, size_t item_bytes);
void queue_destroy(struct queue *queue); // NULL is allowed; nobody may be inside a call
// Appends all `count` items or none; false: no room, or closed.
bool queue_push(struct queue *queue, const void *items, int count);
// Removes up to `max` items, oldest first; returns how many. Never waits.
int queue_pop(struct queue *queue, void *items, int max);
// Waits until an item is there, queue_notify or queue_close was called since the last wait, or
// `timeout_s` has passed.
void queue_wait(struct queue *queue, double timeout_s);
void queue_notify(struct queue *queue);
// Waits until there are more than `count` items, it is closed, or `timeout_s` has passed; returns how
// many there are.
int queue_wait_more(struct queue *queue, int count, double timeout_s);
// How many items can be pushed at least; only the pushing thread can make it less.
int queue_room(struct queue *queue);
// Waits until there is room for `count` items (at most the capacity); false: closed.
bool queue_wait_room(struct queue *queue, int count);
// Pushes fail from now on and waiters wake, once; items that are there can still be popped.
void queue_close(struct queue *queue);

#endif
