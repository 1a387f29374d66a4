// One POST /v1/completions or /v1/chat/completions: what completions.c and, for a chat's messages,
// chat.c build from JSON, and completions_answer.c answers, with chat_answer.c's pieces for a chat.
//   PARSING (pool thread) -> SUBMITTED (engine) -> all choices ended -> answered and freed
// The client may go at any time: `connection` is then NULL, the requests are cancelled, and the
// completion is freed when the last terminal event has come.
#ifndef LORAD_API_COMPLETIONS_INTERNAL_H
#define LORAD_API_COMPLETIONS_INTERNAL_H

#include "api/api_internal.h"

enum { CHOICES_MAX = 128 };

struct choice {
    struct request *request; // NULL once it has ended
    char *prompt_text;       // for echo; NULL otherwise
    char *text;              // not streamed: so far
    size_t text_bytes, text_room;
    bool begun, sent; // its echo was put into text; its first chunk was sent
    // Since the last chunk (streamed) or the beginning (not streamed):
    json_t *tokens, *token_logprobs, *top_logprobs, *text_offset, *token_ids;
    json_t *content_logprobs; // of a chat, instead of the first four
    size_t offset; // characters of tokens so far
    enum finish_reason finish;
    int prompt_tokens, completion_tokens, cached_tokens;
};

struct completion {
    struct offload offload;
    struct api *api;
    struct connection *connection;
    char *body;
    size_t body_bytes;
    int key; // keys_find: whose key came with it
    struct error err;
    bool chat, stream, include_usage, continuous_usage, echo, return_token_ids;
    int n, logprobs;
    char id[96], model[160];
    int64_t created;
    struct choice *choices;
    int choice_count, ended;
    bool submitted, cancelled, error_sent;
};

// ------------------------------------------------------------------ the way in; pool thread

struct builder {
    struct completion *completion;
    const json_t *root;
    struct error *err;
    struct request *pattern; // every choice's request is a copy of this, with its own prompt
};

// STATUS_INVALID with the text, and the field that is at fault.
enum status refuse(struct builder *b, const char *param, const char *text);
// completions.c: n choices for a prompt. `text` is its echo; NULL: there is none.
enum status builder_add_choices(struct builder *b, const struct token_list *prompt,
                                const char *text);
// chat.c: logprobs, top_logprobs and max_completion_tokens, then the messages as the prompt of n choices.
enum status chat_read_numbers(struct builder *b);
enum status chat_read_messages(struct builder *b);

// ------------------------------------------------------------------ the way out; loop thread

// Text that jansson takes: the tokenizer gives valid UTF-8, a stop string from a client may not be.
json_t *completion_text_json(const char *text, size_t bytes);
char *completion_token_text(const struct completion *completion, int32_t id, size_t *bytes);
json_t *completion_logprob_json(float logprob);
// chat_answer.c
void chat_add_logprobs(const struct completion *completion, struct choice *choice,
                       const struct engine_event *event);
// The parts in which a chat's choice differs from a completion's; `text` is taken.
json_t *chat_message_json(json_t *text);
json_t *chat_delta_json(json_t *text, bool begins);
json_t *chat_take_logprobs(struct choice *choice);

// completions_answer.c
void completion_begin(struct completion *completion); // submitted; sends SSE headers
void completion_gone(void *completion);               // connection.gone
void completion_destroy(struct completion *completion); // every request ended or never submitted

#endif
