// What a chat's answer has where a completion's has text: a message or deltas, and log-probabilities
// token by token with their bytes.
#include "api/completions_internal.h"

#include <stdlib.h>

json_t *chat_message_json(json_t *text) {
    return json_pack("{s:s,s:o}", "role", "assistant", "content", text);
}

json_t *chat_delta_json(json_t *text, bool begins) {
    if (begins) return chat_message_json(text);
    if (json_string_length(text) > 0) return json_pack("{s:o}", "content", text);
    json_decref(text);
    return json_object();
}

static json_t *token_json(const struct completion *c, int32_t id, float logprob) {
    size_t bytes;
    char *text = completion_token_text(c, id, &bytes);
    json_t *list = json_array();
    for (size_t i = 0; i < bytes; i++)
        json_array_append_new(list, json_integer((unsigned char)text[i]));
    json_t *json = json_pack("{s:o,s:o,s:o}", "token", completion_text_json(text, bytes), "logprob",
                             completion_logprob_json(logprob), "bytes", list);
    free(text);
    return json;
}

void chat_add_logprobs(const struct completion *c, struct choice *choice,
                       const struct engine_event *event) {
    if (!choice->content_logprobs) choice->content_logprobs = json_array();
    json_t *token = token_json(c, event->token, event->logprob), *top = json_array();
    for (int i = 0; i < event->top_count && i < c->logprobs; i++)
        json_array_append_new(top, token_json(c, event->top[i].id, event->top[i].logprob));
    json_object_set_new(token, "top_logprobs", top);
    json_array_append_new(choice->content_logprobs, token);
}

json_t *chat_take_logprobs(struct choice *choice) {
    if (!choice->content_logprobs) return json_null();
    json_t *json = json_pack("{s:o}", "content", choice->content_logprobs);
    choice->content_logprobs = NULL;
    return json;
}
