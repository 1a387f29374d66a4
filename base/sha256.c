// sha256.h over OpenSSL's EVP interface. It fails only when memory runs out, or when libcrypto was
// built without SHA-256.
#include "base/sha256.h"

#include "base/verify.h"

#include <openssl/evp.h>

void sha256_init(struct sha256 *hash) {
    hash->context = EVP_MD_CTX_new();
    VERIFY(hash->context && EVP_DigestInit_ex(hash->context, EVP_sha256(), NULL) == 1);
}

void sha256_update(struct sha256 *hash, const void *data, size_t bytes) {
    VERIFY(EVP_DigestUpdate(hash->context, data, bytes) == 1);
}

void sha256_bytes(struct sha256 *hash, uint8_t bytes[32]) {
    VERIFY(EVP_DigestFinal_ex(hash->context, bytes, NULL) == 1);
    EVP_MD_CTX_free(hash->context);
    hash->context = NULL;
}

void sha256_hex(struct sha256 *hash, char hex[65]) {
    static const char digits[] = "0123456789abcdef";
    uint8_t bytes[32];
    sha256_bytes(hash, bytes);
    for (int i = 0; i < 32; i++) {
        hex[2 * i] = digits[bytes[i] >> 4];
        hex[2 * i + 1] = digits[bytes[i] & 15];
    }
    hex[64] = 0;
}
