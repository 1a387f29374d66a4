// WIDE before a function: besides the plain version the compiler makes one for AVX2, and the processor
// decides at start. For loops over many elements that are no backend's: conversions while loading.
#ifndef LORAD_BASE_WIDE_H
#define LORAD_BASE_WIDE_H

// Sanitizers start later than the resolvers that choose.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

#endif
