// The listener, its connections and their clocks: accepting, reading, writing, timing out, and the
// shutdown. Loop thread. It knows nothing of routes or JSON beyond handing a request to route().
//
// A connection that is answering is still read, into a bounded buffer, so that a client's going is
// noticed at once; the buffer is parsed when the answer is complete. A client that reads slower
// than its stream is written gets CONNECTION_QUEUE_MAX bytes of patience, then it is cut off.
#include "api/api_internal.h"

#include "base/file.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/verify.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    CONNECTIONS_MAX = 16384,
    CONNECTION_QUEUE_MAX = 4 << 20,
    CONNECTION_INPUT_MAX = HTTP_BODY_MAX + HTTP_HEADER_BYTES_MAX,
    REQUEST_S_MAX = 30, // a request's bytes must have come by then
    IDLE_S_MAX = 75,
    STALL_S_MAX = 60, // a written byte must have left by then
    LINGER_S_MAX = 2,
    SWEEP_MS = 200
};

// ------------------------------------------------------------------ closing

static void on_closed(uv_handle_t *handle) {
    struct connection *c = handle->data;
    struct api *api = c->api;
    if (c->next) c->next->previous = c->previous;
    if (c->previous) c->previous->next = c->next;
    else api->connections = c->next;
    api->connection_count--;
    http_parser_destroy(c->parser);
    free(c->input);
    free(c);
}

void connection_close(struct connection *c) {
    if (c->closing) return;
    c->closing = true;
    if (c->gone) c->gone(c->exchange);
    c->exchange = NULL;
    c->gone = NULL;
    uv_close((uv_handle_t *)&c->tcp, on_closed);
}

// ------------------------------------------------------------------ writing

struct write {
    uv_write_t uv;
    struct connection *connection;
    char *data;
    size_t bytes;
};

static void on_shutdown(uv_shutdown_t *shutdown, int result) {
    (void)result; // when it fails, reading ends too
    free(shutdown);
}

// Everything has been written: our side is shut, and what the client still sends is read and
// dropped for a while. Closing at once would reset the connection under an answer on its way.
static void close_when_done(struct connection *c) {
    if (c->answering || c->keep_alive || c->queued_bytes || c->lingering || c->closing) return;
    c->lingering = true;
    c->active_s = clock_seconds();
    uv_shutdown_t *shutdown = mem_zalloc(1, sizeof *shutdown);
    if (c->ended || uv_shutdown(shutdown, (uv_stream_t *)&c->tcp, on_shutdown)) {
        free(shutdown);
        connection_close(c);
    }
}

static void on_written(uv_write_t *uv, int result) {
    struct write *write = (struct write *)uv;
    struct connection *c = write->connection;
    c->queued_bytes -= write->bytes;
    c->active_s = clock_seconds();
    free(write->data);
    free(write);
    if (result < 0) connection_close(c);
    else close_when_done(c);
}

void connection_write(struct connection *c, char *data, size_t bytes) {
    if (c->closing || c->queued_bytes > CONNECTION_QUEUE_MAX) {
        free(data);
        if (!c->closing) log_event(LOG_WARN, "slow_reader", "queued=%zu", c->queued_bytes);
        connection_close(c);
        return;
    }
    struct write *write = mem_zalloc(1, sizeof *write);
    write->connection = c;
    write->data = data;
    write->bytes = bytes;
    if (c->queued_bytes == 0) c->active_s = clock_seconds();
    c->queued_bytes += bytes;
    uv_buf_t buffer = uv_buf_init(data, (unsigned)bytes);
    int result = uv_write(&write->uv, (uv_stream_t *)&c->tcp, &buffer, 1, on_written);
    if (result == 0) return;
    c->queued_bytes -= bytes;
    free(data);
    free(write);
    connection_close(c);
}

// ------------------------------------------------------------------ reading

static void refuse_request(struct connection *c) {
    c->answering = true;
    c->keep_alive = false;
    respond_refusal(c, http_parser_status(c->parser), NULL, NULL, http_parser_message(c->parser));
}

// Parses what is in c->input until a request is under way or bytes run out.
static void parse_input(struct connection *c) {
    while (!c->closing && !c->answering && !c->lingering && c->input_bytes) {
        if (http_parser_idle(c->parser)) c->active_s = clock_seconds();
        size_t used;
        enum http_event event = http_parser_feed(c->parser, c->input, c->input_bytes, &used);
        VERIFY_OP(used, <=, c->input_bytes);
        c->input_bytes -= used;
        memmove(c->input, c->input + used, c->input_bytes);
        if (event == HTTP_NEED_CONTINUE) {
            char *text = mem_strdup("HTTP/1.1 100 Continue\r\n\r\n");
            connection_write(c, text, strlen(text));
        } else if (event == HTTP_REFUSED) {
            c->input_bytes = 0;
            refuse_request(c);
        } else if (event == HTTP_COMPLETE) {
            const struct http_request *request = http_parser_request(c->parser);
            c->answering = true;
            c->keep_alive = request->keep_alive && !c->api->draining;
            route(c, request);
        }
    }
}

void connection_answered(struct connection *c) {
    c->answering = c->streaming = false;
    c->exchange = NULL;
    c->gone = NULL;
    if (c->closing) return;
    c->active_s = clock_seconds();
    if (c->ended && !c->input_bytes) c->keep_alive = false;
    if (!c->keep_alive) close_when_done(c);
    else uv_async_send(&c->api->wake); // pipelined bytes are parsed from the loop, not from here
}

static void on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buffer) {
    struct connection *c = handle->data;
    (void)suggested;
    enum { READ_BYTES = 65536 };
    if (c->input_room - c->input_bytes < READ_BYTES) {
        c->input_room = c->input_bytes + READ_BYTES + c->input_room / 2;
        c->input = mem_realloc(c->input, c->input_room);
    }
    *buffer = uv_buf_init(c->input + c->input_bytes, READ_BYTES);
}

static void on_read(uv_stream_t *stream, ssize_t bytes, const uv_buf_t *buffer) {
    struct connection *c = stream->data;
    (void)buffer;
    if (bytes == UV_EOF) { // a half-closed client still reads its answer
        c->ended = true;
        uv_read_stop(stream);
        if (c->lingering) connection_close(c);
        else if (c->answering && c->streaming) connection_close(c);
        else if (c->answering) return;
        else if (http_parser_end(c->parser) == HTTP_REFUSED) refuse_request(c);
        else connection_close(c);
        return;
    }
    if (bytes < 0) {
        connection_close(c);
        return;
    }
    if (c->lingering) return;
    c->input_bytes += (size_t)bytes;
    if (c->input_bytes > CONNECTION_INPUT_MAX) connection_close(c);
    else parse_input(c);
}

// ------------------------------------------------------------------ accepting

static void on_connection(uv_stream_t *listener, int status) {
    struct api *api = listener->data;
    if (status < 0) {
        log_event(LOG_WARN, "accept_failed", "%s", uv_strerror(status));
        return;
    }
    struct connection *c = mem_zalloc(1, sizeof *c);
    c->api = api;
    c->keep_alive = true;
    c->active_s = clock_seconds();
    c->parser = http_parser_create();
    c->next = api->connections;
    if (c->next) c->next->previous = c;
    api->connections = c;
    api->connection_count++;
    uv_tcp_init(&api->loop, &c->tcp);
    c->tcp.data = c;
    if (uv_accept(listener, (uv_stream_t *)&c->tcp) || api->connection_count > CONNECTIONS_MAX) {
        connection_close(c);
        return;
    }
    uv_tcp_nodelay(&c->tcp, 1);
    if (uv_read_start((uv_stream_t *)&c->tcp, on_alloc, on_read)) connection_close(c);
}

// ------------------------------------------------------------------ the loop's clocks and signals

static void on_wake(uv_async_t *async) {
    struct api *api = async->data;
    enum { EVENTS = 256 };
    struct engine_event events[EVENTS];
    int count;
    while ((count = engine_poll(api->engine, events, EVENTS)) > 0)
        for (int i = 0; i < count; i++) completion_event(&events[i]);
    for (struct connection *c = api->connections, *next; c; c = next) {
        next = c->next;
        if (!c->closing && !c->answering && c->input_bytes) parse_input(c);
    }
}

void api_wake(void *api) {
    uv_async_send(&((struct api *)api)->wake);
}

static void time_out(struct connection *c, double now_s) {
    double quiet_s = now_s - c->active_s;
    if (c->closing) return;
    if (c->lingering) {
        if (quiet_s > LINGER_S_MAX) connection_close(c);
    } else if (c->queued_bytes) {
        if (quiet_s > STALL_S_MAX) connection_close(c);
    } else if (c->answering) {
        return; // the engine's business
    } else if (http_parser_idle(c->parser)) {
        if (quiet_s > IDLE_S_MAX || c->api->draining) connection_close(c);
    } else if (quiet_s > REQUEST_S_MAX) {
        c->answering = true;
        c->keep_alive = false;
        respond_refusal(c, 408, NULL, NULL, "the request did not arrive within 30 seconds");
    }
}

static void close_everything(struct api *api) {
    if (api->closing) return;
    api->closing = true;
    uv_close((uv_handle_t *)&api->listener, NULL);
    uv_close((uv_handle_t *)&api->wake, NULL);
    uv_close((uv_handle_t *)&api->sweep, NULL);
    uv_close((uv_handle_t *)&api->terminate, NULL);
    uv_close((uv_handle_t *)&api->interrupt, NULL);
    for (struct connection *c = api->connections; c; c = c->next) connection_close(c);
}

static void on_sweep(uv_timer_t *timer) {
    struct api *api = timer->data;
    double now_s = clock_seconds();
    for (struct connection *c = api->connections, *next; c; c = next) {
        next = c->next;
        time_out(c, now_s);
    }
    if (!engine_healthy(api->engine) && !api->exit_code) {
        log_event(LOG_ERROR, "device_failed", "the device reports a permanent error; stopping");
        api->exit_code = 1;
        api->draining = true;
        engine_drain(api->engine, 0);
    }
    if (api->draining && engine_drained(api->engine) && api->work_count == 0) {
        bool writing = false;
        for (struct connection *c = api->connections; c; c = c->next)
            writing |= c->queued_bytes > 0;
        if (!writing) close_everything(api);
    }
}

static void on_signal(uv_signal_t *signal, int number) {
    struct api *api = signal->data;
    if (api->draining) {
        log_event(LOG_WARN, "stopping_now", "second signal %d", number);
        engine_drain(api->engine, 0);
        return;
    }
    log_event(LOG_INFO, "draining", "signal %d; running requests have %d s", number,
              api->setup.options->drain_s);
    api->draining = true;
    engine_drain(api->engine, api->setup.options->drain_s);
}

static void after_work(uv_work_t *work, int status) {
    struct offload *offload = (struct offload *)work;
    (void)status;
    offload->api->work_count--;
    offload->done(offload);
}

static void do_work(uv_work_t *work) {
    struct offload *offload = (struct offload *)work;
    offload->work(offload);
}

void offload_start(struct api *api, struct offload *offload) {
    offload->api = api;
    api->work_count++;
    VERIFY_OP(uv_queue_work(&api->loop, &offload->uv, do_work, after_work), ==, 0);
}

// ------------------------------------------------------------------ life

static enum status bind_listener(struct api *api, struct error *err) {
    const struct options *o = api->setup.options;
    struct sockaddr_storage address;
    if (uv_ip4_addr(o->host, o->port, (struct sockaddr_in *)&address) &&
        uv_ip6_addr(o->host, o->port, (struct sockaddr_in6 *)&address))
        return error_set(err, STATUS_INVALID, "--host %.60s is not an IP address (127.0.0.1, "
                         "0.0.0.0, ::1)", o->host);
    uv_tcp_init(&api->loop, &api->listener);
    api->listener.data = api;
    int result = uv_tcp_bind(&api->listener, (struct sockaddr *)&address, 0);
    if (!result) result = uv_listen((uv_stream_t *)&api->listener, 1024, on_connection);
    if (result)
        return error_set(err, STATUS_IO, "cannot listen on %.60s port %d: %s%s", o->host, o->port,
                         uv_strerror(result),
                         result == UV_EADDRINUSE ? "; choose another with --port" : "");
    return STATUS_OK;
}

int api_port(const struct api *api) {
    struct sockaddr_storage address;
    int length = sizeof address;
    uv_tcp_getsockname(&api->listener, (struct sockaddr *)&address, &length);
    return ntohs(address.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&address)->sin6_port
                                               : ((struct sockaddr_in *)&address)->sin_port);
}

enum status api_create(const struct api_setup *setup, struct api **out, struct error *err) {
    struct api *api = mem_zalloc(1, sizeof *api);
    const struct options *o = setup->options;
    api->setup = *setup;
    api->created = (int64_t)time(NULL);
    api->root = -1;
    *out = NULL;
    enum status status = keys_load(o->api_key_file, &api->api_keys, err);
    if (status == STATUS_OK) status = keys_load(o->admin_key_file, &api->admin_keys, err);
    if (status == STATUS_OK && o->adapter_dir) {
        api->root = open(o->adapter_dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (api->root < 0)
            status = error_set(err, STATUS_NOT_FOUND, "--adapter-dir %.200s is not a folder that "
                               "can be read", o->adapter_dir);
    }
    uv_loop_init(&api->loop);
    if (status == STATUS_OK) status = bind_listener(api, err);
    if (status != STATUS_OK) { // start-up ends here: the loop's handles die with the process
        keys_destroy(api->api_keys);
        keys_destroy(api->admin_keys);
        return status;
    }
    uv_async_init(&api->loop, &api->wake, on_wake);
    uv_timer_init(&api->loop, &api->sweep);
    uv_signal_init(&api->loop, &api->terminate);
    uv_signal_init(&api->loop, &api->interrupt);
    api->wake.data = api->sweep.data = api->terminate.data = api->interrupt.data = api;
    *out = api;
    return STATUS_OK;
}

void api_set_engine(struct api *api, struct engine *engine, struct metrics *metrics) {
    api->engine = engine;
    api->metrics = metrics;
}

int api_run(struct api *api) {
    VERIFY(api->engine);
    uv_timer_start(&api->sweep, on_sweep, SWEEP_MS, SWEEP_MS);
    uv_signal_start(&api->terminate, on_signal, SIGTERM);
    uv_signal_start(&api->interrupt, on_signal, SIGINT);
    uv_run(&api->loop, UV_RUN_DEFAULT);
    return api->exit_code;
}

void api_destroy(struct api *api) {
    if (!api) return;
    VERIFY_OP(uv_loop_close(&api->loop), ==, 0);
    if (api->root >= 0) close(api->root);
    keys_destroy(api->api_keys);
    keys_destroy(api->admin_keys);
    free(api);
}
