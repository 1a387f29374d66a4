// See sse.h.
#include "bench/sse.h"

#include "base/memory.h"

#include <stdlib.h>
#include <string.h>

static void line_end(struct sse *sse) {
    size_t bytes = sse->bytes;
    sse->bytes = 0;
    if (bytes > 0 && sse->line[bytes - 1] == '\r') bytes--;
    if (bytes < 5 || memcmp(sse->line, "data:", 5) != 0) return;
    sse->line[bytes] = 0;
    size_t skip = bytes > 5 && sse->line[5] == ' ' ? 6 : 5;
    sse->on_data(sse->context, sse->line + skip, bytes - skip);
}

void sse_feed(struct sse *sse, const char *bytes, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (bytes[i] == '\n') {
            if (sse->bytes > 0) line_end(sse);
            continue;
        }
        if (sse->bytes + 2 > sse->room) {
            sse->room = 2 * sse->room + 256;
            sse->line = mem_realloc(sse->line, sse->room);
        }
        sse->line[sse->bytes++] = bytes[i];
    }
}

void sse_deinit(struct sse *sse) {
    free(sse->line);
}
