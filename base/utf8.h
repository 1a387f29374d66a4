// Well-formedness of UTF-8 (RFC 3629: no overlong forms, no surrogates, nothing past U+10FFFF).
#ifndef LORAD_BASE_UTF8_H
#define LORAD_BASE_UTF8_H

// Length in bytes (1 to 4) of the well-formed character at `s` (NUL-terminated), or 0.
int utf8_char_bytes(const char *s);

// Replaces, in place, each byte that belongs to no well-formed character by '?'.
void utf8_replace_invalid(char *text);

#endif
