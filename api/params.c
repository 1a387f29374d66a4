// Strict reading of JSON fields: a wrong type or range is an error that names the field and says
// what would be right; an absent or null field leaves the default. Pure; any thread.
#include "api/api_internal.h"

#include <math.h>
#include <string.h>

enum status body_parse(const char *body, size_t bytes, json_t **out, struct error *err) {
    json_error_t where;
    *out = json_loadb(body, bytes, JSON_REJECT_DUPLICATES, &where);
    if (!*out)
        return error_set(err, STATUS_INVALID, "the body is not valid JSON: %.160s (line %d)",
                         where.text, where.line);
    if (json_is_object(*out)) return STATUS_OK;
    json_decref(*out);
    *out = NULL;
    return error_set(err, STATUS_INVALID, "the body must be a JSON object");
}

static const json_t *field(const json_t *root, const char *name) {
    const json_t *value = json_object_get(root, name);
    return json_is_null(value) ? NULL : value;
}

enum status param_number(const json_t *root, const char *name, double min, double max, double *out,
                         struct error *err) {
    const json_t *value = field(root, name);
    if (!value) return STATUS_OK;
    double number = json_number_value(value);
    if (!json_is_number(value) || !isfinite(number) || number < min || number > max)
        return error_set_param(err, STATUS_INVALID, name, "%s must be a number from %g to %g", name,
                               min, max);
    *out = number;
    return STATUS_OK;
}

enum status param_integer(const json_t *root, const char *name, int64_t min, int64_t max,
                          int64_t *out, struct error *err) {
    const json_t *value = field(root, name);
    if (!value) return STATUS_OK;
    int64_t number = json_integer_value(value);
    if (!json_is_integer(value) || number < min || number > max)
        return error_set_param(err, STATUS_INVALID, name,
                               "%s must be a whole number from %lld to %lld", name, (long long)min,
                               (long long)max);
    *out = number;
    return STATUS_OK;
}

enum status param_bool(const json_t *root, const char *name, bool *out, struct error *err) {
    const json_t *value = field(root, name);
    if (!value) return STATUS_OK;
    if (!json_is_boolean(value))
        return error_set_param(err, STATUS_INVALID, name, "%s must be true or false", name);
    *out = json_is_true(value);
    return STATUS_OK;
}

enum status param_string(const json_t *root, const char *name, size_t bytes_max, const char **out,
                         struct error *err) {
    const json_t *value = field(root, name);
    if (!value) return STATUS_OK;
    if (!json_is_string(value) || json_string_length(value) > bytes_max)
        return error_set_param(err, STATUS_INVALID, name,
                               "%s must be a string of at most %zu bytes", name, bytes_max);
    *out = json_string_value(value);
    return STATUS_OK;
}
