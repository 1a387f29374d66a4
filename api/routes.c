// Which handler answers which method and path, and who may ask. Loop thread.
#include "api/api_internal.h"

#include <string.h>
#include <strings.h>

enum access { ACCESS_OPEN, ACCESS_USER, ACCESS_ADMIN };

static const struct route {
    const char *method, *path;
    bool prefix; // path ends in '/' and something follows
    enum access access;
    void (*handle)(struct connection *c, const struct http_request *r, const char *tail);
} routes[] = {
    {"POST", "/v1/completions", false, ACCESS_USER, handle_completions},
    {"POST", "/v1/chat/completions", false, ACCESS_USER, handle_chat_completions},
    {"GET", "/v1/models", false, ACCESS_USER, handle_models},
    {"GET", "/v1/models/", true, ACCESS_USER, handle_models},
    {"POST", "/v1/load_lora_adapter", false, ACCESS_ADMIN, handle_load_adapter},
    {"POST", "/v1/unload_lora_adapter", false, ACCESS_ADMIN, handle_unload_adapter},
    {"GET", "/v1/adapters", false, ACCESS_USER, handle_adapters},
    {"GET", "/v1/adapters/", true, ACCESS_USER, handle_adapters},
    {"PUT", "/v1/adapters/", true, ACCESS_ADMIN, handle_adapter_put},
    {"POST", "/v1/adapters/", true, ACCESS_ADMIN, handle_adapter_action},
    {"DELETE", "/v1/adapters/", true, ACCESS_ADMIN, handle_adapter_delete},
    {"POST", "/tokenize", false, ACCESS_USER, handle_tokenize},
    {"POST", "/detokenize", false, ACCESS_USER, handle_detokenize},
    {"GET", "/health", false, ACCESS_OPEN, handle_health},
    {"GET", "/ready", false, ACCESS_OPEN, handle_ready},
    {"GET", "/metrics", false, ACCESS_OPEN, handle_metrics},
    {"GET", "/version", false, ACCESS_OPEN, handle_version},
};
enum { ROUTE_COUNT = sizeof routes / sizeof *routes };

static bool path_matches(const struct route *route, const char *path) {
    if (!route->prefix) return strcmp(route->path, path) == 0;
    size_t length = strlen(route->path);
    return strncmp(route->path, path, length) == 0 && path[length];
}

// Answers and returns false when the request may not be served.
static bool admitted(struct connection *c, const struct http_request *r, enum access access) {
    const struct api *api = c->api;
    if (access == ACCESS_OPEN) return true;
    bool admin = keys_find(api->admin_keys, r->authorization) > 0;
    bool user = admin || keys_find(api->api_keys, r->authorization) > 0;
    if (access == ACCESS_USER && (user || !api->api_keys)) return true;
    if (access == ACCESS_ADMIN && (admin || (!api->admin_keys && !api->api_keys))) return true;
    if (access == ACCESS_ADMIN && user)
        respond_refusal(c, 403, NULL, NULL, "this needs an admin key (--admin-key-file)");
    else
        respond_refusal(c, 401, NULL, "invalid_api_key",
                        "no valid API key; send it as 'Authorization: Bearer KEY'");
    return false;
}

static void refuse_method(struct connection *c, const char *path) {
    char allow[128] = "Allow: ";
    for (int i = 0; i < ROUTE_COUNT; i++)
        if (path_matches(&routes[i], path)) {
            if (allow[strlen(allow) - 1] != ' ') strcat(allow, ", ");
            strcat(allow, routes[i].method);
        }
    strcat(allow, "\r\n");
    respond_refusal_with(c, 405, allow, NULL, NULL, "this path has other methods; see Allow");
}

void route(struct connection *c, const struct http_request *r) {
    bool path_known = false;
    const char *method = strcmp(r->method, "HEAD") == 0 ? "" : r->method;
    for (int i = 0; i < ROUTE_COUNT; i++) {
        const struct route *route = &routes[i];
        if (!path_matches(route, r->path)) continue;
        path_known = true;
        if (strcmp(route->method, method) != 0) continue;
        if (!admitted(c, r, route->access)) return;
        if (*r->content_encoding && strcasecmp(r->content_encoding, "identity") != 0) {
            respond_refusal(c, 415, NULL, NULL, "send the body without Content-Encoding");
            return;
        }
        route->handle(c, r, route->prefix ? r->path + strlen(route->path) : "");
        return;
    }
    if (path_known) refuse_method(c, r->path);
    else respond_refusal(c, 404, NULL, NULL, "there is nothing at this path");
}
