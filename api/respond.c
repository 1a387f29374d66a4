// Answers: status line and headers, JSON and text bodies, SSE chunks, and OpenAI-shaped errors.
// Loop thread. The one place where a status of base/status.h becomes an HTTP status.
#include "api/api_internal.h"

#include "base/log.h"
#include "base/memory.h"

#include <stdlib.h>
#include <string.h>

static const char *reason(int http_status) {
    static const struct {
        int status;
        const char *text;
    } reasons[] = {{200, "OK"}, {201, "Created"}, {400, "Bad Request"}, {401, "Unauthorized"},
                   {403, "Forbidden"}, {404, "Not Found"}, {405, "Method Not Allowed"},
                   {408, "Request Timeout"}, {409, "Conflict"}, {413, "Content Too Large"},
                   {414, "URI Too Long"}, {415, "Unsupported Media Type"},
                   {417, "Expectation Failed"}, {429, "Too Many Requests"},
                   {431, "Request Header Fields Too Large"}, {500, "Internal Server Error"},
                   {501, "Not Implemented"}, {503, "Service Unavailable"}, {504, "Gateway Timeout"},
                   {505, "HTTP Version Not Supported"}, {507, "Insufficient Storage"}};
    for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++)
        if (reasons[i].status == http_status) return reasons[i].text;
    return "Error";
}

// `extra`: further header lines, each ended by CRLF.
static void respond(struct connection *c, int http_status, const char *content_type,
                    const char *extra, const char *body, size_t bytes) {
    char head[512];
    int length = snprintf(head, sizeof head,
                          "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n"
                          "%sConnection: %s\r\n\r\n",
                          http_status, reason(http_status), content_type, bytes, extra,
                          c->keep_alive ? "keep-alive" : "close");
    char *data = mem_alloc((size_t)length + bytes);
    memcpy(data, head, (size_t)length);
    memcpy(data + length, body, bytes);
    connection_write(c, data, (size_t)length + bytes);
    connection_answered(c);
}

static char *dump(json_t *json) { // takes json
    char *text = json_dumps(json, JSON_COMPACT);
    json_decref(json);
    return text ? text : mem_strdup("{}");
}

void respond_json(struct connection *c, int http_status, json_t *body) {
    char *text = dump(body);
    respond(c, http_status, "application/json", "", text, strlen(text));
    free(text);
}

void respond_text(struct connection *c, int http_status, const char *content_type,
                  const char *text) {
    respond(c, http_status, content_type, "", text, strlen(text));
}

json_t *error_json(int http_status, const char *param, const char *code, const char *message) {
    const char *type = http_status == 401                         ? "authentication_error"
                       : http_status == 403                       ? "permission_error"
                       : http_status == 404                       ? "not_found_error"
                       : http_status == 429                       ? "rate_limit_error"
                       : http_status >= 500 && http_status != 507 ? "server_error"
                                                                  : "invalid_request_error";
    return json_pack("{s:{s:s,s:s,s:s?,s:s?}}", "error", "message", message, "type", type, "param",
                     param && *param ? param : NULL, "code", code);
}

void respond_refusal_with(struct connection *c, int http_status, const char *header,
                          const char *param, const char *code, const char *message) {
    char *text = dump(error_json(http_status, param, code, message));
    respond(c, http_status, "application/json", header, text, strlen(text));
    free(text);
}

void respond_refusal(struct connection *c, int http_status, const char *param, const char *code,
                     const char *message) {
    char header[64] = "";
    if (http_status == 429 || http_status == 503)
        snprintf(header, sizeof header, "Retry-After: %d\r\n",
                 engine_retry_after_s(c->api->engine));
    respond_refusal_with(c, http_status, header, param, code, message);
}

int error_http_status(const struct error *err) {
    switch (err->status) {
    case STATUS_OK: return 200;
    case STATUS_INVALID:
    case STATUS_UNSUPPORTED: return 400;
    case STATUS_NOT_FOUND: return 404;
    case STATUS_EXISTS:
    case STATUS_BUSY: return 409;
    case STATUS_FULL: return 429;
    case STATUS_TOO_LARGE: return 400;
    case STATUS_NO_PAGES: return 507;
    case STATUS_FORBIDDEN: return 403;
    case STATUS_DEADLINE: return 504;
    case STATUS_SHUTDOWN:
    case STATUS_DEVICE: return 503;
    case STATUS_CANCELLED: return 499;
    case STATUS_IO:
    case STATUS_NO_MEMORY: return 500;
    }
    return 500;
}

void respond_error(struct connection *c, const struct error *err) {
    const char *code = err->status == STATUS_NOT_FOUND && strcmp(err->param, "model") == 0
                           ? "model_not_found"
                           : NULL;
    respond_refusal(c, error_http_status(err), err->param, code, err->text);
}

// ------------------------------------------------------------------ server-sent events

static void write_chunk(struct connection *c, const char *prefix, const char *text,
                        const char *suffix) {
    size_t bytes = strlen(prefix) + strlen(text) + strlen(suffix);
    char *data = mem_alloc(bytes + 32);
    int length = snprintf(data, bytes + 32, "%zx\r\n%s%s%s\r\n", bytes, prefix, text, suffix);
    connection_write(c, data, (size_t)length);
}

void respond_stream_begin(struct connection *c) {
    c->streaming = true;
    char head[256];
    int length = snprintf(head, sizeof head,
                          "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                          "Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n"
                          "Connection: %s\r\n\r\n",
                          c->keep_alive ? "keep-alive" : "close");
    connection_write(c, mem_strndup(head, (size_t)length), (size_t)length);
}

void respond_stream_data(struct connection *c, json_t *event) {
    char *text = dump(event);
    write_chunk(c, "data: ", text, "\n\n");
    free(text);
}

void respond_stream_end(struct connection *c) {
    write_chunk(c, "data: ", "[DONE]", "\n\n");
    if (!c->closing) connection_write(c, mem_strdup("0\r\n\r\n"), 5);
    connection_answered(c);
}
