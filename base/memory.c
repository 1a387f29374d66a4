// Host allocation that aborts in one place, and the arena: a list of blocks freed together.
#include "base/memory.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Noreturn void mem_fail(size_t bytes) {
    fprintf(stderr, "lorad: out of host memory (%zu bytes wanted)\n", bytes);
    abort();
}

void *mem_alloc(size_t bytes) {
    void *memory = malloc(bytes ? bytes : 1);
    if (!memory) mem_fail(bytes);
    return memory;
}

void *mem_zalloc(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size ? size : 1);
    if (!memory) mem_fail(count * size);
    return memory;
}

void *mem_realloc(void *old, size_t bytes) {
    void *memory = realloc(old, bytes ? bytes : 1);
    if (!memory) mem_fail(bytes);
    return memory;
}

char *mem_strndup(const char *text, size_t bytes) {
    char *copy = mem_alloc(bytes + 1);
    memcpy(copy, text, bytes);
    copy[bytes] = 0;
    return copy;
}

char *mem_strdup(const char *text) {
    return mem_strndup(text, strlen(text));
}

void *mem_alloc_aligned(size_t bytes) {
    size_t rounded = (bytes + 63) & ~(size_t)63;
    void *memory = rounded >= bytes ? aligned_alloc(64, rounded ? rounded : 64) : NULL;
    if (!memory) mem_fail(bytes);
    return memory;
}

enum { ARENA_BLOCK_BYTES = 16384 };

struct arena_block {
    struct arena_block *next;
    size_t used, size;
    _Alignas(16) unsigned char data[];
};

struct arena {
    struct arena_block *head;
};

struct arena *arena_create(void) {
    return mem_zalloc(1, sizeof(struct arena));
}

void arena_destroy(struct arena *arena) {
    if (!arena) return;
    for (struct arena_block *block = arena->head, *next; block; block = next) {
        next = block->next;
        free(block);
    }
    free(arena);
}

void *arena_alloc(struct arena *arena, size_t bytes) {
    size_t rounded = (bytes + 15) & ~(size_t)15;
    if (rounded < bytes) mem_fail(bytes);
    struct arena_block *block = arena->head;
    if (!block || block->size - block->used < rounded) {
        size_t size = rounded > ARENA_BLOCK_BYTES ? rounded : ARENA_BLOCK_BYTES;
        block = mem_alloc(sizeof *block + size);
        *block = (struct arena_block){.next = arena->head, .size = size};
        arena->head = block;
    }
    void *memory = block->data + block->used;
    block->used += rounded;
    return memset(memory, 0, rounded);
}

char *arena_strndup(struct arena *arena, const char *text, size_t bytes) {
    char *copy = arena_alloc(arena, bytes + 1);
    memcpy(copy, text, bytes);
    return copy;
}
