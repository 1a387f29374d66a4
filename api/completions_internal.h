// One POST /v1/completions: what completions.c builds from JSON and completions_answer.c answers.
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
    bool begun; // its first chunk was sent, or its echo put into text
    // Since the last chunk (streamed) or the beginning (not streamed):
    json_t *tokens, *token_logprobs, *top_logprobs, *text_offset, *token_ids;
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
    bool stream, include_usage, continuous_usage, echo, return_token_ids;
    int n, logprobs;
    char id[96], model[160];
    int64_t created;
    struct choice *choices;
    int choice_count, ended;
    bool submitted, cancelled, error_sent;
};

// completions_answer.c
void completion_begin(struct completion *completion); // submitted; sends SSE headers
void completion_gone(void *completion);               // connection.gone
void completion_destroy(struct completion *completion); // every request ended or never submitted

#endif
