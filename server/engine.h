// The serving engine: one thread that turns queued requests into events, one step at a time.
//
// Threads: engine_submit, engine_cancel and engine_poll are called by the API thread;
// everything else in the engine happens on its own thread. Two bounded queues join them:
// submissions down, events up; `wake` is called (engine thread) when events wait.
// Every accepted request gets exactly one event with a finish_reason other than FINISH_NONE; it is
// the request's last, and may carry its last token and text.
#ifndef LORAD_SERVER_ENGINE_H
#define LORAD_SERVER_ENGINE_H

#include "pager/eviction.h"
#include "server/metrics.h"
#include "server/model/model.h"
#include "server/registry.h"
#include "server/request.h"
#include "server/sampler.h"
#include "server/tenants.h"
#include "server/text/tokenizer.h"

struct engine;

// How a preempted sequence goes on: what it had computed is kept in host memory, or computed again,
// or whichever is faster.
enum engine_preemption { PREEMPTION_AUTO, PREEMPTION_SWAP, PREEMPTION_RECOMPUTE };

// Drafts of next tokens from where a text repeats itself (engine_draft.c): none, where it was measured
// to pay, or wherever there is one.
enum engine_speculation { SPECULATION_OFF, SPECULATION_AUTO, SPECULATION_ALWAYS };

struct engine_options {
    int sequences_max;      // running at once
    int step_tokens_max;    // tokens in a step
    int queue_max;          // waiting requests (preempted ones too); more is STATUS_FULL
    int context_max;
    size_t pool_bytes;
    const struct tenant_weight *tenant_weights; // borrowed until destroy (tenants.h)
    int tenant_weight_count;
    double first_token_slo_s; // who cannot have a first token within it is refused; 0: nobody is
    int clusters_max;       // adapters in use at once, as far as order allows; 0: no limit
    size_t host_bytes;      // of adapters' images in host memory; 0: no limit
    int load_threads;       // that read and copy adapters; 0: the engine does, between steps
    double load_share;      // host_store.h: paced_share; 0: the default
    enum engine_speculation speculation;
    bool prefix_cache;      // equal prefixes within a tenant and adapter share pages
    enum eviction_policy eviction;
    enum engine_preemption preemption;
    int preempt_every;      // tests: force a preemption every n steps; 0 = never
    void (*wake)(void *context);
    void *wake_context;
};

struct engine_event {
    struct request *request;
    enum finish_reason finish;  // FINISH_NONE: one more token
    enum status error;          // not STATUS_OK: failed (finish is FINISH_ABORT)
    char error_text[160];
    int32_t token;              // -1: none (text or finish only)
    // An echoed prompt token with its logprob. They come in order, before what is generated, and
    // start with the prompt's second: nothing stands before the first.
    bool prompt_token;
    char *text;                 // malloc'd new text, complete UTF-8, may be NULL; receiver frees
    size_t text_bytes;
    float logprob;              // of token, when asked for
    int top_count;
    struct token_logprob top[LOGPROBS_MAX];
    int prompt_tokens, completion_tokens; // so far
    int cached_tokens;          // of the prompt, that the prefix cache had
};

// Takes nothing over but borrows all until destroy. `tokenizer` may be NULL (token ids only). The
// model must have been created for at least step_tokens_max tokens, sequences_max rows and
// sequences_max * REQUEST_ADAPTERS_MAX segments. Nothing else may use the backend meanwhile.
MUST_CHECK enum status engine_create(const struct backend_ops *ops, struct backend *backend,
                                     struct model *model, const struct model_config *config,
                                     enum dtype dtype, const struct tokenizer *tokenizer,
                                     struct metrics *metrics, const struct engine_options *options,
                                     struct engine **out, struct error *err);
MUST_CHECK enum status engine_start(struct engine *engine, struct error *err); // the thread
// Stops taking requests, lets accepted ones finish until deadline_s from now, then aborts the
// rest. Returns at once; a second call brings the deadline forward.
void engine_drain(struct engine *engine, double deadline_s);
bool engine_drained(const struct engine *engine); // drain was called and every event was polled
// Joins the thread. Requests still inside get no event any more; all are the caller's again.
void engine_destroy(struct engine *engine);

const struct lora_geometry *engine_lora_geometry(const struct engine *engine);

// The most output tokens with which engine_submit takes the request, at least 1. Any thread.
int engine_output_room(const struct engine *engine, const struct request *request);

// All or none of `count`; on STATUS_OK the engine has them until their terminal event has been
// polled, then they are the caller's again. STATUS_FULL, STATUS_SHUTDOWN, STATUS_DEVICE,
// STATUS_INVALID (a token outside the vocabulary), STATUS_TOO_LARGE (prompt + max_tokens can never
// fit the context, or with their adapters the pool; err says so).
MUST_CHECK enum status engine_submit(struct engine *engine, struct request **requests, int count,
                                     struct error *err);
void engine_cancel(struct engine *engine, struct request *request); // a terminal event follows
// Ends every request that uses this generation, running, waiting or submitted later, with
// STATUS_NOT_FOUND. The name must lead to it no more. API thread.
void engine_force_out(struct engine *engine, struct adapter *adapter);
// The adapter's image is brought to host memory and, where pages are free, to the device; also to
// be called after `pinned` has changed. Any thread. STATUS_FULL: too many such hints
// wait; it is a hint: nothing else follows.
enum status engine_prefetch(struct engine *engine, struct adapter *adapter, struct error *err);
// An adapter that adapter_load has read: its image counts in host_bytes from now on. Any thread.
void engine_adopt(struct engine *engine, struct adapter *adapter);
// Up to `max` events; returns how many. The receiver owns event texts.
int engine_poll(struct engine *engine, struct engine_event *events, int max);
// Seconds a new request would wait, for Retry-After (at least 1).
int engine_retry_after_s(const struct engine *engine);
bool engine_healthy(const struct engine *engine);

// One step with no thread, for tests and benchmarks; true when there was work. It does nothing
// while the event queue lacks room for a step: poll between steps.
bool engine_step(struct engine *engine);

#endif
