// The vocabulary: token texts by id and ids by text, for the model's own tokens and for added
// tokens. Filled at load, then read-only. It refuses two texts for one id and two ids for one text.
#include "server/text/text_internal.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdlib.h>
#include <string.h>

enum { MAP_SLOTS_MIN = 1024 };

static uint64_t hash_text(const char *text, size_t bytes) { // FNV-1a
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < bytes; i++) hash = (hash ^ (unsigned char)text[i]) * 0x100000001b3u;
    return hash ^ hash >> 29;
}

static void map_init(struct token_map *map, size_t slots) {
    map->slots = mem_alloc(slots * sizeof *map->slots);
    memset(map->slots, 0xff, slots * sizeof *map->slots);
    map->mask = slots - 1;
    map->count = 0;
}

// The slot that holds the text, or the free one where it belongs.
static int32_t *map_slot(const struct token_map *map, const struct token *tokens,
                         const char *text, size_t bytes) {
    for (size_t at = hash_text(text, bytes);; at++) {
        int32_t *slot = &map->slots[at & map->mask];
        if (*slot < 0) return slot;
        const struct token *token = &tokens[*slot];
        if (token->bytes == bytes && memcmp(token->text, text, bytes) == 0) return slot;
    }
}

static void map_insert(struct token_map *map, const struct token *tokens, int32_t id) {
    if ((map->count + 1) * 2 > map->mask) {
        struct token_map larger;
        map_init(&larger, (map->mask + 1) * 2);
        for (size_t i = 0; i <= map->mask; i++)
            if (map->slots[i] >= 0) map_insert(&larger, tokens, map->slots[i]);
        free(map->slots);
        *map = larger;
    }
    *map_slot(map, tokens, tokens[id].text, tokens[id].bytes) = id;
    map->count++;
}

void vocabulary_init(struct vocabulary *vocabulary, int id_max) {
    *vocabulary = (struct vocabulary){.id_max = id_max, .arena = arena_create()};
    map_init(&vocabulary->model, MAP_SLOTS_MIN);
    map_init(&vocabulary->added, MAP_SLOTS_MIN);
}

void vocabulary_deinit(struct vocabulary *vocabulary) {
    free(vocabulary->tokens);
    free(vocabulary->model.slots);
    free(vocabulary->added.slots);
    arena_destroy(vocabulary->arena);
}

int32_t vocabulary_find_model(const struct vocabulary *vocabulary, const char *text,
                              size_t bytes) {
    return *map_slot(&vocabulary->model, vocabulary->tokens, text, bytes);
}

int32_t vocabulary_find_added(const struct vocabulary *vocabulary, const char *text,
                              size_t bytes) {
    return *map_slot(&vocabulary->added, vocabulary->tokens, text, bytes);
}

const struct token *vocabulary_token(const struct vocabulary *vocabulary, int32_t id) {
    if (id < 0 || id >= vocabulary->id_count || vocabulary->tokens[id].text == NULL) return NULL;
    return &vocabulary->tokens[id];
}

// The entry for a new or an equal token; NULL when another text has the id.
static struct token *claim(struct vocabulary *vocabulary, const char *text, size_t bytes,
                           int32_t id) {
    VERIFY(id >= 0 && id < vocabulary->id_max);
    if (id >= vocabulary->id_count) {
        size_t old = vocabulary->capacity;
        vocabulary->tokens = text_grow(vocabulary->tokens, (size_t)id + 1, &vocabulary->capacity,
                                       sizeof *vocabulary->tokens);
        if (vocabulary->capacity > old)
            memset(vocabulary->tokens + old, 0,
                   (vocabulary->capacity - old) * sizeof *vocabulary->tokens);
        vocabulary->id_count = id + 1;
    }
    struct token *token = &vocabulary->tokens[id];
    if (token->text != NULL)
        return token->bytes == bytes && memcmp(token->text, text, bytes) == 0 ? token : NULL;
    token->text = arena_strndup(vocabulary->arena, text, bytes);
    token->bytes = bytes;
    return token;
}

enum status vocabulary_add_model(struct vocabulary *vocabulary, const char *text, size_t bytes,
                                 int32_t id, struct error *err) {
    struct token *token = claim(vocabulary, text, bytes, id);
    if (token == NULL)
        return error_set(err, STATUS_INVALID, "id %d belongs to \"%.60s\" and to \"%.60s\"", id,
                         vocabulary->tokens[id].text, text);
    VERIFY(!token->model);
    token->model = true;
    map_insert(&vocabulary->model, vocabulary->tokens, id);
    return STATUS_OK;
}

enum status vocabulary_add_added(struct vocabulary *vocabulary, const char *text, size_t bytes,
                                 int32_t id, bool special, struct error *err) {
    int32_t earlier = vocabulary_find_added(vocabulary, text, bytes);
    if (earlier < 0) earlier = vocabulary_find_model(vocabulary, text, bytes);
    if (earlier >= 0 && earlier != id)
        return error_set(err, STATUS_INVALID,
                         "added token \"%.60s\" has id %d here and id %d elsewhere", text, id,
                         earlier);
    struct token *token = claim(vocabulary, text, bytes, id);
    if (token == NULL)
        return error_set(err, STATUS_INVALID,
                         "added token \"%.60s\" has id %d, which belongs to \"%.60s\"", text, id,
                         vocabulary->tokens[id].text);
    if (!token->added) map_insert(&vocabulary->added, vocabulary->tokens, id);
    token->added = true;
    token->special = token->special || special;
    return STATUS_OK;
}
