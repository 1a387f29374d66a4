// Characters: scanning and writing UTF-8, the character classes that tokenizer.json refers to, the
// alphabet of byte-level BPE, and the growing buffers of server/text. Pure functions, any thread.
// It holds no tables of its own: categories come from utf8proc.
#include "server/text/text_internal.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

// Second-byte bounds keep out overlong forms, surrogates and codes above U+10FFFF.
enum utf8_result utf8_scan(const char *text, size_t bytes, uint32_t *code, size_t *length) {
    const unsigned char *at = (const unsigned char *)text;
    unsigned char lead = at[0];
    *length = 1;
    *code = lead;
    if (lead < 0x80) return UTF8_CHARACTER;
    if (lead < 0xc2 || lead > 0xf4) return UTF8_MALFORMED;
    size_t needed = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    uint32_t value = lead & (0x7fu >> needed);
    for (size_t i = 1; i < needed; i++) {
        *length = i;
        if (i >= bytes) return UTF8_INCOMPLETE;
        if (at[i] < low || at[i] > high) return UTF8_MALFORMED;
        value = value << 6 | (at[i] & 0x3fu);
        low = 0x80;
        high = 0xbf;
    }
    *length = needed;
    *code = value;
    return UTF8_CHARACTER;
}

size_t utf8_next(const char *text, size_t bytes, uint32_t *code) {
    size_t length;
    enum utf8_result result = utf8_scan(text, bytes, code, &length);
    VERIFY_OP(result, ==, UTF8_CHARACTER);
    return length;
}

size_t utf8_put(uint32_t code, char out[4]) {
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    size_t length = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t i = length - 1; i > 0; i--) {
        out[i] = (char)(0x80 | (code & 0x3f));
        code >>= 6;
    }
    unsigned lead = length == 2 ? 0xc0 : length == 3 ? 0xe0 : 0xf0;
    out[0] = (char)(lead | code);
    return length;
}

size_t utf8_valid_prefix(const char *text, size_t bytes) {
    size_t at = 0;
    while (at < bytes) {
        uint64_t word;
        if (bytes - at >= 8) {
            memcpy(&word, text + at, 8);
            if (!(word & 0x8080808080808080u)) {
                at += 8;
                continue;
            }
        }
        uint32_t code;
        size_t length;
        if (utf8_scan(text + at, bytes - at, &code, &length) != UTF8_CHARACTER) return at;
        at += length;
    }
    return bytes;
}

bool char_is_space(uint32_t code) {
    if (code < 0x80) return code == ' ' || (code >= '\t' && code <= '\r');
    return code == 0x85 || code == 0xa0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200a) ||
           code == 0x2028 || code == 0x2029 || code == 0x202f || code == 0x205f ||
           code == 0x3000;
}

bool char_is_numeric(uint32_t code) {
    if (code < 0x80) return code >= '0' && code <= '9';
    utf8proc_category_t category = utf8proc_category((utf8proc_int32_t)code);
    return category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL ||
           category == UTF8PROC_CATEGORY_NO;
}

bool char_is_punctuation(uint32_t code) {
    if (code < 0x80)
        return (code >= '!' && code <= '/') || (code >= ':' && code <= '@') ||
               (code >= '[' && code <= '`') || (code >= '{' && code <= '~');
    switch (utf8proc_category((utf8proc_int32_t)code)) {
    case UTF8PROC_CATEGORY_PC:
    case UTF8PROC_CATEGORY_PD:
    case UTF8PROC_CATEGORY_PS:
    case UTF8PROC_CATEGORY_PE:
    case UTF8PROC_CATEGORY_PI:
    case UTF8PROC_CATEGORY_PF:
    case UTF8PROC_CATEGORY_PO: return true;
    default: return false;
    }
}

// Alphabetic, marks, decimal digits, connectors and the two joiners. utf8proc has no Alphabetic:
// beyond letters, letter numbers and marks it holds four ranges of enclosed Latin letters.
bool char_is_word(uint32_t code) {
    if (code < 0x80)
        return (code >= '0' && code <= '9') || (code >= 'A' && code <= 'Z') ||
               (code >= 'a' && code <= 'z') || code == '_';
    switch (utf8proc_category((utf8proc_int32_t)code)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC: return true;
    default: break;
    }
    return code == 0x200c || code == 0x200d || (code >= 0x24b6 && code <= 0x24e9) ||
           (code >= 0x1f130 && code <= 0x1f149) || (code >= 0x1f150 && code <= 0x1f169) ||
           (code >= 0x1f170 && code <= 0x1f189);
}

// Visible Latin-1 characters stand for themselves; the 68 other bytes, in order, for U+0100 on.
uint32_t byte_to_character(uint8_t byte) {
    if (byte <= 0x20) return 0x100u + byte;
    if (byte >= 0x7f && byte <= 0xa0) return 0x100u + 0x21 + (byte - 0x7fu);
    if (byte == 0xad) return 0x100u + 0x21 + 0x22;
    return byte;
}

int character_to_byte(uint32_t code) {
    if (code > 0x143) return -1;
    if (code == 0x143) return 0xad;
    if (code >= 0x121) return (int)(code - 0x121 + 0x7f);
    if (code >= 0x100) return (int)(code - 0x100);
    return byte_to_character((uint8_t)code) == code ? (int)code : -1;
}

void *text_grow(void *items, size_t needed, size_t *capacity, size_t item_bytes) {
    if (needed <= *capacity) return items;
    size_t wanted = *capacity < 16 ? 16 : *capacity * 2;
    if (wanted < needed) wanted = needed;
    VERIFY(wanted <= SIZE_MAX / 2 / item_bytes);
    *capacity = wanted;
    return mem_realloc(items, wanted * item_bytes);
}

void text_append(struct text_buffer *buffer, const char *text, size_t bytes) {
    if (bytes == 0) return;
    buffer->data = text_grow(buffer->data, buffer->bytes + bytes, &buffer->capacity, 1);
    memcpy(buffer->data + buffer->bytes, text, bytes);
    buffer->bytes += bytes;
}

void text_append_character(struct text_buffer *buffer, uint32_t code) {
    char text[4];
    text_append(buffer, text, utf8_put(code, text));
}

void id_append(struct id_list *list, int32_t id) {
    list->ids = text_grow(list->ids, list->count + 1, &list->capacity, sizeof *list->ids);
    list->ids[list->count++] = id;
}

void span_append(struct span_list *list, struct span span) {
    list->items = text_grow(list->items, list->count + 1, &list->capacity, sizeof *list->items);
    list->items[list->count++] = span;
}
