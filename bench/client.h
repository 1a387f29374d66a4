// One HTTP request on one connection, on a libuv loop. The load generator's own client; it knows
// nothing of what is measured. Loop thread only.
#ifndef LORAD_BENCH_CLIENT_H
#define LORAD_BENCH_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <uv.h>

struct client_target {
    struct sockaddr_storage address;
    char host[256];   // for the Host header, with the port
    char prefix[256]; // of every path
    char *authorization; // "Bearer ..." or NULL; owned by the caller
};

// http://HOST[:PORT][/PREFIX]. false: says on stderr what is wrong.
bool client_target_parse(uv_loop_t *loop, const char *url, struct client_target *target);

struct client_events {
    // Each SSE data of a 200 answer to a POST.
    void (*on_data)(void *context, const char *data, size_t bytes);
    // Exactly once, last. status 0: no whole answer came, and text says why; else text is the body
    // of an answer that was no stream (at most 64 MiB), or "".
    void (*on_end)(void *context, int status, const char *text);
};

// body NULL: GET. timeout_s is for the whole exchange. Everything is copied.
void client_start(uv_loop_t *loop, const struct client_target *target, const char *path,
                  const char *body, double timeout_s, const struct client_events *events,
                  void *context);

#endif
