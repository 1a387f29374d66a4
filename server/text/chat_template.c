// See chat_template.h: loading, and one rendering.
#include "server/text/template_internal.h"

#include "base/file.h"

#include <stdlib.h>
#include <string.h>

enum { FILE_BYTES_MAX = 16 << 20, SOURCE_BYTES_MAX = 1 << 20 };

struct chat_template {
    struct arena *arena; // of the tree
    json_t *literals;    // array: the tree's
    json_t *tokens;      // bos_token and the like, by name
    const struct node *root;
};

enum status chat_template_create(const char *source, size_t bytes, struct chat_template **out,
                                 struct error *err) {
    *out = NULL;
    if (bytes > SOURCE_BYTES_MAX)
        return error_set(err, STATUS_TOO_LARGE, "the chat template is above 1 MiB");
    struct error own = {0};
    struct chat_template *template = mem_zalloc(1, sizeof *template);
    template->arena = arena_create();
    template->literals = json_array();
    template->tokens = json_object();
    struct template_token *tokens = NULL;
    enum status status = template_lex(template->arena, source, bytes, &tokens, &own);
    if (status == STATUS_OK) {
        struct parser parser = {.arena = template->arena, .token = tokens,
                                .literals = template->literals, .err = &own};
        template->root = parse_template(&parser);
        status = template->root ? STATUS_OK : own.status;
    }
    if (status == STATUS_OK) {
        *out = template;
        return STATUS_OK;
    }
    chat_template_destroy(template);
    return error_set(err, status, "%s", own.text);
}

void chat_template_destroy(struct chat_template *template) {
    if (!template) return;
    json_decref(template->literals);
    json_decref(template->tokens);
    arena_destroy(template->arena);
    free(template);
}

// ------------------------------------------------------------------ a model's folder

// "</s>", or {"content": "</s>", ...}.
static const json_t *token_text(const json_t *token) {
    if (json_is_object(token)) token = json_object_get(token, "content");
    return json_is_string(token) ? token : NULL;
}

// "chat_template" is the source, or a list of {name, template}; the default is one called so.
static const json_t *configured_source(const json_t *config) {
    const json_t *value = json_object_get(config, "chat_template"), *one;
    if (!json_is_array(value)) return json_is_string(value) ? value : NULL;
    size_t i;
    json_array_foreach((json_t *)value, i, one) {
        const char *name = json_string_value(json_object_get(one, "name"));
        const json_t *source = json_object_get(one, "template");
        if (name && strcmp(name, "default") == 0 && json_is_string(source)) return source;
    }
    return NULL;
}

static enum status config_read(const char *folder, json_t **config, struct error *err) {
    char *path = path_join(folder, "tokenizer_config.json"), *data;
    size_t bytes;
    json_error_t where;
    enum status status = file_read_all(path, FILE_BYTES_MAX, &data, &bytes, err);
    if (status == STATUS_OK) {
        *config = json_loadb(data, bytes, JSON_REJECT_DUPLICATES, &where);
        free(data);
        if (!json_is_object(*config))
            status = error_set(err, STATUS_INVALID, "%s is no JSON object: %.100s (line %d)", path,
                               where.text, where.line);
    }
    free(path);
    return status;
}

static enum status create_for(const json_t *config, const char *source, size_t bytes,
                              struct chat_template **out, struct error *err) {
    static const char *const names[] = {"bos_token", "eos_token", "unk_token", "pad_token"};
    enum status status = chat_template_create(source, bytes, out, err);
    for (size_t i = 0; status == STATUS_OK && i < sizeof names / sizeof *names; i++) {
        const json_t *token = token_text(json_object_get(config, names[i]));
        if (token) json_object_set((*out)->tokens, names[i], (json_t *)token);
    }
    return status;
}

enum status chat_template_load(const char *folder, struct chat_template **out, struct error *err) {
    *out = NULL;
    json_t *config = NULL;
    char *path = path_join(folder, "chat_template.jinja"), *data = NULL;
    size_t bytes = 0;
    enum status file = file_read_all(path, SOURCE_BYTES_MAX, &data, &bytes, err);
    enum status status = config_read(folder, &config, file == STATUS_OK ? NULL : err);
    const json_t *source = status == STATUS_OK ? configured_source(config) : NULL;
    if (file == STATUS_OK) status = create_for(config, data, bytes, out, err);
    else if (source)
        status = create_for(config, json_string_value(source), json_string_length(source), out, err);
    else if (status == STATUS_OK)
        status = error_set(err, STATUS_NOT_FOUND, "the model has no chat template");
    json_decref(config);
    free(data);
    free(path);
    return status;
}

// ------------------------------------------------------------------ rendering

enum status chat_template_render(const struct chat_template *template, const json_t *variables,
                                 char **text, size_t *bytes, struct error *err) {
    struct render r = {.kept = json_array(), .err = err};
    // The template's own globals, then names that it sets at its top: both are in scope 0.
    r.scopes[r.scope_count++] = json_copy(template->tokens);
    json_object_update(r.scopes[0], (json_t *)variables);
    render_block(&r, template->root);
    while (r.scope_count > 0) json_decref(r.scopes[--r.scope_count]);
    json_decref(r.kept);
    *text = NULL;
    if (r.failed) {
        free(r.output.data);
        return STATUS_INVALID;
    }
    text_append(&r.output, "", 1); // a NUL behind it
    *text = r.output.data;
    *bytes = r.output.bytes - 1;
    return STATUS_OK;
}
