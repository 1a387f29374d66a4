// server/stop_match.h against a search that looks at the whole text every time.
#include "server/stop_match.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

struct end {
    int at, length; // after how many bytes, and of which string; at 0: never
};

static struct end push_all(char *const *strings, int count, const char *text) {
    struct stop_match match;
    stop_match_init(&match, strings, count);
    struct end end = {0};
    for (int i = 0; text[i] && !end.at; i++) {
        int length = stop_match_push(&match, text[i]);
        if (length) end = (struct end){i + 1, length};
    }
    stop_match_deinit(&match);
    return end;
}

static void table(void **state) {
    static const struct {
        const char *strings[STOP_STRINGS_MAX], *text;
        struct end end;
        const char *catches;
    } cases[] = {
        {{"b"}, "aab", {3, 1}, "a single byte"},
        {{"abc"}, "ababc", {5, 3}, "a beginning that fails and overlaps the match"},
        {{"aab"}, "aaaab", {5, 3}, "borders shorter than the match so far"},
        {{"abab"}, "abaabab", {7, 4}, "falling back by a border"},
        {{"xyz", "y"}, "axyz", {3, 1}, "the one that ends first wins, though another began first"},
        {{"yz", "xyz"}, "axyz", {4, 3}, "the longest of those that end together"},
        {{"", "q"}, "abc", {0, 0}, "an empty string matches nothing"},
        {{"abcd"}, "abcabcabc", {0, 0}, "beginnings alone"},
        {{"\xc3\xa9"}, "caf\xc3\xa8 \xc3\xa9", {8, 2}, "bytes of a character in common"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int count = 0;
        while (count < STOP_STRINGS_MAX && cases[i].strings[count]) count++;
        struct end end = push_all((char *const *)cases[i].strings, count, cases[i].text);
        if (end.at != cases[i].end.at || end.length != cases[i].end.length)
            fail_msg("%s: ended at %d with %d bytes", cases[i].catches, end.at, end.length);
    }
}

// Does text[0..end) end with the first `length` bytes of string?
static bool ends_with(const char *text, int end, const char *string, int length) {
    return length <= end && memcmp(text + end - length, string, (size_t)length) == 0;
}

// Catches: any difference from the definition, for the match and for what must be held back.
static void agrees_with_brute_force(void **state) {
    uint32_t seed = 12345;
    for (int round = 0; round < 3000; round++) {
        char strings[3][8], *list[3], text[41];
        for (int i = 0; i < 3; i++) {
            seed = seed * 1664525 + 1013904223;
            int length = 1 + (int)(seed >> 16) % 6;
            for (int j = 0; j < length; j++) {
                seed = seed * 1664525 + 1013904223;
                strings[i][j] = (char)('a' + (seed >> 20) % 2);
            }
            strings[i][length] = 0;
            list[i] = strings[i];
        }
        for (int j = 0; j < 40; j++) {
            seed = seed * 1664525 + 1013904223;
            text[j] = (char)('a' + (seed >> 24) % 3 % 2);
        }
        text[40] = 0;
        struct stop_match match;
        stop_match_init(&match, list, 3);
        for (int end = 1; end <= 40; end++) {
            int whole = 0, held = 0;
            for (int i = 0; i < 3; i++)
                for (int length = 1; length <= (int)strlen(list[i]); length++)
                    if (ends_with(text, end, list[i], length)) {
                        bool all = length == (int)strlen(list[i]);
                        if (all && length > whole) whole = length;
                        if (!all && length > held) held = length;
                    }
            assert_int_equal(stop_match_push(&match, text[end - 1]), whole);
            if (whole) break;
            assert_int_equal(stop_match_held(&match), held);
        }
        stop_match_deinit(&match);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(table),
        cmocka_unit_test(agrees_with_brute_force),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
