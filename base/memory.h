// Host memory: an allocator that never returns NULL, and an arena with one lifetime.
//
// Host malloc failure aborts in one place (mem_fail): lorad bounds its memory by options, so that
// running out of host memory is a misconfiguration, not a state that requests can handle.
#ifndef LORAD_BASE_MEMORY_H
#define LORAD_BASE_MEMORY_H

#include <stddef.h>

// Like malloc/calloc/realloc/strdup but abort on failure. Released with free().
void *mem_alloc(size_t bytes);
void *mem_zalloc(size_t count, size_t size); // zeroed; aborts when count * size wraps
void *mem_realloc(void *old, size_t bytes);
char *mem_strdup(const char *text);
char *mem_strndup(const char *text, size_t bytes); // copies exactly `bytes`, adds a NUL

// 64-byte aligned, for tensors. Released with free().
void *mem_alloc_aligned(size_t bytes);

// Everything of one lifetime: allocations are carved from growing blocks and freed together.
struct arena;
struct arena *arena_create(void);
void arena_destroy(struct arena *arena); // NULL is allowed
// 16-byte aligned, zeroed; valid until arena_destroy.
void *arena_alloc(struct arena *arena, size_t bytes);
char *arena_strndup(struct arena *arena, const char *text, size_t bytes);

#endif
