// Chat templates against what transformers renders (tests/reference/make_chat_templates.py); what is
// refused when a template is loaded; bounds.
#include "server/text/chat_template.h"

#include "base/file.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static json_t *variables_of(const char *text) {
    json_t *variables = json_loads(text, 0, NULL);
    assert_non_null(variables);
    return variables;
}

// Renders; NULL with the error's text in `message`.
static char *render(const char *source, const json_t *variables, size_t *bytes, char message[320]) {
    struct error err = {0};
    struct chat_template *template = NULL;
    char *text = NULL;
    enum status status = chat_template_create(source, strlen(source), &template, &err);
    if (status == STATUS_OK) status = chat_template_render(template, variables, &text, bytes, &err);
    assert_int_equal(status == STATUS_OK, text != NULL);
    assert_int_equal(status != STATUS_OK, err.text[0] != 0);
    snprintf(message, 320, "%s", err.text);
    chat_template_destroy(template);
    return text;
}

// Catches: anything that Jinja, Python or transformers' settings do otherwise.
static void as_transformers(void **state) {
    (void)state;
    char *data;
    size_t size, wrong = 0, cases = 0;
    struct error err;
    assert_int_equal(file_read_all(LORAD_SOURCE_DIR "/tests/fixtures/chat_templates.jsonl", 1 << 24,
                                   &data, &size, &err), STATUS_OK);
    for (char *line = strtok(data, "\n"); line; line = strtok(NULL, "\n"), cases++) {
        json_t *one = variables_of(line), *expected = json_object_get(one, "text");
        char message[320];
        size_t bytes = 0;
        char *text = render(json_string_value(json_object_get(one, "template")),
                            json_object_get(one, "variables"), &bytes, message);
        bool same = expected ? text && bytes == json_string_length(expected) &&
                                   memcmp(text, json_string_value(expected), bytes) == 0
                             : text == NULL;
        if (!same) {
            print_message("%s: got %s%s\n  expected %s\n",
                          json_string_value(json_object_get(one, "name")), text ? text : "error: ",
                          text ? "" : message,
                          expected ? json_string_value(expected) : "an error");
            wrong++;
        }
        free(text);
        json_decref(one);
    }
    free(data);
    assert_true(cases > 200);
    assert_int_equal(wrong, 0);
}

// Catches: a template that is loaded and then fails each request, or one that is not well formed.
static void refused_at_load(void **state) {
    (void)state;
    static const struct {
        const char *source;
        enum status status;
        const char *says;
    } cases[] = {
        {"{{ a|nothing }}", STATUS_UNSUPPORTED, "line 1: there is no filter \"nothing\""},
        {"\n{% include 'x' %}", STATUS_UNSUPPORTED, "line 2: there is no statement \"include\""},
        {"{{ a is wet }}", STATUS_UNSUPPORTED, "there is no test \"wet\""},
        {"{{ a.encode() }}", STATUS_UNSUPPORTED, "there is no method \"encode\""},
        {"{{ a", STATUS_INVALID, "has no end"},
        {"{{ 'a }}", STATUS_INVALID, "a string has no end"},
        {"{% if a %}b", STATUS_INVALID, "is missing at the end"},
        {"{% endif %}", STATUS_UNSUPPORTED, "\"endif\""},
        {"{{ }}", STATUS_INVALID, "a value is missing"},
        {"{{ a b }}", STATUS_INVALID, "is missing before \"b\""},
        {"{% for in x %}{% endfor %}", STATUS_INVALID, ""},
        {"{# never ends", STATUS_INVALID, "has no end"},
        {"{{ a ? b }}", STATUS_INVALID, "no operator"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct error err = {0};
        struct chat_template *template = NULL;
        assert_int_equal(chat_template_create(cases[i].source, strlen(cases[i].source), &template,
                                              &err), cases[i].status);
        assert_null(template);
        if (!strstr(err.text, cases[i].says)) fail_msg("%s: %s", cases[i].source, err.text);
    }
}

// Catches: a template that runs for ever, eats all memory or the stack.
static void bounded(void **state) {
    (void)state;
    static const char *const sources[] = {
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set ns = namespace(s='0123456789') %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}"
        "{% endfor %}",
        "{% for a in range(10000000) %}x{% endfor %}",
        "{% set l = [1] %}{% for a in l %}{% set x = l.append(1) %}{% endfor %}",
    };
    json_t *none = json_object();
    char message[320];
    size_t bytes;
    for (size_t i = 0; i < sizeof sources / sizeof *sources; i++)
        assert_null(render(sources[i], none, &bytes, message));
    char deep[4096];
    memset(deep, '(', sizeof deep);
    memcpy(deep, "{{", 2);
    deep[sizeof deep - 1] = 0;
    assert_null(render(deep, none, &bytes, message));
    memset(deep + 2, '-', sizeof deep - 3);
    assert_null(render(deep, none, &bytes, message));
    json_decref(none);
}

static void folder(void **state) {
    (void)state;
    struct error err = {0};
    struct chat_template *template = NULL;
    assert_int_equal(chat_template_load(LORAD_SOURCE_DIR "/demo/model", &template, &err), STATUS_OK);
    json_t *variables = variables_of("{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}");
    char *text;
    size_t bytes;
    assert_int_equal(chat_template_render(template, variables, &text, &bytes, &err), STATUS_OK);
    assert_string_equal(text, "<|begin_of_text|>Hi\n\n");
    free(text);
    json_decref(variables);
    chat_template_destroy(template);
    assert_int_equal(chat_template_load(LORAD_SOURCE_DIR "/docs", &template, &err), STATUS_NOT_FOUND);
}

int main(void) {
    const struct CMUnitTest all[] = {cmocka_unit_test(as_transformers),
                                     cmocka_unit_test(refused_at_load), cmocka_unit_test(bounded),
                                     cmocka_unit_test(folder)};
    return cmocka_run_group_tests(all, NULL, NULL);
}
