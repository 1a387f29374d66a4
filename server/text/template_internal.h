// What the files of the chat template share.
//
//   template_lex.c        source -> tokens, white space control done
//   template_parse.c      tokens -> statements;  template_expression.c  -> expressions
//   template_render.c     statements -> text;    template_eval.c        expressions -> values
//   template_operations.c filters, tests, methods and functions
//
// A value is a json_t; NULL is Jinja's undefined. Values that evaluation makes live until the
// rendering ends, so nobody counts references but render_keep. Tokens and nodes lie in the template's
// arena.
#ifndef LORAD_SERVER_TEXT_TEMPLATE_INTERNAL_H
#define LORAD_SERVER_TEXT_TEMPLATE_INTERNAL_H

#include "server/text/chat_template.h"

#include "base/memory.h"
#include "server/text/text_internal.h"

// ------------------------------------------------------------------ tokens

enum token_type {
    TOKEN_TEXT, TOKEN_OUTPUT_BEGIN, TOKEN_OUTPUT_END, TOKEN_TAG_BEGIN, TOKEN_TAG_END, TOKEN_NAME,
    TOKEN_STRING, TOKEN_NUMBER, TOKEN_OPERATOR, TOKEN_END
};

struct template_token {
    enum token_type type;
    const char *text; // NUL-terminated; strings without their escapes
    size_t bytes;
    int line;
    struct template_token *next; // of TOKEN_END: itself
};
enum status template_lex(struct arena *arena, const char *source, size_t bytes, struct template_token **first,
                         struct error *err);

// ------------------------------------------------------------------ the tree

enum node_kind {
    NODE_LITERAL,   // literal
    NODE_NAME,      // text
    NODE_ATTRIBUTE, // a.text
    NODE_INDEX,     // a[b]
    NODE_SLICE,     // a[first : second : third of the items], NODE_NONE where one is left out
    NODE_CALL,      // a(items), each with the name of its keyword, if any
    NODE_FILTER,    // a|text(items)
    NODE_TEST,      // a is text(items)
    NODE_NOT, NODE_NEGATIVE, // a
    NODE_AND, NODE_OR,       // a, b
    NODE_BINARY,    // a text b: + - * / // % ** ~ == != < > <= >= in
    NODE_CHOICE,    // b if a else c (c may be NULL)
    NODE_LIST,      // items
    NODE_DICT,      // items: key, value, key, value
    NODE_NONE,
    // statements
    NODE_TEXT,      // text
    NODE_OUTPUT,    // a
    NODE_BLOCK,     // items
    NODE_IF,        // if a: b, else c (may be NULL)
    NODE_FOR,       // for items (names) in a if b (may be NULL): c, else d (may be NULL)
    NODE_SET,       // items (names), or the attribute a, = b, or = the text of the block c
    NODE_MACRO,     // text(items: names, a: default or NULL): c
    NODE_BREAK, NODE_CONTINUE,
};

struct node {
    enum node_kind kind;
    int line;
    const char *text;
    size_t bytes;
    const char *keyword; // of an argument
    json_t *literal;     // borrowed from the template
    struct node *a, *b, *c, *d;
    struct node *items, *last, *next;
    int count;
};

struct parser {
    struct arena *arena;
    const struct template_token *token; // not taken yet
    json_t *literals;          // array: owns them
    int depth;
    struct error *err;
};

// NULL with p->err set on failure, as from every parse_ function.
struct node *parse_template(struct parser *p);
struct node *parse_expression(struct parser *p);
struct node *parse_tuple(struct parser *p); // expressions with commas between: a list
struct node *parse_conditionless(struct parser *p); // no "if" behind it: a loop has its own
struct node *parse_name(struct parser *p);

struct node *node_create(const struct parser *p, enum node_kind kind);
void node_append(struct node *to, struct node *item);
bool at_operator(const struct parser *p, const char *text);
bool at_name(const struct parser *p, const char *text);
bool take_operator(struct parser *p, const char *text); // false: something else stands there
bool take_name(struct parser *p, const char *text);
bool expect_operator(struct parser *p, const char *text); // false: it is told
void *parse_fail(struct parser *p, enum status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

// ------------------------------------------------------------------ rendering

enum { SCOPES_MAX = 64, MACROS_MAX = 32 };

struct render {
    struct text_buffer output;
    json_t *scopes[SCOPES_MAX];  // objects; names are looked for from the last to scope_base, in 0
    int scope_count, scope_base;
    const struct node *macros[MACROS_MAX];
    int macro_count, line;
    json_t *kept; // array: every value made
    size_t steps;
    enum { FLOW_ON, FLOW_BREAK, FLOW_CONTINUE } flow;
    struct error *err;
    bool failed;
};

json_t *render_keep(struct render *r, json_t *value); // owns a new value and returns it
json_t *render_string(struct render *r, const char *text, size_t bytes);
// Sets the error, once; returns NULL.
void *render_fail(struct render *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
bool render_step(struct render *r); // false: it has failed, or takes too long
void render_block(struct render *r, const struct node *node);
const struct node *render_macro(const struct render *r, const char *name);

// What a call, a filter or a test is given.
enum { ARGUMENTS_MAX = 16 };
struct arguments {
    json_t *values[ARGUMENTS_MAX];
    const char *names[ARGUMENTS_MAX]; // keywords, or NULL
    int count;
};
json_t *render_call_macro(struct render *r, const struct node *macro, const struct arguments *given);

// template_eval.c
json_t *eval(struct render *r, const struct node *node);
bool value_is_true(const json_t *value);
bool value_equal(const json_t *a, const json_t *b);
bool value_contains(const json_t *container, const json_t *item);
bool value_as_number(const json_t *value, double *number); // numbers and booleans
void value_append(struct text_buffer *to, const json_t *value); // as Python's str() shows it
json_t *value_string(struct render *r, const json_t *value);
json_t *value_items(struct render *r, json_t *value); // what a loop goes over: an array

// template_operations.c
json_t *apply_filter(struct render *r, const char *name, json_t *value,
                     const struct arguments *given);
bool apply_test(struct render *r, const char *name, json_t *value, const struct arguments *given);
json_t *call_method(struct render *r, json_t *object, const char *name,
                    const struct arguments *given);
json_t *call_function(struct render *r, const char *name, const struct arguments *given);
bool filter_is_known(const char *name);
bool test_is_known(const char *name);
bool method_is_known(const char *name);

#endif
