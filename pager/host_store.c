// See host_store.h. One mutex guards the account, the list of images (least recently wanted first)
// and what is asked for; it is held for moments, never while bytes move.
#include "pager/host_store.h"

#include "base/file.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/thread.h"
#include "base/verify.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { THREADS_MAX = 64, COPY_PIECE_PAGES = 8, SPARE_MAX = 16 };
// While it is paced: how long a loader works at a time, and rests at most.
static const double SLICE_S = 0.0001, PAUSE_MAX_S = 0.05, WANTED_SHARE = 0.5;

struct host_store {
    const struct lora_geometry *geometry; // borrowed from the engine
    const struct backend_ops *ops;
    struct backend *backend;
    struct host_store_options options;
    int thread_count;
    pthread_t *threads;
    _Atomic int pace; // enum host_pace

    pthread_mutex_t mutex; // guards everything below
    pthread_cond_t work;
    bool stopping, copying; // one copy at a time
    struct adapter *oldest, *newest;
    struct {
        void *image;
        size_t bytes;
    } spare[SPARE_MAX + 1];
    size_t spare_bytes;
    int spare_count, undigested; // images whose digest is not known
    struct adapter *wanted[HOST_WANTED_MAX];
    int wanted_count;
    struct adapter *reads[THREADS_MAX]; // that loaders take next; room is reserved, tier READING
    int read_count;
    struct adapter **copies; // first in, first out
    int copy_count, copy_room;
    struct host_event *events;
    int event_count, event_room;
    struct host_store_counts counts;
};

// ------------------------------------------------------------------ resting

struct rest {
    struct host_store *store;
    double since_s;
};

static void rest(void *context) {
    struct rest *rest = context;
    double worked_s = clock_seconds() - rest->since_s;
    if (worked_s < SLICE_S) return;
    const struct host_store *store = rest->store;
    int pace = atomic_load(&store->pace);
    if (store->ops->computes_on_host && (pace == HOST_PACED || pace == HOST_WANTED) &&
        store->thread_count > 0) {
        double share = store->options.paced_share;
        if (pace == HOST_WANTED && share < WANTED_SHARE) share = WANTED_SHARE;
        double pause_s = worked_s * (store->thread_count / share - 1);
        if (pause_s > PAUSE_MAX_S) pause_s = PAUSE_MAX_S;
        struct timespec pause = {0, pause_s > 0 ? (long)(pause_s * 1e9) : 0};
        nanosleep(&pause, NULL);
    }
    rest->since_s = clock_seconds();
}

// ------------------------------------------------------------------ the account; under the mutex

static void list_remove(struct host_store *store, struct adapter *adapter) {
    struct adapter *previous = adapter->host_previous, *next = adapter->host_next;
    *(previous ? &previous->host_next : &store->oldest) = next;
    *(next ? &next->host_previous : &store->newest) = previous;
    adapter->host_previous = adapter->host_next = NULL;
}

static void list_append(struct host_store *store, struct adapter *adapter) {
    adapter->host_previous = store->newest;
    adapter->host_next = NULL;
    *(store->newest ? &store->newest->host_next : &store->oldest) = adapter;
    store->newest = adapter;
}

static void image_destroy(struct host_store *store, void *image) {
    if (store->ops->host_destroy) store->ops->host_destroy(store->backend, image);
    else free(image);
}

static void *spare_take(struct host_store *store, int i) {
    void *image = store->spare[i].image;
    store->spare_bytes -= store->spare[i].bytes;
    store->spare[i] = store->spare[--store->spare_count];
    return image;
}

// Mapping memory anew for each image would interrupt every processor that computes, and
// page-locking it takes longer than a copy: a few images that went are kept for the next ones of
// their size, as far as they fit beside what is in the account. Under the mutex.
static void spare_trim(struct host_store *store) {
    while (store->spare_count > SPARE_MAX ||
           (store->spare_count > 0 &&
            store->counts.bytes_used + store->spare_bytes > store->options.bytes_max))
        image_destroy(store, spare_take(store, 0));
}

// For `bytes` that the account has reserved.
static void *image_create(struct host_store *store, size_t bytes) {
    void *image = NULL;
    for (int i = 0; i < store->spare_count && !image; i++)
        if (store->spare[i].bytes == bytes) image = spare_take(store, i);
    spare_trim(store);
    if (image) return image;
    if (store->ops->host_create) return store->ops->host_create(store->backend, bytes);
    return mem_alloc_aligned(bytes);
}

static void image_free(struct host_store *store, void *image, size_t bytes) {
    store->spare[store->spare_count].image = image;
    store->spare[store->spare_count++].bytes = bytes;
    store->spare_bytes += bytes;
    spare_trim(store);
}

// Out of the account; the image is the caller's.
static void *account_remove(struct host_store *store, struct adapter *adapter) {
    VERIFY_OP(adapter->image_users, ==, 0);
    VERIFY_OP(store->counts.bytes_used, >=, adapter->image_bytes);
    void *image = adapter->image;
    list_remove(store, adapter);
    store->counts.bytes_used -= adapter->image_bytes;
    store->counts.images--;
    store->undigested -= !atomic_load(&adapter->digest_known);
    adapter->image = NULL;
    atomic_store(&adapter->store, NULL);
    atomic_store(&adapter->tier, ADAPTER_ON_DISK);
    return image;
}

static void account_add(struct host_store *store, struct adapter *adapter) {
    list_append(store, adapter);
    store->counts.images++;
    store->undigested += !atomic_load(&adapter->digest_known);
    atomic_store(&adapter->store, store);
    atomic_store(&adapter->tier, ADAPTER_IN_HOST);
}

// Not one of the `kept` most urgent.
static bool droppable(const struct host_store *store, const struct adapter *adapter, int kept) {
    for (int i = 0; i < kept; i++)
        if (store->wanted[i] == adapter) return false;
    return adapter->image_users == 0;
}

// The image to drop for one of `bytes`: the oldest, or, where it is among the oldest, one of the same
// size, whose memory the new one can have.
static struct adapter *victim(const struct host_store *store, size_t bytes, int kept) {
    enum { OLDEST = 32 };
    struct adapter *oldest = NULL;
    int seen = 0;
    for (struct adapter *a = store->oldest; a && (!oldest || seen < OLDEST); a = a->host_next) {
        if (!droppable(store, a, kept)) continue;
        if (a->image_bytes == bytes) return a;
        if (!oldest) oldest = a;
        seen++;
    }
    return oldest;
}

// Reserves room, dropping images but those of the `kept` most urgent and those being read; false:
// there is none.
static bool reserve(struct host_store *store, size_t bytes, int kept) {
    while (store->counts.bytes_used + bytes > store->options.bytes_max) {
        struct adapter *adapter = victim(store, bytes, kept);
        if (!adapter) return false;
        image_free(store, account_remove(store, adapter), adapter->image_bytes);
    }
    store->counts.bytes_used += bytes;
    return true;
}

static struct host_event *event_add(struct host_store *store, struct adapter *adapter) {
    if (store->event_count == store->event_room) {
        store->event_room = store->event_room ? 2 * store->event_room : 64;
        store->events =
            mem_realloc(store->events, (size_t)store->event_room * sizeof *store->events);
    }
    struct host_event *event = &store->events[store->event_count++];
    *event = (struct host_event){.adapter = adapter};
    return event;
}

// For an image in host memory.
static void copy_add(struct host_store *store, struct adapter *adapter) {
    adapter->image_users++;
    if (store->copy_count == store->copy_room) {
        store->copy_room = store->copy_room ? 2 * store->copy_room : 64;
        store->copies =
            mem_realloc(store->copies, (size_t)store->copy_room * sizeof *store->copies);
    }
    store->copies[store->copy_count++] = adapter_ref(adapter);
}

// ------------------------------------------------------------------ the work

// Into the pages, in pieces between which a loader may rest.
static void copy_image(struct host_store *store, struct adapter *adapter) {
    const struct lora_geometry *geometry = store->geometry;
    struct rest resting = {store, clock_seconds()};
    double begin_s = resting.since_s;
    size_t bytes = dtype_bytes(geometry->dtype), elems = adapter->layer_elems;
    size_t piece = store->ops->computes_on_host ? COPY_PIECE_PAGES * geometry->page_elems : elems;
    for (int layer = 0; layer < geometry->layers; layer++)
        for (size_t at = 0; at < elems; at += piece) {
            const char *from = (const char *)adapter->image +
                               ((size_t)layer * elems + at) * bytes;
            store->ops->pool_write(store->backend, layer,
                                   adapter->pages + at / geometry->page_elems, from,
                                   elems - at < piece ? elems - at : piece);
            rest(&resting);
        }
    if (store->ops->pool_written) store->ops->pool_written(store->backend);
    pthread_mutex_lock(&store->mutex);
    adapter->image_users--;
    event_add(store, adapter)->copied = true; // the reference goes with it
    store->counts.bytes_copied += adapter->image_bytes;
    store->counts.copy_s += clock_seconds() - begin_s;
    pthread_mutex_unlock(&store->mutex);
}

// Room is reserved, the tier is READING, and a reference is held.
static void read_image(struct host_store *store, struct adapter *adapter) {
    struct error err = {0};
    struct rest resting = {store, clock_seconds()};
    double begin_s = resting.since_s;
    struct adapter_pause pause = {rest, &resting};
    pthread_mutex_lock(&store->mutex);
    void *image = image_create(store, adapter->image_bytes);
    pthread_mutex_unlock(&store->mutex);
    enum status status =
        image ? adapter_read(store->geometry, adapter, image, &pause, &err)
              : error_set(&err, STATUS_NO_MEMORY, "no page-locked host memory for the adapter");
    pthread_mutex_lock(&store->mutex);
    store->counts.read_s += clock_seconds() - begin_s;
    if (status == STATUS_OK) {
        store->counts.reads++;
        store->counts.bytes_read += adapter->image_bytes;
        adapter->image = image;
        account_add(store, adapter);
        if (adapter->copy_follows) copy_add(store, adapter);
    } else {
        store->counts.read_failures++;
        store->counts.bytes_used -= adapter->image_bytes;
        if (image) image_free(store, image, adapter->image_bytes);
        // Not again until somebody asks again.
        for (int i = 0; i < store->wanted_count; i++)
            if (store->wanted[i] == adapter) {
                adapter_unref(adapter);
                memmove(&store->wanted[i], &store->wanted[i + 1],
                        (size_t)(--store->wanted_count - i) * sizeof *store->wanted);
                break;
            }
        struct host_event *event = event_add(store, adapter_ref(adapter));
        event->status = status;
        snprintf(event->text, sizeof event->text, "%.*s", (int)sizeof event->text - 1, err.text);
        atomic_store(&adapter->tier, ADAPTER_ON_DISK);
    }
    adapter->copy_follows = false;
    pthread_mutex_unlock(&store->mutex);
    if (status != STATUS_OK)
        log_event(LOG_ERROR, "adapter_not_read", "name=%s %s", adapter->name, err.text);
    adapter_unref(adapter);
    if (store->options.wake) store->options.wake(store->options.wake_context);
}

// The first wanted image that is on disk and finds room; under the mutex.
static struct adapter *next_read(struct host_store *store) {
    for (int i = 0; i < store->wanted_count; i++) {
        struct adapter *adapter = store->wanted[i];
        if (atomic_load(&adapter->tier) != ADAPTER_ON_DISK) continue;
        // Less urgent ones make room for it; nothing overtakes it.
        if (!reserve(store, adapter->image_bytes, i)) return NULL;
        atomic_store(&adapter->tier, ADAPTER_READING);
        return adapter_ref(adapter);
    }
    return NULL;
}

// As many as loaders may begin at once: what stands here has its room, and will be read.
static void assign_reads(struct host_store *store) {
    int most = store->thread_count > 0 ? store->thread_count : 1;
    struct adapter *adapter;
    while (store->read_count < most && (adapter = next_read(store)))
        store->reads[store->read_count++] = adapter;
}

// In the list, but its last reference may just have gone.
static bool try_ref(struct adapter *adapter) {
    int refs = atomic_load(&adapter->refs);
    while (refs > 0 && !atomic_compare_exchange_weak(&adapter->refs, &refs, refs + 1)) {}
    return refs > 0;
}

// While nothing is computed and nothing is to be brought: the digest of an image that came without.
static bool digest_one(struct host_store *store) {
    if (store->undigested == 0 || atomic_load(&store->pace) != HOST_IDLE) return false;
    struct adapter *adapter = store->newest;
    while (adapter && (atomic_load(&adapter->digest_known) || adapter->image_users > 0 ||
                       !try_ref(adapter)))
        adapter = adapter->host_previous;
    if (!adapter) return false;
    adapter->image_users++;
    pthread_mutex_unlock(&store->mutex);
    struct rest resting = {store, clock_seconds()};
    adapter_digest(adapter, adapter->image, &(struct adapter_pause){rest, &resting});
    pthread_mutex_lock(&store->mutex);
    adapter->image_users--;
    store->undigested--;
    pthread_mutex_unlock(&store->mutex);
    adapter_unref(adapter);
    pthread_mutex_lock(&store->mutex);
    return true;
}

// Does one thing; false: there is nothing to do. The mutex is held, but not while it works.
static bool work(struct host_store *store) {
    struct adapter *adapter;
    if (store->copy_count > 0 && !store->copying) {
        adapter = store->copies[0];
        memmove(store->copies, store->copies + 1,
                (size_t)--store->copy_count * sizeof *store->copies);
        store->copying = true;
        pthread_mutex_unlock(&store->mutex);
        copy_image(store, adapter);
        if (store->options.wake) store->options.wake(store->options.wake_context);
        pthread_mutex_lock(&store->mutex);
        store->copying = false;
        return true;
    }
    assign_reads(store);
    if (store->read_count == 0) return digest_one(store);
    adapter = store->reads[0];
    memmove(store->reads, store->reads + 1, (size_t)--store->read_count * sizeof *store->reads);
    pthread_mutex_unlock(&store->mutex);
    read_image(store, adapter);
    pthread_mutex_lock(&store->mutex);
    return true;
}

static void *loader(void *argument) {
    struct host_store *store = argument;
    pthread_mutex_lock(&store->mutex);
    while (!store->stopping)
        if (!work(store)) pthread_cond_wait(&store->work, &store->mutex);
    pthread_mutex_unlock(&store->mutex);
    return NULL;
}

// Something may be there to do: now, where there is no loader. The mutex is held.
static void something_to_do(struct host_store *store) {
    if (store->thread_count > 0) pthread_cond_broadcast(&store->work);
    else
        while (work(store)) {}
}

// ------------------------------------------------------------------ life

enum status host_store_create(const struct lora_geometry *geometry, const struct backend_ops *ops,
                              struct backend *backend, const struct host_store_options *options,
                              struct host_store **out, struct error *err) {
    struct host_store *store = mem_zalloc(1, sizeof *store);
    store->geometry = geometry;
    store->ops = ops;
    store->backend = backend;
    store->options = *options;
    store->counts.bytes_max = options->bytes_max;
    VERIFY(options->threads >= 0 && options->threads <= THREADS_MAX);
    VERIFY_OP(pthread_mutex_init(&store->mutex, NULL), ==, 0);
    VERIFY_OP(pthread_cond_init(&store->work, NULL), ==, 0);
    store->threads = mem_zalloc((size_t)options->threads + 1, sizeof *store->threads);
    int failure = 0;
    pthread_mutex_lock(&store->mutex); // loaders wait until all are counted
    while (store->thread_count < options->threads && !failure) {
        failure = thread_start(&store->threads[store->thread_count], loader, store);
        store->thread_count += !failure;
    }
    pthread_mutex_unlock(&store->mutex);
    *out = store;
    if (failure && store->thread_count == 0) {
        host_store_destroy(store);
        *out = NULL;
        return error_set(err, STATUS_NO_MEMORY, "cannot start a thread that loads adapters: %s",
                         strerror(failure));
    }
    return STATUS_OK;
}

// The reference goes with the event.
static void copy_cancel(struct host_store *store, struct adapter *adapter) {
    struct host_event *event = event_add(store, adapter);
    event->copied = true;
    event->status = STATUS_SHUTDOWN;
}

static void read_cancel(struct host_store *store, struct adapter *adapter) {
    store->counts.bytes_used -= adapter->image_bytes;
    atomic_store(&adapter->tier, ADAPTER_ON_DISK);
    bool follows = adapter->copy_follows;
    adapter->copy_follows = false;
    if (follows) copy_cancel(store, adapter);
    else adapter_unref(adapter);
}

void host_store_stop(struct host_store *store) {
    pthread_mutex_lock(&store->mutex);
    store->stopping = true;
    pthread_cond_broadcast(&store->work);
    pthread_mutex_unlock(&store->mutex);
    for (int i = 0; i < store->thread_count; i++) pthread_join(store->threads[i], NULL);
    store->thread_count = 0;
    for (int i = 0; i < store->read_count; i++) read_cancel(store, store->reads[i]);
    store->read_count = 0;
    for (int i = 0; i < store->copy_count; i++) {
        store->copies[i]->image_users--;
        copy_cancel(store, store->copies[i]);
    }
    store->copy_count = 0;
}

void host_store_destroy(struct host_store *store) {
    if (!store) return;
    VERIFY_OP(store->thread_count, ==, 0);
    VERIFY_OP(store->event_count, ==, 0);
    for (int i = 0; i < store->wanted_count; i++) adapter_unref(store->wanted[i]);
    while (store->oldest) { // the backend is about to close: what is its own goes
        struct adapter *adapter = store->oldest;
        void *image = account_remove(store, adapter);
        if (store->ops->host_destroy) {
            image_destroy(store, image);
        } else {
            adapter->image = image;
            atomic_store(&adapter->tier, ADAPTER_IN_HOST);
        }
    }
    while (store->spare_count > 0) image_destroy(store, spare_take(store, 0));
    pthread_mutex_destroy(&store->mutex);
    pthread_cond_destroy(&store->work);
    free(store->threads);
    free(store->copies);
    free(store->events);
    free(store);
}

void host_store_adopt(struct host_store *store, struct adapter *adapter) {
    VERIFY(adapter->image && !atomic_load(&adapter->store));
    void *own = adapter->image;
    pthread_mutex_lock(&store->mutex);
    void *image = NULL;
    if (reserve(store, adapter->image_bytes, store->wanted_count)) {
        image = store->ops->host_create ? image_create(store, adapter->image_bytes) : own;
        if (!image) store->counts.bytes_used -= adapter->image_bytes;
    }
    if (image && image != own) memcpy(image, own, adapter->image_bytes);
    adapter->image = image;
    if (image) account_add(store, adapter);
    else atomic_store(&adapter->tier, ADAPTER_ON_DISK);
    pthread_mutex_unlock(&store->mutex);
    if (image != own) free(own);
}

void host_store_forget(struct adapter *adapter) {
    struct host_store *store = atomic_load(&adapter->store);
    if (!store) return;
    pthread_mutex_lock(&store->mutex);
    void *image = atomic_load(&adapter->store) ? account_remove(store, adapter) : NULL;
    if (image) image_free(store, image, adapter->image_bytes);
    pthread_mutex_unlock(&store->mutex);
}

// ------------------------------------------------------------------ the engine's calls

void host_store_want(struct host_store *store, struct adapter *const *wanted, int count) {
    VERIFY_OP(count, <=, HOST_WANTED_MAX);
    pthread_mutex_lock(&store->mutex);
    bool same = count == store->wanted_count &&
                (count == 0 || memcmp(wanted, store->wanted, (size_t)count * sizeof *wanted) == 0);
    if (!same) {
        struct adapter *before[HOST_WANTED_MAX];
        int before_count = store->wanted_count;
        memcpy(before, store->wanted, sizeof before);
        for (int i = 0; i < count; i++) {
            store->wanted[i] = adapter_ref(wanted[i]);
            if (!atomic_load(&wanted[i]->store)) continue;
            list_remove(store, wanted[i]); // the latest wanted goes last
            list_append(store, wanted[i]);
        }
        store->wanted_count = count;
        assign_reads(store);
        something_to_do(store);
        pthread_mutex_unlock(&store->mutex);
        for (int i = 0; i < before_count; i++) adapter_unref(before[i]);
        return;
    }
    pthread_mutex_unlock(&store->mutex);
}

bool host_store_copy(struct host_store *store, struct adapter *adapter) {
    pthread_mutex_lock(&store->mutex);
    int tier = atomic_load(&adapter->tier);
    if (tier == ADAPTER_READING) adapter->copy_follows = true;
    if (tier == ADAPTER_IN_HOST) {
        copy_add(store, adapter);
        if (atomic_load(&adapter->store)) {
            list_remove(store, adapter);
            list_append(store, adapter);
        }
        something_to_do(store);
    }
    pthread_mutex_unlock(&store->mutex);
    return tier != ADAPTER_ON_DISK;
}

int host_store_poll(struct host_store *store, struct host_event *events, int max) {
    pthread_mutex_lock(&store->mutex);
    int count = store->event_count < max ? store->event_count : max;
    if (count > 0) {
        memcpy(events, store->events, (size_t)count * sizeof *events);
        store->event_count -= count;
        memmove(store->events, store->events + count,
                (size_t)store->event_count * sizeof *events);
    }
    pthread_mutex_unlock(&store->mutex);
    return count;
}

bool host_store_reserve(struct host_store *store, size_t bytes) {
    pthread_mutex_lock(&store->mutex);
    bool reserved = reserve(store, bytes, store->wanted_count);
    spare_trim(store);
    pthread_mutex_unlock(&store->mutex);
    return reserved;
}

void host_store_release(struct host_store *store, size_t bytes) {
    pthread_mutex_lock(&store->mutex);
    VERIFY_OP(store->counts.bytes_used, >=, bytes);
    store->counts.bytes_used -= bytes;
    something_to_do(store); // a read may have waited for the room
    pthread_mutex_unlock(&store->mutex);
}

void host_store_set_pace(struct host_store *store, enum host_pace pace) {
    if (atomic_exchange(&store->pace, pace) != (int)pace && pace == HOST_IDLE) { // time for digests
        pthread_mutex_lock(&store->mutex);
        if (store->undigested > 0) pthread_cond_signal(&store->work);
        pthread_mutex_unlock(&store->mutex);
    }
}

struct host_store_counts host_store_counts(struct host_store *store) {
    pthread_mutex_lock(&store->mutex);
    struct host_store_counts counts = store->counts;
    pthread_mutex_unlock(&store->mutex);
    return counts;
}
