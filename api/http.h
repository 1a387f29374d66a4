// One HTTP/1.x request from bytes, incrementally: llhttp in strict mode plus the checks that it
// leaves to its user (RFC 9112: Host, Transfer-Encoding, limits). No sockets here.
#ifndef LORAD_API_HTTP_H
#define LORAD_API_HTTP_H

#include <stdbool.h>
#include <stddef.h>

enum {
    HTTP_URL_MAX = 8192,
    HTTP_HEADER_BYTES_MAX = 32768,
    HTTP_HEADERS_MAX = 100,
    HTTP_BODY_MAX = 16 << 20,
    HTTP_CHUNK_EXTENSION_MAX = 4096
};

struct http_request {
    char method[16];
    char *path; // percent-decoded, without the query; the parser's
    const char *query; // raw, "" when absent; the parser's
    char *body; // NUL-terminated; the parser's
    size_t body_bytes;
    char authorization[512]; // "" when absent
    char content_encoding[32], content_type[64];
    bool keep_alive;
};

enum http_event {
    HTTP_NEED_MORE,     // needs more bytes
    HTTP_NEED_CONTINUE, // the client waits for "100 Continue"; feed again
    HTTP_COMPLETE,  // a whole request is in http_parser_request
    HTTP_REFUSED       // answer with http_parser_status and close
};

struct http_parser;
struct http_parser *http_parser_create(void);
void http_parser_destroy(struct http_parser *parser);
// Takes up to `bytes`; *used says how many. After HTTP_COMPLETE the next feed begins a new request
// and ends the life of the old one.
enum http_event http_parser_feed(struct http_parser *parser, const char *data, size_t bytes,
                                 size_t *used);
// The peer sent its end: HTTP_REFUSED inside a request, else HTTP_NEED_MORE.
enum http_event http_parser_end(struct http_parser *parser);
bool http_parser_idle(const struct http_parser *parser); // between requests
const struct http_request *http_parser_request(const struct http_parser *parser);
int http_parser_status(const struct http_parser *parser);
const char *http_parser_message(const struct http_parser *parser);

#endif
