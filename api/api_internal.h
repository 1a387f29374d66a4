// What the files of api/ share: the connection, its answer, and the handlers. Loop thread only,
// but for what a `work` function of offload() touches.
#ifndef LORAD_API_INTERNAL_H
#define LORAD_API_INTERNAL_H

#include "api/api.h"
#include "api/http.h"
#include "server/registry.h"

#include <jansson.h>
#include <uv.h>

struct keys; // api keys of one file

struct api {
    struct api_setup setup;
    struct engine *engine;
    struct metrics *metrics;
    uv_loop_t loop;
    uv_tcp_t listener;
    uv_async_t wake;
    uv_timer_t sweep;
    uv_signal_t terminate, interrupt;
    struct connection *connections; // list
    int connection_count, work_count;
    bool draining, closing;
    int exit_code, root; // root: --adapter-dir's descriptor, or -1
    int64_t created;     // unix time, for "created" fields
    uint64_t ids;
    struct keys *api_keys, *admin_keys;
};

// One client. `exchange` is the answer under way: while it is not NULL no further request is
// parsed, so that pipelined requests are answered in order.
//   READING --request--> ANSWERING --respond_*--> READING (keep-alive) or closed
struct connection {
    struct api *api;
    uv_tcp_t tcp;
    struct http_parser *parser;
    char *input; // bytes that came while answering
    size_t input_bytes, input_room;
    bool answering, streaming, keep_alive, closing, ended, lingering;
    size_t queued_bytes; // written to libuv, not yet to the socket
    double active_s;     // last progress, or when this request's first byte came
    void *exchange;      // the handler's; told of the client's going by `gone`
    void (*gone)(void *exchange);
    struct connection *next, *previous;
};

// respond.c: exactly one of these ends every request. Bodies are copied; json is taken.
void respond_json(struct connection *connection, int http_status, json_t *body);
void respond_text(struct connection *connection, int http_status, const char *content_type,
                  const char *text);
void respond_error(struct connection *connection, const struct error *err);
// With an explicit status; param and code may be NULL.
void respond_refusal(struct connection *connection, int http_status, const char *param,
                     const char *code, const char *message);
// The same with a further header line, ended by CRLF.
void respond_refusal_with(struct connection *connection, int http_status, const char *header,
                          const char *param, const char *code, const char *message);
void respond_stream_begin(struct connection *connection);
void respond_stream_data(struct connection *connection, json_t *event); // taken; one SSE event
void respond_stream_end(struct connection *connection);                 // [DONE]
int error_http_status(const struct error *err);
json_t *error_json(int http_status, const char *param, const char *code, const char *message);

// listen.c
void connection_write(struct connection *connection, char *data, size_t bytes); // takes data
void connection_answered(struct connection *connection); // the next request may be read
void connection_close(struct connection *connection);

// Runs `work` on libuv's thread pool, then `done` on the loop.
struct offload {
    uv_work_t uv;
    struct api *api;
    void (*work)(struct offload *offload);
    void (*done)(struct offload *offload);
};
void offload_start(struct api *api, struct offload *offload);

// routes.c
void route(struct connection *connection, const struct http_request *request);

// keys.c: NULL path gives NULL; a missing or empty file is an error.
MUST_CHECK enum status keys_load(const char *path, struct keys **out, struct error *err);
void keys_destroy(struct keys *keys);
// 1 for the first key, and so on; 0: none of them. Constant-time over all keys. `authorization` is the
// header's value.
int keys_find(const struct keys *keys, const char *authorization);

// Handlers. `tail` is what follows the route's prefix ("" when nothing).
void handle_completions(struct connection *c, const struct http_request *r, const char *tail);
void handle_chat_completions(struct connection *c, const struct http_request *r, const char *tail);
void handle_models(struct connection *c, const struct http_request *r, const char *tail);
void handle_load_adapter(struct connection *c, const struct http_request *r, const char *tail);
void handle_unload_adapter(struct connection *c, const struct http_request *r, const char *tail);
void handle_adapters(struct connection *c, const struct http_request *r, const char *tail);
void handle_adapter_put(struct connection *c, const struct http_request *r, const char *tail);
void handle_adapter_delete(struct connection *c, const struct http_request *r, const char *tail);
void handle_adapter_action(struct connection *c, const struct http_request *r, const char *tail);
void handle_health(struct connection *c, const struct http_request *r, const char *tail);
void handle_ready(struct connection *c, const struct http_request *r, const char *tail);
void handle_version(struct connection *c, const struct http_request *r, const char *tail);
void handle_metrics(struct connection *c, const struct http_request *r, const char *tail);
void handle_tokenize(struct connection *c, const struct http_request *r, const char *tail);
void handle_detokenize(struct connection *c, const struct http_request *r, const char *tail);

// completions_answer.c: one engine event, on the loop.
void completion_event(struct engine_event *event);

// params.c: the body as a JSON object; STATUS_INVALID says what is wrong. Any thread.
MUST_CHECK enum status body_parse(const char *body, size_t bytes, json_t **out,
                                  struct error *err);
// A field of that type, or *out unchanged when it is absent or null.
MUST_CHECK enum status param_number(const json_t *root, const char *name, double min, double max,
                                    double *out, struct error *err);
MUST_CHECK enum status param_integer(const json_t *root, const char *name, int64_t min,
                                     int64_t max, int64_t *out, struct error *err);
MUST_CHECK enum status param_bool(const json_t *root, const char *name, bool *out,
                                  struct error *err);
MUST_CHECK enum status param_string(const json_t *root, const char *name, size_t bytes_max,
                                    const char **out, struct error *err);

#endif
