// Statements of a template: text, {{ }}, if, for, set, macro, break, continue; "generation" marks are
// passed over.
#include "server/text/template_internal.h"

#include <string.h>

enum { BLOCKS_MAX = 60 }; // nested

static struct node *parse_block(struct parser *p, const char *const *ends);

// "%}" ends the tag.
static bool tag_end(struct parser *p) {
    if (p->token->type == TOKEN_TAG_END) {
        p->token = p->token->next;
        return true;
    }
    parse_fail(p, STATUS_INVALID, "\"%%}\" is missing before \"%.40s\"", p->token->text);
    return false;
}

static bool close_block(struct parser *p, const char *name) {
    if (take_name(p, name)) return tag_end(p);
    parse_fail(p, STATUS_INVALID, "\"%s\" is missing", name);
    return false;
}

// ------------------------------------------------------------------ statements; their name is taken

static struct node *parse_if(struct parser *p) {
    static const char *const ends[] = {"elif", "else", "endif", NULL}, *const last[] = {"endif", NULL};
    struct node *node = node_create(p, NODE_IF);
    if (!(node->a = parse_expression(p)) || !tag_end(p) || !(node->b = parse_block(p, ends)))
        return NULL;
    if (take_name(p, "elif")) return (node->c = parse_if(p)) ? node : NULL;
    if (take_name(p, "else")) {
        if (!tag_end(p) || !(node->c = parse_block(p, last))) return NULL;
    }
    return close_block(p, "endif") ? node : NULL;
}

static struct node *parse_for(struct parser *p) {
    static const char *const ends[] = {"else", "endfor", NULL}, *const last[] = {"endfor", NULL};
    struct node *node = node_create(p, NODE_FOR);
    bool parenthesis = take_operator(p, "(");
    do {
        struct node *name = parse_name(p);
        if (!name) return NULL;
        node_append(node, name);
    } while (take_operator(p, ","));
    if (parenthesis && !expect_operator(p, ")")) return NULL;
    if (!take_name(p, "in")) return parse_fail(p, STATUS_INVALID, "\"in\" is missing");
    if (!(node->a = parse_conditionless(p))) return NULL;
    if (take_name(p, "if") && !(node->b = parse_expression(p))) return NULL;
    if (at_name(p, "recursive")) return parse_fail(p, STATUS_UNSUPPORTED, "recursive loops");
    if (!tag_end(p) || !(node->c = parse_block(p, ends))) return NULL;
    if (take_name(p, "else") && (!tag_end(p) || !(node->d = parse_block(p, last)))) return NULL;
    return close_block(p, "endfor") ? node : NULL;
}

static struct node *parse_set(struct parser *p) {
    static const char *const ends[] = {"endset", NULL};
    struct node *node = node_create(p, NODE_SET);
    do {
        struct node *name = parse_name(p);
        if (!name) return NULL;
        if (node->count == 0 && take_operator(p, ".")) {
            struct node *attribute = node_create(p, NODE_ATTRIBUTE), *of = name;
            if (!(name = parse_name(p))) return NULL;
            attribute->a = of;
            attribute->text = name->text;
            node->a = attribute;
            break;
        }
        node_append(node, name);
    } while (take_operator(p, ","));
    if (take_operator(p, "=")) return (node->b = parse_tuple(p)) && tag_end(p) ? node : NULL;
    if (!tag_end(p) || !(node->c = parse_block(p, ends))) return NULL;
    return close_block(p, "endset") ? node : NULL;
}

static struct node *parse_macro(struct parser *p) {
    static const char *const ends[] = {"endmacro", NULL};
    struct node *node = node_create(p, NODE_MACRO), *name = parse_name(p);
    if (!name || !expect_operator(p, "(")) return NULL;
    node->text = name->text;
    while (!at_operator(p, ")")) {
        struct node *parameter = parse_name(p);
        if (!parameter) return NULL;
        if (take_operator(p, "=") && !(parameter->a = parse_expression(p))) return NULL;
        node_append(node, parameter);
        if (!take_operator(p, ",")) break;
    }
    if (!expect_operator(p, ")") || !tag_end(p) || !(node->c = parse_block(p, ends))) return NULL;
    return close_block(p, "endmacro") ? node : NULL;
}

static struct node *parse_generation(struct parser *p) {
    static const char *const ends[] = {"endgeneration", NULL};
    struct node *node = tag_end(p) ? parse_block(p, ends) : NULL;
    return node && close_block(p, "endgeneration") ? node : NULL;
}

static struct node *parse_word(struct parser *p, enum node_kind kind) {
    struct node *node = node_create(p, kind);
    return tag_end(p) ? node : NULL;
}

static struct node *parse_statement(struct parser *p) {
    if (take_name(p, "if")) return parse_if(p);
    if (take_name(p, "for")) return parse_for(p);
    if (take_name(p, "set")) return parse_set(p);
    if (take_name(p, "macro")) return parse_macro(p);
    if (take_name(p, "generation")) return parse_generation(p);
    if (take_name(p, "break")) return parse_word(p, NODE_BREAK);
    if (take_name(p, "continue")) return parse_word(p, NODE_CONTINUE);
    return parse_fail(p, STATUS_UNSUPPORTED, "there is no statement \"%.40s\" here", p->token->text);
}

// ------------------------------------------------------------------ blocks

static bool is_end(const struct parser *p, const char *const *ends) {
    if (p->token->type != TOKEN_TAG_BEGIN || p->token->next->type != TOKEN_NAME) return false;
    for (; *ends; ends++)
        if (strcmp(p->token->next->text, *ends) == 0) return true;
    return false;
}

static struct node *parse_piece(struct parser *p) {
    const struct template_token *token = p->token;
    p->token = token->next;
    if (token->type == TOKEN_TAG_BEGIN) return parse_statement(p);
    struct node *node = node_create(p, token->type == TOKEN_TEXT ? NODE_TEXT : NODE_OUTPUT);
    if (token->type == TOKEN_TEXT) {
        node->text = token->text;
        node->bytes = token->bytes;
        return node;
    }
    if (!(node->a = parse_tuple(p))) return NULL;
    if (p->token->type != TOKEN_OUTPUT_END)
        return parse_fail(p, STATUS_INVALID, "\"}}\" is missing before \"%.40s\"", p->token->text);
    p->token = p->token->next;
    return node;
}

// Up to one of `ends`, whose "{%" is taken; ends NULL: up to the template's end.
static struct node *parse_block(struct parser *p, const char *const *ends) {
    if (++p->depth > BLOCKS_MAX) return parse_fail(p, STATUS_INVALID, "nested too deeply");
    struct node *block = node_create(p, NODE_BLOCK);
    while (!(ends && is_end(p, ends))) {
        if (p->token->type == TOKEN_END) {
            if (ends) return parse_fail(p, STATUS_INVALID, "\"%s\" is missing at the end", ends[0]);
            break;
        }
        struct node *piece = parse_piece(p);
        if (!piece) return NULL;
        node_append(block, piece);
    }
    if (ends) p->token = p->token->next;
    p->depth--;
    return block;
}

struct node *parse_template(struct parser *p) {
    return parse_block(p, NULL);
}
