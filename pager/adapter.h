// One generation of one LoRA adapter: its host image and, while resident, its pages.
//
// Host image: per layer, contiguous, the matrices A then B of q, k, v, o, gate, up, down in that
// order, each 16-byte aligned, at the true rank of that module (the largest over layers; missing
// rows are zero), alpha / r (or alpha / sqrt(r), rsLoRA) folded into B. Elements have the pool's
// dtype. Identity is the SHA-256 of the image and its ranks. Immutable after adapter_load but for
// `residency`, which the engine thread alone writes.
//
// States of residency: HOST -> residency_acquire -> DEVICE (PAGE_ADAPTER in use, PAGE_CACHED when no
// running request uses it) -> residency_evict -> HOST. residency.c draws the whole of it.
#ifndef LORAD_PAGER_ADAPTER_H
#define LORAD_PAGER_ADAPTER_H

#include "base/error.h"
#include "kernels/backend.h"
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
};

struct adapter {
    char *name; // owned
    char *path; // owned; "dummy:..." for seeded ones
    char digest[65];
    uint64_t generation; // unique in the process, never reused
    int32_t rank[LORA_MODULES];
    int64_t a_offset[LORA_MODULES], b_offset[LORA_MODULES];
    size_t layer_elems; // of one layer's image
    int page_count;
    void *image; // [layers, layer_elems]
    size_t image_bytes;
    _Atomic int refs;      // registry + requests + residency
    _Atomic bool retired;  // unloaded: no new requests
    _Atomic bool forced;   // unloaded by force: requests that use it end, too
    _Atomic bool resident; // read by any thread, written by the engine
    _Atomic uint64_t requests, tokens;
    _Atomic double last_used_s; // monotonic; 0: never resident; the engine writes it
    // Engine thread only:
    int32_t *pages;        // page_count entries once resident
    int running;           // running requests that use it
    struct adapter *residency_next, *residency_previous;
};

// Loads a PEFT folder (adapter_config.json + adapter_model.safetensors) or
// "dummy:rank=16,seed=7,modules=all|qkvo". Every rule of the adapter checks is checked before the
// adapter exists; no partial match is accepted. Any thread. The result has one reference.
MUST_CHECK enum status adapter_load(const struct lora_geometry *geometry, const char *name,
                                    const char *path, struct adapter **out, struct error *err);
struct adapter *adapter_ref(struct adapter *adapter);
void adapter_unref(struct adapter *adapter); // frees the image at zero; must not be resident then

// Residency: the adapters whose pages are in the pool. Engine thread only.
struct residency;
struct residency *residency_create(struct pool *pool, const struct backend_ops *ops,
                                   struct backend *backend, const struct lora_geometry *geometry);
void residency_destroy(struct residency *residency); // evicts all
// Makes `adapter` resident and counts one more running user. Evicts idle adapters, least recently
// used first, as far as needed. STATUS_NO_PAGES: not even that is enough; nothing changed.
MUST_CHECK enum status residency_acquire(struct residency *residency, struct adapter *adapter,
                                         double now_s);
void residency_release(struct residency *residency, struct adapter *adapter, double now_s);
// Frees at least `pages` pages by evicting idle adapters; returns how many were freed.
int residency_evict(struct residency *residency, int pages);
// Drops retired adapters that nobody runs. Called each step.
void residency_sweep(struct residency *residency);
struct residency_counts {
    int resident;
    uint64_t loads, evictions, bytes_moved;
};
struct residency_counts residency_counts(const struct residency *residency);

#endif
