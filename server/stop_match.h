// Finds the first of several stop strings in a text that arrives byte by byte, whatever the
// borders of the pieces (Knuth, Morris and Pratt: one automaton per string). Engine thread, but
// for creation and destruction. It knows no tokens and keeps no text.
#ifndef LORAD_SERVER_STOP_MATCH_H
#define LORAD_SERVER_STOP_MATCH_H

#include "server/request.h"

struct stop_match {
    int count;
    struct stop_string {
        const char *text; // borrowed
        int bytes;
        int matched; // length of its longest beginning that the text so far ends with
        int *border; // [bytes] longest proper border of each beginning; owned
    } string[STOP_STRINGS_MAX];
};

// Empty strings are left out: they would stop everywhere.
void stop_match_init(struct stop_match *match, char *const *strings, int count);
void stop_match_deinit(struct stop_match *match);

// Takes the next byte. Returns the length of the stop string that ends with it (the longest, when
// several do), or 0. The string that ends first in the text wins; after a match, only deinit.
int stop_match_push(struct stop_match *match, char byte);

// How many of the last bytes may be the beginning of a stop string.
int stop_match_held(const struct stop_match *match);

#endif
