// Post-processing: the ids that a tokenizer puts before and after every text (BOS, EOS). Read at
// load; afterwards two constant lists. It knows TemplateProcessing for one sequence and the
// ByteLevel processor, which changes no ids; templates for pairs of texts are not read.
#include "server/text/text_internal.h"

#include <stdlib.h>
#include <string.h>

struct loading {
    struct post_template *post;
    int id_max;
};

// Appends the ids of one {"SpecialToken": {"id": NAME}} of the template.
static enum status special_token(const struct loading *loading, const json_t *template,
                                 const json_t *piece, struct id_list *out, struct error *err) {
    const json_t *name;
    enum status status = field_string(piece, "id", true, &name, err);
    if (status) return status;
    const json_t *entry = json_object_get(json_object_get(template, "special_tokens"),
                                          json_string_value(name));
    const json_t *ids = json_object_get(entry, "ids");
    if (!json_is_array(ids))
        return error_set(err, STATUS_INVALID, "special_tokens lacks the ids of \"%.60s\"",
                         json_string_value(name));
    for (size_t i = 0; i < json_array_size(ids); i++) {
        int32_t id;
        status = field_id(json_array_get(ids, i), loading->id_max, json_string_value(name), &id,
                          err);
        if (status) return status;
        id_append(out, id);
    }
    return STATUS_OK;
}

static void join(struct id_list *to, const struct id_list *from) {
    for (size_t i = 0; i < from->count; i++) id_append(to, from->ids[i]);
}

static enum status template_pieces(const struct loading *loading, const json_t *json,
                                   struct id_list *before, struct id_list *after,
                                   struct error *err) {
    const json_t *pieces = json_object_get(json, "single");
    if (!json_is_array(pieces))
        return error_set(err, STATUS_INVALID, "\"single\" must be an array of pieces");
    bool seen = false;
    for (size_t i = 0; i < json_array_size(pieces); i++) {
        const json_t *piece = json_array_get(pieces, i);
        const json_t *special = json_object_get(piece, "SpecialToken");
        const json_t *sequence = json_object_get(piece, "Sequence");
        if (special != NULL) {
            enum status status =
                special_token(loading, json, special, seen ? after : before, err);
            if (status) return status;
            continue;
        }
        const char *id = json_string_value(json_object_get(sequence, "id"));
        if (seen || id == NULL || strcmp(id, "A") != 0)
            return error_set(err, STATUS_UNSUPPORTED,
                             "\"single\" must hold special tokens and the sequence A once");
        seen = true;
    }
    if (!seen)
        return error_set(err, STATUS_UNSUPPORTED, "\"single\" lacks the sequence A");
    return STATUS_OK;
}

// A template wraps what the processors before it made.
static enum status add_component(void *owner, const char *type, const json_t *json,
                                 struct error *err) {
    const struct loading *loading = owner;
    if (strcmp(type, "ByteLevel") == 0) return STATUS_OK;
    if (strcmp(type, "TemplateProcessing") != 0) return STATUS_NOT_FOUND;
    struct id_list before = {0}, after = {0};
    enum status status = template_pieces(loading, json, &before, &after, err);
    if (status == STATUS_OK) {
        join(&before, &loading->post->before);
        join(&loading->post->after, &after);
        free(loading->post->before.ids);
        loading->post->before = before;
        before = (struct id_list){0};
    }
    free(before.ids);
    free(after.ids);
    return status;
}

enum status post_template_load(const json_t *json, int id_max, struct post_template *out,
                               struct error *err) {
    struct loading loading = {out, id_max};
    return components_load(json, "post_processor", "processors", add_component, &loading, err);
}

void post_template_deinit(struct post_template *post) {
    free(post->before.ids);
    free(post->after.ids);
}
