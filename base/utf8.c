// UTF-8 checks for text that lorad prints: error texts and log lines. Pure functions, any thread.
// Tokenizing has its own decoder; this file knows nothing of code points.
#include "base/utf8.h"

int utf8_char_bytes(const char *text) {
    const unsigned char *s = (const unsigned char *)text;
    if (s[0] < 0x80) return 1;
    if (s[0] < 0xc2 || s[0] > 0xf4) return 0;
    int length = s[0] >= 0xf0 ? 4 : s[0] >= 0xe0 ? 3 : 2;
    for (int i = 1; i < length; i++)
        if ((s[i] & 0xc0) != 0x80) return 0; // also ends at the NUL
    if (s[0] == 0xe0 && s[1] < 0xa0) return 0;
    if (s[0] == 0xed && s[1] > 0x9f) return 0;
    if (s[0] == 0xf0 && s[1] < 0x90) return 0;
    if (s[0] == 0xf4 && s[1] > 0x8f) return 0;
    return length;
}

void utf8_replace_invalid(char *text) {
    for (char *s = text; *s;) {
        int length = utf8_char_bytes(s);
        if (length == 0) *s = '?';
        s += length ? length : 1;
    }
}
