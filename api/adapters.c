// Models and adapters: what is served, loading and unloading at run time (vLLM's contract), and
// what each adapter holds. Loop thread; files are read on libuv's thread pool.
//
// A path in a request is opened beneath --adapter-dir and nowhere else (pager/adapter_source.c).
#include "api/api_internal.h"

#include "base/file.h"
#include "base/log.h"
#include "base/memory.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

// ------------------------------------------------------------------ GET /v1/models

static json_t *model_json(const struct api *api, const char *id, const char *root,
                          const char *parent) {
    return json_pack("{s:s,s:s,s:I,s:s,s:s,s:s?,s:i}", "id", id, "object", "model", "created",
                     (json_int_t)api->created, "owned_by", "lorad", "root", root, "parent", parent,
                     "max_model_len", api->setup.context_max);
}

void handle_models(struct connection *c, const struct http_request *r, const char *tail) {
    const struct api *api = c->api;
    const char *base = api->setup.base_id;
    struct adapter **list;
    int count = registry_list(api->setup.registry, &list);
    json_t *data = json_array(), *found = NULL;
    json_array_append_new(data, model_json(api, base, base, NULL));
    if (strcmp(tail, base) == 0) found = json_incref(json_array_get(data, 0));
    for (int i = 0; i < count; i++) {
        json_t *one = model_json(api, list[i]->name, list[i]->name, base);
        if (strcmp(tail, list[i]->name) == 0) found = json_incref(one);
        json_array_append_new(data, one);
        adapter_unref(list[i]);
    }
    free(list);
    if (!*tail) {
        respond_json(c, 200, json_pack("{s:s,s:o}", "object", "list", "data", data));
        return;
    }
    json_decref(data);
    if (found) respond_json(c, 200, found);
    else respond_refusal(c, 404, "model", "model_not_found", "there is no such model or adapter");
}

// ------------------------------------------------------------------ GET /v1/adapters

static json_t *adapter_json(const struct adapter *a) {
    static const char *const names[LORA_MODULES] = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                                    "gate_proj", "up_proj", "down_proj"};
    json_t *modules = json_object();
    int rank = 0;
    for (int m = 0; m < LORA_MODULES; m++) {
        if (a->rank[m]) json_object_set_new(modules, names[m], json_integer(a->rank[m]));
        rank = a->rank[m] > rank ? a->rank[m] : rank;
    }
    double used_s = atomic_load(&a->last_used_s), since_s = clock_seconds() - used_s;
    json_t *last_used = used_s > 0 ? json_integer((json_int_t)(time(NULL) - (time_t)since_s))
                                   : json_null();
    static const char *const tiers[] = {
        [ADAPTER_ON_DISK] = "disk", [ADAPTER_READING] = "loading", [ADAPTER_IN_HOST] = "host"};
    const char *digest = atomic_load(&a->digest_known) ? a->digest : NULL; // once it has been read
    return json_pack("{s:s,s:s,s:i,s:o,s:I,s:i,s:i,s:o,s:s?,s:I,s:b,s:I,s:I}", "id", a->name, "tier",
                     atomic_load(&a->resident) ? "device" : tiers[atomic_load(&a->tier)], "rank",
                     rank, "modules", modules, "bytes", (json_int_t)a->image_bytes, "pages", a->page_count, "refs",
                     atomic_load(&a->refs), "last_used", last_used, "digest", digest, "generation",
                     (json_int_t)a->generation, "pinned", atomic_load(&a->pinned), "requests",
                     (json_int_t)atomic_load(&a->requests), "tokens", (json_int_t)atomic_load(&a->tokens));
}

// With the name of whom it shares pages with, if anybody.
static json_t *one_adapter_json(struct registry *registry, const struct adapter *adapter) {
    json_t *answer = adapter_json(adapter);
    struct adapter *twin = registry_twin(registry, adapter);
    json_object_set_new(answer, "pages_of", twin ? json_string(twin->name) : json_null());
    adapter_unref(twin);
    return answer;
}

void handle_adapters(struct connection *c, const struct http_request *r, const char *tail) {
    if (*tail) {
        struct adapter *adapter = registry_find(c->api->setup.registry, tail);
        if (adapter) respond_json(c, 200, one_adapter_json(c->api->setup.registry, adapter));
        else respond_refusal(c, 404, "id", NULL, "there is no such adapter");
        adapter_unref(adapter);
        return;
    }
    struct adapter **list;
    int count = registry_list(c->api->setup.registry, &list);
    json_t *data = json_array();
    for (int i = 0; i < count; i++) {
        json_array_append_new(data, adapter_json(list[i]));
        adapter_unref(list[i]);
    }
    free(list);
    respond_json(c, 200, json_pack("{s:s,s:o}", "object", "list", "data", data));
}

// ------------------------------------------------------------------ loading

struct load {
    struct offload offload;
    struct connection *connection; // NULL once the client has gone; the load goes on
    char *name, *path;
    bool pinned;
    bool put, dry_run;       // PUT /v1/adapters/{id}: its answer is the adapter
    bool replaces;           // the name was there
    struct adapter *adapter; // a reference for that answer, or NULL
    struct error err;
};

static void load_gone(void *exchange) {
    ((struct load *)exchange)->connection = NULL;
}

// `path` beneath --adapter-dir, however the client wrote it.
static enum status beneath_root(const struct api *api, const char **path, struct error *err) {
    const char *root = api->setup.options->adapter_dir;
    if (api->root < 0)
        return error_set_param(err, STATUS_FORBIDDEN, "lora_path",
                               "adapters can be loaded by path only when the server was started "
                               "with --adapter-dir");
    size_t length = strlen(root);
    while (length && root[length - 1] == '/') length--;
    if (strncmp(*path, root, length) == 0 && (*path)[length] == '/') *path += length;
    else if (**path == '/')
        return error_set_param(err, STATUS_FORBIDDEN, "lora_path",
                               "lora_path must lie inside --adapter-dir");
    while (**path == '/') (*path)++;
    return STATUS_OK;
}

// Where `path` leads: a root for adapter_load, and the path that it takes.
static enum status resolve(const struct api *api, const char **path, int *root, struct error *err) {
    *root = -1;
    if (!adapter_is_dummy(*path)) {
        *root = api->root;
        return beneath_root(api, path, err);
    }
    if (api->setup.dummy) return STATUS_OK;
    return error_set_param(err, STATUS_FORBIDDEN, "lora_path",
                           "dummy: adapters need --load-format dummy");
}

static enum status load_adapter(struct load *load, struct adapter **out) {
    struct api *api = load->offload.api;
    const char *path = load->path;
    int root;
    enum status status = resolve(api, &path, &root, &load->err);
    if (status) return status;
    return adapter_load(engine_lora_geometry(api->engine), load->name, root, path, out, &load->err);
}

static const char *image_dtype(const struct api *api) {
    return dtype_name(engine_lora_geometry(api->engine)->dtype);
}

enum { STAMP_BYTES = 96 };
static void stamp_text(const struct adapter_stamp *stamp, char text[STAMP_BYTES]) {
    snprintf(text, STAMP_BYTES, "%llx:%llx:%llu:%lld", (unsigned long long)stamp->device,
             (unsigned long long)stamp->inode, (unsigned long long)stamp->bytes,
             (long long)stamp->changed_ns);
}

// The name leads to the adapter from now on, or, when it is NULL, to what it led to before.
static void publish(struct api *api, const char *name, struct adapter *adapter, bool pinned) {
    if (adapter && pinned) {
        atomic_store(&adapter->pinned, true);
        engine_prefetch(api->engine, adapter, NULL); // too many: it comes when it is used
    }
    registry_commit(api->setup.registry, name, adapter);
}

static void load_work(struct offload *offload) {
    struct load *load = (struct load *)offload;
    struct store *store = offload->api->setup.store;
    struct adapter *adapter = NULL;
    load->err.status = load_adapter(load, &adapter);
    load->adapter = adapter ? adapter_ref(adapter) : NULL;
    if (adapter && load->dry_run) {
        adapter_unref(adapter);
        adapter = NULL;
    }
    if (adapter && store) { // on the disk before the name changes, and before the answer
        char stamp[STAMP_BYTES];
        stamp_text(&adapter->stamp, stamp);
        load->err.status = store_put(store, load->name, load->path, adapter->digest,
                                     image_dtype(offload->api), stamp, load->pinned, &load->err);
        if (load->err.status) {
            adapter_unref(adapter);
            adapter = NULL;
        }
    }
    if (adapter) engine_adopt(offload->api->engine, adapter);
    publish(offload->api, load->name, adapter, load->pinned);
}

static void respond_put(struct connection *c, const struct load *load) {
    json_t *answer = adapter_json(load->adapter);
    if (load->dry_run) json_object_set_new(answer, "dry_run", json_true());
    respond_json(c, load->dry_run || load->replaces ? 200 : 201, answer);
}

static void load_done(struct offload *offload) {
    struct load *load = (struct load *)offload;
    struct connection *c = load->connection;
    log_event(load->err.status ? LOG_WARN : LOG_INFO,
              load->err.status ? "adapter_refused"
              : load->dry_run  ? "adapter_checked"
                               : "adapter_loaded", "name=%s %s", load->name,
              load->err.status ? load->err.text : "");
    char text[512];
    snprintf(text, sizeof text, "Success: LoRA adapter '%s' added successfully.", load->name);
    if (c && load->err.status == STATUS_TOO_LARGE)
        respond_refusal(c, 507, load->err.param, NULL, load->err.text);
    else if (c && load->err.status) respond_error(c, &load->err);
    else if (c && load->put) respond_put(c, load);
    else if (c) respond_text(c, 200, "text/plain", text);
    adapter_unref(load->adapter);
    free(load->name);
    free(load->path);
    free(load);
}

static struct load *load_start(struct connection *c, const char *name, const char *path) {
    struct load *load = mem_zalloc(1, sizeof *load);
    load->connection = c;
    load->name = mem_strdup(name);
    load->path = mem_strdup(path);
    load->offload.work = load_work;
    load->offload.done = load_done;
    c->exchange = load;
    c->gone = load_gone;
    return load;
}

void handle_load_adapter(struct connection *c, const struct http_request *r, const char *tail) {
    struct registry *registry = c->api->setup.registry;
    struct error err = {0};
    json_t *root = NULL;
    const char *name = NULL, *path = NULL;
    bool replace = false;
    enum status status = body_parse(r->body, r->body_bytes, &root, &err);
    if (!status) status = param_string(root, "lora_name", 1024, &name, &err);
    if (!status) status = param_string(root, "lora_path", 4096, &path, &err);
    if (!status) status = param_bool(root, "load_inplace", &replace, &err);
    if (!status && (!name || !path || !*path))
        status = error_set_param(&err, STATUS_INVALID, name ? "lora_path" : "lora_name",
                                 "lora_name and lora_path are needed");
    if (!status) status = registry_check_name(registry, name, &err);
    if (!status) status = registry_begin(registry, name, replace, &err);
    if (status) {
        respond_error(c, &err);
        json_decref(root);
        return;
    }
    struct load *load = load_start(c, name, path);
    json_decref(root);
    offload_start(c->api, &load->offload);
}

// Loads or replaces; with dry_run it only checks, and the name stays as it is.
void handle_adapter_put(struct connection *c, const struct http_request *r, const char *tail) {
    struct registry *registry = c->api->setup.registry;
    struct error err = {0};
    json_t *root = NULL;
    const char *path = NULL;
    bool dry_run = false, pinned = false;
    enum status status = body_parse(r->body, r->body_bytes, &root, &err);
    if (!status) status = param_string(root, "path", 4096, &path, &err);
    if (!status) status = param_bool(root, "dry_run", &dry_run, &err);
    if (!status) status = param_bool(root, "pinned", &pinned, &err);
    if (!status && (!path || !*path))
        status = error_set_param(&err, STATUS_INVALID, "path", "path is needed");
    if (!status) status = registry_begin(registry, tail, true, &err);
    if (status) {
        respond_error(c, &err);
        json_decref(root);
        return;
    }
    struct load *load = load_start(c, tail, path);
    json_decref(root);
    struct adapter *before = registry_find(registry, tail); // nobody changes it: it is reserved
    load->replaces = before != NULL;
    adapter_unref(before);
    load->pinned = pinned;
    load->put = true;
    load->dry_run = dry_run;
    offload_start(c->api, &load->offload);
}

// ------------------------------------------------------------------ loading again after a restart

// Without reading it, when the file is the one that was read then, and unchanged. NULL: it is not.
static struct adapter *reopen(const struct api *api, const struct store_entry *entry) {
    const char *path = entry->path;
    struct adapter *adapter = NULL;
    struct adapter_stamp stamp;
    char text[STAMP_BYTES];
    int root;
    if (strlen(entry->digest) != sizeof adapter->digest - 1 ||
        resolve(api, &path, &root, NULL) || adapter_stamp_now(root, path, &stamp, NULL))
        return NULL;
    stamp_text(&stamp, text);
    if (strcmp(text, entry->stamp) != 0 || adapter_open(engine_lora_geometry(api->engine),
                                                        entry->name, root, path, &adapter, NULL))
        return NULL;
    adapter_set_digest(adapter, entry->digest, &stamp);
    return adapter;
}

static enum status restore_one(struct api *api, const struct store_entry *entry,
                               struct error *err) {
    struct registry *registry = api->setup.registry;
    struct load load = {.offload.api = api, .name = entry->name, .path = entry->path};
    struct adapter *adapter = NULL;
    enum status status = registry_begin(registry, entry->name, false, err);
    if (status) return status;
    bool same_dtype = strcmp(entry->dtype, image_dtype(api)) == 0;
    if (same_dtype && (adapter = reopen(api, entry))) {
        publish(api, entry->name, adapter, entry->pinned);
        return STATUS_OK;
    }
    status = load_adapter(&load, &adapter);
    *err = load.err;
    // Digests are of images: those of another dtype cannot be compared.
    if (adapter && same_dtype && strcmp(entry->digest, adapter->digest) != 0) {
        status = error_set(err, STATUS_INVALID, "its files are not those that were loaded; load "
                           "it again");
        adapter_unref(adapter);
        adapter = NULL;
    }
    if (adapter) engine_adopt(api->engine, adapter);
    publish(api, entry->name, adapter, entry->pinned);
    return status;
}

enum status api_restore(struct api *api, struct error *err) {
    struct store_entry *list;
    int count, restored = 0;
    if (!api->setup.store) return STATUS_OK;
    enum status status = store_list(api->setup.store, &list, &count, err);
    if (status) return status;
    for (int i = 0; i < count; i++) {
        struct error reason = {0};
        if (restore_one(api, &list[i], &reason) == STATUS_OK) restored++;
        else log_event(LOG_ERROR, "adapter_not_restored", "name=%s %s", list[i].name, reason.text);
    }
    store_list_free(list, count);
    log_event(LOG_INFO, "adapters_restored", "count=%d of=%d", restored, count);
    return STATUS_OK;
}

// ------------------------------------------------------------------ POST /v1/adapters/{id}/{action}

struct pin {
    struct offload offload;
    struct connection *connection; // NULL once the client has gone; the pin stays
    struct adapter *adapter;       // a reference
    bool pinned;
    struct error err;
};

static void pin_gone(void *exchange) {
    ((struct pin *)exchange)->connection = NULL;
}

static void pin_work(struct offload *offload) {
    struct pin *pin = (struct pin *)offload;
    struct store *store = offload->api->setup.store;
    if (store)
        pin->err.status = store_set_pinned(store, pin->adapter->name, pin->pinned, &pin->err);
}

static void respond_hint(struct connection *c, struct adapter *adapter) {
    struct error err = {0};
    if (engine_prefetch(c->api->engine, adapter, &err)) respond_error(c, &err);
    else respond_json(c, 200, adapter_json(adapter));
}

static void pin_done(struct offload *offload) {
    struct pin *pin = (struct pin *)offload;
    struct connection *c = pin->connection;
    if (!pin->err.status) atomic_store(&pin->adapter->pinned, pin->pinned);
    if (c && pin->err.status) respond_error(c, &pin->err);
    else if (c) respond_hint(c, pin->adapter);
    else if (!pin->err.status) engine_prefetch(offload->api->engine, pin->adapter, NULL);
    adapter_unref(pin->adapter);
    free(pin);
}

// Takes the reference. It is on the disk before the answer, as a load is.
static void pin_start(struct connection *c, struct adapter *adapter, bool pinned) {
    struct pin *pin = mem_zalloc(1, sizeof *pin);
    *pin = (struct pin){.connection = c, .adapter = adapter, .pinned = pinned};
    pin->offload.work = pin_work;
    pin->offload.done = pin_done;
    c->exchange = pin;
    c->gone = pin_gone;
    offload_start(c->api, &pin->offload);
}

void handle_adapter_action(struct connection *c, const struct http_request *r, const char *tail) {
    const char *slash = strrchr(tail, '/'), *action = slash ? slash + 1 : "";
    bool pin = strcmp(action, "pin") == 0, unpin = strcmp(action, "unpin") == 0;
    if (!pin && !unpin && strcmp(action, "prefetch") != 0) {
        respond_refusal(c, 404, NULL, NULL, "an adapter knows pin, unpin and prefetch");
        return;
    }
    char *name = mem_strndup(tail, (size_t)(slash - tail));
    struct adapter *adapter = registry_find(c->api->setup.registry, name);
    free(name);
    if (!adapter) {
        respond_refusal(c, 404, "id", NULL, "there is no such adapter");
    } else if (pin || unpin) {
        pin_start(c, adapter, pin);
    } else {
        respond_hint(c, adapter);
        adapter_unref(adapter);
    }
}

// ------------------------------------------------------------------ unloading

struct unload {
    struct offload offload;
    struct connection *connection; // NULL once the client has gone; the unload goes on
    char *name;
    bool text_answer; // vLLM's form
    struct adapter *forced; // a reference: its requests end, too; or NULL: they finish
    struct error err;
};

static void unload_gone(void *exchange) {
    ((struct unload *)exchange)->connection = NULL;
}

static void unload_work(struct offload *offload) {
    struct unload *unload = (struct unload *)offload;
    struct store *store = offload->api->setup.store;
    if (store) unload->err.status = store_delete(store, unload->name, &unload->err);
    registry_end_remove(offload->api->setup.registry, unload->name,
                        unload->err.status == STATUS_OK);
}

static void unload_done(struct offload *offload) {
    struct unload *unload = (struct unload *)offload;
    struct connection *c = unload->connection;
    if (unload->forced && !unload->err.status)
        engine_force_out(offload->api->engine, unload->forced);
    adapter_unref(unload->forced);
    char text[512];
    snprintf(text, sizeof text, "Success: LoRA adapter '%s' removed successfully.", unload->name);
    if (c && unload->err.status) respond_error(c, &unload->err);
    else if (c && unload->text_answer) respond_text(c, 200, "text/plain", text);
    else if (c) respond_json(c, 200, json_pack("{s:s,s:b}", "id", unload->name, "deleted", 1));
    free(unload->name);
    free(unload);
}

// The name serves until the store has forgotten it.
static void unload_start(struct connection *c, const char *name, bool text_answer, bool force) {
    struct error err = {0};
    if (registry_begin_remove(c->api->setup.registry, name, &err)) {
        respond_error(c, &err);
        return;
    }
    struct unload *unload = mem_zalloc(1, sizeof *unload);
    unload->connection = c;
    unload->name = mem_strdup(name);
    unload->text_answer = text_answer;
    unload->forced = force ? registry_find(c->api->setup.registry, name) : NULL;
    unload->offload.work = unload_work;
    unload->offload.done = unload_done;
    c->exchange = unload;
    c->gone = unload_gone;
    offload_start(c->api, &unload->offload);
}

void handle_unload_adapter(struct connection *c, const struct http_request *r, const char *tail) {
    struct error err = {0};
    json_t *root = NULL;
    const char *name = NULL;
    enum status status = body_parse(r->body, r->body_bytes, &root, &err);
    if (!status) status = param_string(root, "lora_name", 1024, &name, &err);
    if (!status && !name)
        status = error_set_param(&err, STATUS_INVALID, "lora_name", "lora_name is needed");
    if (status) respond_error(c, &err);
    else unload_start(c, name, true, false);
    json_decref(root);
}

void handle_adapter_delete(struct connection *c, const struct http_request *r, const char *tail) {
    bool force = strcmp(r->query, "mode=force") == 0;
    if (!force && *r->query && strcmp(r->query, "mode=drain") != 0)
        respond_refusal(c, 400, "mode", NULL, "mode must be drain or force");
    else unload_start(c, tail, false, force);
}
