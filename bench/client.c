// The client of client.h. A call lives until its handles are closed; on_end is told when the answer
// is whole, the connection fails, or time is up, whichever comes first.
#include "bench/client.h"

#include "base/memory.h"
#include "bench/sse.h"

#include <llhttp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEXT_MAX = 64 << 20 }; // a list of 100,000 models is 20 MiB

struct call {
    uv_tcp_t tcp;
    uv_timer_t timer;
    uv_connect_t connect;
    uv_write_t write;
    llhttp_t parser;
    struct sse sse;
    struct client_events events;
    void *context;
    char *request, *text;
    size_t request_bytes, text_bytes;
    bool ended, is_post;
    const char *failure; // why it ended before anything was sent
    int open_handles;
    char in[65536];
};

// ------------------------------------------------------------------ the end of a call

static void on_close(uv_handle_t *handle) {
    struct call *call = handle->data;
    if (--call->open_handles > 0) return;
    sse_deinit(&call->sse);
    free(call->request);
    free(call->text);
    free(call);
}

static void end(struct call *call, int status, const char *text) {
    if (call->ended) return;
    call->ended = true;
    call->events.on_end(call->context, status, text);
    uv_close((uv_handle_t *)&call->tcp, on_close);
    uv_close((uv_handle_t *)&call->timer, on_close);
}

static void on_timeout(uv_timer_t *timer) {
    struct call *call = timer->data;
    end(call, 0, call->failure ? call->failure : "time is up");
}

// ------------------------------------------------------------------ the answer

static int on_body(llhttp_t *parser, const char *at, size_t bytes) {
    struct call *call = parser->data;
    if (call->is_post && parser->status_code == 200) {
        sse_feed(&call->sse, at, bytes);
        return 0;
    }
    if (call->text_bytes + bytes > TEXT_MAX) return HPE_USER;
    call->text = mem_realloc(call->text, call->text_bytes + bytes + 1);
    memcpy(call->text + call->text_bytes, at, bytes);
    call->text_bytes += bytes;
    call->text[call->text_bytes] = 0;
    return 0;
}

static int on_complete(llhttp_t *parser) {
    struct call *call = parser->data;
    end(call, parser->status_code, call->text ? call->text : "");
    return 0;
}

static void on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buf) {
    (void)suggested;
    struct call *call = handle->data;
    *buf = uv_buf_init(call->in, sizeof call->in);
}

static void on_read(uv_stream_t *stream, ssize_t count, const uv_buf_t *buf) {
    struct call *call = stream->data;
    if (call->ended) return;
    if (count == UV_EOF) {
        llhttp_finish(&call->parser); // an answer without a length ends here
        end(call, 0, "the connection was closed before the answer was whole");
    } else if (count < 0) {
        end(call, 0, uv_strerror((int)count));
    } else if (llhttp_execute(&call->parser, buf->base, (size_t)count) != HPE_OK) {
        end(call, 0, "the answer is not HTTP");
    }
}

static const llhttp_settings_t *parser_settings(void) {
    static llhttp_settings_t settings;
    if (!settings.on_body) {
        llhttp_settings_init(&settings);
        settings.on_body = on_body;
        settings.on_message_complete = on_complete;
    }
    return &settings;
}

// ------------------------------------------------------------------ the request

static void on_written(uv_write_t *write, int status) {
    struct call *call = write->data;
    if (status < 0) end(call, 0, uv_strerror(status));
}

static void on_connected(uv_connect_t *connect, int status) {
    struct call *call = connect->data;
    if (call->ended) return;
    if (status < 0) {
        end(call, 0, uv_strerror(status));
        return;
    }
    uv_tcp_nodelay(&call->tcp, 1);
    uv_buf_t buf = uv_buf_init(call->request, (unsigned)call->request_bytes);
    uv_write(&call->write, (uv_stream_t *)&call->tcp, &buf, 1, on_written);
    uv_read_start((uv_stream_t *)&call->tcp, on_alloc, on_read);
}

static void request_write(struct call *call, const struct client_target *target, const char *path,
                          const char *body) {
    size_t room = 2048 + strlen(path) + (body ? strlen(body) : 0) +
                  (target->authorization ? strlen(target->authorization) : 0);
    call->request = mem_alloc(room);
    int bytes = snprintf(call->request, room, "%s %s%s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n",
                         body ? "POST" : "GET", target->prefix, path, target->host);
    if (target->authorization)
        bytes += snprintf(call->request + bytes, room - (size_t)bytes, "Authorization: %s\r\n",
                          target->authorization);
    if (body)
        bytes += snprintf(call->request + bytes, room - (size_t)bytes,
                          "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                          strlen(body), body);
    else bytes += snprintf(call->request + bytes, room - (size_t)bytes, "\r\n");
    call->request_bytes = (size_t)bytes;
}

void client_start(uv_loop_t *loop, const struct client_target *target, const char *path,
                  const char *body, double timeout_s, const struct client_events *events,
                  void *context) {
    struct call *call = mem_zalloc(1, sizeof *call);
    call->events = *events;
    call->context = context;
    call->is_post = body != NULL;
    call->sse = (struct sse){.on_data = events->on_data, .context = context};
    call->tcp.data = call->timer.data = call->connect.data = call->write.data = call;
    call->open_handles = 2;
    llhttp_init(&call->parser, HTTP_RESPONSE, parser_settings());
    call->parser.data = call;
    request_write(call, target, path, body);
    uv_tcp_init(loop, &call->tcp);
    uv_timer_init(loop, &call->timer);
    uv_timer_start(&call->timer, on_timeout, (uint64_t)(timeout_s * 1000), 0);
    int status = uv_tcp_connect(&call->connect, &call->tcp,
                                (const struct sockaddr *)&target->address, on_connected);
    if (status >= 0) return;
    // Told from the loop: whoever is told may start the next call, and must not end up in itself.
    call->failure = uv_strerror(status);
    uv_timer_start(&call->timer, on_timeout, 0, 0);
}

bool client_target_parse(uv_loop_t *loop, const char *url, struct client_target *target) {
    char host[200], port[8] = "80";
    if (strncmp(url, "http://", 7) != 0) {
        fprintf(stderr, "lorad-bench: --url %s: must be http://HOST[:PORT][/PREFIX]\n", url);
        return false;
    }
    const char *at = url + 7;
    size_t authority = strcspn(at, "/"), name = strcspn(at, ":/");
    if (name == 0 || authority >= sizeof host || authority - name > 6) {
        fprintf(stderr, "lorad-bench: --url %s: no host, or too long\n", url);
        return false;
    }
    snprintf(host, sizeof host, "%.*s", (int)name, at);
    if (at[name] == ':')
        snprintf(port, sizeof port, "%.*s", (int)(authority - name - 1), at + name + 1);
    snprintf(target->host, sizeof target->host, "%.*s", (int)authority, at);
    snprintf(target->prefix, sizeof target->prefix, "%s", at + authority);
    size_t prefix = strlen(target->prefix);
    if (prefix > 0 && target->prefix[prefix - 1] == '/') target->prefix[prefix - 1] = 0;
    uv_getaddrinfo_t query;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    int status = uv_getaddrinfo(loop, &query, NULL, host, port, &hints);
    if (status < 0) {
        fprintf(stderr, "lorad-bench: --url %s: %s\n", url, uv_strerror(status));
        return false;
    }
    memcpy(&target->address, query.addrinfo->ai_addr, query.addrinfo->ai_addrlen);
    uv_freeaddrinfo(query.addrinfo);
    return true;
}
