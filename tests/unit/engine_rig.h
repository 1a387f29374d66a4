// An engine over a tiny dummy model for tests: creation, jobs (requests and all that came back for
// them), and a driver that steps without a thread. Included by one test a program.
#ifndef LORAD_TESTS_ENGINE_RIG_H
#define LORAD_TESTS_ENGINE_RIG_H

#include "server/engine.h"
#include "base/log.h"
#include "base/memory.h"
#include "plain_backend.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>

enum { RIG_ADAPTERS = 4, JOB_TOKENS_MAX = 512, RIG_CONTEXT = 256, RIG_VOCABULARY = 97 };

struct rig {
    const struct backend_ops *ops;
    struct backend *backend;
    struct model *model;
    struct model_config config;
    struct metrics metrics;
    struct engine_options options;
    struct engine *engine;
    size_t page_bytes;
    struct adapter *adapters[RIG_ADAPTERS]; // ranks 2, 4, 8, 16; 2, 4, 8, 15 pages
};

struct job {
    struct request *request;
    int count, prompt_count; // tokens that came, generated and echoed
    int32_t tokens[JOB_TOKENS_MAX], prompt_tokens[JOB_TOKENS_MAX];
    float logprobs[JOB_TOKENS_MAX], prompt_logprobs[JOB_TOKENS_MAX];
    char text[4 * JOB_TOKENS_MAX];
    size_t text_bytes;
    int terminals;
    enum finish_reason finish;
    enum status error;
};

static const struct model_config rig_config = {
    .layers = 2, .hidden = 32, .query_heads = 4, .kv_heads = 2, .head_size = 8, .ffn = 48,
    .vocabulary = RIG_VOCABULARY, .context_max = RIG_CONTEXT, .norm_epsilon = 1e-5f,
    .rope_theta = 10000, .rope_factor = 1, .stored_dtype = DTYPE_F32, .bos_id = -1};

// Dummy adapters barely change a dummy model; these are to be told apart by their tokens.
static struct adapter *rig_adapter(const struct lora_geometry *geometry, int rank, int seed) {
    char path[64], name[32];
    struct error err = {0};
    struct adapter *adapter = NULL;
    snprintf(path, sizeof path, "dummy:rank=%d,seed=%d,modules=all", rank, seed);
    snprintf(name, sizeof name, "rank%d-%d", rank, seed);
    if (adapter_load(geometry, name, -1, path, &adapter, &err) != STATUS_OK) fail_msg("%s", err.text);
    float *image = adapter->image;
    for (size_t i = 0; i < adapter->image_bytes / sizeof *image; i++) image[i] *= 6;
    return adapter;
}

// pool_pages, sequences_max, step_tokens_max and queue_max of `options` count; the rest is filled.
static void rig_open(struct rig *rig, struct engine_options options, int pool_pages,
                     const struct tokenizer *tokenizer) {
    struct error err = {0};
    log_configure(LOG_WARN, false);
    *rig = (struct rig){.ops = &plain_backend, .config = rig_config};
    struct backend_options backend_options = {.dtype = DTYPE_F32, .threads = 1};
    assert_int_equal(rig->ops->open(&backend_options, &rig->backend, &err), STATUS_OK);
    struct model_options model_options = {
        .dummy = true, .seed = 5, .tokens_max = options.step_tokens_max,
        .sequences_max = options.sequences_max, .context_max = RIG_CONTEXT,
        .segments_max = options.sequences_max * REQUEST_ADAPTERS_MAX};
    if (model_create(rig->ops, rig->backend, &rig->config, DTYPE_F32, &model_options, &rig->model,
                     &err) != STATUS_OK)
        fail_msg("%s", err.text);
    struct lora_geometry geometry = model_lora_geometry(&rig->config, DTYPE_F32);
    rig->page_bytes = geometry.page_elems * 4 * (size_t)geometry.layers;
    options.pool_bytes = rig->page_bytes * (size_t)pool_pages;
    if (!options.queue_max) options.queue_max = 64;
    options.context_max = RIG_CONTEXT;
    rig->options = options;
    if (engine_create(rig->ops, rig->backend, rig->model, &rig->config, DTYPE_F32, tokenizer,
                      &rig->metrics, &options, &rig->engine, &err) != STATUS_OK)
        fail_msg("%s", err.text);
    assert_int_equal(engine_lora_geometry(rig->engine)->pool_pages, pool_pages);
    geometry.pool_pages = 1000; // whether an adapter fits is engine_submit's to say here
    for (int i = 0; i < RIG_ADAPTERS; i++)
        rig->adapters[i] = rig_adapter(&geometry, 2 << i, 100 + i);
}

static void rig_close(struct rig *rig) {
    engine_destroy(rig->engine);
    for (int i = 0; i < RIG_ADAPTERS; i++)
        if (rig->adapters[i]) adapter_unref(rig->adapters[i]);
    model_destroy(rig->model);
    rig->ops->close(rig->backend);
}

// ------------------------------------------------------------------ text

// A tokenizer of our own in place of server/text's, so that ids have the text a test needs: bytes
// from a short list, in which two characters are split over two ids each.
static const char *const rig_pieces[] = {"a", "b", " ", "ab", "\xc3", "\xa9", "c", "\xe2\x82",
                                         "\xac", "ca", "bc"};
enum { RIG_PIECES = sizeof rig_pieces / sizeof *rig_pieces };

struct detokenizer {
    char bytes[64];
    size_t count, sent;
};

static const char *rig_piece(int32_t id) {
    return rig_pieces[id % RIG_PIECES];
}

struct detokenizer *detokenizer_create(const struct tokenizer *tokenizer, bool skip_special) {
    return tokenizer && skip_special ? mem_zalloc(1, sizeof(struct detokenizer)) : NULL;
}

void detokenizer_destroy(struct detokenizer *detokenizer) {
    free(detokenizer);
}

// Incomplete characters stay; bytes that can no longer become one are dropped.
void detokenizer_push(struct detokenizer *d, int32_t id, const char **text, size_t *bytes) {
    memmove(d->bytes, d->bytes + d->sent, d->count -= d->sent);
    for (const char *piece = rig_piece(id); *piece; piece++) {
        unsigned char byte = (unsigned char)*piece;
        size_t start = d->count;
        while (start > 0 && ((unsigned char)d->bytes[start - 1] & 0xc0) == 0x80) start--;
        unsigned char lead = start > 0 ? (unsigned char)d->bytes[start - 1] : 0;
        size_t length = lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 1, have = d->count - (start - 1);
        bool open = lead >= 0xc0 && have < length;
        if (open != ((byte & 0xc0) == 0x80)) {
            if (open) d->count = start - 1;
            if ((byte & 0xc0) == 0x80) continue;
        }
        d->bytes[d->count++] = (char)byte;
    }
    d->sent = d->count;
    for (size_t back = 1; back <= 2 && back <= d->count; back++) {
        unsigned char lead = (unsigned char)d->bytes[d->count - back];
        if ((lead >= 0xc0 && back < 2) || (lead >= 0xe0 && back < 3)) d->sent = d->count - back;
    }
    *text = d->bytes;
    *bytes = d->sent;
}

void detokenizer_finish(struct detokenizer *d, const char **text, size_t *bytes) {
    *text = "\xef\xbf\xbd";
    *bytes = d->sent < d->count ? 3 : 0;
}

// ------------------------------------------------------------------ jobs

static uint32_t philox_word(int seed, int position) {
    uint32_t counter[4] = {(uint32_t)position, 0, 0, 0}, key[2] = {(uint32_t)seed, 0}, out[4];
    philox4x32_10(counter, key, out);
    return out[0];
}

// A greedy request for `prompt_count` made-up tokens; the same `seed`, the same prompt.
static void job_init(struct job *job, int seed, int prompt_count, int max_tokens) {
    *job = (struct job){.request = request_create()};
    struct request *request = job->request;
    request->owner = job;
    request->prompt = mem_alloc((size_t)prompt_count * sizeof(int32_t));
    request->prompt_count = prompt_count;
    for (int i = 0; i < prompt_count; i++)
        request->prompt[i] = (int32_t)(philox_word(seed, i) % RIG_VOCABULARY);
    request->sampling.temperature = 0;
    request->sampling.logprobs = 0;
    request->sampling.max_tokens = max_tokens;
}

static void job_adapter(struct job *job, struct adapter *adapter, float weight) {
    struct request *request = job->request;
    request->adapters[request->adapter_count] = adapter_ref(adapter);
    request->adapter_weights[request->adapter_count++] = weight;
}

static void job_free(struct job *job) {
    request_destroy(job->request);
    job->request = NULL;
}

static bool utf8_complete(const char *text, size_t bytes) {
    for (size_t i = 0; i < bytes;) {
        unsigned char lead = (unsigned char)text[i];
        size_t length = lead < 0x80 ? 1 : lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc2 ? 2 : 0;
        if (length == 0 || i + length > bytes) return false;
        for (size_t j = 1; j < length; j++)
            if (((unsigned char)text[i + j] & 0xc0) != 0x80) return false;
        i += length;
    }
    return true;
}

// What any receiver may rely on, for one event.
static void job_take(struct engine_event *event) {
    struct job *job = event->request->owner;
    assert_int_equal(job->terminals, 0); // nothing follows the terminal event
    if (event->prompt_token) {
        assert_int_equal(job->count, 0); // echoes come first
        job->prompt_tokens[job->prompt_count] = event->token;
        job->prompt_logprobs[job->prompt_count++] = event->logprob;
    } else if (event->token >= 0) {
        job->tokens[job->count] = event->token;
        job->logprobs[job->count++] = event->logprob;
    }
    if (event->text) {
        assert_true(event->text_bytes > 0);
        assert_true(utf8_complete(event->text, event->text_bytes));
        memcpy(job->text + job->text_bytes, event->text, event->text_bytes);
        job->text_bytes += event->text_bytes;
        free(event->text);
    }
    assert_int_equal(event->completion_tokens, job->count);
    assert_int_equal(event->prompt_tokens, job->request->prompt_count);
    assert_int_equal(event->error != STATUS_OK, event->finish == FINISH_ABORT);
    if (event->finish == FINISH_NONE) return;
    job->terminals++;
    job->finish = event->finish;
    job->error = event->error;
    assert_null(job->request->sequence);
}

static int rig_poll(struct rig *rig) {
    struct engine_event events[16];
    int total = 0;
    for (int count; (count = engine_poll(rig->engine, events, 16)) > 0; total += count)
        for (int i = 0; i < count; i++) job_take(&events[i]);
    return total;
}

static bool rig_step(struct rig *rig) {
    bool works = engine_step(rig->engine);
    rig_poll(rig);
    return works;
}

static void rig_submit(struct rig *rig, struct job *job) {
    struct error err = {0};
    if (engine_submit(rig->engine, &job->request, 1, &err) != STATUS_OK) fail_msg("%s", err.text);
}

static void rig_run(struct rig *rig) {
    for (int i = 0; rig_step(rig); i++) assert_true(i < 100000);
}

// Invariant 3: nobody inside, so no KV page and no adapter in use.
static void rig_assert_idle(const struct rig *rig) {
    const struct metrics *metrics = &rig->metrics;
    assert_int_equal(atomic_load(&metrics->pages[PAGE_KV]), 0);
    assert_int_equal(atomic_load(&metrics->pages[PAGE_ADAPTER]), 0);
    assert_int_equal(atomic_load(&metrics->pages[PAGE_FREE]) +
                     atomic_load(&metrics->pages[PAGE_CACHED]),
                     atomic_load(&metrics->pages_total));
    assert_int_equal(atomic_load(&metrics->running), 0);
    assert_int_equal(atomic_load(&metrics->waiting), 0);
    assert_int_equal(atomic_load(&metrics->started),
                     atomic_load(&metrics->finished_stop) + atomic_load(&metrics->finished_length) +
                         atomic_load(&metrics->aborted) + atomic_load(&metrics->failed));
}

#endif
