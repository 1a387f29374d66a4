// POST /v1/completions and /v1/chat/completions, the way in: JSON -> checked parameters -> tokenized
// requests -> engine.
// The body is parsed and tokenized on libuv's thread pool; submission is on the loop. Nothing is
// ignored silently but fields that nobody defines: what lorad cannot do is refused by name.
#include "api/completions_internal.h"

#include "base/file.h"
#include "base/memory.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { TEXT_MAX = 8 << 20, STOP_BYTES_MAX = 1024 };

enum status refuse(struct builder *b, const char *param, const char *text) {
    return error_set_param(b->err, STATUS_INVALID, param, "%s", text);
}

// ------------------------------------------------------------------ sampling

// What asks for nothing beyond what is done anyway.
static bool asks_nothing(const char *name, const json_t *value) {
    const char *text = json_string_value(strcmp(name, "response_format") == 0
                                             ? json_object_get(value, "type") : value);
    return !value || json_is_null(value) || json_is_false(value) ||
           (json_is_array(value) && json_array_size(value) == 0) ||
           (text && strcmp(name, "tool_choice") == 0 && strcmp(text, "none") == 0) ||
           (text && strcmp(name, "response_format") == 0 && strcmp(text, "text") == 0);
}

static enum status refuse_unsupported(struct builder *b) {
    static const char *const refused[] = {"suffix", "tools", "tool_choice", "functions",
                                          "response_format", "guided_json", "guided_regex",
                                          "structured_outputs", "use_beam_search", "documents",
                                          "chat_template"};
    const char *other = b->completion->chat ? "prompt" : "messages";
    if (json_object_get(b->root, other))
        return error_set_param(b->err, STATUS_UNSUPPORTED, other,
                               "%s belongs to the other completions endpoint", other);
    if (b->completion->chat && !asks_nothing("echo", json_object_get(b->root, "echo")))
        return error_set_param(b->err, STATUS_UNSUPPORTED, "echo", "a chat has no echo");
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        if (!asks_nothing(refused[i], json_object_get(b->root, refused[i])))
            return error_set_param(b->err, STATUS_UNSUPPORTED, refused[i],
                                   "%s is not supported by this endpoint", refused[i]);
    }
    return STATUS_OK;
}

static enum status read_numbers(struct builder *b) {
    struct sampling *s = &b->pattern->sampling;
    const struct {
        const char *name;
        double min, max;
        float *to;
    } rows[] = {{"temperature", 0, 2, &s->temperature},
                {"top_p", 1e-6, 1, &s->top_p},
                {"min_p", 0, 1, &s->min_p},
                {"presence_penalty", -2, 2, &s->presence_penalty},
                {"frequency_penalty", -2, 2, &s->frequency_penalty},
                {"repetition_penalty", 0.01, 100, &s->repetition_penalty}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        double value = *rows[i].to;
        enum status status =
            param_number(b->root, rows[i].name, rows[i].min, rows[i].max, &value, b->err);
        if (status) return status;
        *rows[i].to = (float)value;
    }
    return STATUS_OK;
}

static enum status read_integers(struct builder *b) {
    struct sampling *s = &b->pattern->sampling;
    int vocabulary = b->completion->api->setup.config->vocabulary;
    int context = b->completion->api->setup.context_max;
    int64_t max_tokens = 16, min_tokens = 0, top_k = 0, logprobs = -1, n = 1, best_of = 0;
    int64_t priority = 0, seed = 0, deadline_ms = 0;
    bool echo = b->completion->echo;
    const struct {
        const char *name;
        int64_t min, max, *to;
    } rows[] = {{"max_tokens", echo ? 0 : 1, context, &max_tokens},
                {"min_tokens", 0, context, &min_tokens},
                {"top_k", -1, vocabulary, &top_k},
                {"logprobs", 0, LOGPROBS_MAX, &logprobs},
                {"n", 1, CHOICES_MAX, &n},
                {"best_of", 1, CHOICES_MAX, &best_of},
                {"priority", -1000000, 1000000, &priority},
                {"seed", INT64_MIN, INT64_MAX, &seed},
                {"deadline_ms", 1, 86400000, &deadline_ms}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (b->completion->chat && rows[i].to == &logprobs) continue; // a chat's are true or false
        enum status status =
            param_integer(b->root, rows[i].name, rows[i].min, rows[i].max, rows[i].to, b->err);
        if (status) return status;
    }
    if (best_of && best_of != n)
        return refuse(b, "best_of", "best_of must equal n: choosing among more is not supported");
    if (min_tokens > max_tokens && !b->completion->chat)
        return refuse(b, "min_tokens", "min_tokens must not be larger than max_tokens");
    s->max_tokens = (int)max_tokens;
    s->min_tokens = (int)min_tokens;
    s->top_k = top_k < 0 ? 0 : (int)top_k;
    s->logprobs = b->completion->logprobs = (int)logprobs;
    b->completion->n = (int)n;
    b->pattern->priority = (int)priority;
    s->seed = (uint64_t)seed;
    if (b->completion->chat && !json_is_integer(json_object_get(b->root, "max_tokens")))
        s->max_tokens = 0; // as many as there is room for, once the prompt is known
    s->seeded = json_is_integer(json_object_get(b->root, "seed"));
    if (deadline_ms) b->pattern->deadline_s = clock_seconds() + (double)deadline_ms / 1000;
    return STATUS_OK;
}

static enum status read_flags(struct builder *b) {
    struct completion *c = b->completion;
    struct sampling *s = &b->pattern->sampling;
    const struct {
        const char *name;
        bool *to;
    } rows[] = {{"stream", &c->stream},
                {"echo", &c->echo},
                {"return_token_ids", &c->return_token_ids},
                {"ignore_eos", &s->ignore_eos},
                {"include_stop_str_in_output", &s->include_stop}};
    enum status status = STATUS_OK;
    for (size_t i = 0; i < sizeof rows / sizeof *rows && !status; i++)
        status = param_bool(b->root, rows[i].name, rows[i].to, b->err);
    const json_t *options = json_object_get(b->root, "stream_options");
    if (status || !options || json_is_null(options)) return status;
    if (!json_is_object(options))
        return refuse(b, "stream_options", "stream_options must be an object");
    if (!c->stream)
        return refuse(b, "stream_options", "stream_options needs \"stream\": true");
    status = param_bool(options, "include_usage", &c->include_usage, b->err);
    if (!status)
        status = param_bool(options, "continuous_usage_stats", &c->continuous_usage, b->err);
    return status;
}

static enum status read_stops(struct builder *b) {
    static const char *const form = "stop must be a string, or a list of up to 4 strings, each of "
                                    "1 to 1024 bytes";
    struct request *p = b->pattern;
    json_t *stop = json_object_get(b->root, "stop"), *one;
    if (stop && !json_is_null(stop) && !json_is_string(stop) && !json_is_array(stop))
        return refuse(b, "stop", form);
    size_t count = json_is_string(stop) ? 1 : json_array_size(stop);
    if (count > STOP_STRINGS_MAX) return refuse(b, "stop", form);
    for (size_t i = 0; i < count; i++) {
        one = json_is_string(stop) ? stop : json_array_get(stop, i);
        size_t bytes = json_string_length(one);
        if (!json_is_string(one) || bytes == 0 || bytes > STOP_BYTES_MAX)
            return refuse(b, "stop", form);
        p->stop[p->stop_count++] = mem_strdup(json_string_value(one));
    }
    json_t *ids = json_object_get(b->root, "stop_token_ids");
    if (!ids || json_is_null(ids)) return STATUS_OK;
    if (!json_is_array(ids) || json_array_size(ids) > STOP_IDS_MAX)
        return refuse(b, "stop_token_ids", "stop_token_ids must be a list of up to 16 ids");
    for (size_t i = 0; i < json_array_size(ids); i++) {
        const json_t *id = json_array_get(ids, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= b->completion->api->setup.config->vocabulary)
            return refuse(b, "stop_token_ids", "stop_token_ids must hold ids of the vocabulary");
        p->stop_ids[p->stop_id_count++] = (int32_t)json_integer_value(id);
    }
    return STATUS_OK;
}

static enum status read_bias(struct builder *b) {
    json_t *bias = json_object_get(b->root, "logit_bias"), *value;
    if (!bias || json_is_null(bias)) return STATUS_OK;
    if (!json_is_object(bias) || json_object_size(bias) > LOGIT_BIAS_MAX)
        return refuse(b, "logit_bias", "logit_bias must be an object of up to 1024 token ids");
    struct sampling *s = &b->pattern->sampling;
    int32_t *ids = mem_zalloc(json_object_size(bias) + 1, sizeof *ids);
    float *values = mem_zalloc(json_object_size(bias) + 1, sizeof *values);
    s->bias_ids = ids;
    s->bias_values = values;
    const char *key;
    json_object_foreach(bias, key, value) {
        char *end;
        long id = strtol(key, &end, 10);
        double number = json_number_value(value);
        if (end == key || *end || id < 0 || id >= b->completion->api->setup.config->vocabulary)
            return refuse(b, "logit_bias", "logit_bias keys must be ids of the vocabulary");
        if (!json_is_number(value) || !(number >= -100 && number <= 100))
            return refuse(b, "logit_bias", "logit_bias values must be numbers from -100 to 100");
        ids[s->bias_count] = (int32_t)id;
        values[s->bias_count++] = (float)number;
    }
    return STATUS_OK;
}

// ------------------------------------------------------------------ adapters

static enum status add_adapter(struct builder *b, const char *name, float weight,
                               const char *param) {
    struct request *p = b->pattern;
    if (p->adapter_count == REQUEST_ADAPTERS_MAX)
        return refuse(b, param, "a request may mix up to 4 adapters");
    struct adapter *adapter = registry_find(b->completion->api->setup.registry, name);
    if (!adapter)
        return error_set_param(b->err, STATUS_NOT_FOUND, param,
                               "there is no model or adapter '%.128s'; GET /v1/models lists them",
                               name);
    p->adapter_weights[p->adapter_count] = weight;
    p->twins[p->adapter_count] = registry_twin(b->completion->api->setup.registry, adapter);
    p->adapters[p->adapter_count++] = adapter;
    return STATUS_OK;
}

static enum status read_salt(struct builder *b) {
    const char *salt = NULL;
    enum status status = param_string(b->root, "cache_salt", 1024, &salt, b->err);
    if (!status && salt) b->pattern->cache_salt = mem_strdup(salt);
    return status;
}

static enum status read_model(struct builder *b) {
    const char *base = b->completion->api->setup.base_id, *model = NULL, *adapter = NULL;
    enum status status = param_string(b->root, "model", 1024, &model, b->err);
    if (!status) status = param_string(b->root, "adapter_id", 1024, &adapter, b->err);
    if (status) return status;
    if (!model && !adapter)
        return refuse(b, "model", "model must name the base model or an adapter");
    const char *shown = adapter ? adapter : model;
    snprintf(b->completion->model, sizeof b->completion->model, "%.150s", shown);
    if (adapter && model && strcmp(model, base) != 0 && strcmp(model, adapter) != 0)
        return refuse(b, "adapter_id", "model and adapter_id name different adapters");
    if (strcmp(shown, base) != 0 && (status = add_adapter(b, shown, 1, "model"))) return status;
    json_t *mix = json_object_get(b->root, "lora"), *one;
    if (!mix || json_is_null(mix)) return STATUS_OK;
    if (!json_is_array(mix)) return refuse(b, "lora", "lora must be a list of {id, weight}");
    size_t i;
    json_array_foreach(mix, i, one) {
        const char *id = NULL;
        double weight = 1;
        if ((status = param_string(one, "id", 1024, &id, b->err)) ||
            (status = param_number(one, "weight", -16, 16, &weight, b->err)))
            return status;
        if (!id) return refuse(b, "lora", "lora must be a list of {id, weight}");
        if ((status = add_adapter(b, id, (float)weight, "lora"))) return status;
    }
    return STATUS_OK;
}

// ------------------------------------------------------------------ prompts

// A copy of the pattern with its own strings, biases and adapter references.
static struct request *request_copy(const struct request *pattern) {
    struct request *r = request_create();
    r->sampling = pattern->sampling;
    size_t count = (size_t)pattern->sampling.bias_count;
    int32_t *ids = mem_zalloc(count + 1, sizeof *ids);
    float *values = mem_zalloc(count + 1, sizeof *values);
    if (count) memcpy(ids, pattern->sampling.bias_ids, count * sizeof *ids);
    if (count) memcpy(values, pattern->sampling.bias_values, count * sizeof *values);
    r->sampling.bias_ids = ids;
    r->sampling.bias_values = values;
    r->adapter_count = pattern->adapter_count;
    for (int i = 0; i < r->adapter_count; i++) {
        r->adapters[i] = adapter_ref(pattern->adapters[i]);
        if (pattern->twins[i]) r->twins[i] = adapter_ref(pattern->twins[i]);
        r->adapter_weights[i] = pattern->adapter_weights[i];
    }
    r->stop_count = pattern->stop_count;
    for (int i = 0; i < r->stop_count; i++) r->stop[i] = mem_strdup(pattern->stop[i]);
    memcpy(r->stop_ids, pattern->stop_ids, sizeof r->stop_ids);
    r->stop_id_count = pattern->stop_id_count;
    r->deadline_s = pattern->deadline_s;
    r->priority = pattern->priority;
    memcpy(r->tenant, pattern->tenant, sizeof r->tenant);
    if (pattern->cache_salt) r->cache_salt = mem_strdup(pattern->cache_salt);
    return r;
}

static enum status encode_text(struct builder *b, const json_t *text, struct token_list *list) {
    const struct tokenizer *tokenizer = b->completion->api->setup.tokenizer;
    if (!tokenizer)
        return refuse(b, "prompt", "this model has no tokenizer: send the prompt as token ids");
    if (json_string_length(text) > TEXT_MAX)
        return refuse(b, "prompt", "prompt is larger than 8 MiB");
    enum status status = tokenizer_encode(tokenizer, json_string_value(text),
                                          json_string_length(text), true, false, list, b->err);
    return status ? error_set_param(b->err, STATUS_INVALID, "prompt", "%s", b->err->text) : status;
}

static enum status read_ids(struct builder *b, const json_t *array, struct token_list *list) {
    int vocabulary = b->completion->api->setup.config->vocabulary;
    list->count = json_array_size(array);
    list->ids = mem_zalloc(list->count + 1, sizeof *list->ids);
    for (size_t i = 0; i < list->count; i++) {
        const json_t *id = json_array_get(array, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= vocabulary) {
            free(list->ids);
            return error_set_param(b->err, STATUS_INVALID, "prompt",
                                   "prompt must hold token ids from 0 to %d", vocabulary - 1);
        }
        list->ids[i] = (int32_t)json_integer_value(id);
    }
    return STATUS_OK;
}

enum status builder_add_choices(struct builder *b, const struct token_list *prompt,
                                const char *text) {
    struct completion *c = b->completion;
    const struct tokenizer *tokenizer = c->api->setup.tokenizer;
    if (prompt->count > (size_t)c->api->setup.context_max)
        return error_set_param(b->err, STATUS_INVALID, c->chat ? "messages" : "prompt",
                               "the prompt has %zu tokens; this model's context is %d",
                               prompt->count, c->api->setup.context_max);
    for (int i = 0; i < c->n; i++) {
        struct choice *choice = &c->choices[c->choice_count];
        struct request *r = choice->request = request_copy(b->pattern);
        r->owner = c;
        r->choice = c->choice_count++;
        snprintf(r->id, sizeof r->id, "%.63s", c->id);
        r->prompt = mem_alloc(prompt->count * sizeof *r->prompt);
        memcpy(r->prompt, prompt->ids, prompt->count * sizeof *r->prompt);
        r->prompt_count = (int)prompt->count;
        r->echo_logprobs = c->echo && c->logprobs >= 0;
        if (c->echo && text) choice->prompt_text = mem_strdup(text);
        else if (c->echo && tokenizer)
            choice->prompt_text = tokenizer_decode(tokenizer, prompt->ids, prompt->count, false,
                                                   &(size_t){0});
    }
    return STATUS_OK;
}

// Adds n choices for one prompt (a string or a list of ids).
static enum status add_prompt(struct builder *b, const json_t *prompt) {
    struct token_list list = {0};
    enum status status = json_is_string(prompt) ? encode_text(b, prompt, &list)
                                                : read_ids(b, prompt, &list);
    if (status) return status;
    if (list.count == 0 || (json_is_string(prompt) && json_string_length(prompt) == 0))
        status = refuse(b, "prompt", "prompt is empty");
    else status = builder_add_choices(b, &list, json_string_value(prompt));
    free(list.ids);
    return status;
}

static enum status read_prompts(struct builder *b) {
    static const char *const form = "prompt must be a string, a list of strings, a list of token "
                                    "ids, or a list of lists of token ids";
    struct completion *c = b->completion;
    json_t *prompt = json_object_get(b->root, "prompt");
    json_t *first = json_array_get(prompt, 0);
    bool many = json_is_array(prompt) && (json_is_string(first) || json_is_array(first));
    if (!json_is_string(prompt) && !json_is_array(prompt)) return refuse(b, "prompt", form);
    size_t count = many ? json_array_size(prompt) : 1;
    if (count * (size_t)c->n > CHOICES_MAX)
        return refuse(b, "n", "prompts times n must be at most 128");
    c->choices = mem_zalloc(count * (size_t)c->n, sizeof *c->choices);
    for (size_t i = 0; i < count; i++) {
        const json_t *one = many ? json_array_get(prompt, i) : prompt;
        if (!json_is_string(one) && !json_is_array(one)) return refuse(b, "prompt", form);
        if (many && json_is_string(one) != json_is_string(first))
            return refuse(b, "prompt", form);
        enum status status = add_prompt(b, one);
        if (status) return status;
    }
    return STATUS_OK;
}

// ------------------------------------------------------------------ the way

static enum status build(struct builder *b) {
    struct completion *c = b->completion;
    const char *user = NULL, *request_id = NULL;
    enum status status;
    if ((status = refuse_unsupported(b)) || (status = read_flags(b)) ||
        (status = read_numbers(b)) || (status = read_integers(b)) ||
        (c->chat && (status = chat_read_numbers(b))) || (status = read_stops(b)) ||
        (status = read_bias(b)) || (status = param_string(b->root, "user", 512, &user, b->err)) ||
        (status = param_string(b->root, "request_id", 64, &request_id, b->err)) ||
        (status = read_salt(b)) || (status = read_model(b)))
        return status;
    // Keys cannot be made up, users can: with keys, the key is the tenant.
    if (c->key > 0) snprintf(b->pattern->tenant, sizeof b->pattern->tenant, "key-%d", c->key);
    else if (user) snprintf(b->pattern->tenant, sizeof b->pattern->tenant, "%.63s", user);
    if (request_id)
        snprintf(c->id, sizeof c->id, "%s-%.64s", c->chat ? "chatcmpl" : "cmpl", request_id);
    return c->chat ? chat_read_messages(b) : read_prompts(b);
}

// Pool thread.
static void completion_work(struct offload *offload) {
    struct completion *c = (struct completion *)offload;
    json_t *root = NULL;
    if (body_parse(c->body, c->body_bytes, &root, &c->err) == STATUS_OK) {
        struct builder b = {c, root, &c->err, request_create()};
        c->err.status = build(&b);
        request_destroy(b.pattern);
    }
    json_decref(root);
    free(c->body);
    c->body = NULL;
}

static void completion_submit(struct offload *offload) {
    struct completion *c = (struct completion *)offload;
    if (c->err.status == STATUS_OK && c->connection) {
        struct request *requests[CHOICES_MAX];
        for (int i = 0; i < c->choice_count; i++) requests[i] = c->choices[i].request;
        c->err.status = engine_submit(c->api->engine, requests, c->choice_count, &c->err);
        c->submitted = c->err.status == STATUS_OK;
    }
    if (c->submitted) {
        completion_begin(c);
        return;
    }
    if (c->connection) respond_error(c->connection, &c->err);
    completion_destroy(c);
}

static void handle(struct connection *connection, const struct http_request *r, bool chat) {
    struct api *api = connection->api;
    if (api->draining) {
        respond_refusal(connection, 503, NULL, NULL, "the server is shutting down");
        return;
    }
    if (atomic_load(&api->metrics->waiting) >= api->setup.options->max_queue) {
        respond_refusal(connection, 429, NULL, NULL, "the queue is full; try again later");
        return;
    }
    struct completion *c = mem_zalloc(1, sizeof *c);
    c->api = api;
    c->connection = connection;
    c->chat = chat;
    c->created = (int64_t)time(NULL);
    c->key = keys_find(api->api_keys, r->authorization);
    c->body = mem_strndup(r->body, r->body_bytes);
    c->body_bytes = r->body_bytes;
    snprintf(c->id, sizeof c->id, "%s-%llx%06llx", chat ? "chatcmpl" : "cmpl",
             (unsigned long long)api->created, (unsigned long long)++api->ids);
    c->offload.work = completion_work;
    c->offload.done = completion_submit;
    connection->exchange = c;
    connection->gone = completion_gone;
    offload_start(api, &c->offload);
}

void handle_completions(struct connection *connection, const struct http_request *r,
                        const char *tail) {
    (void)tail;
    handle(connection, r, false);
}

void handle_chat_completions(struct connection *connection, const struct http_request *r,
                             const char *tail) {
    (void)tail;
    handle(connection, r, true);
}
