// Statements of a template to text.
#include "server/text/template_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { STEPS_MAX = 2000000, OUTPUT_MAX = 16 << 20 };

// ------------------------------------------------------------------ what rendering owns

json_t *render_keep(struct render *r, json_t *value) {
    if (!value) return render_fail(r, "a text that is not valid UTF-8");
    json_array_append_new(r->kept, value);
    return value;
}

json_t *render_string(struct render *r, const char *text, size_t bytes) {
    if (bytes > OUTPUT_MAX) return render_fail(r, "a text is too large");
    return render_keep(r, json_stringn(text ? text : "", bytes));
}

void *render_fail(struct render *r, const char *format, ...) {
    if (r->failed) return NULL;
    r->failed = true;
    char text[200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    (void)error_set(r->err, STATUS_INVALID, "the chat template, line %d: %s", r->line, text);
    return NULL;
}

bool render_step(struct render *r) {
    if (r->failed) return false;
    if (++r->steps > STEPS_MAX) render_fail(r, "it takes too long");
    if (r->output.bytes > OUTPUT_MAX) render_fail(r, "its text is too large");
    return !r->failed;
}

// ------------------------------------------------------------------ scopes

static bool scope_open(struct render *r) {
    if (r->scope_count == SCOPES_MAX) {
        render_fail(r, "nested too deeply");
        return false;
    }
    r->scopes[r->scope_count++] = json_object();
    return true;
}

static void scope_close(struct render *r) {
    json_decref(r->scopes[--r->scope_count]);
}

// An undefined value leaves the name undefined.
static void bind(struct render *r, const char *name, json_t *value) {
    json_t *scope = r->scopes[r->scope_count - 1];
    if (value) json_object_set_nocheck(scope, name, value);
    else json_object_del(scope, name);
}

// One name takes the value, several take its items.
static void bind_names(struct render *r, const struct node *of, json_t *value) {
    if (of->count == 1) {
        bind(r, of->items->text, value);
        return;
    }
    if (!json_is_array(value) || json_array_size(value) != (size_t)of->count) {
        render_fail(r, "%d names for a value that has not so many items", of->count);
        return;
    }
    size_t i = 0;
    for (const struct node *name = of->items; name; name = name->next)
        bind(r, name->text, json_array_get(value, i++));
}

// ------------------------------------------------------------------ macros

const struct node *render_macro(const struct render *r, const char *name) {
    for (int i = r->macro_count - 1; i >= 0; i--)
        if (strcmp(r->macros[i]->text, name) == 0) return r->macros[i];
    return NULL;
}

static json_t *captured(struct render *r, const struct node *block) {
    struct text_buffer before = r->output;
    r->output = (struct text_buffer){0};
    render_block(r, block);
    json_t *text = render_string(r, r->output.data, r->output.bytes);
    free(r->output.data);
    r->output = before;
    return text;
}

// Position by position, then by keyword, then by default.
static void bind_parameters(struct render *r, const struct node *macro,
                            const struct arguments *given) {
    int position = 0;
    for (const struct node *parameter = macro->items; parameter; parameter = parameter->next) {
        json_t *value = NULL;
        bool found = position < given->count && !given->names[position];
        if (found) value = given->values[position++];
        for (int i = 0; i < given->count && !found; i++)
            if (given->names[i] && strcmp(given->names[i], parameter->text) == 0) {
                found = true;
                value = given->values[i];
            }
        if (!found && parameter->a) value = eval(r, parameter->a);
        bind(r, parameter->text, value);
    }
}

json_t *render_call_macro(struct render *r, const struct node *macro, const struct arguments *given) {
    int base = r->scope_base;
    if (!scope_open(r)) return NULL;
    r->scope_base = r->scope_count - 1; // it sees its own names and the template's
    bind_parameters(r, macro, given);
    json_t *text = captured(r, macro->c);
    r->scope_base = base;
    scope_close(r);
    return text;
}

// ------------------------------------------------------------------ statements

// What the loop goes over: the items that its condition lets through.
static json_t *loop_items(struct render *r, const struct node *node) {
    json_t *items = value_items(r, eval(r, node->a)), *item;
    if (!node->b || r->failed) return items;
    json_t *chosen = render_keep(r, json_array());
    size_t i;
    json_array_foreach(items, i, item) {
        if (!scope_open(r)) return NULL;
        bind_names(r, node, item);
        if (value_is_true(eval(r, node->b))) json_array_append(chosen, item);
        scope_close(r);
    }
    return chosen;
}

static void bind_loop(struct render *r, const json_t *items, size_t i) {
    json_int_t count = (json_int_t)json_array_size(items), at = (json_int_t)i;
    json_t *loop = json_pack("{s:I,s:I,s:I,s:I,s:I,s:b,s:b}", "index", at + 1, "index0", at,
                             "revindex", count - at, "revindex0", count - at - 1, "length", count,
                             "first", at == 0, "last", at + 1 == count);
    if (at > 0) json_object_set(loop, "previtem", json_array_get(items, i - 1));
    if (at + 1 < count) json_object_set(loop, "nextitem", json_array_get(items, i + 1));
    bind(r, "loop", loop);
    json_decref(loop);
}

static void render_for(struct render *r, const struct node *node) {
    json_t *items = loop_items(r, node);
    if (json_array_size(items) == 0) {
        if (node->d) render_block(r, node->d);
        return;
    }
    for (size_t i = 0; i < json_array_size(items) && render_step(r); i++) {
        if (!scope_open(r)) return;
        bind_names(r, node, json_array_get(items, i));
        bind_loop(r, items, i);
        render_block(r, node->c);
        scope_close(r);
        bool ends = r->flow == FLOW_BREAK;
        r->flow = FLOW_ON;
        if (ends) break;
    }
}

static void render_set(struct render *r, const struct node *node) {
    json_t *value = node->c ? captured(r, node->c) : eval(r, node->b);
    if (r->failed) return;
    if (!node->a) {
        bind_names(r, node, value);
        return;
    }
    json_t *object = eval(r, node->a->a);
    if (!json_is_object(object)) render_fail(r, "an attribute is set of what is no namespace");
    else json_object_set_nocheck(object, node->a->text, value ? value : render_keep(r, json_null()));
}

static void render_node(struct render *r, const struct node *node) {
    switch (node->kind) {
    case NODE_TEXT: text_append(&r->output, node->text, node->bytes); break;
    case NODE_OUTPUT: value_append(&r->output, eval(r, node->a)); break;
    case NODE_BLOCK: render_block(r, node); break;
    case NODE_FOR: render_for(r, node); break;
    case NODE_SET: render_set(r, node); break;
    case NODE_BREAK: r->flow = FLOW_BREAK; break;
    case NODE_CONTINUE: r->flow = FLOW_CONTINUE; break;
    case NODE_IF:
        if (value_is_true(eval(r, node->a))) render_node(r, node->b);
        else if (node->c) render_node(r, node->c);
        break;
    case NODE_MACRO:
        if (r->macro_count == MACROS_MAX) render_fail(r, "too many macros");
        else r->macros[r->macro_count++] = node;
        break;
    default: render_fail(r, "a value where a statement is wanted");
    }
}

void render_block(struct render *r, const struct node *node) {
    for (const struct node *item = node->items; item && r->flow == FLOW_ON; item = item->next) {
        if (!render_step(r)) return;
        r->line = item->line;
        render_node(r, item);
    }
}
