// The base model: weights in the backend's form, and one forward step over a ragged batch.
#ifndef LORAD_SERVER_MODEL_MODEL_H
#define LORAD_SERVER_MODEL_MODEL_H

#include "kernels/backend.h"
#include "pager/adapter.h"
#include "server/model/config.h"

struct model;

struct model_options {
    const char *folder;
    bool dummy;        // seeded random weights instead of files
    uint64_t seed;     // of the dummy weights
    int tokens_max;    // T in a step at most
    int sequences_max; // rows of logits in a step at most
    int segments_max;
    int context_max;
};

// Reads config.json is the caller's; loads every weight (progress goes to the log), allocates all
// activations. A missing, surplus or misshapen tensor is an error that names it.
MUST_CHECK enum status model_create(const struct backend_ops *ops, struct backend *backend,
                                    const struct model_config *config, enum dtype dtype,
                                    const struct model_options *options, struct model **out,
                                    struct error *err);
void model_destroy(struct model *model);

// The geometry an adapter must fit (pool_pages is the caller's to fill).
struct lora_geometry model_lora_geometry(const struct model_config *config, enum dtype dtype);

// What a step gave, on the host, valid until the next one.
struct model_rows {
    const float *logits; // [logit_count, V]; where ids is not NULL, rows of DRAW_NONE alone
    const int32_t *ids;  // [logit_count] tokens by step->draws; NULL: the backend does not draw
};
struct model_rows model_forward(struct model *model, const struct step *step);
// The same in two: a device computes in between. `step` and its arrays stay as they are until the end.
void model_queue(struct model *model, const struct step *step);
struct model_rows model_wait(struct model *model);

#endif
