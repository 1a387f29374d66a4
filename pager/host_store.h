// The tiers above the pool: loader threads bring adapters' images from disk into host memory, as
// many as fit into host_bytes_max, and copy them into their pages.
//
//   ON_DISK --room is reserved for one of the first wanted--> READING --read, checked--> IN_HOST
//   READING --the read failed--> ON_DISK, and an event with the reason
//   IN_HOST --another image needs the room, least recently wanted first--> ON_DISK
//
// The engine says each step which images are wanted, most urgent first; what it no longer says and
// is not READING is forgotten. Copies into pages go before reads, in the order they were asked
// for. On a backend that computes on the host's own processor the loaders work in slices of about
// 0.1 ms and rest in between, so that steps stay as long as they are, unless the steps lack those who
// wait for what the loaders bring.
#ifndef LORAD_PAGER_HOST_STORE_H
#define LORAD_PAGER_HOST_STORE_H

#include "pager/adapter.h"

struct host_store;
struct host_store_options {
    size_t bytes_max;
    double paced_share; // of one core, above 0; see host_store_set_pace
    int threads; // 0: everything happens inside the calls below, for tests
    void (*wake)(void *context); // by a loader: an event waits, or a wanted image has come
    void *wake_context;
};

// Borrows ops and backend: pool_write and pool_written are called by loaders.
MUST_CHECK enum status host_store_create(const struct lora_geometry *geometry,
                                         const struct backend_ops *ops, struct backend *backend,
                                         const struct host_store_options *options,
                                         struct host_store **out, struct error *err);
// Joins the loaders. Copies that no loader has begun end in events with STATUS_SHUTDOWN.
void host_store_stop(struct host_store *store);
// After host_store_stop, once every event has been polled. Images in its account stay with their
// adapters, unless the backend made them.
void host_store_destroy(struct host_store *store);

// Any thread: an adapter that adapter_load has read brings its image into the account; where it
// does not fit beside images in use, the image goes.
void host_store_adopt(struct host_store *store, struct adapter *adapter);
void host_store_forget(struct adapter *adapter); // its last reference has gone

// Engine thread: the wanted adapters; references are taken. At most HOST_WANTED_MAX count.
enum { HOST_WANTED_MAX = 128 };
void host_store_want(struct host_store *store, struct adapter *const *wanted, int count);
// Engine thread: copies an image into adapter->pages, now where it is IN_HOST, behind the read where
// it is READING (if that fails, its event says so for both). False: it has just left.
bool host_store_copy(struct host_store *store, struct adapter *adapter);
// Engine thread: what has ended since the last call; the event's reference is the caller's.
struct host_event {
    struct adapter *adapter;
    bool copied; // it is about a copy into pages; else about a read that failed
    enum status status; // with `text` when not STATUS_OK
    char text[160];
};
int host_store_poll(struct host_store *store, struct host_event *events, int max);
// Engine thread: room in the account for something else than an image; false: there is none.
bool host_store_reserve(struct host_store *store, size_t bytes);
void host_store_release(struct host_store *store, size_t bytes);
// Engine thread: what else there is to do.
enum host_pace {
    HOST_IDLE,   // nothing is computed: digests are, too
    HOST_PACED,  // steps are computed: loaders keep to paced_share
    HOST_WANTED, // and a request waits for them: to half of a core at least
    HOST_URGENT, // steps are computed, but for too few: loaders do not rest
};
void host_store_set_pace(struct host_store *store, enum host_pace pace);

struct host_store_counts {
    size_t bytes_used, bytes_max;
    int images;
    uint64_t reads, read_failures, bytes_read;
    double read_s, copy_s;  // in all
    uint64_t bytes_copied;
};
struct host_store_counts host_store_counts(struct host_store *store);

#endif
