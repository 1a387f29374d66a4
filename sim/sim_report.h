// A result as text, JSON, CSV and SVG; and the comparison with S-LoRA's published rows.
#ifndef LORAD_SIM_SIM_REPORT_H
#define LORAD_SIM_SIM_REPORT_H

#include "sim/sim.h"

#include <jansson.h>
#include <stdio.h>

void sim_print(FILE *out, const struct sim_options *options, const struct sim_result *result);
// A new reference; says that it is a simulation.
json_t *sim_json(const struct sim_options *options, const struct sim_result *result);
MUST_CHECK enum status sim_write_json(const char *path, json_t *value, struct error *err);
// Pages by owner over time.
MUST_CHECK enum status sim_write_csv(const char *path, const struct sim_result *result,
                                     struct error *err);
MUST_CHECK enum status sim_write_svg(const char *path, const struct sim_result *result,
                                     struct error *err);

// Runs every published row under S-LoRA's policy, then under ours, prints the tables, and writes
// them to `json_path` unless NULL. `within`: out, no predicted throughput was off by more than 15%.
MUST_CHECK enum status sim_reproduce(FILE *out, const char *json_path, bool *within,
                                     struct error *err);
// Orders of eviction over several traces: prints the table, writes the rows to `json_path` unless NULL.
MUST_CHECK enum status sim_compare(FILE *out, const char *json_path, struct error *err);
// The three constants of the engine "slora" by search over the fitted rows; prints the best.
MUST_CHECK enum status sim_fit(FILE *out, struct error *err);

#endif
