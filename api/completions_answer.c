// POST /v1/completions and /v1/chat/completions, the way out: engine events -> SSE chunks, or one
// JSON answer at the end.
// Loop thread. A failed choice fails the whole answer: the others are cancelled, and the client
// gets one error (before the first byte an HTTP status, afterwards one SSE error event).
#include "api/completions_internal.h"

#include "base/memory.h"
#include "base/verify.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

json_t *completion_text_json(const char *text, size_t bytes) {
    json_t *json = json_stringn(text ? text : "", text ? bytes : 0);
    return json ? json : json_string("\xef\xbf\xbd");
}

static void append_text(struct choice *choice, const char *text, size_t bytes) {
    if (choice->text_bytes + bytes + 1 > choice->text_room) {
        choice->text_room = 2 * (choice->text_bytes + bytes) + 64;
        choice->text = mem_realloc(choice->text, choice->text_room);
    }
    if (bytes) memcpy(choice->text + choice->text_bytes, text, bytes);
    choice->text_bytes += bytes;
}

// ------------------------------------------------------------------ log-probabilities

// JSON has no infinity; OpenAI's servers write -9999 for a token that could not come.
json_t *completion_logprob_json(float logprob) {
    return json_real(isfinite(logprob) ? (double)logprob : -9999.0);
}

char *completion_token_text(const struct completion *c, int32_t id, size_t *bytes) {
    if (c->api->setup.tokenizer) return tokenizer_token_text(c->api->setup.tokenizer, id, bytes);
    char text[16];
    *bytes = (size_t)snprintf(text, sizeof text, "%d", id);
    return mem_strdup(text);
}

static size_t characters(const char *text, size_t bytes) {
    size_t count = 0;
    for (size_t i = 0; i < bytes; i++) count += ((unsigned char)text[i] & 0xc0) != 0x80;
    return count;
}

// `event` NULL: the first prompt token, which has no log-probability.
static void add_logprobs(const struct completion *c, struct choice *choice, int32_t token,
                         const struct engine_event *event) {
    if (!choice->tokens) {
        choice->tokens = json_array();
        choice->token_logprobs = json_array();
        choice->top_logprobs = json_array();
        choice->text_offset = json_array();
    }
    size_t bytes;
    char *text = completion_token_text(c, token, &bytes);
    json_array_append_new(choice->tokens, completion_text_json(text, bytes));
    json_array_append_new(choice->text_offset, json_integer((json_int_t)choice->offset));
    choice->offset += characters(text, bytes);
    json_array_append_new(choice->token_logprobs, event ? completion_logprob_json(event->logprob)
                                                        : json_null());
    json_t *top = event ? json_object() : json_null();
    for (int i = 0; event && i < event->top_count && i < c->logprobs; i++) {
        size_t other_bytes;
        char *other = completion_token_text(c, event->top[i].id, &other_bytes);
        json_t *name = completion_text_json(other, other_bytes); // two ids may show the same: best first
        if (!json_object_get(top, json_string_value(name)))
            json_object_set_new(top, json_string_value(name),
                                completion_logprob_json(event->top[i].logprob));
        json_decref(name);
        free(other);
    }
    json_array_append_new(choice->top_logprobs, top);
    free(text);
}

static json_t *take_logprobs(const struct completion *c, struct choice *choice) {
    if (c->chat) return chat_take_logprobs(choice);
    if (!choice->tokens) return json_null();
    json_t *json = json_pack("{s:o,s:o,s:o,s:o}", "text_offset", choice->text_offset,
                             "token_logprobs", choice->token_logprobs, "tokens", choice->tokens,
                             "top_logprobs", choice->top_logprobs);
    choice->tokens = choice->token_logprobs = choice->top_logprobs = choice->text_offset = NULL;
    return json;
}

// ------------------------------------------------------------------ chunks and the whole answer

static json_t *usage_json(const struct completion *c) {
    int prompt = 0, generated = 0, cached = 0;
    for (int i = 0; i < c->choice_count; i++) {
        if (i % c->n == 0) prompt += c->choices[i].prompt_tokens;
        if (i % c->n == 0) cached += c->choices[i].cached_tokens;
        generated += c->choices[i].completion_tokens;
    }
    return json_pack("{s:i,s:i,s:i,s:{s:i}}", "prompt_tokens", prompt, "completion_tokens",
                     generated, "total_tokens", prompt + generated, "prompt_tokens_details",
                     "cached_tokens", cached);
}

static json_t *finish_json(enum finish_reason finish) {
    static const char *const names[] = {
        [FINISH_STOP] = "stop", [FINISH_LENGTH] = "length", [FINISH_ABORT] = "abort"};
    return finish == FINISH_NONE ? json_null() : json_string(names[finish]);
}

static json_t *choice_json(const struct completion *c, struct choice *choice, int index,
                           json_t *text) {
    const char *name = !c->chat ? "text" : c->stream ? "delta" : "message";
    json_t *json = json_pack("{s:i,s:o,s:o,s:o}", "index", index, name, text, "logprobs",
                             take_logprobs(c, choice), "finish_reason",
                             finish_json(choice->finish));
    if (c->return_token_ids) {
        json_object_set_new(json, "token_ids",
                            choice->token_ids ? choice->token_ids : json_array());
        choice->token_ids = NULL;
    }
    return json;
}

static json_t *envelope(const struct completion *c, json_t *choices) {
    const char *object = !c->chat ? "text_completion"
                                  : c->stream ? "chat.completion.chunk" : "chat.completion";
    return json_pack("{s:s,s:s,s:I,s:s,s:o}", "id", c->id, "object", object, "created",
                     (json_int_t)c->created, "model", c->model, "choices", choices);
}

static void send_chunk(struct completion *c, struct choice *choice, int index) {
    json_t *text = completion_text_json(choice->text, choice->text_bytes);
    if (c->chat) text = chat_delta_json(text, !choice->sent);
    choice->sent = true;
    choice->text_bytes = 0;
    json_t *chunk = envelope(c, json_pack("[o]", choice_json(c, choice, index, text)));
    if (c->continuous_usage) json_object_set_new(chunk, "usage", usage_json(c));
    else if (c->include_usage) json_object_set_new(chunk, "usage", json_null());
    respond_stream_data(c->connection, chunk);
}

static void answer_whole(struct completion *c) {
    json_t *choices = json_array();
    for (int i = 0; i < c->choice_count; i++) {
        struct choice *choice = &c->choices[i];
        json_t *text = completion_text_json(choice->text, choice->text_bytes);
        if (c->chat) text = chat_message_json(text);
        json_array_append_new(choices, choice_json(c, choice, i, text));
    }
    json_t *answer = envelope(c, choices);
    json_object_set_new(answer, "usage", usage_json(c));
    respond_json(c->connection, 200, answer);
}

static void finish_answer(struct completion *c) {
    struct connection *connection = c->connection;
    if (!connection) return;
    connection->exchange = NULL;
    connection->gone = NULL;
    if (!c->stream) {
        if (c->err.status) respond_error(connection, &c->err);
        else answer_whole(c);
        return;
    }
    if (c->include_usage && !c->err.status) {
        json_t *last = envelope(c, json_array());
        json_object_set_new(last, "usage", usage_json(c));
        respond_stream_data(connection, last);
    }
    if (!connection->closing) respond_stream_end(connection);
}

// ------------------------------------------------------------------ events

static void cancel_all(struct completion *c) {
    if (c->cancelled) return;
    c->cancelled = true;
    for (int i = 0; c->submitted && i < c->choice_count; i++)
        if (c->choices[i].request) engine_cancel(c->api->engine, c->choices[i].request);
}

void completion_gone(void *completion) {
    struct completion *c = completion;
    c->connection = NULL;
    cancel_all(c);
}

static void fail(struct completion *c, const struct engine_event *event) {
    if (!c->err.status) (void)error_set(&c->err, event->error, "%s", event->error_text);
    cancel_all(c);
    if (!c->connection || !c->stream || c->error_sent) return;
    c->error_sent = true;
    respond_stream_data(c->connection, error_json(error_http_status(&c->err), c->err.param, NULL,
                                                  c->err.text));
}

// What stands before the first generated token: the echo.
static void begin_choice(struct completion *c, struct choice *choice) {
    if (choice->begun) return;
    choice->begun = true;
    if (c->echo && c->logprobs >= 0) add_logprobs(c, choice, choice->request->prompt[0], NULL);
    if (choice->prompt_text)
        append_text(choice, choice->prompt_text, strlen(choice->prompt_text));
}

static void take_event(struct completion *c, struct choice *choice, struct engine_event *event) {
    begin_choice(c, choice);
    choice->prompt_tokens = event->prompt_tokens;
    choice->completion_tokens = event->completion_tokens;
    choice->cached_tokens = event->cached_tokens;
    if (event->token >= 0) {
        if (c->logprobs >= 0 && c->chat) chat_add_logprobs(c, choice, event);
        else if (c->logprobs >= 0) add_logprobs(c, choice, event->token, event);
        if (c->return_token_ids && !event->prompt_token) {
            if (!choice->token_ids) choice->token_ids = json_array();
            json_array_append_new(choice->token_ids, json_integer(event->token));
        }
    }
    append_text(choice, event->text, event->text_bytes);
    choice->finish = event->finish;
}

void completion_event(struct engine_event *event) {
    struct request *request = event->request;
    struct completion *c = request->owner;
    int index = request->choice;
    struct choice *choice = &c->choices[index];
    bool last = event->finish != FINISH_NONE;
    if (event->error) fail(c, event);
    if (c->connection && !c->err.status) {
        take_event(c, choice, event);
        if (c->stream && (!event->prompt_token || last)) send_chunk(c, choice, index);
    }
    free(event->text);
    if (!last) return;
    choice->request = NULL;
    request_destroy(request);
    if (++c->ended < c->choice_count) return;
    finish_answer(c);
    completion_destroy(c);
}

void completion_begin(struct completion *c) {
    if (c->connection && c->stream) respond_stream_begin(c->connection);
}

void completion_destroy(struct completion *c) {
    for (int i = 0; i < c->choice_count; i++) {
        struct choice *choice = &c->choices[i];
        if (choice->request) {
            VERIFY(!c->submitted);
            request_destroy(choice->request);
        }
        free(choice->prompt_text);
        free(choice->text);
        json_decref(choice->tokens);
        json_decref(choice->token_logprobs);
        json_decref(choice->top_logprobs);
        json_decref(choice->text_offset);
        json_decref(choice->token_ids);
        json_decref(choice->content_logprobs);
    }
    free(c->choices);
    free(c->body);
    free(c);
}
