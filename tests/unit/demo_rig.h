// The demo model with its adapters, and what transformers and PEFT answered
// (tests/reference/make_demo_goldens.py), driven in two ways: all logits of one step through
// model_forward, and greedy requests through engine_step. Included by one test a program.
#ifndef LORAD_TESTS_DEMO_RIG_H
#define LORAD_TESTS_DEMO_RIG_H

#include "base/file.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/safetensors.h"
#include "server/engine.h"

#include <dirent.h>
#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define DEMO_MODEL LORAD_SOURCE_DIR "/demo/model"
#define DEMO_ADAPTERS LORAD_SOURCE_DIR "/demo/adapters"
#define DEMO_FIXTURES LORAD_SOURCE_DIR "/tests/fixtures/demo"

enum {
    DEMO_CASES_MAX = 128, DEMO_GREEDY = 32, DEMO_POSITIONS_MAX = 8, DEMO_PROMPT_MAX = 256,
    DEMO_ADAPTERS_MAX = 16, DEMO_CONTEXT = 512, DEMO_TOKENS = 8192, DEMO_PAGES = 1200,
    DEMO_SEQUENCES = 512 // rows of logits in a step
};

// One prompt under one set of adapters, and the reference's answers.
struct demo_case {
    struct adapter *adapters[REQUEST_ADAPTERS_MAX];
    float weights[REQUEST_ADAPTERS_MAX];
    int adapter_count;
    int32_t prompt[DEMO_PROMPT_MAX];
    int prompt_count;
    int positions[DEMO_POSITIONS_MAX], position_count;
    float *logits; // [position_count, V]
    int32_t tokens[DEMO_GREEDY];
    double gaps[DEMO_GREEDY]; // of the two best logits
    char label[96];
};

struct demo {
    const struct backend_ops *ops;
    struct backend *backend;
    struct model_config config;
    struct model *model;
    struct tokenizer *tokenizer;
    struct lora_geometry geometry;
    struct adapter *adapters[DEMO_ADAPTERS_MAX];
    int adapter_count;
    struct demo_case cases[DEMO_CASES_MAX];
    int case_count;
};

// ------------------------------------------------------------------ loading

static struct adapter *demo_adapter(struct demo *demo, const char *name) {
    for (int i = 0; i < demo->adapter_count; i++)
        if (strcmp(demo->adapters[i]->name, name) == 0) return demo->adapters[i];
    assert_true(demo->adapter_count < DEMO_ADAPTERS_MAX);
    struct error err = {0};
    char path[512];
    snprintf(path, sizeof path, DEMO_ADAPTERS "/%s", name);
    struct adapter **out = &demo->adapters[demo->adapter_count++];
    if (adapter_load(&demo->geometry, name, -1, path, out, &err) != STATUS_OK)
        fail_msg("%s: %s", name, err.text);
    return *out;
}

static int demo_ids(const json_t *array, int32_t *ids, int max) {
    int count = (int)json_array_size(array);
    assert_in_range(count, 1, max);
    for (int i = 0; i < count; i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(array, (size_t)i));
    return count;
}

static void demo_case_load(struct demo *demo, const json_t *line, struct safetensors *logits) {
    assert_true(demo->case_count < DEMO_CASES_MAX);
    struct demo_case *c = &demo->cases[demo->case_count];
    json_t *adapters = json_object_get(line, "adapters"), *gaps = json_object_get(line, "gaps");
    c->adapter_count = (int)json_array_size(adapters);
    assert_in_range(c->adapter_count, 0, REQUEST_ADAPTERS_MAX);
    c->prompt_count = demo_ids(json_object_get(line, "prompt"), c->prompt, DEMO_PROMPT_MAX);
    c->position_count =
        demo_ids(json_object_get(line, "positions"), c->positions, DEMO_POSITIONS_MAX);
    int length = snprintf(c->label, sizeof c->label, "prompt of %d tokens", c->prompt_count);
    for (int i = 0; i < c->adapter_count; i++) {
        const json_t *pair = json_array_get(adapters, (size_t)i);
        const char *name = json_string_value(json_array_get(pair, 0));
        c->adapters[i] = demo_adapter(demo, name);
        c->weights[i] = (float)json_number_value(json_array_get(pair, 1));
        length += snprintf(c->label + length, sizeof c->label - (size_t)length, ", %s", name);
    }
    assert_int_equal(demo_ids(json_object_get(line, "tokens"), c->tokens, DEMO_GREEDY),
                     DEMO_GREEDY);
    assert_int_equal(json_array_size(gaps), DEMO_GREEDY);
    for (int i = 0; i < DEMO_GREEDY; i++)
        c->gaps[i] = json_number_value(json_array_get(gaps, (size_t)i));
    char name[16];
    snprintf(name, sizeof name, "%d", demo->case_count++);
    const struct tensor_info *info = safetensors_find(logits, name);
    assert_non_null(info);
    assert_int_equal(info->elements, c->position_count * demo->config.vocabulary);
    c->logits = mem_alloc(info->bytes);
    assert_int_equal(info->bytes, info->elements * sizeof *c->logits);
    assert_int_equal(safetensors_read(logits, info, c->logits, NULL), STATUS_OK);
}

// Calls `take` with every line of a file of JSON values.
static void demo_lines(const char *path, void (*take)(void *context, const json_t *line),
                       void *context) {
    char *data;
    size_t bytes;
    struct error err = {0};
    if (file_read_all(path, 64 << 20, &data, &bytes, &err) != STATUS_OK) fail_msg("%s", err.text);
    for (char *at = data, *end; at < data + bytes; at = end + 1) {
        end = memchr(at, '\n', (size_t)(data + bytes - at));
        assert_non_null(end);
        json_t *line = json_loadb(at, (size_t)(end - at), JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
        assert_non_null(line);
        take(context, line);
        json_decref(line);
    }
    free(data);
}

struct demo_loading {
    struct demo *demo;
    struct safetensors *logits;
};

static void demo_take_case(void *context, const json_t *line) {
    struct demo_loading *loading = context;
    demo_case_load(loading->demo, line, loading->logits);
}

static void demo_open(struct demo *demo, const struct backend_ops *ops) {
    struct error err = {0};
    log_configure(LOG_WARN, false);
    *demo = (struct demo){.ops = ops};
    struct backend_options backend_options = {.dtype = DTYPE_F32, .threads = 2};
    struct model_options options = {
        .folder = DEMO_MODEL, .tokens_max = DEMO_TOKENS, .sequences_max = DEMO_SEQUENCES,
        .segments_max = DEMO_SEQUENCES * REQUEST_ADAPTERS_MAX, .context_max = DEMO_CONTEXT};
    struct safetensors *logits;
    if (ops->open(&backend_options, &demo->backend, &err) != STATUS_OK ||
        model_config_load(DEMO_MODEL, &demo->config, &err) != STATUS_OK ||
        model_create(ops, demo->backend, &demo->config, DTYPE_F32, &options, &demo->model, &err) !=
            STATUS_OK ||
        tokenizer_load(DEMO_MODEL, demo->config.vocabulary, &demo->tokenizer, &err) != STATUS_OK ||
        safetensors_open_file(DEMO_FIXTURES "/logits.safetensors", &logits, &err) != STATUS_OK)
        fail_msg("%s", err.text);
    demo->geometry = model_lora_geometry(&demo->config, DTYPE_F32);
    demo->geometry.pool_pages = DEMO_PAGES;
    struct demo_loading loading = {demo, logits};
    demo_lines(DEMO_FIXTURES "/cases.jsonl", demo_take_case, &loading);
    assert_int_equal(safetensors_count(logits), demo->case_count);
    safetensors_close(logits);
}

static void demo_close(struct demo *demo) {
    for (int i = 0; i < demo->case_count; i++) free(demo->cases[i].logits);
    for (int i = 0; i < demo->adapter_count; i++) adapter_unref(demo->adapters[i]);
    tokenizer_destroy(demo->tokenizer);
    model_destroy(demo->model);
    demo->ops->close(demo->backend);
}

// ------------------------------------------------------------------ logits of one step

// A pool of the test's own, with adapters in it as residency would lay them.
struct demo_pool {
    void *memory;
    int next; // pages below are taken
};

static void demo_pool_open(struct demo *demo, struct demo_pool *pool) {
    struct pool_shape shape = {.layers = demo->config.layers, .page_count = DEMO_PAGES,
                               .kv_heads = demo->config.kv_heads,
                               .head_size = demo->config.head_size,
                               .page_elems = demo->geometry.page_elems, .elem_bytes = 4};
    size_t bytes = (size_t)shape.layers * DEMO_PAGES * shape.page_elems * shape.elem_bytes;
    *pool = (struct demo_pool){.memory = demo->ops->memory_create(demo->backend, bytes)};
    demo->ops->pool_attach(demo->backend, pool->memory, &shape);
    for (int i = 0; i < demo->adapter_count; i++) {
        struct adapter *adapter = demo->adapters[i];
        for (int page = 0; page < adapter->page_count; page++) adapter->pages[page] = pool->next++;
        for (int layer = 0; layer < shape.layers; layer++)
            demo->ops->pool_write(demo->backend, layer, adapter->pages,
                                  (float *)adapter->image + (size_t)layer * adapter->layer_elems,
                                  adapter->layer_elems);
        if (demo->ops->pool_written) demo->ops->pool_written(demo->backend);
    }
}

static void demo_pool_close(struct demo *demo, struct demo_pool *pool) {
    demo->ops->memory_destroy(demo->backend, pool->memory);
}

struct demo_step {
    int32_t ids[DEMO_TOKENS], positions[DEMO_TOKENS], slots[DEMO_TOKENS], rows[DEMO_SEQUENCES];
    int32_t pages[DEMO_PAGES];
    struct attention_span spans[DEMO_CASES_MAX];
    struct lora_segment segments[DEMO_CASES_MAX * REQUEST_ADAPTERS_MAX];
    struct step step;
    int v_rows, pages_used;
};

// The whole prompt of one case. Segments are not joined: two of one adapter may be neighbours.
static void demo_step_add(struct demo_step *s, struct demo_pool *pool, const struct demo_case *c) {
    int first = s->step.token_count, count = c->prompt_count;
    assert_true(first + count <= DEMO_TOKENS);
    int32_t *pages = &s->pages[s->pages_used];
    for (int i = 0; i < count; i++) {
        if (i % PAGE_TOKENS == 0) pages[i / PAGE_TOKENS] = pool->next++;
        s->ids[first + i] = c->prompt[i];
        s->positions[first + i] = i;
        s->slots[first + i] = pages[i / PAGE_TOKENS] * PAGE_TOKENS + i % PAGE_TOKENS;
    }
    assert_true(pool->next <= DEMO_PAGES);
    s->pages_used += (count + PAGE_TOKENS - 1) / PAGE_TOKENS;
    s->spans[s->step.span_count++] = (struct attention_span){
        .token_first = first, .token_count = count, .context = count, .pages = pages};
    for (int i = 0; i < c->adapter_count; i++) {
        struct lora_segment *segment = &s->segments[s->step.segment_count++];
        *segment = (struct lora_segment){.token_first = first, .token_count = count,
                                         .v_first = s->v_rows, .weight = c->weights[i],
                                         .pages = c->adapters[i]->pages,
                                         .page_count = c->adapters[i]->page_count};
        memcpy(segment->rank, c->adapters[i]->rank, sizeof segment->rank);
        memcpy(segment->a_offset, c->adapters[i]->a_offset, sizeof segment->a_offset);
        memcpy(segment->b_offset, c->adapters[i]->b_offset, sizeof segment->b_offset);
        s->v_rows += count;
    }
    for (int i = 0; i < c->position_count; i++) {
        assert_true(s->step.logit_count < DEMO_SEQUENCES);
        s->rows[s->step.logit_count++] = first + c->positions[i];
    }
    s->step.token_count += count;
}

static const float *demo_step_run(struct demo *demo, struct demo_step *s) {
    s->step.ids = s->ids, s->step.positions = s->positions, s->step.slots = s->slots;
    s->step.query_heads = demo->config.query_heads;
    s->step.spans = s->spans, s->step.segments = s->segments, s->step.logit_rows = s->rows;
    return model_forward(demo->model, &s->step).logits;
}

// ------------------------------------------------------------------ greedy requests

struct demo_job {
    const struct demo_case *wanted;
    struct request *request;
    int32_t tokens[DEMO_GREEDY];
    char text[16 * DEMO_GREEDY];
    size_t text_bytes;
    int count;
    bool ended;
};

static void demo_job_open(struct demo_job *job, const struct demo_case *c) {
    *job = (struct demo_job){.wanted = c, .request = request_create()};
    struct request *request = job->request;
    request->owner = job;
    request->prompt = mem_alloc((size_t)c->prompt_count * sizeof(int32_t));
    memcpy(request->prompt, c->prompt, (size_t)c->prompt_count * sizeof(int32_t));
    request->prompt_count = c->prompt_count;
    for (int i = 0; i < c->adapter_count; i++) {
        request->adapters[i] = adapter_ref(c->adapters[i]);
        request->adapter_weights[i] = c->weights[i];
    }
    request->adapter_count = c->adapter_count;
    request->sampling.temperature = 0;
    request->sampling.logprobs = -1;
    request->sampling.ignore_eos = true;
    request->sampling.max_tokens = DEMO_GREEDY;
}

static void demo_job_take(struct engine_event *event) {
    struct demo_job *job = event->request->owner;
    if (event->error != STATUS_OK) fail_msg("%s: %s", job->wanted->label, event->error_text);
    assert_false(job->ended);
    if (event->token >= 0) {
        assert_true(job->count < DEMO_GREEDY);
        job->tokens[job->count++] = event->token;
    }
    if (event->text) {
        assert_true(job->text_bytes + event->text_bytes <= sizeof job->text);
        memcpy(job->text + job->text_bytes, event->text, event->text_bytes);
        job->text_bytes += event->text_bytes;
        free(event->text);
    }
    if (event->finish == FINISH_NONE) return;
    assert_int_equal(event->finish, FINISH_LENGTH);
    job->ended = true;
}

// Steps until nothing is left to do.
static void demo_engine_run(struct engine *engine) {
    struct engine_event events[64];
    bool works = true;
    for (int step = 0; works; step++) {
        assert_true(step < 1000000);
        works = engine_step(engine);
        for (int count; (count = engine_poll(engine, events, 64)) > 0;)
            for (int i = 0; i < count; i++) demo_job_take(&events[i]);
    }
}

#endif
