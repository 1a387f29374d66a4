// llhttp's callbacks, and what it lets through that a server must not: see http.h. Loop thread; one
// parser a connection. A callback that refuses sets status and message and stops the parser.
#include "api/http.h"

#include "base/memory.h"

#include <ctype.h>
#include <llhttp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

struct buffer {
    char *data;
    size_t bytes, room;
};

struct http_parser {
    llhttp_t llhttp;
    struct http_request request;
    struct buffer url, body, name, value;
    size_t header_bytes, extension_bytes;
    int headers, hosts, authorizations, content_types, lengths, encodings;
    enum { SCAN_LINE, SCAN_LINE_BEGIN, SCAN_BODY } scan; // of raw bytes: see folded()
    bool begun, in_body, complete, expects, wants_continue, encoding_is_chunked;
    int status;
    const char *message;
};

static void append(struct buffer *buffer, const char *data, size_t bytes) {
    if (buffer->bytes + bytes + 1 > buffer->room) {
        buffer->room = 2 * (buffer->bytes + bytes) + 64;
        buffer->data = mem_realloc(buffer->data, buffer->room);
    }
    memcpy(buffer->data + buffer->bytes, data, bytes);
    buffer->bytes += bytes;
    buffer->data[buffer->bytes] = 0;
}

static int refuse(struct http_parser *p, int status, const char *message) {
    if (p->status) return HPE_USER;
    p->status = status;
    p->message = message;
    return HPE_USER;
}

static struct http_parser *self(llhttp_t *llhttp) {
    return llhttp->data;
}

static int on_message_begin(llhttp_t *llhttp) {
    struct http_parser *p = self(llhttp);
    p->url.bytes = p->body.bytes = p->name.bytes = p->value.bytes = 0;
    p->header_bytes = p->extension_bytes = 0;
    p->headers = p->hosts = p->authorizations = p->content_types = p->lengths = p->encodings = 0;
    p->in_body = p->complete = p->expects = p->wants_continue = p->encoding_is_chunked = false;
    free(p->request.path);
    p->request = (struct http_request){0};
    p->begun = true;
    return 0;
}

static int on_url(llhttp_t *llhttp, const char *at, size_t bytes) {
    struct http_parser *p = self(llhttp);
    if (p->url.bytes + bytes > HTTP_URL_MAX) return refuse(p, 414, "the URL is too long");
    append(&p->url, at, bytes);
    return 0;
}

static int header_bytes(struct http_parser *p, size_t bytes) {
    p->header_bytes += bytes;
    return p->header_bytes > HTTP_HEADER_BYTES_MAX ? refuse(p, 431, "the headers are too large")
                                                   : 0;
}

static int on_field(llhttp_t *llhttp, const char *at, size_t bytes) {
    struct http_parser *p = self(llhttp);
    append(&p->name, at, bytes);
    return header_bytes(p, bytes);
}

static int on_value(llhttp_t *llhttp, const char *at, size_t bytes) {
    struct http_parser *p = self(llhttp);
    append(&p->value, at, bytes);
    return header_bytes(p, bytes);
}

static int keep(struct http_parser *p, char *to, size_t room, int *count, const char *value,
                const char *twice) {
    if (++*count > 1) return refuse(p, 400, twice);
    if (strlen(value) >= room) return refuse(p, 431, "a header is too long");
    memcpy(to, value, strlen(value) + 1);
    return 0;
}

static int host_ok(const char *host) {
    for (const char *c = host; *c; c++)
        if (!isalnum((unsigned char)*c) && !strchr("-._:[]%~", *c)) return 0;
    return *host != 0;
}

// llhttp lets a space through before the colon.
static int name_ok(const char *name) {
    return *name && !strpbrk(name, " \t");
}

static int header(struct http_parser *p, const char *name, const char *value) {
    struct http_request *r = &p->request;
    if (!name_ok(name)) return refuse(p, 400, "a header's name holds a space");
    if (strcasecmp(name, "host") == 0) {
        p->hosts++;
        return host_ok(value) ? 0 : refuse(p, 400, "the Host header is not a host name");
    }
    if (strcasecmp(name, "authorization") == 0)
        return keep(p, r->authorization, sizeof r->authorization, &p->authorizations, value,
                    "more than one Authorization header");
    if (strcasecmp(name, "content-type") == 0)
        return keep(p, r->content_type, sizeof r->content_type, &p->content_types, value,
                    "more than one Content-Type header");
    if (strcasecmp(name, "content-encoding") == 0) {
        int none = 0;
        return keep(p, r->content_encoding, sizeof r->content_encoding, &none, value, "");
    }
    if (strcasecmp(name, "content-length") == 0 && ++p->lengths > 1)
        return refuse(p, 400, "more than one Content-Length header");
    if (strcasecmp(name, "transfer-encoding") == 0) {
        if (++p->encodings > 1) return refuse(p, 400, "more than one Transfer-Encoding header");
        p->encoding_is_chunked = strcasecmp(value, "chunked") == 0;
        if (!p->encoding_is_chunked && strcasecmp(value, "gzip, chunked") == 0)
            return refuse(p, 501, "of transfer encodings only chunked is supported");
    }
    if (strcasecmp(name, "expect") == 0) {
        if (strcasecmp(value, "100-continue") != 0)
            return refuse(p, 417, "the only expectation supported is 100-continue");
        p->expects = true;
    }
    return 0;
}

static int on_value_complete(llhttp_t *llhttp) {
    struct http_parser *p = self(llhttp);
    if (p->in_body) { // trailers are read and dropped
        p->name.bytes = p->value.bytes = 0;
        return 0;
    }
    if (++p->headers > HTTP_HEADERS_MAX) return refuse(p, 431, "too many headers");
    append(&p->name, "", 0);
    append(&p->value, "", 0);
    while (p->value.bytes && strchr(" \t", p->value.data[p->value.bytes - 1]))
        p->value.data[--p->value.bytes] = 0;
    int result = header(p, p->name.data, p->value.data);
    p->name.bytes = p->value.bytes = 0;
    return result;
}

static int hex(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    c = (char)tolower((unsigned char)c);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

// url -> path: absolute form is cut to its path, percent signs decoded, NUL and junk refused.
static int decode_path(struct http_parser *p) {
    append(&p->url, "", 0);
    const char *from = p->url.data;
    if (strncasecmp(from, "http://", 7) == 0) {
        from = strchr(from + 7, '/');
        if (!from) from = "/";
    }
    if (*from != '/' && strcmp(from, "*") != 0) return refuse(p, 400, "the URL has no path");
    char *to = p->request.path = mem_alloc(strlen(from) + 1);
    for (; *from && *from != '?' && *from != '#'; from++) {
        if ((unsigned char)*from <= ' ' || (unsigned char)*from >= 127)
            return refuse(p, 400, "the URL holds a byte that must be percent-encoded");
        if (*from != '%') {
            *to++ = *from;
            continue;
        }
        int high = hex(from[1]), low = high < 0 ? -1 : hex(from[2]);
        if (high < 0 || low < 0 || high * 16 + low == 0)
            return refuse(p, 400, "the URL holds a bad percent escape");
        *to++ = (char)(high * 16 + low);
        from += 2;
    }
    *to = 0;
    p->request.query = *from == '?' ? from + 1 : "";
    return 0;
}

static int on_headers_complete(llhttp_t *llhttp) {
    struct http_parser *p = self(llhttp);
    const char *method = llhttp_method_name((llhttp_method_t)llhttp->method);
    if (llhttp->http_major != 1 || llhttp->http_minor > 1)
        return refuse(p, 505, "only HTTP/1.0 and HTTP/1.1 are spoken here");
    if (strcmp(method, "CONNECT") == 0) return refuse(p, 405, "CONNECT is not supported");
    if (p->hosts > 1 || (p->hosts == 0 && llhttp->http_minor == 1))
        return refuse(p, 400, "exactly one Host header is needed");
    if (p->encodings && llhttp->http_minor == 0)
        return refuse(p, 400, "Transfer-Encoding in an HTTP/1.0 request");
    if (p->encodings && !p->encoding_is_chunked)
        return refuse(p, 400, "Transfer-Encoding must be chunked");
    if (!p->encodings && p->lengths && llhttp->content_length > HTTP_BODY_MAX)
        return refuse(p, 413, "the body is larger than 16 MiB");
    if (strlen(method) >= sizeof p->request.method) return refuse(p, 501, "unknown method");
    memcpy(p->request.method, method, strlen(method) + 1);
    if (decode_path(p)) return HPE_USER;
    llhttp->upgrade = 0; // an Upgrade header is ignored
    p->in_body = true;
    p->wants_continue = p->expects && llhttp->http_minor == 1 &&
                        (p->encodings || llhttp->content_length > 0);
    return p->wants_continue ? HPE_PAUSED : 0;
}

static int on_body(llhttp_t *llhttp, const char *at, size_t bytes) {
    struct http_parser *p = self(llhttp);
    if (p->body.bytes + bytes > HTTP_BODY_MAX)
        return refuse(p, 413, "the body is larger than 16 MiB");
    append(&p->body, at, bytes);
    return 0;
}

static int on_extension(llhttp_t *llhttp, const char *at, size_t bytes) {
    struct http_parser *p = self(llhttp);
    (void)at;
    p->extension_bytes += bytes;
    return p->extension_bytes > HTTP_CHUNK_EXTENSION_MAX
               ? refuse(p, 400, "the chunk extensions are too large")
               : 0;
}

static int on_chunk_header(llhttp_t *llhttp) {
    struct http_parser *p = self(llhttp);
    return llhttp->content_length > HTTP_BODY_MAX - p->body.bytes
               ? refuse(p, 413, "the body is larger than 16 MiB")
               : 0;
}

static int on_message_complete(llhttp_t *llhttp) {
    struct http_parser *p = self(llhttp);
    append(&p->body, "", 0);
    p->request.body = p->body.data;
    p->request.body_bytes = p->body.bytes;
    p->request.keep_alive = llhttp_should_keep_alive(llhttp);
    p->complete = true;
    return HPE_PAUSED;
}

static const llhttp_settings_t settings = {
    .on_message_begin = on_message_begin,
    .on_url = on_url,
    .on_header_field = on_field,
    .on_header_value = on_value,
    .on_header_value_complete = on_value_complete,
    .on_headers_complete = on_headers_complete,
    .on_body = on_body,
    .on_chunk_extension_name = on_extension,
    .on_chunk_extension_value = on_extension,
    .on_chunk_header = on_chunk_header,
    .on_message_complete = on_message_complete,
};

struct http_parser *http_parser_create(void) {
    struct http_parser *p = mem_zalloc(1, sizeof *p);
    llhttp_init(&p->llhttp, HTTP_REQUEST, &settings);
    p->llhttp.data = p;
    return p;
}

void http_parser_destroy(struct http_parser *p) {
    if (!p) return;
    free(p->request.path);
    free(p->url.data);
    free(p->body.data);
    free(p->name.data);
    free(p->value.data);
    free(p);
}

static enum http_event bad(struct http_parser *p) {
    if (!p->status) {
        bool version = llhttp_get_errno(&p->llhttp) == HPE_INVALID_VERSION;
        bool method = llhttp_get_errno(&p->llhttp) == HPE_INVALID_METHOD;
        (void)refuse(p, version ? 505 : 400,
                     method ? "not an HTTP request, or an unknown method"
                            : llhttp_get_error_reason(&p->llhttp));
        if (!p->message || !*p->message) p->message = "not a valid HTTP request";
    }
    return HTTP_REFUSED;
}

// llhttp joins folded header lines (obs-fold); RFC 9112 5.2 lets a server refuse them.
static bool folded(struct http_parser *p, const char *data, size_t bytes) {
    for (size_t i = 0; i < bytes && p->scan != SCAN_BODY; i++) {
        if (p->scan == SCAN_LINE_BEGIN && (data[i] == ' ' || data[i] == '\t')) return true;
        if (p->scan == SCAN_LINE_BEGIN && data[i] == '\r') p->scan = SCAN_BODY;
        else p->scan = data[i] == '\n' ? SCAN_LINE_BEGIN : SCAN_LINE;
    }
    return false;
}

enum http_event http_parser_feed(struct http_parser *p, const char *data, size_t bytes,
                                 size_t *used) {
    *used = bytes;
    if (p->status) return HTTP_REFUSED;
    if (p->complete) {
        p->complete = p->begun = false;
        p->scan = SCAN_LINE;
    }
    if (folded(p, data, bytes)) {
        (void)refuse(p, 400, "a header continues on a second line");
        return HTTP_REFUSED;
    }
    llhttp_errno_t result = llhttp_execute(&p->llhttp, data, bytes);
    if (result == HPE_OK) return HTTP_NEED_MORE;
    if (result != HPE_PAUSED) return bad(p);
    *used = (size_t)(llhttp_get_error_pos(&p->llhttp) - data);
    llhttp_resume(&p->llhttp);
    if (p->complete) return HTTP_COMPLETE;
    return HTTP_NEED_CONTINUE;
}

enum http_event http_parser_end(struct http_parser *p) {
    if (p->status) return HTTP_REFUSED;
    if (http_parser_idle(p)) return HTTP_NEED_MORE;
    if (llhttp_finish(&p->llhttp) != HPE_OK || !p->complete) {
        (void)refuse(p, 400, "the connection ended inside a request");
        return HTTP_REFUSED;
    }
    return HTTP_NEED_MORE;
}

bool http_parser_idle(const struct http_parser *p) {
    return !p->begun || p->complete;
}

const struct http_request *http_parser_request(const struct http_parser *p) {
    return &p->request;
}

int http_parser_status(const struct http_parser *p) {
    return p->status;
}

const char *http_parser_message(const struct http_parser *p) {
    return p->message ? p->message : "";
}
