// SHA-256 against the examples of FIPS 180-4 (NIST's "SHA256.pdf" and the CAVP short messages), and
// against itself when the same bytes come in other pieces.
#include "base/sha256.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void hash_pieces(const void *data, size_t bytes, size_t piece, char hex[65]) {
    struct sha256 hash;
    sha256_init(&hash);
    for (size_t at = 0; at < bytes; at += piece) {
        size_t part = bytes - at < piece ? bytes - at : piece;
        sha256_update(&hash, (const char *)data + at, part);
    }
    sha256_hex(&hash, hex);
}

static const struct {
    const char *text, *hex;
} examples[] = {
    {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
    {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
    // 56 bytes: the length no longer fits in the first block
    {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
     "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
    {"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmno"
     "ijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu",
     "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"},
};

static void fips_examples(void **state) {
    char hex[65];
    for (size_t i = 0; i < sizeof examples / sizeof *examples; i++) {
        hash_pieces(examples[i].text, strlen(examples[i].text), 1000, hex);
        assert_string_equal(hex, examples[i].hex);
    }
}

static void million_letters(void **state) {
    enum { COUNT = 1000000 };
    char *letters = malloc(COUNT), hex[65];
    assert_non_null(letters);
    memset(letters, 'a', COUNT);
    static const size_t pieces[] = {COUNT, 1, 63, 64, 65, 1000};
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
        hash_pieces(letters, COUNT, pieces[i], hex);
        assert_string_equal(hex,
                            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    }
    free(letters);
}

// Every length around the block's edges, in every piece size: catches a lost partial block.
static void pieces_do_not_matter(void **state) {
    uint8_t data[200];
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)(i * 7 + 3);
    for (size_t length = 0; length <= sizeof data; length++) {
        char whole[65], parts[65];
        hash_pieces(data, length, sizeof data, whole);
        for (size_t piece = 1; piece <= 70; piece++) {
            hash_pieces(data, length, piece, parts);
            assert_string_equal(parts, whole);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fips_examples),
        cmocka_unit_test(million_letters),
        cmocka_unit_test(pieces_do_not_matter),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
