// What adapter_config.c tells adapter_load.c: for every module of every layer, whether the adapter
// changes it, at which rank, and how much.
#ifndef LORAD_PAGER_ADAPTER_INTERNAL_H
#define LORAD_PAGER_ADAPTER_INTERNAL_H

#include "pager/adapter.h"

// "self_attn.q_proj" and so on, by enum lora_module.
extern const char *const lora_module_names[LORA_MODULES];

struct adapter_plan {
    struct adapter_plan_entry {
        int rank; // 0: the configuration does not target this module
        double scale;
    } *entry; // [layers * LORA_MODULES], malloc'd
};

// Reads and checks FOLDER/adapter_config.json. On failure plan->entry is NULL.
MUST_CHECK enum status adapter_config_load(const char *folder, const struct lora_geometry *geometry,
                                           struct adapter_plan *plan, struct error *err);

#endif
