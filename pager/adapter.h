// One generation of one LoRA adapter: what its files say, its host image, and its pages.
//
// Host image: per layer, contiguous, the matrices A then B of q, k, v, o, gate, up, down in that
// order, each 16-byte aligned, at the true rank of that module (the largest over layers; missing
// rows are zero), alpha / r (or alpha / sqrt(r), rsLoRA) folded into B. Elements have the pool's
// dtype. Identity is the SHA-256 of the image and its ranks, known at some time after the image was read.
//
// Two states, each drawn where it is kept: of the image (host_store.h: on disk, reading, in host
// memory) and of the pages (residency.h: away, arriving, resident). All else is immutable after
// adapter_open; an adapter whose image is on disk takes less than 1 KiB beside its path.
#ifndef LORAD_PAGER_ADAPTER_H
#define LORAD_PAGER_ADAPTER_H

#include "base/error.h"
#include "kernels/backend.h"
#include "pager/eviction.h"
#include "pager/pool.h"

#include <stdatomic.h>

// What an adapter must fit: taken from the base model.
struct lora_geometry {
    int layers;
    int in[LORA_MODULES], out[LORA_MODULES];
    enum dtype dtype; // of the images
    int rank_max;
    size_t page_elems;
    int pool_pages; // an adapter that needs more is STATUS_TOO_LARGE
    size_t host_bytes_max; // likewise for its image; 0: no limit
};

enum adapter_tier { ADAPTER_ON_DISK, ADAPTER_READING, ADAPTER_IN_HOST };

// Which bytes of adapter_model.safetensors were read: as long as it stays the same, so do they.
struct adapter_stamp {
    uint64_t device, inode, bytes;
    int64_t changed_ns;
};

struct host_store;

// An activated LoRA (Greenewald et al., 2504.12397; PEFT's alora_invocation_tokens) changes only the
// tokens from the last place on at which the prompt has these; without them, none. A plain adapter has
// none of them and changes all.
enum { INVOCATION_MAX = 32 };
struct adapter_invocation {
    int count;
    int32_t tokens[INVOCATION_MAX];
};

struct adapter {
    char *name; // owned
    char *path; // owned; "dummy:..." for seeded ones
    int root;   // borrowed descriptor of the folder that path must lie beneath; -1: any path
    uint64_t generation; // unique in the process, never reused
    struct adapter_invocation *invocation; // owned; NULL: a plain adapter
    int32_t rank[LORA_MODULES];
    int64_t a_offset[LORA_MODULES], b_offset[LORA_MODULES];
    size_t layer_elems; // of one layer's image
    int page_count;
    size_t image_bytes; // [layers, layer_elems]

    _Atomic int refs;      // registry + requests + residency
    _Atomic bool retired;  // unloaded: no new requests
    _Atomic bool forced;   // unloaded by force: requests that use it end, too
    _Atomic bool pinned;   // evicted last
    _Atomic uint64_t requests, tokens;
    _Atomic double last_used_s; // monotonic; 0: never resident; the engine writes it

    // Of the image; host_store.c's lock guards the links, one reader at a time writes the rest.
    _Atomic int tier;           // enum adapter_tier
    bool stamped;               // it has been read once; `stamp` is of the file that was read
    struct adapter_stamp stamp;
    _Atomic bool digest_known;  // then `digest` stays as it is
    char digest[65];
    void *image;                // while in host memory
    struct host_store *_Atomic store; // that holds the image in its account; NULL: nobody's account
    struct adapter *host_next, *host_previous;
    int image_users;            // uploads that read it
    bool copy_follows;          // its pages are there when it has been read

    // Of the pages. Engine thread only, but for `resident`, which any thread may read.
    _Atomic bool resident;
    bool arriving;
    int32_t *pages;        // page_count entries, meaningful while arriving or resident
    int running;           // running requests that use it
    int wanted;            // waiting requests that will
    double uses;           // for the order of eviction
    int32_t prefixes;      // its list in the prefix cache (prefix.h); -1: none
    struct evictable evictable;
    struct adapter *residency_next, *residency_previous;
};

// From a PEFT folder (adapter_config.json + adapter_model.safetensors) or a description
// "dummy:rank=16,seed=7,modules=all|qkvo". Any thread. The result has one reference.
//
// adapter_open checks the configuration and every tensor's name, type and shape, and reads no
// tensor; no partial match is accepted. adapter_load also reads the image, which the adapter then
// owns, and checks every value.
MUST_CHECK enum status adapter_open(const struct lora_geometry *geometry, const char *name,
                                    int root, const char *path, struct adapter **out,
                                    struct error *err);
MUST_CHECK enum status adapter_load(const struct lora_geometry *geometry, const char *name,
                                    int root, const char *path, struct adapter **out,
                                    struct error *err);
// Fills `image` (image_bytes of it). Files that say something else than at adapter_open are
// STATUS_INVALID; so are, after the first read, files that changed, unless the digest is known and
// they hold the same. `pause`, when not NULL, is called about every 0.1 ms of work. One call for an
// adapter at a time, adapter_digest's included.
struct adapter_pause {
    void (*call)(void *context);
    void *context;
};
MUST_CHECK enum status adapter_read(const struct lora_geometry *geometry, struct adapter *adapter,
                                    void *image, const struct adapter_pause *pause,
                                    struct error *err);
// Computes the digest of what adapter_read filled, where it is not known yet.
void adapter_digest(struct adapter *adapter, const void *image, const struct adapter_pause *pause);
// Whether `path` is a description of a seeded adapter, not a folder.
bool adapter_is_dummy(const char *path);
// Tells a restored adapter what its files held; before it is shared.
void adapter_set_digest(struct adapter *adapter, const char *digest,
                        const struct adapter_stamp *stamp);
// The stamp of the files as they are now; zero for a dummy adapter.
MUST_CHECK enum status adapter_stamp_now(int root, const char *path, struct adapter_stamp *stamp,
                                         struct error *err);

struct adapter *adapter_ref(struct adapter *adapter);
void adapter_unref(struct adapter *adapter); // frees all at zero; must not be resident then

#endif
