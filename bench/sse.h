// Server-sent events out of bytes that come in any pieces: the data of each event, without its
// "data: ". Lines that are not data are skipped; an event ends at its line's end, as OpenAI's do.
#ifndef LORAD_BENCH_SSE_H
#define LORAD_BENCH_SSE_H

#include <stddef.h>

typedef void sse_data(void *context, const char *data, size_t bytes); // NUL-terminated too

struct sse {
    char *line;
    size_t bytes, room;
    sse_data *on_data;
    void *context;
};

void sse_feed(struct sse *sse, const char *bytes, size_t count);
void sse_deinit(struct sse *sse);

#endif
