// Expressions of a template to values, as Jinja's default undefined and Python's operators have it.
#include "server/text/template_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ------------------------------------------------------------------ values

bool value_is_true(const json_t *value) {
    switch (value ? json_typeof(value) : JSON_NULL) {
    case JSON_NULL:
    case JSON_FALSE: return false;
    case JSON_TRUE: return true;
    case JSON_INTEGER: return json_integer_value(value) != 0;
    case JSON_REAL: return json_real_value(value) != 0;
    case JSON_STRING: return json_string_length(value) > 0;
    case JSON_ARRAY: return json_array_size(value) > 0;
    default: return json_object_size(value) > 0;
    }
}

bool value_as_number(const json_t *value, double *number) {
    if (json_is_boolean(value)) *number = json_is_true(value);
    else if (json_is_number(value)) *number = json_number_value(value);
    else return false;
    return true;
}

bool value_equal(const json_t *a, const json_t *b) {
    double x, y;
    if (value_as_number(a, &x) && value_as_number(b, &y)) return x == y;
    if (!a || !b) return a == b;
    return json_equal(a, b);
}

static bool text_contains(const json_t *text, const json_t *part) {
    return memmem(json_string_value(text), json_string_length(text), json_string_value(part),
                  json_string_length(part)) != NULL;
}

bool value_contains(const json_t *container, const json_t *item) {
    if (json_is_string(container)) return json_is_string(item) && text_contains(container, item);
    if (json_is_object(container))
        return json_is_string(item) && json_object_get(container, json_string_value(item));
    size_t i;
    json_t *one;
    json_array_foreach(container, i, one)
        if (value_equal(one, item)) return true;
    return false;
}

static void append_text(struct text_buffer *to, const char *text) {
    text_append(to, text, strlen(text));
}

// As Python's repr() shows what stands in a list.
static void append_inside(struct text_buffer *to, const json_t *value) {
    if (!json_is_string(value)) {
        value_append(to, value);
        return;
    }
    const char *text = json_string_value(value);
    size_t bytes = json_string_length(value);
    const char *quote = memchr(text, '\'', bytes) && !memchr(text, '"', bytes) ? "\"" : "'";
    append_text(to, quote);
    for (size_t i = 0; i < bytes; i++) {
        if (text[i] == '\\' || text[i] == *quote) append_text(to, "\\");
        if (text[i] == '\n') append_text(to, "\\n");
        else text_append(to, text + i, 1);
    }
    append_text(to, quote);
}

// The shortest text that is the same number, with an exponent where Python has one.
static void append_real(struct text_buffer *to, double value) {
    char text[64];
    int digits = 0;
    do snprintf(text, sizeof text, "%.*e", digits, value);
    while (strtod(text, NULL) != value && ++digits < 17);
    long exponent = strtol(strchr(text, 'e') + 1, NULL, 10);
    if (exponent >= -4 && exponent < 16) {
        int decimals = digits > exponent ? digits - (int)exponent : 1;
        snprintf(text, sizeof text, "%.*f", decimals, value);
    }
    append_text(to, text);
}

void value_append(struct text_buffer *to, const json_t *value) {
    size_t i;
    const char *key;
    json_t *one;
    char text[32];
    bool first = true;
    switch (value ? json_typeof(value) : JSON_NULL) {
    case JSON_NULL: append_text(to, value ? "None" : ""); break;
    case JSON_TRUE: append_text(to, "True"); break;
    case JSON_FALSE: append_text(to, "False"); break;
    case JSON_REAL: append_real(to, json_real_value(value)); break;
    case JSON_STRING: text_append(to, json_string_value(value), json_string_length(value)); break;
    case JSON_INTEGER:
        snprintf(text, sizeof text, "%lld", (long long)json_integer_value(value));
        append_text(to, text);
        break;
    case JSON_ARRAY:
        append_text(to, "[");
        json_array_foreach(value, i, one) {
            if (i > 0) append_text(to, ", ");
            append_inside(to, one);
        }
        append_text(to, "]");
        break;
    case JSON_OBJECT:
        append_text(to, "{");
        json_object_foreach((json_t *)value, key, one) {
            if (!first) append_text(to, ", ");
            first = false;
            json_t *name = json_string(key);
            append_inside(to, name);
            json_decref(name);
            append_text(to, ": ");
            append_inside(to, one);
        }
        append_text(to, "}");
    }
}

json_t *value_string(struct render *r, const json_t *value) {
    if (json_is_string(value)) return (json_t *)value;
    struct text_buffer text = {0};
    value_append(&text, value);
    json_t *string = render_string(r, text.data, text.bytes);
    free(text.data);
    return string;
}

// Characters of a string, keys of an object, items of a list.
json_t *value_items(struct render *r, json_t *value) {
    if (json_is_array(value)) return value;
    json_t *items = render_keep(r, json_array());
    if (json_is_object(value)) {
        const char *key;
        json_t *one;
        json_object_foreach(value, key, one) json_array_append_new(items, json_string(key));
    } else if (json_is_string(value)) {
        const char *text = json_string_value(value);
        size_t bytes = json_string_length(value), length;
        uint32_t code;
        for (size_t at = 0; at < bytes && render_step(r); at += length) {
            length = utf8_next(text + at, bytes - at, &code);
            json_array_append_new(items, json_stringn(text + at, length));
        }
    } else if (value) {
        return render_fail(r, "a value is not iterable");
    }
    return items;
}

// ------------------------------------------------------------------ names and parts

static json_t *eval_name(struct render *r, const char *name) {
    json_t *value;
    for (int i = r->scope_count - 1; i >= r->scope_base; i--)
        if ((value = json_object_get(r->scopes[i], name))) return value;
    return json_object_get(r->scopes[0], name);
}

static json_t *part(struct render *r, json_t *of, const json_t *key) {
    if (!of) return render_fail(r, "a part of something undefined is asked for");
    if (json_is_object(of) && json_is_string(key))
        return json_object_get(of, json_string_value(key));
    if (!json_is_integer(key)) return NULL;
    json_t *items = json_is_string(of) ? value_items(r, of) : of;
    json_int_t index = json_integer_value(key), count = (json_int_t)json_array_size(items);
    if (index < 0) index += count;
    return index < 0 ? NULL : json_array_get(items, (size_t)index);
}

// A slice's bound, clamped as Python clamps it.
static json_int_t bound(struct render *r, const struct node *node, json_int_t otherwise,
                        json_int_t count, json_int_t low, json_int_t high) {
    const json_t *value = node->kind == NODE_NONE ? NULL : eval(r, node);
    if (!json_is_integer(value)) return otherwise;
    json_int_t index = json_integer_value(value);
    if (index < 0) index += count;
    return index < low ? low : index > high ? high : index;
}

static json_t *eval_slice(struct render *r, const struct node *node) {
    json_t *of = eval(r, node->a), *items = value_items(r, of);
    const struct node *first = node->items, *second = first->next, *third = second->next;
    const json_t *by = third->kind == NODE_NONE ? NULL : eval(r, third);
    json_int_t step = json_is_integer(by) ? json_integer_value(by) : 1;
    json_int_t count = (json_int_t)json_array_size(items);
    if (step == 0) return render_fail(r, "a slice's step is 0");
    json_int_t low = step > 0 ? 0 : -1, high = step > 0 ? count : count - 1;
    json_int_t begin = bound(r, first, step > 0 ? 0 : count - 1, count, low, high);
    json_int_t end = bound(r, second, step > 0 ? count : -1, count, low, high);
    json_t *slice = render_keep(r, json_array());
    for (json_int_t i = begin; (step > 0 ? i < end : i > end) && render_step(r); i += step)
        json_array_append(slice, json_array_get(items, (size_t)i));
    if (!json_is_string(of)) return slice;
    struct text_buffer text = {0};
    for (size_t i = 0; i < json_array_size(slice); i++) value_append(&text, json_array_get(slice, i));
    json_t *string = render_string(r, text.data, text.bytes);
    free(text.data);
    return string;
}

// ------------------------------------------------------------------ operators

static json_t *add(struct render *r, json_t *a, json_t *b) {
    if (json_is_string(a) && json_is_string(b)) {
        struct text_buffer text = {0};
        value_append(&text, a);
        value_append(&text, b);
        json_t *sum = render_string(r, text.data, text.bytes);
        free(text.data);
        return sum;
    }
    if (!json_is_array(a) || !json_is_array(b))
        return render_fail(r, "values that cannot be added; \"~\" joins any as text");
    json_t *sum = render_keep(r, json_copy(a));
    json_array_extend(sum, b);
    return sum;
}

static json_t *arithmetic(struct render *r, char operator, char second, json_t *a, json_t *b) {
    double x, y, result;
    if (!value_as_number(a, &x) || !value_as_number(b, &y)) {
        if (operator == '+') return add(r, a, b);
        return render_fail(r, "\"%c\" of something that is no number", operator);
    }
    if ((operator == '/' || operator == '%') && y == 0) return render_fail(r, "a division by 0");
    switch (operator) {
    case '+': result = x + y; break;
    case '-': result = x - y; break;
    case '*': result = second ? pow(x, y) : x * y; break;
    case '/': result = second ? floor(x / y) : x / y; break;
    default: result = x - y * floor(x / y); break; // the divisor's sign, as in Python
    }
    bool whole = !json_is_real(a) && !json_is_real(b) && (operator != '/' || second);
    if (whole && fabs(result) < 0x1p53) return render_keep(r, json_integer((json_int_t)result));
    if (!isfinite(result)) return render_fail(r, "a number is too large");
    return render_keep(r, json_real(result));
}

// -1, 0, 1; 2: they have no order.
static int compare(const json_t *a, const json_t *b) {
    double x, y;
    if (value_as_number(a, &x) && value_as_number(b, &y)) return (x > y) - (x < y);
    if (!json_is_string(a) || !json_is_string(b)) return 2;
    int order = strcmp(json_string_value(a), json_string_value(b));
    return (order > 0) - (order < 0);
}

static json_t *eval_binary(struct render *r, const struct node *node) {
    json_t *a = eval(r, node->a), *b = eval(r, node->b);
    const char *op = node->text;
    if (r->failed) return NULL;
    if (*op == '~') {
        a = value_string(r, a);
        b = value_string(r, b);
        return r->failed ? NULL : add(r, a, b);
    }
    if (*op == 'i') return render_keep(r, json_boolean(value_contains(b, a)));
    if (*op == '=') return render_keep(r, json_boolean(value_equal(a, b)));
    if (*op == '!') return render_keep(r, json_boolean(!value_equal(a, b)));
    if (*op != '<' && *op != '>') return arithmetic(r, op[0], op[1], a, b);
    int order = compare(a, b);
    if (order == 2) return render_fail(r, "values that have no order are compared");
    bool holds = (order == 0 && op[1] == '=') || (order != 0 && (order < 0) == (*op == '<'));
    return render_keep(r, json_boolean(holds));
}

// ------------------------------------------------------------------ calls

static bool eval_arguments(struct render *r, const struct node *node, struct arguments *given) {
    given->count = 0;
    for (const struct node *item = node->items; item; item = item->next) {
        given->names[given->count] = item->keyword;
        given->values[given->count++] = eval(r, item->a);
    }
    return !r->failed;
}

static json_t *eval_call(struct render *r, const struct node *node) {
    struct arguments given;
    const struct node *callee = node->a;
    if (callee->kind == NODE_ATTRIBUTE) {
        json_t *object = eval(r, callee->a);
        if (!eval_arguments(r, node, &given)) return NULL;
        return call_method(r, object, callee->text, &given);
    }
    if (!eval_arguments(r, node, &given)) return NULL;
    const struct node *macro = render_macro(r, callee->text);
    return macro ? render_call_macro(r, macro, &given) : call_function(r, callee->text, &given);
}

static json_t *eval_filter(struct render *r, const struct node *node) {
    struct arguments given;
    json_t *value = eval(r, node->a);
    return eval_arguments(r, node, &given) ? apply_filter(r, node->text, value, &given) : NULL;
}

static json_t *eval_test(struct render *r, const struct node *node) {
    struct arguments given;
    json_t *value = eval(r, node->a);
    if (!eval_arguments(r, node, &given)) return NULL;
    return render_keep(r, json_boolean(apply_test(r, node->text, value, &given)));
}

static json_t *eval_items(struct render *r, const struct node *node) {
    json_t *made = render_keep(r, node->kind == NODE_LIST ? json_array() : json_object());
    for (const struct node *item = node->items; item && !r->failed; item = item->next) {
        json_t *value = eval(r, item);
        if (node->kind == NODE_LIST) {
            json_array_append(made, value ? value : render_keep(r, json_null()));
            continue;
        }
        item = item->next;
        json_t *held = eval(r, item);
        if (!json_is_string(value)) return render_fail(r, "a key that is no string");
        json_object_set(made, json_string_value(value), held ? held : render_keep(r, json_null()));
    }
    return made;
}

json_t *eval(struct render *r, const struct node *node) {
    if (!render_step(r)) return NULL;
    r->line = node->line;
    json_t *value;
    switch (node->kind) {
    case NODE_LITERAL: return node->literal;
    case NODE_NAME: return eval_name(r, node->text);
    case NODE_ATTRIBUTE:
        if (!(value = eval(r, node->a)) && !r->failed)
            return render_fail(r, "\"%.40s\" of something undefined", node->text);
        return json_object_get(value, node->text);
    case NODE_INDEX: value = eval(r, node->a); return r->failed ? NULL : part(r, value, eval(r, node->b));
    case NODE_SLICE: return eval_slice(r, node);
    case NODE_CALL: return eval_call(r, node);
    case NODE_FILTER: return eval_filter(r, node);
    case NODE_TEST: return eval_test(r, node);
    case NODE_NOT: return render_keep(r, json_boolean(!value_is_true(eval(r, node->a))));
    case NODE_NEGATIVE: return arithmetic(r, '-', 0, render_keep(r, json_integer(0)), eval(r, node->a));
    case NODE_AND: value = eval(r, node->a); return value_is_true(value) ? eval(r, node->b) : value;
    case NODE_OR: value = eval(r, node->a); return value_is_true(value) ? value : eval(r, node->b);
    case NODE_BINARY: return eval_binary(r, node);
    case NODE_CHOICE:
        if (value_is_true(eval(r, node->a))) return eval(r, node->b);
        return node->c ? eval(r, node->c) : NULL;
    case NODE_LIST:
    case NODE_DICT: return eval_items(r, node);
    default: return render_fail(r, "a statement where a value is wanted");
    }
}
