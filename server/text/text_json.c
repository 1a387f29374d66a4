// Fields of tokenizer.json, each read with its type checked, so that every loader of server/text
// reports a bad file in the same words. Called at load alone. It gives no meaning to the fields.
#include "server/text/text_internal.h"

#include <string.h>

static enum status wrong_type(const char *key, const char *wanted, struct error *err) {
    return error_set(err, STATUS_INVALID, "\"%s\" must be %s", key, wanted);
}

enum status field_bool(const json_t *object, const char *key, bool fallback, bool *out,
                       struct error *err) {
    const json_t *value = json_object_get(object, key);
    *out = fallback;
    if (value == NULL || json_is_null(value)) return STATUS_OK;
    if (!json_is_boolean(value)) return wrong_type(key, "true or false", err);
    *out = json_is_true(value);
    return STATUS_OK;
}

enum status field_count(const json_t *object, const char *key, size_t fallback, size_t *out,
                        struct error *err) {
    const json_t *value = json_object_get(object, key);
    *out = fallback;
    if (value == NULL || json_is_null(value)) return STATUS_OK;
    if (!json_is_integer(value) || json_integer_value(value) < 0)
        return wrong_type(key, "an integer >= 0", err);
    *out = (size_t)json_integer_value(value);
    return STATUS_OK;
}

enum status field_string(const json_t *object, const char *key, bool required, const json_t **out,
                         struct error *err) {
    const json_t *value = json_object_get(object, key);
    *out = NULL;
    if ((value == NULL || json_is_null(value)) && !required) return STATUS_OK;
    if (!json_is_string(value)) return wrong_type(key, "a string", err);
    *out = value;
    return STATUS_OK;
}

enum status field_character(const json_t *object, const char *key, uint32_t fallback,
                            uint32_t *out, struct error *err) {
    const json_t *value;
    *out = fallback;
    enum status status = field_string(object, key, false, &value, err);
    if (status || value == NULL) return status;
    size_t bytes = json_string_length(value);
    if (bytes == 0 || utf8_next(json_string_value(value), bytes, out) != bytes)
        return wrong_type(key, "one character", err);
    return STATUS_OK;
}

enum status field_type(const json_t *object, const char *what, const char **out,
                       struct error *err) {
    const json_t *type = json_object_get(object, "type");
    if (!json_is_string(type))
        return error_set(err, STATUS_INVALID, "%s must be an object with a \"type\"", what);
    *out = json_string_value(type);
    return STATUS_OK;
}

enum status field_id(const json_t *value, int below, const char *what, int32_t *out,
                     struct error *err) {
    if (!json_is_integer(value))
        return error_set(err, STATUS_INVALID, "the id of %s must be an integer", what);
    json_int_t id = json_integer_value(value);
    if (id < 0)
        return error_set(err, STATUS_INVALID, "the id of %s is negative (%lld)", what,
                         (long long)id);
    if (id >= below)
        return error_set(err, STATUS_INVALID,
                         "the id of %s is %lld, but ids must be below the model's vocabulary "
                         "size %d",
                         what, (long long)id, below);
    *out = (int32_t)id;
    return STATUS_OK;
}

enum status components_load(const json_t *json, const char *what, const char *members,
                            component_add *add, void *owner, struct error *err) {
    if (json == NULL || json_is_null(json)) return STATUS_OK;
    const char *type = NULL;
    enum status status = field_type(json, what, &type, err);
    if (status) return status;
    if (strcmp(type, "Sequence") != 0) {
        status = add(owner, type, json, err);
        if (status == STATUS_NOT_FOUND)
            return error_set(err, STATUS_UNSUPPORTED, "%s \"%.60s\" is not supported", what, type);
        if (status) error_prefix(err, "%s \"%.60s\"", what, type);
        return status;
    }
    const json_t *list = json_object_get(json, members);
    if (!json_is_array(list))
        return error_set(err, STATUS_INVALID, "%s \"Sequence\" needs an array \"%s\"", what,
                         members);
    for (size_t i = 0; i < json_array_size(list); i++) {
        status = components_load(json_array_get(list, i), what, members, add, owner, err);
        if (status) return status;
    }
    return STATUS_OK;
}
