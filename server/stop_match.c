// The automata of stop_match.h.
#include "server/stop_match.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdlib.h>
#include <string.h>

// The longest beginning that ends with `byte`, given the longest before it.
static int advance(const struct stop_string *string, int matched, char byte) {
    while (matched > 0 && string->text[matched] != byte) matched = string->border[matched - 1];
    return matched + (string->text[matched] == byte);
}

void stop_match_init(struct stop_match *match, char *const *strings, int count) {
    VERIFY_OP(count, <=, STOP_STRINGS_MAX);
    *match = (struct stop_match){0};
    for (int i = 0; i < count; i++) {
        size_t bytes = strlen(strings[i]);
        if (bytes == 0 || bytes > INT32_MAX) continue;
        struct stop_string *string = &match->string[match->count++];
        string->text = strings[i];
        string->bytes = (int)bytes;
        string->border = mem_zalloc(bytes, sizeof *string->border);
        for (int at = 1; at < string->bytes; at++)
            string->border[at] = advance(string, string->border[at - 1], string->text[at]);
    }
}

void stop_match_deinit(struct stop_match *match) {
    for (int i = 0; i < match->count; i++) free(match->string[i].border);
    match->count = 0;
}

int stop_match_push(struct stop_match *match, char byte) {
    int longest = 0;
    for (int i = 0; i < match->count; i++) {
        struct stop_string *string = &match->string[i];
        VERIFY_OP(string->matched, <, string->bytes);
        string->matched = advance(string, string->matched, byte);
        if (string->matched == string->bytes && string->bytes > longest) longest = string->bytes;
    }
    return longest;
}

int stop_match_held(const struct stop_match *match) {
    int held = 0;
    for (int i = 0; i < match->count; i++)
        if (match->string[i].matched > held) held = match->string[i].matched;
    return held;
}
