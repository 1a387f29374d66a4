// Levelled log to stderr: one line an event, as text or as JSON lines. Thread-safe; a line is
// written with one write(). The sink (level and format) is the process's one mutable global.
//
// log_event(LOG_INFO, "adapter_loaded", "name=%s rank=%d", name, rank) prints
//   2026-01-01T00:00:00.000Z INFO  adapter_loaded name=x rank=8
// or {"ts":"...","level":"info","event":"adapter_loaded","message":"name=x rank=8"}.
#ifndef LORAD_BASE_LOG_H
#define LORAD_BASE_LOG_H

#include <stdbool.h>

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };

// Called once before threads start.
void log_configure(enum log_level level, bool json);
__attribute__((format(printf, 3, 4))) void log_event(enum log_level level, const char *event,
                                                     const char *format, ...);
bool log_level_parse(const char *text, enum log_level *level);

#endif
