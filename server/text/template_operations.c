// Filters, tests, methods and functions of templates: those that chat templates use, as Jinja2, Python
// and transformers have them.
#include "server/text/template_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <utf8proc.h>

// ------------------------------------------------------------------ arguments

// The argument at `position`, or by its keyword; NULL: neither.
static json_t *argument(const struct arguments *given, int position, const char *keyword) {
    for (int i = 0; i < given->count; i++)
        if (given->names[i] ? keyword && strcmp(given->names[i], keyword) == 0 : i == position)
            return given->values[i];
    return NULL;
}

static const char *text_of(const json_t *value) {
    return json_is_string(value) ? json_string_value(value) : "";
}

static json_t *truth(struct render *r, bool value) {
    return render_keep(r, json_boolean(value));
}

static json_t *finish(struct render *r, struct text_buffer *text) {
    json_t *string = render_string(r, text->data, text->bytes);
    free(text->data);
    return string;
}

// ------------------------------------------------------------------ text

static bool strippable(uint32_t code, const char *set) {
    if (!*set) return char_is_space(code) || (code >= 0x1c && code <= 0x1f);
    uint32_t one;
    for (size_t left = strlen(set), length; left > 0; set += length, left -= length) {
        length = utf8_next(set, left, &one);
        if (one == code) return true;
    }
    return false;
}

static json_t *strip(struct render *r, const json_t *value, const char *set, bool left, bool right) {
    const char *text = text_of(value);
    size_t begin = 0, end = json_string_length(value);
    uint32_t code;
    while (left && begin < end) {
        size_t length = utf8_next(text + begin, end - begin, &code);
        if (!strippable(code, set)) break;
        begin += length;
    }
    while (right && end > begin) {
        size_t at = end - 1;
        while (at > begin && ((unsigned char)text[at] & 0xc0) == 0x80) at--;
        utf8_next(text + at, end - at, &code);
        if (!strippable(code, set)) break;
        end = at;
    }
    return render_string(r, text + begin, end - begin);
}

// Capitals at the beginning of: the text, each run of letters (Python), each word (Jinja).
enum casing { CASE_UPPER, CASE_LOWER, CASE_CAPITAL, CASE_TITLE, CASE_WORDS };

static json_t *recase(struct render *r, const json_t *value, enum casing casing) {
    struct text_buffer to = {0};
    const char *text = text_of(value);
    size_t bytes = json_string_length(value), length;
    bool begins = true;
    for (size_t at = 0; at < bytes; at += length) {
        uint32_t code;
        length = utf8_next(text + at, bytes - at, &code);
        bool upper = casing == CASE_UPPER || (casing != CASE_LOWER && begins);
        int32_t changed = upper ? utf8proc_toupper((int32_t)code) : utf8proc_tolower((int32_t)code);
        text_append_character(&to, (uint32_t)changed);
        bool letter = char_is_word(code) && code != '_' && !char_is_numeric(code);
        begins = casing == CASE_TITLE ? !letter
                 : casing == CASE_WORDS && (strippable(code, "") || (code < 128 && strchr("-({[<", (int)code)));
    }
    return finish(r, &to);
}

static json_t *replace(struct render *r, const json_t *value, const json_t *from, const json_t *to) {
    struct text_buffer text = {0};
    const char *at = text_of(value), *end = at + json_string_length(value);
    size_t bytes = json_string_length(from);
    if (!json_is_string(value) || !json_is_string(from) || !json_is_string(to) || bytes == 0)
        return render_fail(r, "replace takes two texts, the first not empty");
    for (const char *found; (found = memmem(at, (size_t)(end - at), json_string_value(from), bytes));
         at = found + bytes) {
        text_append(&text, at, (size_t)(found - at));
        text_append(&text, json_string_value(to), json_string_length(to));
    }
    text_append(&text, at, (size_t)(end - at));
    return finish(r, &text);
}

// By `by`, at most `most` times (negative: as often as it stands there); NULL: by white space.
static json_t *split(struct render *r, const json_t *value, const json_t *by, json_int_t most) {
    json_t *parts = render_keep(r, json_array());
    const char *at = text_of(value), *end = at + json_string_length(value);
    size_t bytes = json_string_length(by);
    if (json_is_string(by) && bytes == 0) return render_fail(r, "a split by nothing");
    while (!json_is_string(by)) {
        while (at < end && strippable((unsigned char)*at, "")) at++;
        if (at == end) return parts;
        const char *begin = at;
        while (at < end && !strippable((unsigned char)*at, "")) at++;
        if (most-- == 0) at = end;
        json_array_append_new(parts, json_stringn(begin, (size_t)(at - begin)));
    }
    const char *found;
    while (most-- != 0 && (found = memmem(at, (size_t)(end - at), json_string_value(by), bytes))) {
        json_array_append_new(parts, json_stringn(at, (size_t)(found - at)));
        at = found + bytes;
    }
    json_array_append_new(parts, json_stringn(at, (size_t)(end - at)));
    return parts;
}

// A text, or a list of texts one of which will do.
static bool starts_or_ends(const json_t *value, const json_t *part, bool ends) {
    size_t i, bytes = json_string_length(value), length = json_string_length(part);
    json_t *one;
    if (json_is_string(part))
        return length <= bytes && memcmp(text_of(value) + (ends ? bytes - length : 0),
                                         json_string_value(part), length) == 0;
    json_array_foreach(part, i, one)
        if (json_is_string(one) && starts_or_ends(value, one, ends)) return true;
    return false;
}

// ------------------------------------------------------------------ filters

typedef json_t *filter(struct render *r, json_t *value, const struct arguments *given);

static json_t *filter_trim(struct render *r, json_t *value, const struct arguments *given) {
    return strip(r, value_string(r, value), text_of(argument(given, 0, "chars")), true, true);
}

static json_t *filter_upper(struct render *r, json_t *value, const struct arguments *given) {
    (void)given;
    return recase(r, value_string(r, value), CASE_UPPER);
}

static json_t *filter_lower(struct render *r, json_t *value, const struct arguments *given) {
    (void)given;
    return recase(r, value_string(r, value), CASE_LOWER);
}

static json_t *filter_title(struct render *r, json_t *value, const struct arguments *given) {
    (void)given;
    return recase(r, value_string(r, value), CASE_WORDS);
}

static json_t *filter_capitalize(struct render *r, json_t *value, const struct arguments *given) {
    (void)given;
    return recase(r, value_string(r, value), CASE_CAPITAL);
}

static json_t *filter_replace(struct render *r, json_t *value, const struct arguments *given) {
    return replace(r, value_string(r, value), argument(given, 0, "old"), argument(given, 1, "new"));
}

static json_t *filter_length(struct render *r, json_t *value, const struct arguments *given) {
    (void)given;
    if (json_is_object(value)) return render_keep(r, json_integer((json_int_t)json_object_size(value)));
    return render_keep(r, json_integer((json_int_t)json_array_size(value_items(r, value))));
}

static json_t *filter_tojson(struct render *r, json_t *value, const struct arguments *given) {
    const json_t *indent = argument(given, 0, "indent");
    size_t flags = JSON_ENCODE_ANY | JSON_REAL_PRECISION(15);
    if (!value) return render_fail(r, "something undefined as JSON");
    if (json_is_integer(indent) && json_integer_value(indent) > 0)
        flags |= JSON_INDENT(json_integer_value(indent) & 31);
    char *text = json_dumps(value, flags);
    json_t *string = render_string(r, text, text ? strlen(text) : 0);
    free(text);
    return string;
}

static json_t *filter_join(struct render *r, json_t *value, const struct arguments *given) {
    const json_t *by = argument(given, 0, "d");
    struct text_buffer text = {0};
    json_t *items = value_items(r, value), *one;
    size_t i;
    json_array_foreach(items, i, one) {
        if (i > 0) text_append(&text, text_of(by), json_string_length(by));
        value_append(&text, one);
    }
    return finish(r, &text);
}

static json_t *filter_default(struct render *r, json_t *value, const struct arguments *given) {
    bool falsy_too = value_is_true(argument(given, 1, "boolean"));
    if (falsy_too ? value_is_true(value) : value != NULL) return value;
    json_t *otherwise = argument(given, 0, "default_value");
    return otherwise ? otherwise : render_string(r, "", 0);
}

static json_t *filter_first(struct render *r, json_t *value, const struct arguments *given) {
    (void)given;
    return json_array_get(value_items(r, value), 0);
}

static json_t *filter_last(struct render *r, json_t *value, const struct arguments *given) {
    (void)given;
    json_t *items = value_items(r, value);
    return json_array_get(items, json_array_size(items) - 1);
}

static json_t *filter_list(struct render *r, json_t *value, const struct arguments *given) {
    (void)given;
    json_t *items = value_items(r, value);
    return items ? render_keep(r, json_copy(items)) : NULL;
}

static json_t *filter_reverse(struct render *r, json_t *value, const struct arguments *given) {
    (void)given;
    json_t *items = value_items(r, value), *reversed = render_keep(r, json_array());
    for (size_t i = json_array_size(items); i > 0; i--)
        json_array_append(reversed, json_array_get(items, i - 1));
    return reversed;
}

static json_t *filter_string(struct render *r, json_t *value, const struct arguments *given) {
    (void)given;
    return value_string(r, value);
}

static json_t *filter_int(struct render *r, json_t *value, const struct arguments *given) {
    (void)given;
    double number = 0;
    if (!value_as_number(value, &number)) number = strtod(text_of(value), NULL);
    if (!(fabs(number) < 0x1p53)) number = 0;
    return render_keep(r, json_integer((json_int_t)number));
}

static json_t *filter_items(struct render *r, json_t *value, const struct arguments *given) {
    (void)given;
    json_t *pairs = render_keep(r, json_array()), *one;
    const char *key;
    json_object_foreach(value, key, one) json_array_append_new(pairs, json_pack("[s,O]", key, one));
    return pairs;
}

static int by_first(const void *a, const void *b) {
    return strcmp(text_of(json_array_get(*(json_t *const *)a, 0)),
                  text_of(json_array_get(*(json_t *const *)b, 0)));
}

static json_t *filter_dictsort(struct render *r, json_t *value, const struct arguments *given) {
    json_t *pairs = filter_items(r, value, given), *sorted = render_keep(r, json_array());
    size_t count = json_array_size(pairs);
    json_t **order = mem_zalloc(count + 1, sizeof *order);
    for (size_t i = 0; i < count; i++) order[i] = json_array_get(pairs, i);
    qsort(order, count, sizeof *order, by_first);
    for (size_t i = 0; i < count; i++) json_array_append(sorted, order[i]);
    free(order);
    return sorted;
}

static json_t *filter_unique(struct render *r, json_t *value, const struct arguments *given) {
    (void)given;
    json_t *items = value_items(r, value), *kept = render_keep(r, json_array()), *one;
    size_t i;
    json_array_foreach(items, i, one)
        if (render_step(r) && !value_contains(kept, one)) json_array_append(kept, one);
    return kept;
}

static json_t *filter_indent(struct render *r, json_t *value, const struct arguments *given) {
    const json_t *width = argument(given, 0, "width");
    int blanks = json_is_integer(width) ? (int)json_integer_value(width) : 4;
    bool first = value_is_true(argument(given, 1, "first")), begins = first;
    bool empty_too = value_is_true(argument(given, 2, "blank"));
    struct text_buffer text = {0};
    json_t *string = value_string(r, value);
    const char *at = text_of(string), *end = at + json_string_length(string);
    for (; at < end; at++) {
        for (int i = 0; begins && (*at != '\n' || empty_too) && i < blanks && i < 64; i++)
            text_append(&text, " ", 1);
        text_append(&text, at, 1);
        begins = *at == '\n';
    }
    return finish(r, &text);
}

// A dotted path into a value.
static json_t *attribute(json_t *value, const char *path) {
    char name[64];
    while (value && *path) {
        size_t length = strcspn(path, ".");
        snprintf(name, sizeof name, "%.*s", (int)length, path);
        char *end;
        unsigned long index = strtoul(name, &end, 10);
        value = *name && !*end ? json_array_get(value, index) : json_object_get(value, name);
        path += length + (path[length] == '.');
    }
    return value;
}

static json_t *filter_map(struct render *r, json_t *value, const struct arguments *given) {
    json_t *items = value_items(r, value), *mapped = render_keep(r, json_array()), *one;
    const json_t *path = argument(given, -1, "attribute");
    const char *name = text_of(argument(given, 0, NULL));
    struct arguments rest = {.count = 0};
    for (int i = 1; i < given->count; i++) rest.values[rest.count++] = given->values[i];
    if (!path && !filter_is_known(name)) return render_fail(r, "there is no filter \"%.40s\"", name);
    size_t i;
    json_array_foreach(items, i, one) {
        json_t *part = path ? attribute(one, text_of(path))
                            : apply_filter(r, name, one, &rest);
        if (!part && path) part = argument(given, -1, "default");
        json_array_append(mapped, part ? part : render_keep(r, json_null()));
    }
    return mapped;
}

// Those items for which a test holds (or does not): of themselves, or of an attribute.
static json_t *choose(struct render *r, json_t *value, const struct arguments *given, bool of_attribute,
                      bool wanted) {
    json_t *items = value_items(r, value), *chosen = render_keep(r, json_array()), *one;
    int at = of_attribute ? 1 : 0;
    const char *test = given->count > at ? text_of(given->values[at]) : NULL;
    if (test && !test_is_known(test)) return render_fail(r, "there is no test \"%.40s\"", test);
    struct arguments rest = {.count = 0};
    for (int i = at + 1; i < given->count; i++) rest.values[rest.count++] = given->values[i];
    size_t i;
    json_array_foreach(items, i, one) {
        json_t *looked = of_attribute ? attribute(one, text_of(given->values[0])) : one;
        bool holds = test ? apply_test(r, test, looked, &rest) : value_is_true(looked);
        if (holds == wanted) json_array_append(chosen, one);
    }
    return chosen;
}

static json_t *filter_select(struct render *r, json_t *value, const struct arguments *given) {
    return choose(r, value, given, false, true);
}

static json_t *filter_reject(struct render *r, json_t *value, const struct arguments *given) {
    return choose(r, value, given, false, false);
}

static json_t *filter_selectattr(struct render *r, json_t *value, const struct arguments *given) {
    return given->count ? choose(r, value, given, true, true) : render_fail(r, "selectattr of what");
}

static json_t *filter_rejectattr(struct render *r, json_t *value, const struct arguments *given) {
    return given->count ? choose(r, value, given, true, false) : render_fail(r, "rejectattr of what");
}

static json_t *filter_same(struct render *r, json_t *value, const struct arguments *given) {
    (void)r, (void)given;
    return value; // nothing is escaped here
}

static const struct {
    const char *name;
    filter *apply;
} filters[] = {
    {"trim", filter_trim}, {"upper", filter_upper}, {"lower", filter_lower}, {"title", filter_title},
    {"capitalize", filter_capitalize}, {"replace", filter_replace}, {"length", filter_length},
    {"count", filter_length}, {"tojson", filter_tojson}, {"join", filter_join},
    {"default", filter_default}, {"d", filter_default}, {"first", filter_first},
    {"last", filter_last}, {"list", filter_list}, {"reverse", filter_reverse},
    {"string", filter_string}, {"int", filter_int}, {"items", filter_items},
    {"dictsort", filter_dictsort}, {"unique", filter_unique}, {"indent", filter_indent},
    {"map", filter_map}, {"select", filter_select}, {"reject", filter_reject},
    {"selectattr", filter_selectattr}, {"rejectattr", filter_rejectattr}, {"safe", filter_same},
};
enum { FILTERS = sizeof filters / sizeof *filters };

static filter *filter_find(const char *name) {
    for (int i = 0; i < FILTERS; i++)
        if (strcmp(filters[i].name, name) == 0) return filters[i].apply;
    return NULL;
}

bool filter_is_known(const char *name) {
    return filter_find(name) != NULL;
}

json_t *apply_filter(struct render *r, const char *name, json_t *value,
                     const struct arguments *given) {
    return filter_find(name)(r, value, given);
}

// ------------------------------------------------------------------ tests

enum test {
    TEST_DEFINED, TEST_UNDEFINED, TEST_NONE, TEST_STRING, TEST_MAPPING, TEST_ITERABLE, TEST_SEQUENCE,
    TEST_NUMBER, TEST_INTEGER, TEST_FLOAT, TEST_BOOLEAN, TEST_TRUE, TEST_FALSE, TEST_EQUAL,
    TEST_UNEQUAL, TEST_IN, TEST_ODD, TEST_EVEN
};
static const struct {
    const char *name;
    enum test test;
} tests[] = {
    {"defined", TEST_DEFINED}, {"undefined", TEST_UNDEFINED}, {"none", TEST_NONE},
    {"string", TEST_STRING}, {"mapping", TEST_MAPPING}, {"iterable", TEST_ITERABLE},
    {"sequence", TEST_SEQUENCE}, {"number", TEST_NUMBER}, {"integer", TEST_INTEGER},
    {"float", TEST_FLOAT}, {"boolean", TEST_BOOLEAN}, {"true", TEST_TRUE}, {"false", TEST_FALSE},
    {"equalto", TEST_EQUAL}, {"eq", TEST_EQUAL}, {"sameas", TEST_EQUAL}, {"ne", TEST_UNEQUAL},
    {"in", TEST_IN}, {"odd", TEST_ODD}, {"even", TEST_EVEN},
};

static const enum test *test_find(const char *name) {
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++)
        if (strcmp(tests[i].name, name) == 0) return &tests[i].test;
    return NULL;
}

bool test_is_known(const char *name) {
    return test_find(name) != NULL;
}

bool apply_test(struct render *r, const char *name, json_t *value, const struct arguments *given) {
    (void)r;
    bool several = json_is_string(value) || json_is_array(value) || json_is_object(value);
    const json_t *other = argument(given, 0, NULL);
    double number = 0;
    switch (*test_find(name)) {
    case TEST_DEFINED: return value != NULL;
    case TEST_UNDEFINED: return value == NULL;
    case TEST_NONE: return json_is_null(value);
    case TEST_STRING: return json_is_string(value);
    case TEST_MAPPING: return json_is_object(value);
    case TEST_ITERABLE:
    case TEST_SEQUENCE: return several;
    case TEST_NUMBER: return json_is_number(value) || json_is_boolean(value);
    case TEST_INTEGER: return json_is_integer(value);
    case TEST_FLOAT: return json_is_real(value);
    case TEST_BOOLEAN: return json_is_boolean(value);
    case TEST_TRUE: return json_is_true(value);
    case TEST_FALSE: return json_is_false(value);
    case TEST_EQUAL: return value_equal(value, other);
    case TEST_UNEQUAL: return !value_equal(value, other);
    case TEST_IN: return value_contains(other, value);
    case TEST_ODD: return value_as_number(value, &number) && fmod(number, 2) != 0;
    default: return value_as_number(value, &number) && fmod(number, 2) == 0;
    }
}

// ------------------------------------------------------------------ methods and functions

static bool listed(const char *const *names, const char *name) {
    for (; *names; names++)
        if (strcmp(*names, name) == 0) return true;
    return false;
}

static const char *const methods[] = {
    "strip", "lstrip", "rstrip", "split", "startswith", "endswith", "upper", "lower", "title",
    "capitalize", "replace", "items", "keys", "values", "get", "append", "find", NULL};

bool method_is_known(const char *name) {
    return listed(methods, name);
}

static json_t *text_method(struct render *r, json_t *text, const char *name,
                           const struct arguments *given) {
    json_t *first = argument(given, 0, NULL), *second = argument(given, 1, NULL);
    json_int_t most = json_is_integer(second) ? json_integer_value(second) : -1;
    if (strcmp(name, "strip") == 0) return strip(r, text, text_of(first), true, true);
    if (strcmp(name, "lstrip") == 0) return strip(r, text, text_of(first), true, false);
    if (strcmp(name, "rstrip") == 0) return strip(r, text, text_of(first), false, true);
    if (strcmp(name, "split") == 0) return split(r, text, first, most);
    if (strcmp(name, "startswith") == 0) return truth(r, starts_or_ends(text, first, false));
    if (strcmp(name, "endswith") == 0) return truth(r, starts_or_ends(text, first, true));
    if (strcmp(name, "upper") == 0) return recase(r, text, CASE_UPPER);
    if (strcmp(name, "lower") == 0) return recase(r, text, CASE_LOWER);
    if (strcmp(name, "title") == 0) return recase(r, text, CASE_TITLE);
    if (strcmp(name, "capitalize") == 0) return recase(r, text, CASE_CAPITAL);
    if (strcmp(name, "replace") == 0) return replace(r, text, first, second);
    if (strcmp(name, "find") == 0) {
        const char *found = json_is_string(first) ? strstr(text_of(text), text_of(first)) : NULL;
        json_int_t characters = found ? 0 : -1;
        for (const char *at = text_of(text); found && at < found; at++)
            characters += ((unsigned char)*at & 0xc0) != 0x80;
        return render_keep(r, json_integer(characters));
    }
    return render_fail(r, "a text has no method \"%.40s\"", name);
}

static json_t *object_method(struct render *r, json_t *object, const char *name,
                             const struct arguments *given) {
    json_t *first = argument(given, 0, NULL), *values, *one;
    const char *key;
    if (strcmp(name, "items") == 0) return filter_items(r, object, given);
    if (strcmp(name, "keys") == 0) return value_items(r, object);
    if (strcmp(name, "get") == 0) {
        json_t *found = json_is_string(first) ? json_object_get(object, text_of(first)) : NULL;
        if (!found) found = argument(given, 1, NULL);
        return found ? found : render_keep(r, json_null());
    }
    if (strcmp(name, "values") != 0)
        return render_fail(r, "a mapping has no method \"%.40s\"", name);
    values = render_keep(r, json_array());
    json_object_foreach(object, key, one) json_array_append(values, one);
    return values;
}

json_t *call_method(struct render *r, json_t *object, const char *name,
                    const struct arguments *given) {
    if (json_is_string(object)) return text_method(r, object, name, given);
    if (json_is_object(object)) return object_method(r, object, name, given);
    if (json_is_array(object) && strcmp(name, "append") == 0) {
        json_t *item = argument(given, 0, NULL);
        json_array_append(object, item ? item : render_keep(r, json_null()));
        return render_keep(r, json_null());
    }
    return render_fail(r, "\"%.40s\" is called of a value that has it not", name);
}

static const char *const functions[] = {"range", "namespace", "dict", "raise_exception",
                                        "strftime_now", NULL};

static json_t *range(struct render *r, const struct arguments *given) {
    json_int_t bounds[3] = {0, 0, 1};
    for (int i = 0; i < given->count && i < 3; i++) {
        if (!json_is_integer(given->values[i])) return render_fail(r, "range takes whole numbers");
        bounds[given->count == 1 ? 1 : i] = json_integer_value(given->values[i]);
    }
    if (bounds[2] == 0) return render_fail(r, "a range's step is 0");
    json_t *list = render_keep(r, json_array());
    for (json_int_t i = bounds[0]; (bounds[2] > 0 ? i < bounds[1] : i > bounds[1]) && render_step(r);
         i += bounds[2])
        json_array_append_new(list, json_integer(i));
    return list;
}

static json_t *call_strftime(struct render *r, const struct arguments *given) {
    char text[200];
    time_t now = time(NULL);
    struct tm local;
    localtime_r(&now, &local);
    size_t bytes = strftime(text, sizeof text, text_of(argument(given, 0, "format")), &local);
    return render_string(r, text, bytes);
}

json_t *call_function(struct render *r, const char *name, const struct arguments *given) {
    if (strcmp(name, "range") == 0) return range(r, given);
    if (strcmp(name, "strftime_now") == 0) return call_strftime(r, given);
    if (strcmp(name, "raise_exception") == 0)
        return render_fail(r, "%.160s", text_of(argument(given, 0, NULL)));
    if (!listed(functions, name)) return render_fail(r, "there is no function \"%.40s\"", name);
    json_t *object = render_keep(r, json_object());
    for (int i = 0; i < given->count; i++)
        if (given->names[i])
            json_object_set(object, given->names[i],
                            given->values[i] ? given->values[i] : render_keep(r, json_null()));
        else if (json_is_object(given->values[i])) json_object_update(object, given->values[i]);
    return object;
}
