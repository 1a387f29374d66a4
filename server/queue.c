// The bounded queue of queue.h: a ring of items under one mutex.
#include "server/queue.h"

#include "base/memory.h"
#include "base/verify.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct queue {
    pthread_mutex_t lock;
    pthread_cond_t filled, emptied;
    size_t item_bytes;
    int capacity, first, count;
    bool closed, notified;
    unsigned char *items;
};

struct queue *queue_create(int capacity, size_t item_bytes) {
    VERIFY_OP(capacity, >, 0);
    struct queue *queue = mem_zalloc(1, sizeof *queue);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&queue->lock, NULL);
    pthread_cond_init(&queue->filled, &monotonic);
    pthread_cond_init(&queue->emptied, &monotonic);
    pthread_condattr_destroy(&monotonic);
    queue->capacity = capacity;
    queue->item_bytes = item_bytes;
    queue->items = mem_zalloc((size_t)capacity, item_bytes);
    return queue;
}

void queue_destroy(struct queue *queue) {
    if (!queue) return;
    pthread_cond_destroy(&queue->filled);
    pthread_cond_destroy(&queue->emptied);
    pthread_mutex_destroy(&queue->lock);
    free(queue->items);
    free(queue);
}

static void append(struct queue *queue, const void *item) {
    int at = (queue->first + queue->count) % queue->capacity;
    memcpy(queue->items + (size_t)at * queue->item_bytes, item, queue->item_bytes);
    queue->count++;
}

bool queue_push(struct queue *queue, const void *items, int count) {
    VERIFY_OP(count, >=, 0);
    pthread_mutex_lock(&queue->lock);
    bool fits = !queue->closed && count <= queue->capacity - queue->count;
    for (int i = 0; fits && i < count; i++)
        append(queue, (const unsigned char *)items + (size_t)i * queue->item_bytes);
    if (fits) pthread_cond_signal(&queue->filled);
    pthread_mutex_unlock(&queue->lock);
    return fits;
}

int queue_room(struct queue *queue) {
    pthread_mutex_lock(&queue->lock);
    int room = queue->closed ? 0 : queue->capacity - queue->count;
    pthread_mutex_unlock(&queue->lock);
    return room;
}

bool queue_wait_room(struct queue *queue, int count) {
    VERIFY_OP(count, <=, queue->capacity);
    pthread_mutex_lock(&queue->lock);
    while (!queue->closed && queue->capacity - queue->count < count)
        pthread_cond_wait(&queue->emptied, &queue->lock);
    bool open = !queue->closed;
    pthread_mutex_unlock(&queue->lock);
    return open;
}

int queue_pop(struct queue *queue, void *items, int max) {
    pthread_mutex_lock(&queue->lock);
    int taken = queue->count < max ? queue->count : max;
    for (int i = 0; i < taken; i++) {
        memcpy((unsigned char *)items + (size_t)i * queue->item_bytes,
               queue->items + (size_t)queue->first * queue->item_bytes, queue->item_bytes);
        queue->first = (queue->first + 1) % queue->capacity;
    }
    queue->count -= taken;
    if (taken) pthread_cond_signal(&queue->emptied);
    pthread_mutex_unlock(&queue->lock);
    return taken;
}

static struct timespec time_in(double seconds) {
    VERIFY(seconds >= 0 && seconds < 1e6);
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    long long ns = until.tv_nsec + (long long)(seconds * 1e9);
    until.tv_sec += ns / 1000000000;
    until.tv_nsec = ns % 1000000000;
    return until;
}

void queue_wait(struct queue *queue, double timeout_s) {
    struct timespec until = time_in(timeout_s);
    pthread_mutex_lock(&queue->lock);
    while (!queue->count && !queue->notified)
        if (pthread_cond_timedwait(&queue->filled, &queue->lock, &until)) break;
    queue->notified = false;
    pthread_mutex_unlock(&queue->lock);
}

int queue_wait_more(struct queue *queue, int count, double timeout_s) {
    struct timespec until = time_in(timeout_s);
    pthread_mutex_lock(&queue->lock);
    while (queue->count <= count && !queue->closed)
        if (pthread_cond_timedwait(&queue->filled, &queue->lock, &until)) break;
    int there = queue->count;
    pthread_mutex_unlock(&queue->lock);
    return there;
}

void queue_notify(struct queue *queue) {
    pthread_mutex_lock(&queue->lock);
    queue->notified = true;
    pthread_cond_signal(&queue->filled);
    pthread_mutex_unlock(&queue->lock);
}

void queue_close(struct queue *queue) {
    pthread_mutex_lock(&queue->lock);
    queue->closed = true;
    queue->notified = true;
    pthread_cond_broadcast(&queue->filled);
    pthread_cond_broadcast(&queue->emptied);
    pthread_mutex_unlock(&queue->lock);
}
