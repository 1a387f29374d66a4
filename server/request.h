// One request, from validated JSON to its last event. Built by api/ on the libuv thread (or its
// pool), handed to the engine by engine_submit, from then on the engine's until its terminal event.
//
//   NEW -> QUEUED -> RUNNING -> FINISHED
//             ^---------|   (preemption: KV dropped, tokens kept, recomputed later)
#ifndef LORAD_SERVER_REQUEST_H
#define LORAD_SERVER_REQUEST_H

#include "pager/adapter.h"

#include <stdbool.h>
#include <stdint.h>

enum { STOP_STRINGS_MAX = 4, STOP_IDS_MAX = 16, LOGPROBS_MAX = 20, LOGIT_BIAS_MAX = 1024,
       REQUEST_ADAPTERS_MAX = 4 };

enum finish_reason { FINISH_NONE, FINISH_STOP, FINISH_LENGTH, FINISH_ABORT };

struct sampling {
    float temperature, top_p, min_p; // defaults 1, 1, 0; temperature 0 is greedy
    int top_k;                       // 0 = off
    float presence_penalty, frequency_penalty, repetition_penalty; // 0, 0, 1
    bool seeded;
    uint64_t seed;
    int max_tokens, min_tokens;
    bool ignore_eos, include_stop;
    int logprobs; // alternatives wanted per token; -1 = no logprobs at all
    int bias_count;
    const int32_t *bias_ids;
    const float *bias_values;
};

struct request {
    void *owner;  // the API's handle, returned in every event
    int choice;   // index in the API's answer
    char id[64];
    char tenant[64];
    char *cache_salt; // malloc'd, owned; pages of other salts are not shared; NULL is ""
    struct adapter *adapters[REQUEST_ADAPTERS_MAX]; // referenced; released with the request
    struct adapter *twins[REQUEST_ADAPTERS_MAX]; // NULL, or another of equal content, referenced,
                                                 // whose pages serve instead (registry.h)
    float adapter_weights[REQUEST_ADAPTERS_MAX];
    int adapter_count;
    int32_t *prompt; // malloc'd, owned
    int prompt_count;
    bool echo_logprobs; // logprobs of the prompt's tokens are wanted too
    struct sampling sampling;
    char *stop[STOP_STRINGS_MAX]; // malloc'd, owned
    int stop_count;
    int32_t stop_ids[STOP_IDS_MAX];
    int stop_id_count;
    double deadline_s; // monotonic; 0 = none
    int priority;      // smaller first
    _Atomic bool cancelled; // set by api/ when the client is gone
    struct sequence *sequence; // the engine's state; NULL before and after
};

// Zeroed with the defaults above.
struct request *request_create(void);
void request_destroy(struct request *request); // releases adapters; never while the engine has it

#endif
