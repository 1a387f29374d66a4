// A tiny model of tests/fixtures/models with its adapters and the reference's answers, driven
// through model_forward as the engine does: pages in random order, sequences ("runs") of several
// adapters laid end to end in one step, prompts fed in chunks. Included by one test a program.
#ifndef LORAD_TESTS_MODEL_RIG_H
#define LORAD_TESTS_MODEL_RIG_H

#include "base/file.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/safetensors.h"
#include "server/model/model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum {
    RIG_PAGES = 400, RIG_TOKENS = 400, RIG_SEGMENTS = 96, RIG_CONTEXT = 128, RUNS_MAX = 24,
    GREEDY = 16, RIG_ADAPTERS_MAX = 2, PROMPTS = 5
};

static const int prompt_lengths[PROMPTS] = {1, 7, 16, 17, 50};

struct model_rig {
    const char *name; // the fixture's
    const struct backend_ops *ops;
    struct backend *backend;
    struct model_config config;
    struct model *model;
    struct lora_geometry geometry;
    void *pool_memory;
    struct safetensors *expected;
    int32_t free_pages[RIG_PAGES]; // a stack in random order
    int free_count;
    const char *adapter_names[RIG_ADAPTERS_MAX]; // in order of name, as in "mix"
    struct adapter *adapters[RIG_ADAPTERS_MAX];
    int adapter_count;
    float mix_weights[RIG_ADAPTERS_MAX];
    double worst; // the largest difference of a logit seen so far
};

// One sequence: a prompt, then its greedy continuation.
struct run {
    char variant[32];
    int length;                // of the prompt
    int32_t ids[RIG_CONTEXT];  // the prompt and what was generated
    int known, done;           // ids known; ids whose K and V are in the pool
    int32_t pages[RIG_CONTEXT / PAGE_TOKENS];
    float weights[RIG_ADAPTERS_MAX]; // 0: the adapter is not used
    int row_count;
    int32_t *rows, *greedy;
    float *logits; // [row_count, V]
};

static char *fixture_path(const char *name, const char *rest) {
    char path[512];
    snprintf(path, sizeof path, LORAD_SOURCE_DIR "/tests/fixtures/models/%s%s", name, rest);
    return mem_strdup(path);
}

// The bytes of one expected tensor; the caller frees them. *count: elements (of 4 bytes).
static void *expected_tensor(const struct model_rig *rig, const char *variant, int length,
                             const char *what, int *count) {
    char name[128];
    snprintf(name, sizeof name, "%s/%d/%s", variant, length, what);
    const struct tensor_info *info = safetensors_find(rig->expected, name);
    if (!info) fail_msg("%s: expected.safetensors has no %s", rig->name, name);
    assert_int_equal(info->bytes, info->elements * 4);
    void *data = mem_alloc(info->bytes);
    assert_int_equal(safetensors_read(rig->expected, info, data, NULL), STATUS_OK);
    *count = (int)info->elements;
    return data;
}

static int32_t page_pop(struct model_rig *rig) {
    assert_true(rig->free_count > 0);
    return rig->free_pages[--rig->free_count];
}

static void rig_pool_open(struct model_rig *rig, unsigned seed) {
    struct pool_shape shape = {.layers = rig->config.layers, .page_count = RIG_PAGES,
                               .kv_heads = rig->config.kv_heads,
                               .head_size = rig->config.head_size,
                               .page_elems = rig->geometry.page_elems,
                               .elem_bytes = dtype_bytes(rig->geometry.dtype)};
    size_t elems = (size_t)shape.layers * RIG_PAGES * shape.page_elems;
    rig->pool_memory = rig->ops->memory_create(rig->backend, elems * shape.elem_bytes);
    // Stale numbers everywhere, so that a read of what was never written shows in the logits.
    float *stale = mem_alloc(elems * sizeof *stale);
    for (size_t i = 0; i < elems; i++) stale[i] = i % 2 ? 50.0f : -70.0f;
    void *converted = mem_alloc(elems * shape.elem_bytes);
    dtype_convert(converted, rig->geometry.dtype, stale, DTYPE_F32, elems);
    rig->ops->upload(rig->backend, rig->pool_memory, converted, elems * shape.elem_bytes);
    rig->ops->synchronize(rig->backend);
    free(converted);
    free(stale);
    rig->ops->pool_attach(rig->backend, rig->pool_memory, &shape);
    for (int i = 0; i < RIG_PAGES; i++) rig->free_pages[i] = i;
    for (int i = RIG_PAGES - 1; i > 0; i--) {
        int j = (int)(rand_r(&seed) % (unsigned)(i + 1));
        int32_t page = rig->free_pages[i];
        rig->free_pages[i] = rig->free_pages[j];
        rig->free_pages[j] = page;
    }
    rig->free_count = RIG_PAGES;
}

static void rig_adapter_open(struct model_rig *rig, const char *adapter_name) {
    char rest[128];
    snprintf(rest, sizeof rest, "/adapters/%s", adapter_name);
    char *folder = fixture_path(rig->name, rest);
    struct adapter **out = &rig->adapters[rig->adapter_count];
    struct error err = {0};
    if (adapter_load(&rig->geometry, adapter_name, -1, folder, out, &err) != STATUS_OK)
        fail_msg("%s/%s: %s", rig->name, adapter_name, err.text);
    free(folder);
    size_t layer_bytes = (*out)->layer_elems * dtype_bytes(rig->geometry.dtype);
    for (int p = 0; p < (*out)->page_count; p++) (*out)->pages[p] = page_pop(rig);
    for (int layer = 0; layer < rig->config.layers; layer++)
        rig->ops->pool_write(rig->backend, layer, (*out)->pages,
                             (const char *)(*out)->image + (size_t)layer * layer_bytes,
                             (*out)->layer_elems);
    if (rig->ops->pool_written) rig->ops->pool_written(rig->backend);
    rig->adapter_names[rig->adapter_count++] = adapter_name;
}

static void rig_open(struct model_rig *rig, const struct backend_ops *ops, enum dtype dtype,
                     const char *name, const char *const adapter_names[RIG_ADAPTERS_MAX]) {
    struct error err = {0};
    log_configure(LOG_WARN, false);
    *rig = (struct model_rig){.name = name, .ops = ops};
    struct backend_options backend_options = {.dtype = dtype, .threads = 2};
    char *folder = fixture_path(name, ""), *path = fixture_path(name, "/expected.safetensors");
    struct model_options options = {.folder = folder, .tokens_max = RIG_TOKENS,
                                    .sequences_max = RIG_TOKENS, .segments_max = RIG_SEGMENTS,
                                    .context_max = RIG_CONTEXT};
    if (ops->open(&backend_options, &rig->backend, &err) != STATUS_OK ||
        model_config_load(folder, &rig->config, &err) != STATUS_OK ||
        model_create(ops, rig->backend, &rig->config, dtype, &options, &rig->model, &err) !=
            STATUS_OK ||
        safetensors_open_file(path, &rig->expected, &err) != STATUS_OK)
        fail_msg("%s: %s", name, err.text);
    free(folder);
    free(path);
    rig->geometry = model_lora_geometry(&rig->config, dtype);
    rig->geometry.pool_pages = RIG_PAGES;
    rig_pool_open(rig, 4711);
    for (int i = 0; i < RIG_ADAPTERS_MAX && adapter_names[i]; i++)
        rig_adapter_open(rig, adapter_names[i]);
    const struct tensor_info *mix = safetensors_find(rig->expected, "mix/weights");
    if (mix)
        assert_int_equal(safetensors_read(rig->expected, mix, rig->mix_weights, NULL), STATUS_OK);
}

static void rig_close(struct model_rig *rig) {
    for (int i = 0; i < rig->adapter_count; i++) adapter_unref(rig->adapters[i]);
    safetensors_close(rig->expected);
    model_destroy(rig->model);
    rig->ops->memory_destroy(rig->backend, rig->pool_memory);
    rig->ops->close(rig->backend);
}

static bool rig_has(const struct model_rig *rig, const char *variant) {
    char name[64];
    snprintf(name, sizeof name, "%s/1/ids", variant);
    return safetensors_find(rig->expected, name) != NULL;
}

static void run_open(struct model_rig *rig, struct run *run, const char *variant, int length) {
    *run = (struct run){.length = length};
    snprintf(run->variant, sizeof run->variant, "%s", variant);
    int count = 0;
    int32_t *ids = expected_tensor(rig, variant, length, "ids", &count);
    assert_int_equal(count, length);
    memcpy(run->ids, ids, (size_t)length * sizeof *ids);
    free(ids);
    run->known = length;
    run->rows = expected_tensor(rig, variant, length, "rows", &run->row_count);
    run->logits = expected_tensor(rig, variant, length, "logits", &count);
    assert_int_equal(count, run->row_count * rig->config.vocabulary);
    run->greedy = expected_tensor(rig, variant, length, "greedy", &count);
    assert_int_equal(count, GREEDY);
    for (int i = 0; i < RIG_CONTEXT / PAGE_TOKENS; i++) run->pages[i] = page_pop(rig);
    for (int i = 0; i < rig->adapter_count; i++) {
        if (strcmp(variant, rig->adapter_names[i]) == 0) run->weights[i] = 1;
        if (strcmp(variant, "mix") == 0) run->weights[i] = rig->mix_weights[i];
    }
}

static void run_close(struct model_rig *rig, struct run *run) {
    for (int i = 0; i < RIG_CONTEXT / PAGE_TOKENS; i++)
        rig->free_pages[rig->free_count++] = run->pages[i];
    free(run->rows);
    free(run->logits);
    free(run->greedy);
}

// ---- one step ----------------------------------------------------------------------------------

struct step_arrays {
    int32_t ids[RIG_TOKENS], positions[RIG_TOKENS], slots[RIG_TOKENS], rows[RIG_TOKENS];
    struct { struct run *run; int position; } row_of[RIG_TOKENS];
    struct attention_span spans[RUNS_MAX];
    struct lora_segment segments[RIG_SEGMENTS];
    struct step step;
};

// Tokens [first, first + count) use this adapter: a new segment, or more of one that ends there.
static void add_segment(struct step_arrays *a, const struct adapter *adapter, float weight,
                        int first, int count) {
    for (int i = 0; i < a->step.segment_count; i++) {
        struct lora_segment *s = &a->segments[i];
        if (s->pages != adapter->pages || s->weight != weight ||
            s->token_first + s->token_count != first)
            continue;
        s->token_count += count;
        return;
    }
    assert_true(a->step.segment_count < RIG_SEGMENTS);
    struct lora_segment *s = &a->segments[a->step.segment_count++];
    *s = (struct lora_segment){.token_first = first, .token_count = count, .weight = weight,
                               .pages = adapter->pages, .page_count = adapter->page_count};
    memcpy(s->rank, adapter->rank, sizeof s->rank);
    memcpy(s->a_offset, adapter->a_offset, sizeof s->a_offset);
    memcpy(s->b_offset, adapter->b_offset, sizeof s->b_offset);
}

static bool row_is_expected(const struct run *run, int position) {
    for (int i = 0; i < run->row_count; i++)
        if (run->rows[i] == position) return true;
    return false;
}

static void add_run(struct model_rig *rig, struct step_arrays *a, struct run *run, int count) {
    int first = a->step.token_count;
    assert_true(count > 0 && run->done + count <= run->known && first + count <= RIG_TOKENS);
    for (int i = 0; i < count; i++) {
        int position = run->done + i, t = first + i;
        a->ids[t] = run->ids[position];
        a->positions[t] = position;
        a->slots[t] = run->pages[position / PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS;
        if (!row_is_expected(run, position) && position + 1 < run->known) continue;
        a->row_of[a->step.logit_count].run = run;
        a->row_of[a->step.logit_count].position = position;
        a->rows[a->step.logit_count++] = t;
    }
    a->spans[a->step.span_count++] = (struct attention_span){
        .token_first = first, .token_count = count, .context = run->done + count,
        .pages = run->pages};
    for (int i = 0; i < rig->adapter_count; i++)
        if (run->weights[i] != 0)
            add_segment(a, rig->adapters[i], run->weights[i], first, count);
    run->done += count;
    a->step.token_count += count;
}

static int argmax(const float *values, int count) {
    int best = 0;
    for (int i = 1; i < count; i++)
        if (values[i] > values[best]) best = i;
    return best;
}

// How a step's logits are judged; returns false to fail with the run's name.
typedef bool (*judge)(struct model_rig *rig, const struct run *run, const float *logits,
                      const float *expected);

// Feeds counts[i] ids of runs[i] (0: not in this step) and checks every row the reference gave.
// A run whose last known id was fed learns its next id, greedily.
static void rig_step(struct model_rig *rig, struct run *runs, const int *counts, int run_count,
                     judge judge_logits) {
    static struct step_arrays a;
    memset(&a, 0, sizeof a);
    for (int i = 0; i < run_count; i++)
        if (counts[i] > 0) add_run(rig, &a, &runs[i], counts[i]);
    int v_rows = 0;
    for (int i = 0; i < a.step.segment_count; i++) {
        a.segments[i].v_first = v_rows;
        v_rows += a.segments[i].token_count;
    }
    a.step.ids = a.ids, a.step.positions = a.positions, a.step.slots = a.slots;
    a.step.query_heads = rig->config.query_heads, a.step.repeats = true;
    a.step.spans = a.spans, a.step.segments = a.segments, a.step.logit_rows = a.rows;
    const float *logits = model_forward(rig->model, &a.step).logits;
    int V = rig->config.vocabulary;
    for (int r = 0; r < a.step.logit_count; r++, logits += V) {
        struct run *run = a.row_of[r].run;
        int position = a.row_of[r].position;
        for (int i = 0; i < run->row_count; i++)
            if (run->rows[i] == position &&
                !judge_logits(rig, run, logits, run->logits + (size_t)i * (size_t)V))
                fail_msg("%s, %s, prompt of %d, position %d: logits differ (worst %g)", rig->name,
                         run->variant, run->length, position, rig->worst);
        if (position + 1 == run->known && run->known < RIG_CONTEXT)
            run->ids[run->known++] = argmax(logits, V);
    }
}

static void expect_greedy(const struct model_rig *rig, const struct run *run) {
    for (int i = 0; i < GREEDY; i++)
        if (run->ids[run->length + i] != run->greedy[i])
            fail_msg("%s, %s, prompt of %d: generated token %d is %d, expected %d", rig->name,
                     run->variant, run->length, i, run->ids[run->length + i], run->greedy[i]);
}

#endif
