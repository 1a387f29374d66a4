// SHA-256 (FIPS 180-4), for identity by content; not for secrets. Over OpenSSL's libcrypto, which
// uses the processor's instructions for it.
#ifndef LORAD_BASE_SHA256_H
#define LORAD_BASE_SHA256_H

#include <stddef.h>
#include <stdint.h>

struct sha256 {
    void *context; // from init to hex or bytes
};

void sha256_init(struct sha256 *hash);
void sha256_update(struct sha256 *hash, const void *data, size_t bytes);
// End the hash: 32 bytes, or 64 lower-case hex digits and a NUL.
void sha256_bytes(struct sha256 *hash, uint8_t bytes[32]);
void sha256_hex(struct sha256 *hash, char hex[65]);

#endif
