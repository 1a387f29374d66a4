// Expressions of a template, by Jinja's precedence: choice, or, and, not, comparison and "in", + -, ~,
// * / // %, sign, **, then what stands behind a value: attribute, index, call, filter, test.
#include "server/text/template_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEPTH_MAX = 100 };

// ------------------------------------------------------------------ what parsers share

void *parse_fail(struct parser *p, enum status status, const char *format, ...) {
    char text[200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (p->err && p->err->status == STATUS_OK)
        (void)error_set(p->err, status, "chat template, line %d: %s", p->token->line, text);
    return NULL;
}

struct node *node_create(const struct parser *p, enum node_kind kind) {
    struct node *node = arena_alloc(p->arena, sizeof *node);
    node->kind = kind;
    node->line = p->token->line;
    return node;
}

void node_append(struct node *to, struct node *item) {
    *(to->last ? &to->last->next : &to->items) = item;
    to->last = item;
    to->count++;
}

static bool at(const struct parser *p, enum token_type type, const char *text) {
    return p->token->type == type && strcmp(p->token->text, text) == 0;
}

bool at_operator(const struct parser *p, const char *text) {
    return at(p, TOKEN_OPERATOR, text);
}

bool at_name(const struct parser *p, const char *text) {
    return at(p, TOKEN_NAME, text);
}

static bool take(struct parser *p, bool there) {
    if (there) p->token = p->token->next;
    return there;
}

bool take_operator(struct parser *p, const char *text) {
    return take(p, at_operator(p, text));
}

bool take_name(struct parser *p, const char *text) {
    return take(p, at_name(p, text));
}

bool expect_operator(struct parser *p, const char *text) {
    if (take_operator(p, text)) return true;
    parse_fail(p, STATUS_INVALID, "\"%s\" is missing before \"%.40s\"", text, p->token->text);
    return false;
}

struct node *parse_name(struct parser *p) {
    if (p->token->type != TOKEN_NAME)
        return parse_fail(p, STATUS_INVALID, "a name is missing before \"%.40s\"", p->token->text);
    struct node *node = node_create(p, NODE_NAME);
    node->text = p->token->text;
    p->token = p->token->next;
    return node;
}

// ------------------------------------------------------------------ values

static struct node *literal(struct parser *p, json_t *value) {
    struct node *node = node_create(p, NODE_LITERAL);
    json_array_append_new(p->literals, value);
    node->literal = value;
    return node;
}

static struct node *parse_number(struct parser *p) {
    const char *text = p->token->text;
    char *end;
    json_t *value = strpbrk(text, ".eE") ? json_real(strtod(text, &end))
                                      : json_integer(strtoll(text, &end, 10));
    if (*end) {
        json_decref(value);
        return parse_fail(p, STATUS_INVALID, "\"%.40s\" is no number", text);
    }
    struct node *node = literal(p, value);
    p->token = p->token->next;
    return node;
}

// Strings that follow one another are one.
static struct node *parse_strings(struct parser *p) {
    struct text_buffer text = {0};
    const struct template_token *first = p->token;
    for (; p->token->type == TOKEN_STRING; p->token = p->token->next)
        text_append(&text, p->token->text, p->token->bytes);
    json_t *value = json_stringn(text.data ? text.data : "", text.bytes);
    free(text.data);
    if (value) return literal(p, value);
    p->token = first;
    return parse_fail(p, STATUS_INVALID, "a string is not valid UTF-8");
}

static struct node *parse_constant(struct parser *p) {
    static const struct {
        const char *name;
        enum { FALSE_, TRUE_, NULL_ } value;
    } constants[] = {{"true", TRUE_}, {"True", TRUE_}, {"false", FALSE_}, {"False", FALSE_},
                     {"none", NULL_}, {"None", NULL_}};
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (take_name(p, constants[i].name))
            return literal(p, constants[i].value == NULL_ ? json_null()
                                                          : json_boolean(constants[i].value));
    return parse_name(p);
}

// Items up to `close`, which is taken.
static bool parse_items(struct parser *p, struct node *to, const char *close) {
    while (!at_operator(p, close)) {
        struct node *item = parse_expression(p);
        if (!item) return false;
        node_append(to, item);
        if (to->kind == NODE_DICT) {
            struct node *value = expect_operator(p, ":") ? parse_expression(p) : NULL;
            if (!value) return false;
            node_append(to, value);
        }
        if (!take_operator(p, ",")) break;
    }
    return expect_operator(p, close);
}

static struct node *parse_value(struct parser *p) {
    if (p->token->type == TOKEN_NUMBER) return parse_number(p);
    if (p->token->type == TOKEN_STRING) return parse_strings(p);
    if (p->token->type == TOKEN_NAME) return parse_constant(p);
    struct node *node = node_create(p, at_operator(p, "{") ? NODE_DICT : NODE_LIST);
    if (take_operator(p, "[")) return parse_items(p, node, "]") ? node : NULL;
    if (take_operator(p, "{")) return parse_items(p, node, "}") ? node : NULL;
    if (!take_operator(p, "("))
        return parse_fail(p, STATUS_INVALID, "a value is missing before \"%.40s\"", p->token->text);
    if (take_operator(p, ")")) return node;
    struct node *inner = parse_tuple(p);
    return inner && expect_operator(p, ")") ? inner : NULL;
}

struct node *parse_tuple(struct parser *p) {
    struct node *first = parse_expression(p);
    if (!first || !at_operator(p, ",")) return first;
    struct node *list = node_create(p, NODE_LIST);
    node_append(list, first);
    while (take_operator(p, ",")) {
        if (p->token->type == TOKEN_TAG_END || at_operator(p, ")")) break;
        struct node *item = parse_expression(p);
        if (!item) return NULL;
        node_append(list, item);
    }
    return list;
}

// ------------------------------------------------------------------ what stands behind a value

static bool parse_argument(struct parser *p, struct node *call, struct node *value) {
    if (!value) return false;
    struct node *argument = node_create(p, NODE_OUTPUT); // so that a value has one `next`
    argument->a = value;
    node_append(call, argument);
    if (call->count <= ARGUMENTS_MAX) return true;
    parse_fail(p, STATUS_UNSUPPORTED, "more than %d arguments", ARGUMENTS_MAX);
    return false;
}

// "(" is taken.
static bool parse_arguments(struct parser *p, struct node *call) {
    while (!at_operator(p, ")")) {
        const char *keyword = NULL;
        const struct template_token *next = p->token->next;
        if (p->token->type == TOKEN_NAME && next->type == TOKEN_OPERATOR &&
            strcmp(next->text, "=") == 0) {
            keyword = p->token->text;
            p->token = next->next;
        }
        if (!parse_argument(p, call, parse_expression(p))) return false;
        call->last->keyword = keyword;
        if (!take_operator(p, ",")) break;
    }
    return expect_operator(p, ")");
}

static struct node *parse_bound(struct parser *p) {
    if (at_operator(p, ":") || at_operator(p, "]")) return node_create(p, NODE_NONE);
    return parse_expression(p);
}

// "[" is taken.
static struct node *parse_subscript(struct parser *p, struct node *of) {
    struct node *first = parse_bound(p);
    if (!first) return NULL;
    struct node *node = node_create(p, at_operator(p, ":") ? NODE_SLICE : NODE_INDEX);
    node->a = of;
    if (node->kind == NODE_INDEX) {
        node->b = first;
        return first->kind != NODE_NONE && expect_operator(p, "]")
                   ? node : parse_fail(p, STATUS_INVALID, "an index is missing");
    }
    node_append(node, first);
    while (take_operator(p, ":")) {
        struct node *bound = parse_bound(p);
        if (!bound) return NULL;
        node_append(node, bound);
    }
    if (node->count > 3) return parse_fail(p, STATUS_INVALID, "a slice has three parts at most");
    while (node->count < 3) node_append(node, node_create(p, NODE_NONE));
    return expect_operator(p, "]") ? node : NULL;
}

static struct node *parse_filter(struct parser *p, struct node *of) {
    struct node *name = parse_name(p);
    if (!name) return NULL;
    struct node *node = node_create(p, NODE_FILTER);
    node->a = of;
    node->text = name->text;
    if (!filter_is_known(node->text))
        return parse_fail(p, STATUS_UNSUPPORTED, "there is no filter \"%.40s\"", node->text);
    if (take_operator(p, "(") && !parse_arguments(p, node)) return NULL;
    return node;
}

// A test may have its argument without parentheses.
static bool value_begins(const struct parser *p) {
    static const char *const others[] = {"else", "or", "and", "if", "is", "not", "in"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (at_name(p, others[i])) return false;
    return p->token->type == TOKEN_NAME || p->token->type == TOKEN_STRING ||
           p->token->type == TOKEN_NUMBER || at_operator(p, "[") || at_operator(p, "{");
}

static struct node *parse_postfix(struct parser *p);

static struct node *parse_test(struct parser *p, struct node *of) {
    bool negated = take_name(p, "not");
    struct node *name = parse_name(p);
    if (!name) return NULL;
    struct node *node = node_create(p, NODE_TEST);
    node->a = of;
    node->text = name->text;
    if (!test_is_known(node->text))
        return parse_fail(p, STATUS_UNSUPPORTED, "there is no test \"%.40s\"", node->text);
    if (take_operator(p, "(")) {
        if (!parse_arguments(p, node)) return NULL;
    } else if (value_begins(p) && !parse_argument(p, node, parse_postfix(p))) {
        return NULL;
    }
    if (!negated) return node;
    struct node *not = node_create(p, NODE_NOT);
    not->a = node;
    return not;
}

static struct node *parse_call(struct parser *p, struct node *of) {
    struct node *node = node_create(p, NODE_CALL);
    node->a = of;
    if (of->kind == NODE_ATTRIBUTE && !method_is_known(of->text))
        return parse_fail(p, STATUS_UNSUPPORTED, "there is no method \"%.40s\"", of->text);
    if (of->kind != NODE_ATTRIBUTE && of->kind != NODE_NAME)
        return parse_fail(p, STATUS_UNSUPPORTED, "only names and methods are called");
    return parse_arguments(p, node) ? node : NULL;
}

static struct node *parse_postfix(struct parser *p) {
    struct node *node = parse_value(p);
    while (node) {
        if (take_operator(p, ".")) {
            struct node *name = parse_name(p);
            if (!name) return NULL;
            struct node *attribute = node_create(p, NODE_ATTRIBUTE);
            attribute->a = node;
            attribute->text = name->text;
            node = attribute;
        } else if (take_operator(p, "[")) node = parse_subscript(p, node);
        else if (take_operator(p, "(")) node = parse_call(p, node);
        else break;
    }
    return node;
}

// ------------------------------------------------------------------ operators

static struct node *two(struct parser *p, enum node_kind kind, const char *text, struct node *a,
                        struct node *b) {
    struct node *node = node_create(p, kind);
    node->text = text;
    node->a = a;
    node->b = b;
    return b ? node : NULL;
}

static struct node *parse_unary(struct parser *p);

static struct node *parse_power(struct parser *p) {
    struct node *node = parse_postfix(p);
    if (node && take_operator(p, "**")) node = two(p, NODE_BINARY, "**", node, parse_unary(p));
    return node;
}

// Filters and tests bind closer than anything but a sign.
static struct node *parse_unary(struct parser *p) {
    if (++p->depth > DEPTH_MAX) return parse_fail(p, STATUS_INVALID, "nested too deeply");
    struct node *node;
    if (take_operator(p, "-")) {
        node = node_create(p, NODE_NEGATIVE);
        node->a = parse_unary(p);
        if (!node->a) node = NULL;
    } else {
        (void)take_operator(p, "+");
        node = parse_power(p);
    }
    while (node)
        if (take_operator(p, "|")) node = parse_filter(p, node);
        else if (take_name(p, "is")) node = parse_test(p, node);
        else break;
    p->depth--;
    return node;
}

// The operators of a level, the closest first; a level's are taken from left to right.
static const char *const levels[][5] = {{"*", "/", "//", "%"}, {"~"}, {"+", "-"},
                                        {"==", "!=", "<", ">"}};
enum { LEVELS = sizeof levels / sizeof *levels, COMPARISONS = LEVELS - 1 };

static struct node *parse_level(struct parser *p, int level);

static struct node *parse_comparison(struct parser *p, struct node *node, bool *taken) {
    static const char *const more[] = {"<=", ">="};
    *taken = true;
    for (int i = 0; i < 2; i++)
        if (take_operator(p, more[i]))
            return two(p, NODE_BINARY, more[i], node, parse_level(p, COMPARISONS - 1));
    if (take_name(p, "in"))
        return two(p, NODE_BINARY, "in", node, parse_level(p, COMPARISONS - 1));
    if (at_name(p, "not") && p->token->next->type == TOKEN_NAME &&
        strcmp(p->token->next->text, "in") == 0) {
        p->token = p->token->next->next;
        struct node *in = two(p, NODE_BINARY, "in", node, parse_level(p, COMPARISONS - 1));
        return in ? two(p, NODE_NOT, NULL, in, in) : NULL;
    }
    *taken = false;
    return node;
}

static struct node *parse_level(struct parser *p, int level) {
    if (level < 0) return parse_unary(p);
    struct node *node = parse_level(p, level - 1);
    for (bool taken = true; node && taken;) {
        taken = false;
        for (int i = 0; i < 5 && levels[level][i] && !taken; i++)
            if (take_operator(p, levels[level][i])) {
                taken = true;
                node = two(p, NODE_BINARY, levels[level][i], node, parse_level(p, level - 1));
            }
        if (!taken && node && level == COMPARISONS) node = parse_comparison(p, node, &taken);
    }
    return node;
}

static struct node *parse_not(struct parser *p) {
    if (!take_name(p, "not")) return parse_level(p, COMPARISONS);
    if (++p->depth > DEPTH_MAX) return parse_fail(p, STATUS_INVALID, "nested too deeply");
    struct node *node = node_create(p, NODE_NOT);
    node->a = parse_not(p);
    p->depth--;
    return node->a ? node : NULL;
}

static struct node *parse_and(struct parser *p) {
    struct node *node = parse_not(p);
    while (node && take_name(p, "and")) node = two(p, NODE_AND, NULL, node, parse_not(p));
    return node;
}

struct node *parse_conditionless(struct parser *p) {
    struct node *node = parse_and(p);
    while (node && take_name(p, "or")) node = two(p, NODE_OR, NULL, node, parse_and(p));
    return node;
}

struct node *parse_expression(struct parser *p) {
    if (++p->depth > DEPTH_MAX) return parse_fail(p, STATUS_INVALID, "nested too deeply");
    struct node *node = parse_conditionless(p);
    while (node && take_name(p, "if")) {
        struct node *choice = two(p, NODE_CHOICE, NULL, parse_conditionless(p), node);
        if (!choice || !choice->a) return NULL;
        if (take_name(p, "else") && !(choice->c = parse_expression(p))) return NULL;
        node = choice;
    }
    p->depth--;
    return node;
}
