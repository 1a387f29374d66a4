// The log sink: formats one event into a line on the stack and writes it to stderr with a single
// write(), so that lines of different threads never mix. Any thread; no lock, no allocation.
//
// A line is bounded (LINE_BYTES); a longer message is cut. Control bytes are escaped, so that text
// from outside cannot forge a second line. The file refuses to fail: a log that cannot be written
// is dropped.
#include "base/log.h"

#include "base/utf8.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

enum {
    MESSAGE_BYTES = 2048,
    LINE_BYTES = 6 * MESSAGE_BYTES + 512, // every byte of the message as \u00xx, and the rest
};

static enum log_level sink_level = LOG_INFO;
static bool sink_json = false;

static const struct {
    const char *name, *padded;
} level_names[] = {
    [LOG_DEBUG] = {"debug", "DEBUG"},
    [LOG_INFO] = {"info", "INFO "},
    [LOG_WARN] = {"warn", "WARN "},
    [LOG_ERROR] = {"error", "ERROR"},
};

enum { LEVELS = sizeof level_names / sizeof level_names[0] };

void log_configure(enum log_level level, bool json) {
    sink_level = level;
    sink_json = json;
}

bool log_level_parse(const char *text, enum log_level *level) {
    for (int i = 0; i < LEVELS; i++)
        if (strcasecmp(text, level_names[i].name) == 0) {
            *level = (enum log_level)i;
            return true;
        }
    return false;
}

// 2026-01-01T00:00:00.000Z
static void format_time(char *text, size_t bytes) {
    struct timespec now;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    size_t used = strftime(text, bytes, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(text + used, bytes - used, ".%03ldZ", now.tv_nsec / 1000000);
}

// Appends `text` with control bytes escaped; quotes and backslashes too when `json`.
static char *append_escaped(char *to, const char *text, bool json) {
    for (const char *s = text; *s; s++) {
        unsigned char c = (unsigned char)*s;
        if (c == '\n') {
            *to++ = '\\', *to++ = 'n';
        } else if (c < 0x20 || c == 0x7f) {
            to += sprintf(to, json ? "\\u%04x" : "\\x%02x", c);
        } else {
            if (json && (c == '"' || c == '\\')) *to++ = '\\';
            *to++ = (char)c;
        }
    }
    return to;
}

static void write_line(const char *line, size_t bytes) {
    ssize_t done;
    do done = write(STDERR_FILENO, line, bytes);
    while (done < 0 && errno == EINTR);
}

void log_event(enum log_level level, const char *event, const char *format, ...) {
    if (level < sink_level) return;
    int saved_errno = errno;
    char when[64], name[64], message[MESSAGE_BYTES], line[LINE_BYTES];
    format_time(when, sizeof when);
    snprintf(name, sizeof name, "%s", event);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    utf8_replace_invalid(message);

    char *end = line;
    if (sink_json) {
        end += sprintf(end, "{\"ts\":\"%s\",\"level\":\"%s\",\"event\":\"%s\",\"message\":\"", when,
                       level_names[level].name, name);
        end = append_escaped(end, message, true);
        end += sprintf(end, "\"}\n");
    } else {
        end += sprintf(end, "%s %s %s", when, level_names[level].padded, name);
        if (message[0]) *end++ = ' ';
        end = append_escaped(end, message, false);
        *end++ = '\n';
    }
    write_line(line, (size_t)(end - line));
    errno = saved_errno;
}
