// What operators ask: health, readiness, version, Prometheus metrics, and the tokenizer alone.
// Loop thread. Metric names that begin with vllm: are those that existing routers and dashboards
// read; the rest is lorad_.
#include "api/api_internal.h"

#include "base/memory.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef LORAD_VERSION
#define LORAD_VERSION "0.1.0"
#endif

void handle_health(struct connection *c, const struct http_request *r, const char *tail) {
    if (engine_healthy(c->api->engine)) respond_text(c, 200, "text/plain", "");
    else respond_refusal(c, 503, NULL, NULL, "the device has failed");
}

void handle_ready(struct connection *c, const struct http_request *r, const char *tail) {
    if (!c->api->draining && engine_healthy(c->api->engine)) respond_text(c, 200, "text/plain", "");
    else respond_refusal(c, 503, NULL, NULL, "the server is shutting down");
}

void handle_version(struct connection *c, const struct http_request *r, const char *tail) {
    respond_json(c, 200, json_pack("{s:s}", "version", LORAD_VERSION));
}

// ------------------------------------------------------------------ /metrics

struct page {
    char *text;
    size_t bytes, room;
};

__attribute__((format(printf, 2, 3))) static void print(struct page *page, const char *format, ...) {
    for (;;) {
        va_list list;
        va_start(list, format);
        size_t left = page->room - page->bytes;
        int length = vsnprintf(page->text + page->bytes, left, format, list);
        va_end(list);
        if ((size_t)length < left) {
            page->bytes += (size_t)length;
            return;
        }
        page->room = 2 * page->room + (size_t)length + 4096;
        page->text = mem_realloc(page->text, page->room);
    }
}

static void value(struct page *page, const char *name, const char *type, double number) {
    print(page, "# TYPE %s %s\n%s %.17g\n", name, type, name, number);
}

static void print_histogram(struct page *page, const char *name, struct histogram *h) {
    uint64_t sum = 0;
    print(page, "# TYPE %s histogram\n", name);
    for (int i = 0; i < HISTOGRAM_BUCKETS; i++) {
        sum += atomic_load(&h->bucket[i]);
        print(page, "%s_bucket{le=\"%g\"} %llu\n", name, histogram_bounds_s[i],
              (unsigned long long)sum);
    }
    sum += atomic_load(&h->bucket[HISTOGRAM_BUCKETS]);
    print(page, "%s_bucket{le=\"+Inf\"} %llu\n%s_sum %.6f\n%s_count %llu\n", name,
          (unsigned long long)sum, name, (double)atomic_load(&h->sum_us) / 1e6, name,
          (unsigned long long)sum);
}

// A label's value: the exposition format escapes backslash, quote and newline.
static void print_label(struct page *page, const char *text) {
    for (; *text; text++) {
        if (strchr("\\\"", *text)) print(page, "\\");
        print(page, "%c", *text);
    }
}

static void print_lora_info(struct page *page, const struct api *api) {
    char running[1024], waiting[1024];
    metrics_names(api->metrics, running, waiting);
    print(page, "# TYPE vllm:lora_requests_info gauge\nvllm:lora_requests_info{max_lora=\"%d\","
          "running_lora_adapters=\"", api->setup.options->max_seqs);
    print_label(page, running);
    print(page, "\",waiting_lora_adapters=\"");
    print_label(page, waiting);
    print(page, "\"} %lld\n", (long long)time(NULL));
}

static void print_pool(struct page *page, const struct metrics *m) {
    static const char *const owners[PAGE_OWNERS] = {"free", "kv", "adapter", "cached"};
    int total = atomic_load(&m->pages_total);
    print(page, "# TYPE lorad_pages gauge\n");
    for (int i = 0; i < PAGE_OWNERS; i++)
        print(page, "lorad_pages{owner=\"%s\"} %d\n", owners[i], atomic_load(&m->pages[i]));
    value(page, "lorad_pages_total", "gauge", total);
    value(page, "vllm:kv_cache_usage_perc", "gauge",
          total ? (double)atomic_load(&m->pages[PAGE_KV]) / total : 0);
}

static void print_tenants(struct page *page, struct metrics *m) {
    int count = atomic_load(&m->tenant_count);
    print(page, "# TYPE lorad_tenant_tokens_total counter\n");
    for (int i = 0; i < count; i++)
        for (int output = 0; output < 2; output++) {
            print(page, "lorad_tenant_tokens_total{tenant=\"");
            print_label(page, m->tenants[i].name);
            print(page, "\",kind=\"%s\"} %llu\n", output ? "generated" : "prompt",
                  (unsigned long long)atomic_load(output ? &m->tenants[i].generation_tokens
                                                         : &m->tenants[i].prompt_tokens));
        }
}

void handle_metrics(struct connection *c, const struct http_request *r, const char *tail) {
    struct metrics *m = c->api->metrics;
    struct page page = {.text = mem_alloc(16384), .room = 16384};
    value(&page, "vllm:num_requests_running", "gauge", atomic_load(&m->running));
    value(&page, "vllm:num_requests_waiting", "gauge", atomic_load(&m->waiting));
    print_pool(&page, m);
    print_lora_info(&page, c->api);
    print_tenants(&page, m);
    const struct {
        const char *name, *type;
        uint64_t number;
    } rows[] = {
        {"vllm:prompt_tokens_total", "counter", atomic_load(&m->prompt_tokens)},
        {"vllm:generation_tokens_total", "counter", atomic_load(&m->generation_tokens)},
        {"vllm:num_preemptions_total", "counter", atomic_load(&m->preemptions)},
        {"lorad_requests_started_total", "counter", atomic_load(&m->started)},
        {"lorad_requests_stopped_total", "counter", atomic_load(&m->finished_stop)},
        {"lorad_requests_length_total", "counter", atomic_load(&m->finished_length)},
        {"lorad_requests_aborted_total", "counter", atomic_load(&m->aborted)},
        {"lorad_requests_failed_total", "counter", atomic_load(&m->failed)},
        {"lorad_steps_total", "counter", atomic_load(&m->steps)},
        {"lorad_adapter_loads_total", "counter", atomic_load(&m->adapter_loads)},
        {"lorad_adapter_evictions_total", "counter", atomic_load(&m->adapter_evictions)},
        {"lorad_adapter_bytes_moved_total", "counter", atomic_load(&m->adapter_bytes_moved)},
        {"lorad_adapter_reads_total", "counter", atomic_load(&m->host_reads)},
        {"lorad_adapter_read_failures_total", "counter", atomic_load(&m->host_read_failures)},
        {"lorad_host_images", "gauge", (uint64_t)atomic_load(&m->host_images)},
        {"lorad_host_bytes", "gauge", atomic_load(&m->host_bytes)},
        {"lorad_step_adapter_bytes_total", "counter", atomic_load(&m->step_adapter_bytes)},
        {"lorad_swaps_total", "counter", atomic_load(&m->swaps)},
        {"lorad_swapped_bytes_total", "counter", atomic_load(&m->swapped_bytes)},
        {"lorad_early_aborts_total", "counter", atomic_load(&m->early_aborts)},
        {"vllm:spec_decode_num_draft_tokens_total", "counter", atomic_load(&m->drafts)},
        {"vllm:spec_decode_num_accepted_tokens_total", "counter",
         atomic_load(&m->drafts_accepted)},
        {"vllm:prefix_cache_queries_total", "counter", atomic_load(&m->prefix_queries)},
        {"vllm:prefix_cache_hits_total", "counter", atomic_load(&m->prefix_hits)},
        {"lorad_adapters_resident", "gauge", (uint64_t)atomic_load(&m->adapters_resident)},
        {"lorad_step_tokens", "gauge", (uint64_t)atomic_load(&m->step_tokens)},
        {"lorad_step_adapters", "gauge", (uint64_t)atomic_load(&m->step_adapters)},
        {"lorad_step_adapters_max", "gauge", (uint64_t)atomic_load(&m->step_adapters_max)},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        value(&page, rows[i].name, rows[i].type, (double)rows[i].number);
    value(&page, "lorad_step_seconds_total", "counter", (double)atomic_load(&m->step_us) / 1e6);
    value(&page, "lorad_adapter_read_seconds_total", "counter",
          (double)atomic_load(&m->host_read_us) / 1e6);
    value(&page, "lorad_adapter_copy_seconds_total", "counter",
          (double)atomic_load(&m->host_copy_us) / 1e6);
    print_histogram(&page, "vllm:time_to_first_token_seconds", &m->ttft);
    print_histogram(&page, "vllm:inter_token_latency_seconds", &m->itl);
    print_histogram(&page, "vllm:e2e_request_latency_seconds", &m->e2e);
    print_histogram(&page, "vllm:request_queue_time_seconds", &m->queue_time);
    respond_text(c, 200, "text/plain; version=0.0.4", page.text);
    free(page.text);
}

// ------------------------------------------------------------------ the tokenizer alone

// On the loop: an input is at most a few megabytes, which takes well under a second.
void handle_tokenize(struct connection *c, const struct http_request *r, const char *tail) {
    const struct tokenizer *tokenizer = c->api->setup.tokenizer;
    struct error err = {0};
    json_t *root = NULL;
    const char *text = NULL;
    bool special = true;
    struct token_list list = {0};
    enum status status = tokenizer ? body_parse(r->body, r->body_bytes, &root, &err)
                                   : error_set(&err, STATUS_INVALID, "this model has no tokenizer");
    if (!status) status = param_string(root, "prompt", 1 << 20, &text, &err);
    if (!status) status = param_bool(root, "add_special_tokens", &special, &err);
    if (!status && !text)
        status = error_set_param(&err, STATUS_INVALID, "prompt", "prompt must be a string");
    if (!status)
        status = tokenizer_encode(tokenizer, text, json_string_length(json_object_get(root, "prompt")),
                                  special, false, &list, &err);
    json_decref(root);
    if (status) {
        respond_error(c, &err);
        return;
    }
    json_t *tokens = json_array();
    for (size_t i = 0; i < list.count; i++) json_array_append_new(tokens, json_integer(list.ids[i]));
    respond_json(c, 200, json_pack("{s:o,s:i,s:i}", "tokens", tokens, "count", (int)list.count,
                                   "max_model_len", c->api->setup.context_max));
    free(list.ids);
}

void handle_detokenize(struct connection *c, const struct http_request *r, const char *tail) {
    const struct tokenizer *tokenizer = c->api->setup.tokenizer;
    struct error err = {0};
    json_t *root = NULL;
    enum status status = tokenizer ? body_parse(r->body, r->body_bytes, &root, &err)
                                   : error_set(&err, STATUS_INVALID, "this model has no tokenizer");
    json_t *tokens = json_object_get(root, "tokens");
    size_t count = json_array_size(tokens);
    int32_t *ids = mem_zalloc(count + 1, sizeof *ids);
    if (!status && !json_is_array(tokens))
        status = error_set_param(&err, STATUS_INVALID, "tokens", "tokens must be a list of ids");
    for (size_t i = 0; !status && i < count; i++) {
        json_t *id = json_array_get(tokens, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= c->api->setup.config->vocabulary)
            status = error_set_param(&err, STATUS_INVALID, "tokens", "tokens must hold ids from 0 "
                                     "to %d", c->api->setup.config->vocabulary - 1);
        else ids[i] = (int32_t)json_integer_value(id);
    }
    if (!status) {
        size_t bytes;
        char *text = tokenizer_decode(tokenizer, ids, count, false, &bytes);
        json_t *json = json_stringn(text, bytes);
        respond_json(c, 200, json_pack("{s:o}", "prompt", json ? json : json_string("")));
        free(text);
    } else respond_error(c, &err);
    free(ids);
    json_decref(root);
}
