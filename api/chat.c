// The messages of a chat -> the model's chat template -> token ids. What clients write never becomes a
// special token: their texts are guarded before they go into the template (tokenizer.h).
#include "api/completions_internal.h"

#include "base/memory.h"
#include "server/text/chat_template.h"
#include "server/text/tokenizer.h"

#include <stdlib.h>
#include <string.h>

enum { MESSAGES_MAX = 4096 };

enum status chat_read_numbers(struct builder *b) {
    struct completion *c = b->completion;
    struct sampling *s = &b->pattern->sampling;
    int64_t top = 0, most = 0;
    bool logprobs = false;
    enum status status = param_bool(b->root, "logprobs", &logprobs, b->err);
    if (!status) status = param_integer(b->root, "top_logprobs", 0, LOGPROBS_MAX, &top, b->err);
    if (!status)
        status = param_integer(b->root, "max_completion_tokens", 1, c->api->setup.context_max, &most,
                               b->err);
    if (status) return status;
    if (top > 0 && !logprobs)
        return refuse(b, "top_logprobs", "top_logprobs needs \"logprobs\": true");
    if (most > 0) s->max_tokens = (int)most;
    if (s->max_tokens > 0 && s->min_tokens > s->max_tokens)
        return refuse(b, "min_tokens", "min_tokens must not be larger than max_tokens");
    s->logprobs = c->logprobs = logprobs ? (int)top : -1;
    return STATUS_OK;
}

// ------------------------------------------------------------------ what clients wrote

// A copy in which every text is guarded.
static json_t *guarded(const struct tokenizer *tokenizer, const json_t *value) {
    size_t i;
    const char *key;
    json_t *one, *copy;
    if (json_is_string(value)) {
        size_t bytes;
        char *text = tokenizer_guard(tokenizer, json_string_value(value), json_string_length(value),
                                     &bytes);
        copy = json_stringn(text, bytes);
        free(text);
    } else if (json_is_array(value)) {
        copy = json_array();
        json_array_foreach(value, i, one) json_array_append_new(copy, guarded(tokenizer, one));
    } else if (json_is_object(value)) {
        copy = json_object();
        json_object_foreach((json_t *)value, key, one)
            json_object_set_new(copy, key, guarded(tokenizer, one));
    } else {
        copy = json_deep_copy(value);
    }
    return copy;
}

// A string, or parts of type text, which are joined by line breaks. NULL: neither.
static json_t *content_text(const json_t *content) {
    if (json_is_string(content)) return json_deep_copy(content);
    size_t i, bytes = 0;
    json_t *part;
    json_array_foreach(content, i, part) {
        const json_t *kind = json_object_get(part, "type"), *text = json_object_get(part, "text");
        if (!json_is_string(kind) || strcmp(json_string_value(kind), "text") != 0 ||
            !json_is_string(text))
            return NULL;
        bytes += json_string_length(text) + 1;
    }
    if (bytes == 0) return NULL; // no list, or an empty one
    char *joined = mem_alloc(bytes), *to = joined;
    json_array_foreach(content, i, part) {
        const json_t *text = json_object_get(part, "text");
        memcpy(to, json_string_value(text), json_string_length(text));
        to += json_string_length(text);
        *to++ = '\n';
    }
    json_t *text = json_stringn(joined, bytes - 1);
    free(joined);
    return text;
}

static bool is_role(const char *role) {
    static const char *const roles[] = {"system", "developer", "user", "assistant", "tool",
                                        "function"};
    for (size_t i = 0; i < sizeof roles / sizeof *roles; i++)
        if (strcmp(role, roles[i]) == 0) return true;
    return false;
}

static enum status add_message(struct builder *b, const json_t *message, json_t *to) {
    const char *role = NULL;
    if (!json_is_object(message))
        return refuse(b, "messages", "messages must hold objects with role and content");
    if (param_string(message, "role", 64, &role, b->err) || !role || !is_role(role))
        return refuse(b, "messages", "a message's role must be system, developer, user, "
                                     "assistant, tool or function");
    const json_t *calls = json_object_get(message, "tool_calls");
    if (calls && !json_is_null(calls) && json_array_size(calls) > 0)
        return error_set_param(b->err, STATUS_UNSUPPORTED, "messages", "tool_calls are not supported");
    const json_t *content = json_object_get(message, "content");
    bool none = (!content || json_is_null(content)) && strcmp(role, "assistant") == 0;
    json_t *text = none ? json_string("") : content_text(content);
    if (!text)
        return refuse(b, "messages", "a message's content must be a string, or a list of "
                                     "parts {\"type\": \"text\", \"text\": ...}");
    const struct tokenizer *tokenizer = b->completion->api->setup.tokenizer;
    json_t *copy = guarded(tokenizer, message);
    json_object_set_new(copy, "role", json_string(role));
    json_object_set_new(copy, "content", guarded(tokenizer, text));
    json_decref(text);
    json_array_append_new(to, copy);
    return STATUS_OK;
}

static enum status read_all(struct builder *b, json_t *to) {
    const json_t *messages = json_object_get(b->root, "messages");
    size_t count = json_array_size(messages);
    if (!json_is_array(messages) || count == 0 || count > MESSAGES_MAX)
        return refuse(b, "messages", "messages must be a list of 1 to 4096 messages");
    enum status status = STATUS_OK;
    for (size_t i = 0; i < count && !status; i++)
        status = add_message(b, json_array_get(messages, i), to);
    return status;
}

// ------------------------------------------------------------------ what the template makes of it

struct chat {
    json_t *variables; // object; owned
    bool continues;    // the last message is to be continued
    char *text;
    size_t bytes;
};

static enum status read_variables(struct builder *b, struct chat *chat) {
    bool prompts = true;
    json_t *messages = json_array(), *more = json_object_get(b->root, "chat_template_kwargs");
    json_object_set_new(chat->variables, "messages", messages);
    json_object_set_new(chat->variables, "tools", json_null());
    json_object_set_new(chat->variables, "documents", json_null());
    enum status status = read_all(b, messages);
    if (!status)
        status = param_bool(b->root, "continue_final_message", &chat->continues, b->err);
    prompts = !chat->continues;
    if (!status) status = param_bool(b->root, "add_generation_prompt", &prompts, b->err);
    if (status) return status;
    if (prompts && chat->continues)
        return refuse(b, "continue_final_message", "continue_final_message needs "
                                                   "\"add_generation_prompt\": false");
    if (more && !json_is_null(more) && !json_is_object(more))
        return refuse(b, "chat_template_kwargs", "chat_template_kwargs must be an object");
    if (json_is_object(more)) {
        json_t *copy = guarded(b->completion->api->setup.tokenizer, more);
        json_object_update_missing(chat->variables, copy);
        json_decref(copy);
    }
    json_object_set_new(chat->variables, "add_generation_prompt", json_boolean(prompts));
    return STATUS_OK;
}

// Cuts the text behind the last message's content.
static enum status cut_final(struct builder *b, struct chat *chat) {
    const json_t *messages = json_object_get(chat->variables, "messages");
    const json_t *last = json_array_get(messages, json_array_size(messages) - 1);
    const char *content = json_string_value(json_object_get(last, "content"));
    const char *end = content + strlen(content); // templates trim what they show
    while (*content == ' ' || *content == '\n' || *content == '\t') content++;
    while (end > content && (end[-1] == ' ' || end[-1] == '\n' || end[-1] == '\t')) end--;
    size_t bytes = (size_t)(end - content);
    for (size_t at = chat->bytes - bytes + 1; bytes > 0 && bytes <= chat->bytes && at-- > 0;)
        if (memcmp(chat->text + at, content, bytes) == 0) {
            chat->bytes = at + bytes;
            return STATUS_OK;
        }
    return refuse(b, "continue_final_message", "the chat template does not show the last "
                                               "message as it is: it cannot be continued");
}

static enum status add_choices(struct builder *b, const struct chat *chat) {
    struct completion *c = b->completion;
    struct token_list ids;
    enum status status = tokenizer_encode_guarded(c->api->setup.tokenizer, chat->text, chat->bytes,
                                                  &ids, b->err);
    if (status) return error_set_param(b->err, STATUS_INVALID, "messages", "%s", b->err->text);
    c->choices = mem_zalloc((size_t)c->n, sizeof *c->choices);
    if (ids.count == 0)
        status = refuse(b, "messages", "the chat template makes nothing of the messages");
    else status = builder_add_choices(b, &ids, NULL);
    free(ids.ids);
    // Where the client names no limit, the context is it.
    for (int i = 0; i < c->choice_count && b->pattern->sampling.max_tokens == 0; i++)
        c->choices[i].request->sampling.max_tokens =
            engine_output_room(c->api->engine, c->choices[i].request);
    return status;
}

enum status chat_read_messages(struct builder *b) {
    const struct api_setup *setup = &b->completion->api->setup;
    if (!setup->tokenizer || !setup->chat_template)
        return error_set_param(b->err, STATUS_UNSUPPORTED, "messages",
                               "this model has no chat template; use /v1/completions");
    struct chat chat = {.variables = json_object()};
    enum status status = read_variables(b, &chat);
    if (!status) {
        status = chat_template_render(setup->chat_template, chat.variables, &chat.text, &chat.bytes,
                                      b->err);
        if (status) (void)error_set_param(b->err, status, "messages", "%s", b->err->text);
    }
    if (!status && chat.continues) status = cut_final(b, &chat);
    if (!status) status = add_choices(b, &chat);
    json_decref(chat.variables);
    free(chat.text);
    return status;
}
