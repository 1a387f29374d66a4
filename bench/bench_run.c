// One run: asks the server for its models, then sends the workload and records what comes back.
// Everything happens on one libuv loop. In the open loop a request leaves at its time whatever the
// server does; in the closed one the next leaves when one ends.
#include "bench/bench_internal.h"

#include "base/file.h"
#include "base/memory.h"
#include "bench/client.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MOMENT_MS = 250, LINE_EVERY_MS = 2000 };

struct runner {
    const struct bench_options *options;
    struct bench_run *run;
    uv_loop_t *loop;
    struct client_target target;
    uv_timer_t arrivals, ticks;
    double start_s;
    size_t sent, ended;
    int running, waiting;
    uint64_t tokens, tokens_before; // seen so far, at the moment before
    double line_s;                  // when the progress line was last written
    bool terminal;
};

struct flight {
    struct runner *runner;
    size_t index;
};

static double since_start(const struct runner *r) {
    return clock_seconds() - r->start_s;
}

// ------------------------------------------------------------------ the server's models

struct models_answer {
    int status;
    char *text;
};

static void models_end(void *context, int status, const char *text) {
    struct models_answer *answer = context;
    *answer = (struct models_answer){status, mem_strdup(text)};
}

static void adapter_add(struct bench_run *run, const char *name) {
    run->adapters = mem_realloc(run->adapters,
                                (size_t)(run->adapter_count + 1) * sizeof *run->adapters);
    run->adapters[run->adapter_count++] = mem_strdup(name);
}

static bool models_take(struct runner *r, const json_t *root) {
    struct bench_run *run = r->run;
    int wanted = r->options->adapters;
    size_t i;
    json_t *model;
    json_array_foreach(json_object_get(root, "data"), i, model) {
        const char *id = json_string_value(json_object_get(model, "id"));
        if (!id) continue;
        if (json_is_string(json_object_get(model, "parent"))) {
            bool counts = strncmp(id, r->options->prefix, strlen(r->options->prefix)) == 0;
            if (counts && (wanted < 0 || run->adapter_count < wanted)) adapter_add(run, id);
        } else if (!run->base && (!r->options->model || !strcmp(r->options->model, id))) {
            run->base = mem_strdup(id);
        }
    }
    if (!run->base) {
        fprintf(stderr, "lorad-bench: %s lists no base model%s%s\n", r->options->url,
                r->options->model ? " called " : "", r->options->model ? r->options->model : "");
        return false;
    }
    if (run->adapter_count >= wanted) return true;
    fprintf(stderr, "lorad-bench: --adapters %d: %s lists %d\n", wanted, r->options->url,
            run->adapter_count);
    return false;
}

static bool models_ask(struct runner *r) {
    struct models_answer answer = {0};
    const struct client_events events = {.on_end = models_end};
    client_start(r->loop, &r->target, "/v1/models", NULL, 30, &events, &answer);
    uv_run(r->loop, UV_RUN_DEFAULT);
    bool good = false;
    if (answer.status != 200) {
        fprintf(stderr, "lorad-bench: %s/v1/models: %d %s\n", r->options->url, answer.status,
                answer.text);
    } else {
        json_error_t error;
        json_t *root = json_loads(answer.text, 0, &error);
        if (root) good = models_take(r, root);
        else fprintf(stderr, "lorad-bench: %s/v1/models: not JSON: %s\n", r->options->url,
                     error.text);
        json_decref(root);
    }
    free(answer.text);
    return good;
}

// ------------------------------------------------------------------ one request

static json_t *prompt_make(const struct bench_options *o, const struct workload_request *w) {
    static const char *const words[] = {"the", "of", "and", "in", "to", "was", "that", "it"};
    uint64_t state = w->seed;
    if (!o->text_prompts) {
        json_t *ids = json_array();
        for (int i = 0; i < w->input_tokens; i++)
            json_array_append_new(
                ids, json_integer(3 + (int)(workload_uniform(&state) * (o->vocabulary - 3))));
        return ids;
    }
    char *text = mem_zalloc((size_t)w->input_tokens * 6 + 1, 1), *to = text;
    for (int i = 0; i < w->input_tokens; i++)
        to = stpcpy(stpcpy(to, i > 0 ? " " : ""), words[workload_bits(&state) % 8]);
    json_t *prompt = json_string(text);
    free(text);
    return prompt;
}

static char *body_make(const struct runner *r, const struct workload_request *w) {
    json_t *root = json_pack("{s:s,s:o,s:i,s:i,s:b,s:{s:b}}", "model",
                             w->adapter < 0 ? r->run->base : r->run->adapters[w->adapter],
                             "prompt", prompt_make(r->options, w), "max_tokens", w->output_tokens,
                             "temperature", 0, "stream", 1, "stream_options", "include_usage", 1);
    if (r->options->ignore_eos) json_object_set_new(root, "ignore_eos", json_true());
    char *body = json_dumps(root, JSON_COMPACT);
    json_decref(root);
    return body;
}

static void error_count(struct bench_run *run, const char *text) {
    for (size_t i = 0; i < run->error_count; i++)
        if (!strcmp(run->errors[i].text, text)) {
            run->errors[i].count++;
            return;
        }
    run->errors = mem_realloc(run->errors, (run->error_count + 1) * sizeof *run->errors);
    run->errors[run->error_count++] = (struct bench_error){mem_strdup(text), 1};
}

static void token_seen(struct runner *r, struct bench_request *request) {
    double now_s = since_start(r);
    r->tokens++;
    if (request->first_s == 0) {
        request->first_s = now_s;
        r->waiting--;
        r->running++;
    } else {
        samples_add(&r->run->itl_s, now_s - request->last_s);
    }
    request->last_s = now_s;
}

static void on_data(void *context, const char *data, size_t bytes) {
    struct flight *flight = context;
    struct runner *r = flight->runner;
    struct bench_request *request = &r->run->requests[flight->index];
    if (bytes == 6 && !memcmp(data, "[DONE]", 6)) return;
    json_error_t error;
    json_t *root = json_loadb(data, bytes, 0, &error);
    const json_t *failure = json_object_get(root, "error"), *usage = json_object_get(root, "usage");
    if (!root || failure) {
        const char *text = json_string_value(json_object_get(failure, "message"));
        request->failed = true;
        error_count(r->run, text ? text : "an event that is not JSON");
    } else if (json_is_object(usage)) {
        request->tokens = (int)json_integer_value(json_object_get(usage, "completion_tokens"));
        request->prompt_tokens = (int)json_integer_value(json_object_get(usage, "prompt_tokens"));
    }
    // The last chunk, which only says why it ended, brings no token.
    const json_t *choice = json_array_get(json_object_get(root, "choices"), 0);
    const char *text = json_string_value(json_object_get(choice, "text"));
    if (choice && text && (*text || json_is_null(json_object_get(choice, "finish_reason"))))
        token_seen(r, request);
    json_decref(root);
}

static void send_next(struct runner *r);

static void on_end(void *context, int status, const char *text) {
    struct flight *flight = context;
    struct runner *r = flight->runner;
    struct bench_request *request = &r->run->requests[flight->index];
    request->status = status;
    request->end_s = since_start(r);
    if (status != 200) {
        json_error_t error;
        json_t *root = json_loads(text, 0, &error);
        const char *message = json_string_value(
            json_object_get(json_object_get(root, "error"), "message"));
        char line[400];
        snprintf(line, sizeof line, "%d %s", status, message ? message : text);
        error_count(r->run, line);
        json_decref(root);
    } else if (request->tokens == 0 && !request->failed) {
        request->failed = true;
        error_count(r->run, "200 without usage");
    }
    request->failed |= status != 200;
    if (request->first_s > 0) r->running--;
    else r->waiting--;
    free(flight);
    r->ended++;
    if (r->options->concurrency > 0) send_next(r);
    if (r->ended == r->run->count && !uv_is_closing((uv_handle_t *)&r->arrivals)) {
        uv_close((uv_handle_t *)&r->arrivals, NULL);
        uv_close((uv_handle_t *)&r->ticks, NULL);
    }
}

static void send_next(struct runner *r) {
    if (r->sent == r->run->count) return;
    struct flight *flight = mem_zalloc(1, sizeof *flight);
    *flight = (struct flight){r, r->sent++};
    char *body = body_make(r, &r->run->workload[flight->index]);
    r->run->requests[flight->index].sent_s = since_start(r);
    r->waiting++;
    const struct client_events events = {on_data, on_end};
    client_start(r->loop, &r->target, "/v1/completions", body, r->options->timeout_s, &events,
                 flight);
    free(body);
}

// ------------------------------------------------------------------ pace and progress

static void on_arrival(uv_timer_t *timer) {
    struct runner *r = timer->data;
    double now_s = since_start(r);
    while (r->sent < r->run->count && r->run->workload[r->sent].at_s <= now_s) send_next(r);
    if (r->sent == r->run->count) return;
    double wait_s = r->run->workload[r->sent].at_s - now_s;
    uv_timer_start(timer, on_arrival, (uint64_t)(wait_s > 0 ? wait_s * 1000 : 0) + 1, 0);
}

static void progress(struct runner *r, double now_s) {
    if (now_s - r->line_s < (r->terminal ? 0 : LINE_EVERY_MS / 1000.0)) return;
    r->line_s = now_s;
    const struct bench_moment *m = &r->run->moments[r->run->moment_count - 1];
    fprintf(stderr, "%s%6.1f s  sent %zu/%zu  running %d  waiting %d  done %zu  %.0f tok/s%s",
            r->terminal ? "\r\033[K" : "", now_s, r->sent, r->run->count, r->running, r->waiting,
            r->ended, m->tokens_per_s, r->terminal ? "" : "\n");
}

static void on_tick(uv_timer_t *timer) {
    struct runner *r = timer->data;
    struct bench_run *run = r->run;
    double now_s = since_start(r);
    double before_s = run->moment_count ? run->moments[run->moment_count - 1].at_s : 0;
    if (run->moment_count == run->moment_room) {
        run->moment_room = 2 * run->moment_room + 256;
        run->moments = mem_realloc(run->moments, run->moment_room * sizeof *run->moments);
    }
    run->moments[run->moment_count++] = (struct bench_moment){
        now_s, r->running, r->waiting,
        now_s > before_s ? (double)(r->tokens - r->tokens_before) / (now_s - before_s) : 0};
    r->tokens_before = r->tokens;
    progress(r, now_s);
}

bool bench_run(const struct bench_options *options, struct bench_run *run) {
    *run = (struct bench_run){.began = time(NULL)};
    struct runner r = {.options = options, .run = run, .loop = uv_default_loop(),
                       .terminal = isatty(STDERR_FILENO)};
    if (!r.loop) {
        fprintf(stderr, "lorad-bench: no event loop; raise the limit of open files (ulimit -n)\n");
        return false;
    }
    if (!client_target_parse(r.loop, options->url, &r.target)) return false;
    r.target.authorization = options->authorization;
    if (!models_ask(&r)) return false;

    struct workload_options workload = options->workload;
    workload.adapters = run->adapter_count;
    if (options->concurrency > 0 && workload.requests == 0)
        workload.requests = (int)(workload.rate * workload.duration_s);
    if (options->concurrency > 0) workload.rate = 0;
    run->count = workload_make(&workload, &run->workload);
    run->requests = mem_zalloc(run->count + 1, sizeof *run->requests);
    if (run->count == 0) {
        fprintf(stderr, "lorad-bench: rate x duration is less than one request\n");
        return false;
    }
    fprintf(stderr, "%zu requests over %d adapters of %s\n", run->count, run->adapter_count,
            run->base);
    r.start_s = clock_seconds();
    uv_timer_init(r.loop, &r.arrivals);
    uv_timer_init(r.loop, &r.ticks);
    r.arrivals.data = r.ticks.data = &r;
    uv_timer_start(&r.ticks, on_tick, MOMENT_MS, MOMENT_MS);
    if (options->concurrency > 0)
        for (int i = 0; i < options->concurrency; i++) send_next(&r);
    else on_arrival(&r.arrivals);
    uv_run(r.loop, UV_RUN_DEFAULT);
    run->wall_s = since_start(&r);
    if (r.terminal) fprintf(stderr, "\r\033[K");
    return true;
}

void bench_run_deinit(struct bench_run *run) {
    for (int i = 0; i < run->adapter_count; i++) free(run->adapters[i]);
    for (size_t i = 0; i < run->error_count; i++) free(run->errors[i].text);
    free(run->adapters);
    free(run->errors);
    free(run->workload);
    free(run->requests);
    free(run->moments);
    free(run->base);
    samples_deinit(&run->itl_s);
}
