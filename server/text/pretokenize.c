// Pre-tokenizers: they cut a normal text into the pieces that byte-pair encoding sees one at a
// time, and rewrite it for byte-level and SentencePiece-style vocabularies. Every kind is loaded as
// one or two of four steps: add a space, split by a pattern, map bytes, mark spaces. Any thread;
// the steps are read-only, the pieces lie in the caller's struct encoding.
#include "server/text/text_internal.h"

#include "base/memory.h"

#include <stdlib.h>
#include <string.h>

// The pattern that byte-level pre-tokenizers have built in (GPT-2's).
#define BYTE_LEVEL_REGEX                                                                           \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

enum split_behavior {
    SPLIT_REMOVED,
    SPLIT_ISOLATED,
    SPLIT_MERGED_WITH_PREVIOUS,
    SPLIT_MERGED_WITH_NEXT,
    SPLIT_CONTIGUOUS,
};
static const char *const behavior_names[] = {"Removed", "Isolated", "MergedWithPrevious",
                                             "MergedWithNext", "Contiguous"};

enum pretokenize_kind { STEP_ADD_SPACE, STEP_SPLIT, STEP_BYTE_MAP, STEP_MARK_SPACES };
enum prepend_scheme { PREPEND_NEVER, PREPEND_FIRST, PREPEND_ALWAYS };

struct pretokenize_step {
    enum pretokenize_kind kind;
    struct pattern *pattern; // SPLIT
    enum split_behavior behavior;
    bool invert;
    char mark[4]; // MARK_SPACES
    size_t mark_bytes;
    enum prepend_scheme prepend;
};

enum { PRETOKENIZE_STEPS_MAX = 64 };
struct pretokenizer {
    struct pretokenize_step steps[PRETOKENIZE_STEPS_MAX];
    size_t count;
};

// ---- loading ----------------------------------------------------------------------------------

static struct pretokenize_step *next_step(struct pretokenizer *owner, enum pretokenize_kind kind) {
    struct pretokenize_step *step = &owner->steps[owner->count++];
    step->kind = kind;
    return step;
}

static void add_split(struct pretokenizer *owner, struct pattern *pattern,
                      enum split_behavior behavior, bool invert) {
    struct pretokenize_step *step = next_step(owner, STEP_SPLIT);
    step->pattern = pattern;
    step->behavior = behavior;
    step->invert = invert;
}

static enum status load_behavior(const json_t *json, const char *fallback,
                                 enum split_behavior *out, struct error *err) {
    const json_t *value;
    enum status status = field_string(json, "behavior", fallback == NULL, &value, err);
    if (status) return status;
    const char *name = value ? json_string_value(value) : fallback;
    for (size_t i = 0; i < sizeof behavior_names / sizeof *behavior_names; i++)
        if (strcmp(name, behavior_names[i]) == 0) {
            *out = (enum split_behavior)i;
            return STATUS_OK;
        }
    return error_set(err, STATUS_UNSUPPORTED, "behavior \"%.60s\" is not supported", name);
}

static enum status load_byte_level(struct pretokenizer *owner, const json_t *json,
                                   struct error *err) {
    bool add_space, use_regex;
    enum status status = field_bool(json, "add_prefix_space", true, &add_space, err);
    if (status == STATUS_OK) status = field_bool(json, "use_regex", true, &use_regex, err);
    if (status) return status;
    if (add_space) next_step(owner, STEP_ADD_SPACE);
    if (use_regex) {
        struct pattern *pattern;
        status = pattern_from_regex(BYTE_LEVEL_REGEX, strlen(BYTE_LEVEL_REGEX), &pattern, err);
        if (status) return status;
        add_split(owner, pattern, SPLIT_ISOLATED, false);
    }
    next_step(owner, STEP_BYTE_MAP);
    return STATUS_OK;
}

static enum status load_split(struct pretokenizer *owner, const json_t *json, struct error *err) {
    enum split_behavior behavior = SPLIT_ISOLATED;
    bool invert;
    struct pattern *pattern;
    enum status status = load_behavior(json, NULL, &behavior, err);
    if (status == STATUS_OK) status = field_bool(json, "invert", false, &invert, err);
    if (status == STATUS_OK)
        status = pattern_load(json_object_get(json, "pattern"), &pattern, err);
    if (status == STATUS_OK) add_split(owner, pattern, behavior, invert);
    return status;
}

// Older files have add_prefix_space where newer ones have prepend_scheme.
static enum status load_metaspace(struct pretokenizer *owner, const json_t *json,
                                  struct error *err) {
    uint32_t mark;
    bool add_space, split;
    const json_t *scheme;
    enum status status = field_character(json, "replacement", 0x2581, &mark, err);
    if (status == STATUS_OK) status = field_bool(json, "add_prefix_space", true, &add_space, err);
    if (status == STATUS_OK) status = field_bool(json, "split", true, &split, err);
    if (status == STATUS_OK) status = field_string(json, "prepend_scheme", false, &scheme, err);
    if (status) return status;
    const char *name = scheme ? json_string_value(scheme) : add_space ? "always" : "never";
    struct pretokenize_step *step = next_step(owner, STEP_MARK_SPACES);
    step->mark_bytes = utf8_put(mark, step->mark);
    if (strcmp(name, "always") == 0)
        step->prepend = PREPEND_ALWAYS;
    else if (strcmp(name, "first") == 0)
        step->prepend = PREPEND_FIRST;
    else if (strcmp(name, "never") == 0)
        step->prepend = PREPEND_NEVER;
    else
        return error_set(err, STATUS_UNSUPPORTED, "prepend_scheme \"%.60s\" is not supported",
                         name);
    if (split)
        add_split(owner, pattern_from_text(step->mark, step->mark_bytes), SPLIT_MERGED_WITH_NEXT,
                  false);
    return STATUS_OK;
}

static enum status add_component(void *pretokenizer, const char *type, const json_t *json,
                                 struct error *err) {
    struct pretokenizer *owner = pretokenizer;
    enum status status = STATUS_OK;
    if (owner->count + 3 > PRETOKENIZE_STEPS_MAX)
        return error_set(err, STATUS_UNSUPPORTED, "more than %d steps", PRETOKENIZE_STEPS_MAX);
    if (strcmp(type, "ByteLevel") == 0) return load_byte_level(owner, json, err);
    if (strcmp(type, "Split") == 0) return load_split(owner, json, err);
    if (strcmp(type, "Metaspace") == 0) return load_metaspace(owner, json, err);
    if (strcmp(type, "Digits") == 0) {
        bool alone;
        status = field_bool(json, "individual_digits", false, &alone, err);
        if (status) return status;
        add_split(owner, pattern_from_class(char_is_numeric),
                  alone ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS, false);
    } else if (strcmp(type, "Punctuation") == 0) {
        enum split_behavior behavior = SPLIT_ISOLATED;
        status = load_behavior(json, "Isolated", &behavior, err);
        if (status) return status;
        add_split(owner, pattern_from_class(char_is_punctuation), behavior, false);
    } else if (strcmp(type, "WhitespaceSplit") == 0) {
        add_split(owner, pattern_from_class(char_is_space), SPLIT_REMOVED, false);
    } else if (strcmp(type, "Whitespace") == 0) {
        add_split(owner, pattern_of_words(), SPLIT_REMOVED, true);
    } else {
        return STATUS_NOT_FOUND;
    }
    return STATUS_OK;
}

enum status pretokenizer_load(const json_t *json, struct pretokenizer **out, struct error *err) {
    *out = mem_zalloc(1, sizeof **out);
    return components_load(json, "pre_tokenizer", "pretokenizers", add_component, *out, err);
}

void pretokenizer_destroy(struct pretokenizer *pretokenizer) {
    if (pretokenizer == NULL) return;
    for (size_t i = 0; i < pretokenizer->count; i++)
        pattern_destroy(pretokenizer->steps[i].pattern);
    free(pretokenizer);
}

// ---- splitting --------------------------------------------------------------------------------

// The behaviours turn cuts into pieces by gluing some to their neighbour, in place. A piece keeps
// `match` only where it is to be dropped.
static void glue_forward(struct cut_list *cuts, enum split_behavior behavior) {
    size_t kept = 0;
    bool previous = false;
    for (size_t i = 0; i < cuts->count; i++) {
        struct cut cut = cuts->items[i];
        bool glue = behavior == SPLIT_CONTIGUOUS ? cut.match == previous : cut.match && !previous;
        previous = cut.match;
        cut.match = false;
        if (glue && kept > 0)
            cuts->items[kept - 1].end = cut.end;
        else
            cuts->items[kept++] = cut;
    }
    cuts->count = kept;
}

static void glue_backward(struct cut_list *cuts) {
    size_t kept = cuts->count; // items[kept..] are done
    bool previous = false;
    for (size_t i = cuts->count; i-- > 0;) {
        struct cut cut = cuts->items[i];
        bool glue = cut.match && !previous;
        previous = cut.match;
        cut.match = false;
        if (glue && kept < cuts->count)
            cuts->items[kept].start = cut.start;
        else
            cuts->items[--kept] = cut;
    }
    memmove(cuts->items, cuts->items + kept, (cuts->count - kept) * sizeof *cuts->items);
    cuts->count -= kept;
}

static void apply_behavior(const struct pretokenize_step *step, struct cut_list *cuts) {
    if (step->invert)
        for (size_t i = 0; i < cuts->count; i++) cuts->items[i].match = !cuts->items[i].match;
    switch (step->behavior) {
    case SPLIT_REMOVED: break;
    case SPLIT_ISOLATED:
        for (size_t i = 0; i < cuts->count; i++) cuts->items[i].match = false;
        break;
    case SPLIT_MERGED_WITH_PREVIOUS:
    case SPLIT_CONTIGUOUS: glue_forward(cuts, step->behavior); break;
    case SPLIT_MERGED_WITH_NEXT: glue_backward(cuts); break;
    }
}

static enum status split(const struct pretokenize_step *step, struct encoding *encoding,
                         struct span span, struct error *err) {
    struct cut_list *cuts = &encoding->cuts;
    enum status status = pattern_cut(step->pattern, &encoding->match,
                                     encoding->text.data + span.start, span.bytes, cuts, err);
    if (status) return status;
    apply_behavior(step, cuts);
    for (size_t i = 0; i < cuts->count; i++) {
        struct cut cut = cuts->items[i];
        if (cut.match || cut.start == cut.end) continue;
        span_append(&encoding->spare_spans,
                    (struct span){span.start + cut.start, cut.end - cut.start, -1,
                                  span.first && cut.start == 0});
    }
    return STATUS_OK;
}

// ---- rewriting --------------------------------------------------------------------------------

static void map_bytes(const char *text, size_t bytes, struct text_buffer *out) {
    for (size_t i = 0; i < bytes; i++)
        text_append_character(out, byte_to_character((uint8_t)text[i]));
}

static void mark_spaces(const struct pretokenize_step *step, const char *text, size_t bytes,
                        bool first, struct text_buffer *out) {
    bool marked = text[0] == ' ' || (bytes >= step->mark_bytes &&
                                     memcmp(text, step->mark, step->mark_bytes) == 0);
    bool prepend = step->prepend == PREPEND_ALWAYS || (step->prepend == PREPEND_FIRST && first);
    if (prepend && !marked) text_append(out, step->mark, step->mark_bytes);
    for (size_t start = 0; start < bytes;) {
        const char *space = memchr(text + start, ' ', bytes - start);
        size_t end = space ? (size_t)(space - text) : bytes;
        text_append(out, text + start, end - start);
        if (space) text_append(out, step->mark, step->mark_bytes);
        start = end + 1;
    }
}

static void rewrite(const struct pretokenize_step *step, struct encoding *encoding,
                    struct span span) {
    const char *text = encoding->text.data + span.start;
    size_t start = encoding->spare.bytes;
    if (step->kind == STEP_ADD_SPACE) {
        if (text[0] != ' ') text_append(&encoding->spare, " ", 1);
        text_append(&encoding->spare, text, span.bytes);
    } else if (step->kind == STEP_BYTE_MAP) {
        map_bytes(text, span.bytes, &encoding->spare);
    } else {
        mark_spaces(step, text, span.bytes, span.first, &encoding->spare);
    }
    span_append(&encoding->spare_spans,
                (struct span){start, encoding->spare.bytes - start, -1, span.first});
}

static enum status run_step(const struct pretokenize_step *step, struct encoding *encoding,
                            struct error *err) {
    encoding->spare.bytes = 0;
    encoding->spare_spans.count = 0;
    for (size_t i = 0; i < encoding->spans.count; i++) {
        struct span span = encoding->spans.items[i];
        enum status status = STATUS_OK;
        if (span.id >= 0)
            span_append(&encoding->spare_spans, span);
        else if (step->kind == STEP_SPLIT)
            status = split(step, encoding, span, err);
        else
            rewrite(step, encoding, span);
        if (status) return status;
    }
    struct span_list spans = encoding->spare_spans;
    encoding->spare_spans = encoding->spans;
    encoding->spans = spans;
    if (step->kind == STEP_SPLIT) return STATUS_OK;
    struct text_buffer text = encoding->spare;
    encoding->spare = encoding->text;
    encoding->text = text;
    return STATUS_OK;
}

enum status pretokenizer_run(const struct pretokenizer *pretokenizer, struct encoding *encoding,
                             struct error *err) {
    for (size_t i = 0; i < pretokenizer->count; i++) {
        enum status status = run_step(&pretokenizer->steps[i], encoding, err);
        if (status) return status;
    }
    return STATUS_OK;
}
