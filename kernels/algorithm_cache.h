// Which algorithm of a matmul library a shape runs with. All are kept in memory; those that were
// chosen by measurement in a file as well, one for each device, library version and type, so that the
// next start need not measure again, and gives the same bits.
//
// The file is text: a line that says whose it is, then "out in tokens" and the algorithm in hex, a
// line each. Lines are appended whole; what is no such line is passed over. A file of someone else, or
// none that can be written: the cache does without. One thread at a time.
#ifndef LORAD_KERNELS_ALGORITHM_CACHE_H
#define LORAD_KERNELS_ALGORITHM_CACHE_H

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { ALGORITHM_BYTES = 64 };

struct algorithm {
    int out, in, tokens;
    unsigned char bytes[ALGORITHM_BYTES]; // the library's own form
};

struct algorithm_cache;

// `folder`: made where it is missing; NULL: in memory alone. `owner`: a line of text.
struct algorithm_cache *algorithm_cache_open(const char *folder, const char *owner);
void algorithm_cache_close(struct algorithm_cache *cache);

// NULL: none is known. Valid until the next add.
const struct algorithm *algorithm_cache_find(const struct algorithm_cache *cache, int out, int in,
                                             int tokens);
// Replaces what there is for the shape. `measured`: into the file, too.
void algorithm_cache_add(struct algorithm_cache *cache, const struct algorithm *algorithm,
                         bool measured);

// Where caches lie: $LORAD_CACHE_DIR, else lorad in $XDG_CACHE_HOME or ~/.cache; NULL: nowhere.
// malloc'd.
char *algorithm_cache_folder(void);

#ifdef __cplusplus
}
#endif
#endif
