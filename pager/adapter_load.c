// The life of an adapter's record: opened from what its files say, filled from what they hold,
// freed with its last reference. Any thread.
#include "pager/adapter_internal.h"

#include "base/file.h"
#include "base/memory.h"
#include "base/sha256.h"
#include "base/verify.h"
#include "pager/host_store.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define DUMMY "dummy:"
enum { ALIGNMENT_BYTES = 16 };

static struct adapter *adapter_new(const char *name, int root, const char *path) {
    // Generations must be unique in the process, however many registries it has.
    static _Atomic uint64_t generations;
    struct adapter *adapter = mem_zalloc(1, sizeof *adapter);
    adapter->name = mem_strdup(name);
    adapter->path = mem_strdup(path);
    adapter->root = root;
    adapter->generation = atomic_fetch_add(&generations, 1) + 1;
    adapter->prefixes = -1;
    atomic_init(&adapter->refs, 1);
    return adapter;
}

struct adapter *adapter_ref(struct adapter *adapter) {
    int before = atomic_fetch_add(&adapter->refs, 1);
    VERIFY_OP(before, >, 0);
    return adapter;
}

void adapter_unref(struct adapter *adapter) {
    if (!adapter) return;
    int before = atomic_fetch_sub(&adapter->refs, 1);
    VERIFY_OP(before, >, 0);
    if (before > 1) return;
    VERIFY(!atomic_load(&adapter->resident) && !adapter->arriving);
    VERIFY_OP(adapter->running, ==, 0);
    VERIFY_OP(adapter->wanted, ==, 0);
    host_store_forget(adapter);
    free(adapter->pages);
    free(adapter->image);
    free(adapter->invocation);
    free(adapter->name);
    free(adapter->path);
    free(adapter);
}

// ------------------------------------------------------------------ what the files say

// Places the matrices of adapter->rank in the layer image.
static enum status layout(const struct lora_geometry *geometry, struct adapter *adapter,
                          struct error *err) {
    VERIFY(geometry->dtype == DTYPE_F32 || geometry->dtype == DTYPE_BF16);
    VERIFY_OP(geometry->page_elems, >, 0);
    int64_t step = ALIGNMENT_BYTES / (int64_t)dtype_bytes(geometry->dtype), elems = 0;
    for (int module = 0; module < LORA_MODULES; module++) {
        int64_t rank = adapter->rank[module];
        VERIFY_OP(rank, <=, geometry->rank_max);
        adapter->a_offset[module] = elems;
        elems += (rank * geometry->in[module] + step - 1) / step * step;
        adapter->b_offset[module] = elems;
        elems += (rank * geometry->out[module] + step - 1) / step * step;
    }
    int64_t page_elems = (int64_t)geometry->page_elems;
    int64_t pages = (elems + page_elems - 1) / page_elems;
    if (pages > geometry->pool_pages)
        return error_set(err, STATUS_TOO_LARGE, "the adapter needs %lld pages of the pool, which "
                         "has %d; use a smaller rank or fewer modules, or a larger pool",
                         (long long)pages, geometry->pool_pages);
    adapter->layer_elems = (size_t)elems;
    adapter->page_count = (int)pages;
    adapter->image_bytes = (size_t)elems * (size_t)geometry->layers * dtype_bytes(geometry->dtype);
    if (geometry->host_bytes_max > 0 && adapter->image_bytes > geometry->host_bytes_max)
        return error_set(err, STATUS_TOO_LARGE, "the adapter takes %zu bytes of host memory and "
                         "--host-bytes is %zu", adapter->image_bytes, geometry->host_bytes_max);
    adapter->pages = mem_zalloc((size_t)pages, sizeof *adapter->pages);
    return STATUS_OK;
}

static const char *dummy_text(const char *path) {
    return strncmp(path, DUMMY, strlen(DUMMY)) == 0 ? path + strlen(DUMMY) : NULL;
}

bool adapter_is_dummy(const char *path) {
    return dummy_text(path) != NULL;
}

static enum status dummy_ranks(const struct lora_geometry *geometry, const char *text,
                               int32_t *ranks, struct error *err) {
    struct adapter_dummy dummy;
    enum status status = adapter_dummy_parse(geometry, text, &dummy, err);
    if (status == STATUS_OK) adapter_dummy_ranks(&dummy, ranks);
    return status;
}

static enum status folder_open(const struct lora_geometry *geometry, struct adapter *adapter,
                               struct error *err) {
    struct adapter_source source;
    struct adapter_files files;
    enum status status = adapter_source_open(adapter->root, adapter->path, &source, err);
    if (status != STATUS_OK) return status;
    status = adapter_files_open(geometry, source.folder, &files, adapter->rank, err);
    if (files.plan.invocation.count > 0) {
        adapter->invocation = mem_alloc(sizeof *adapter->invocation);
        *adapter->invocation = files.plan.invocation;
    }
    adapter_files_close(&files);
    adapter_source_close(&source);
    return status;
}

enum status adapter_open(const struct lora_geometry *geometry, const char *name, int root,
                         const char *path, struct adapter **out, struct error *err) {
    *out = NULL;
    struct adapter *adapter = adapter_new(name, root, path);
    const char *dummy = dummy_text(path);
    enum status status = dummy ? dummy_ranks(geometry, dummy, adapter->rank, err)
                               : folder_open(geometry, adapter, err);
    if (status == STATUS_OK) status = layout(geometry, adapter, err);
    if (status != STATUS_OK) {
        adapter_unref(adapter);
        return status;
    }
    *out = adapter;
    return STATUS_OK;
}

// ------------------------------------------------------------------ what they hold

static enum status stamp_of(const struct adapter_source *source, struct adapter_stamp *stamp,
                            struct error *err) {
    char *file = path_join(source->folder, ADAPTER_WEIGHTS);
    struct stat info;
    int failure = stat(file, &info);
    free(file);
    if (failure)
        return error_set(err, STATUS_INVALID, ADAPTER_WEIGHTS ": there is no such file in the "
                         "adapter's folder");
    *stamp = (struct adapter_stamp){(uint64_t)info.st_dev, (uint64_t)info.st_ino,
                                    (uint64_t)info.st_size,
                                    info.st_mtim.tv_sec * 1000000000ll + info.st_mtim.tv_nsec};
    return STATUS_OK;
}

enum status adapter_stamp_now(int root, const char *path, struct adapter_stamp *stamp,
                              struct error *err) {
    *stamp = (struct adapter_stamp){0};
    if (adapter_is_dummy(path)) return STATUS_OK;
    struct adapter_source source;
    enum status status = adapter_source_open(root, path, &source, err);
    if (status != STATUS_OK) return status;
    status = stamp_of(&source, stamp, err);
    adapter_source_close(&source);
    return status;
}

void adapter_set_digest(struct adapter *adapter, const char *digest,
                        const struct adapter_stamp *stamp) {
    VERIFY_OP(strlen(digest), ==, sizeof adapter->digest - 1);
    memcpy(adapter->digest, digest, sizeof adapter->digest);
    adapter->stamp = *stamp;
    adapter->stamped = true;
    atomic_store(&adapter->digest_known, true);
}

static void digest_of(const struct adapter *adapter, const void *image, char hex[65],
                      const struct adapter_pause *pause) {
    enum { PIECE_BYTES = 256 << 10 };
    struct sha256 hash;
    sha256_init(&hash);
    sha256_update(&hash, adapter->rank, sizeof adapter->rank);
    for (size_t at = 0; at < adapter->image_bytes; at += PIECE_BYTES) {
        size_t left = adapter->image_bytes - at;
        sha256_update(&hash, (const char *)image + at, left < PIECE_BYTES ? left : PIECE_BYTES);
        adapter_pause(pause);
    }
    sha256_hex(&hash, hex);
}

static enum status files_changed(struct error *err) {
    return error_set(err, STATUS_INVALID, "the adapter's files are not those that were registered; "
                     "load it again");
}

static bool same_invocation(const struct adapter *adapter, const struct adapter_files *files) {
    const struct adapter_invocation *now = &files->plan.invocation, *then = adapter->invocation;
    if (!then || now->count != then->count) return !then && now->count == 0;
    return memcmp(now->tokens, then->tokens, (size_t)now->count * sizeof *now->tokens) == 0;
}

static enum status files_read(const struct lora_geometry *geometry, struct adapter *adapter,
                              const char *folder, void *image, const struct adapter_pause *pause,
                              struct error *err) {
    struct adapter_files files;
    int32_t ranks[LORA_MODULES] = {0};
    enum status status = adapter_files_open(geometry, folder, &files, ranks, err);
    if (status != STATUS_OK) return status;
    if (memcmp(ranks, adapter->rank, sizeof ranks) != 0 || !same_invocation(adapter, &files))
        status = files_changed(err);
    else status = adapter_files_read(geometry, adapter, &files, image, pause, err);
    adapter_files_close(&files);
    return status;
}

// `stamp` is of the files before they were read, and after.
static enum status folder_read(const struct lora_geometry *geometry, struct adapter *adapter,
                               void *image, struct adapter_stamp *stamp,
                               const struct adapter_pause *pause, struct error *err) {
    struct adapter_source source;
    struct adapter_stamp after = {0};
    enum status status = adapter_source_open(adapter->root, adapter->path, &source, err);
    if (status != STATUS_OK) return status;
    status = stamp_of(&source, stamp, err);
    if (status == STATUS_OK)
        status = files_read(geometry, adapter, source.folder, image, pause, err);
    if (status == STATUS_OK) status = stamp_of(&source, &after, err);
    if (status == STATUS_OK && memcmp(stamp, &after, sizeof after) != 0)
        status = files_changed(err);
    adapter_source_close(&source);
    return status;
}

void adapter_digest(struct adapter *adapter, const void *image, const struct adapter_pause *pause) {
    if (atomic_load(&adapter->digest_known)) return;
    digest_of(adapter, image, adapter->digest, pause);
    atomic_store(&adapter->digest_known, true);
}

// What a read found the first time is what every later one must find. As long as the file is the
// same one and unchanged, so are its bytes.
enum status adapter_read(const struct lora_geometry *geometry, struct adapter *adapter, void *image,
                         const struct adapter_pause *pause, struct error *err) {
    struct adapter_stamp stamp = {0};
    enum status status = STATUS_OK;
    const char *text = dummy_text(adapter->path);
    if (text) {
        struct adapter_dummy dummy;
        status = adapter_dummy_parse(geometry, text, &dummy, err);
        VERIFY_OP(status, ==, STATUS_OK); // adapter_open read it
        adapter_dummy_fill(geometry, adapter, &dummy, image, pause);
    } else {
        status = folder_read(geometry, adapter, image, &stamp, pause, err);
    }
    if (status != STATUS_OK) return status;
    if (adapter->stamped && memcmp(&stamp, &adapter->stamp, sizeof stamp) != 0) {
        char hex[65]; // as long as no digest is known, none is equal
        digest_of(adapter, image, hex, pause);
        if (strcmp(hex, adapter->digest) != 0) return files_changed(err);
    }
    adapter->stamp = stamp;
    adapter->stamped = true;
    return STATUS_OK;
}

enum status adapter_load(const struct lora_geometry *geometry, const char *name, int root,
                         const char *path, struct adapter **out, struct error *err) {
    enum status status = adapter_open(geometry, name, root, path, out, err);
    if (status != STATUS_OK) return status;
    struct adapter *adapter = *out;
    adapter->image = mem_alloc_aligned(adapter->image_bytes);
    atomic_store(&adapter->tier, ADAPTER_IN_HOST);
    status = adapter_read(geometry, adapter, adapter->image, NULL, err);
    if (status == STATUS_OK) {
        adapter_digest(adapter, adapter->image, NULL);
        return STATUS_OK;
    }
    adapter_unref(adapter);
    *out = NULL;
    return status;
}
