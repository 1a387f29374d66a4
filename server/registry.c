// Names and the adapter generation each stands for: a hash table of chains under one mutex, which
// is never held while a file is read or an image freed. Any thread.
//
// A name's entry: absent -> registry_begin -> LOADING -> registry_commit -> there (or absent again)
//                 there  -> registry_begin(replace) -> there, LOADING -> registry_commit -> there
//                 there  -> registry_begin_remove -> LOADING -> registry_end_remove -> absent, there
// While LOADING (a change is under way), the generation that was there keeps serving.
#include "server/registry.h"

#include "base/memory.h"
#include "base/verify.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_BYTES_MAX = 128, BUCKETS_FIRST = 64 };

struct entry {
    struct entry *next;
    char *name;
    struct adapter *adapter; // one reference; NULL while its first load runs
    bool loading;
    struct entry *twin; // whose adapter's pages serve; NULL: its own
    bool twin_sought;
    int twins;          // how many others' twin it is
};

struct registry {
    char *base_id;
    pthread_mutex_t mutex; // guards everything below
    struct entry **buckets;
    size_t bucket_count; // a power of two
    size_t entry_count;
};

// FNV-1a, 64 bits.
static size_t name_hash(const char *name) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (; *name; name++) hash = (hash ^ (unsigned char)*name) * 0x100000001b3u;
    return (size_t)(hash ^ hash >> 32);
}

// The link that points to the name's entry, or to the NULL at its chain's end.
static struct entry **find_link(struct registry *registry, const char *name) {
    struct entry **link = &registry->buckets[name_hash(name) & (registry->bucket_count - 1)];
    while (*link && strcmp((*link)->name, name) != 0) link = &(*link)->next;
    return link;
}

static void grow(struct registry *registry) {
    size_t old_count = registry->bucket_count;
    struct entry **old = registry->buckets;
    registry->bucket_count *= 2;
    registry->buckets = mem_zalloc(registry->bucket_count, sizeof *registry->buckets);
    for (size_t i = 0; i < old_count; i++)
        for (struct entry *entry = old[i], *next; entry; entry = next) {
            next = entry->next;
            struct entry **link = find_link(registry, entry->name);
            VERIFY(*link == NULL);
            *link = entry;
            entry->next = NULL;
        }
    free(old);
}

static void entry_unlink(struct registry *registry, struct entry **link) {
    struct entry *entry = *link;
    *link = entry->next;
    VERIFY_OP(registry->entry_count, >, 0);
    registry->entry_count--;
    free(entry->name);
    free(entry);
}

// ------------------------------------------------------------------ twins; under the mutex

// Before the entry's adapter goes: whoever shared its pages looks for another.
static void part_twins(struct registry *registry, struct entry *leaving) {
    if (leaving->twin) leaving->twin->twins--;
    leaving->twin = NULL;
    leaving->twin_sought = false;
    for (size_t i = 0; leaving->twins > 0 && i < registry->bucket_count; i++)
        for (struct entry *entry = registry->buckets[i]; entry; entry = entry->next) {
            if (entry->twin != leaving) continue;
            entry->twin = NULL;
            entry->twin_sought = false;
            leaving->twins--;
        }
    VERIFY_OP(leaving->twins, ==, 0);
}

// One that serves for itself and has the same content.
static struct entry *seek_twin(struct registry *registry, const struct entry *entry) {
    for (size_t i = 0; i < registry->bucket_count; i++)
        for (struct entry *other = registry->buckets[i]; other; other = other->next)
            if (other != entry && other->twin_sought && !other->twin &&
                strcmp(other->adapter->digest, entry->adapter->digest) == 0)
                return other;
    return NULL;
}

struct adapter *registry_twin(struct registry *registry, const struct adapter *adapter) {
    if (!atomic_load(&adapter->digest_known)) return NULL;
    struct adapter *twin = NULL;
    pthread_mutex_lock(&registry->mutex);
    struct entry *entry = *find_link(registry, adapter->name);
    if (entry && entry->adapter == adapter) {
        if (!entry->twin_sought) {
            entry->twin = seek_twin(registry, entry);
            entry->twin_sought = true;
            if (entry->twin) entry->twin->twins++;
        }
        if (entry->twin) twin = adapter_ref(entry->twin->adapter);
    }
    pthread_mutex_unlock(&registry->mutex);
    return twin;
}

static void retire(struct adapter *adapter) {
    if (!adapter) return;
    atomic_store(&adapter->retired, true);
    adapter_unref(adapter);
}

struct registry *registry_create(const char *base_id) {
    struct registry *registry = mem_zalloc(1, sizeof *registry);
    registry->base_id = mem_strdup(base_id);
    registry->bucket_count = BUCKETS_FIRST;
    registry->buckets = mem_zalloc(registry->bucket_count, sizeof *registry->buckets);
    VERIFY_OP(pthread_mutex_init(&registry->mutex, NULL), ==, 0);
    return registry;
}

void registry_destroy(struct registry *registry) {
    if (!registry) return;
    for (size_t i = 0; i < registry->bucket_count; i++)
        while (registry->buckets[i]) {
            part_twins(registry, registry->buckets[i]);
            retire(registry->buckets[i]->adapter);
            entry_unlink(registry, &registry->buckets[i]);
        }
    VERIFY_OP(registry->entry_count, ==, 0);
    pthread_mutex_destroy(&registry->mutex);
    free(registry->buckets);
    free(registry->base_id);
    free(registry);
}

enum status registry_check_name(const struct registry *registry, const char *name,
                                struct error *err) {
    size_t length = strlen(name);
    if (length == 0 || length > NAME_BYTES_MAX)
        return error_set(err, STATUS_INVALID, "the adapter's name has %zu bytes; it must have 1 to "
                         "%d", length, NAME_BYTES_MAX);
    for (const char *c = name; *c; c++)
        if (*c < '!' || *c > '~' || *c == '/' || *c == '\\')
            return error_set(err, STATUS_INVALID, "the adapter's name has the byte 0x%02x at %d; "
                             "use printable ASCII without spaces, '/' and '\\'", (unsigned char)*c,
                             (int)(c - name));
    if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
        return error_set(err, STATUS_INVALID, "an adapter cannot be named \"%s\"", name);
    if (strcmp(name, registry->base_id) == 0)
        return error_set(err, STATUS_INVALID, "\"%s\" is the base model's name; choose another",
                         name);
    return STATUS_OK;
}

enum status registry_begin(struct registry *registry, const char *name, bool replace,
                           struct error *err) {
    enum status status = registry_check_name(registry, name, err);
    if (status != STATUS_OK) return status;
    pthread_mutex_lock(&registry->mutex);
    struct entry *entry = *find_link(registry, name);
    if (entry && entry->loading) {
        status = error_set(err, STATUS_BUSY, "adapter \"%s\" is being loaded or unloaded already",
                           name);
    } else if (entry && !replace) {
        status = error_set(err, STATUS_EXISTS, "adapter \"%s\" is loaded already; unload it first, "
                           "or ask for it to be replaced", name);
    } else if (entry) {
        entry->loading = true;
    } else {
        if (registry->entry_count >= registry->bucket_count) grow(registry);
        struct entry **link = find_link(registry, name);
        *link = mem_zalloc(1, sizeof **link);
        (*link)->name = mem_strdup(name);
        (*link)->loading = true;
        registry->entry_count++;
    }
    pthread_mutex_unlock(&registry->mutex);
    return status;
}

void registry_commit(struct registry *registry, const char *name, struct adapter *adapter) {
    struct adapter *replaced = NULL;
    pthread_mutex_lock(&registry->mutex);
    struct entry **link = find_link(registry, name);
    VERIFY(*link != NULL);
    VERIFY((*link)->loading);
    (*link)->loading = false;
    if (adapter) {
        part_twins(registry, *link);
        replaced = (*link)->adapter;
        (*link)->adapter = adapter;
    } else if (!(*link)->adapter) {
        entry_unlink(registry, link);
    }
    pthread_mutex_unlock(&registry->mutex);
    retire(replaced);
}

struct adapter *registry_find(struct registry *registry, const char *name) {
    pthread_mutex_lock(&registry->mutex);
    struct entry *entry = *find_link(registry, name);
    struct adapter *adapter = entry && entry->adapter ? adapter_ref(entry->adapter) : NULL;
    pthread_mutex_unlock(&registry->mutex);
    return adapter;
}

enum status registry_begin_remove(struct registry *registry, const char *name,
                                  struct error *err) {
    enum status status = STATUS_OK;
    pthread_mutex_lock(&registry->mutex);
    struct entry **link = find_link(registry, name);
    if (!*link) {
        status = error_set(err, STATUS_NOT_FOUND, "no adapter is named \"%.128s\"", name);
    } else if ((*link)->loading) {
        status = error_set(err, STATUS_BUSY, "adapter \"%s\" is being loaded or unloaded; unload it "
                           "when that is done", name);
    } else {
        (*link)->loading = true;
    }
    pthread_mutex_unlock(&registry->mutex);
    return status;
}

void registry_end_remove(struct registry *registry, const char *name, bool remove) {
    struct adapter *removed = NULL;
    pthread_mutex_lock(&registry->mutex);
    struct entry **link = find_link(registry, name);
    VERIFY(*link != NULL);
    VERIFY((*link)->loading);
    VERIFY((*link)->adapter != NULL);
    (*link)->loading = false;
    if (remove) {
        part_twins(registry, *link);
        removed = (*link)->adapter;
        entry_unlink(registry, link);
    }
    pthread_mutex_unlock(&registry->mutex);
    retire(removed);
}

enum status registry_remove(struct registry *registry, const char *name, struct error *err) {
    enum status status = registry_begin_remove(registry, name, err);
    if (!status) registry_end_remove(registry, name, true);
    return status;
}

static int compare_names(const void *left, const void *right) {
    return strcmp((*(struct adapter *const *)left)->name, (*(struct adapter *const *)right)->name);
}

int registry_list(struct registry *registry, struct adapter ***list) {
    int count = 0;
    pthread_mutex_lock(&registry->mutex);
    struct adapter **found = mem_alloc(registry->entry_count * sizeof *found);
    for (size_t i = 0; i < registry->bucket_count; i++)
        for (struct entry *entry = registry->buckets[i]; entry; entry = entry->next)
            if (entry->adapter) found[count++] = adapter_ref(entry->adapter);
    pthread_mutex_unlock(&registry->mutex);
    if (count > 1) qsort(found, (size_t)count, sizeof *found, compare_names);
    *list = found;
    return count;
}
