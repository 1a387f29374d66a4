// SHA-256 (FIPS 180-4), for identity by content; not for secrets.
#ifndef LORAD_BASE_SHA256_H
#define LORAD_BASE_SHA256_H

#include <stddef.h>
#include <stdint.h>

struct sha256 {
    uint32_t state[8];
    uint64_t bytes;
    uint8_t block[64];
};

void sha256_init(struct sha256 *hash);
void sha256_update(struct sha256 *hash, const void *data, size_t bytes);
// Ends the hash: 64 lower-case hex digits and a NUL.
void sha256_hex(struct sha256 *hash, char hex[65]);

#endif
