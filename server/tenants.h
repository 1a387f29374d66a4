// Fairness between tenants: the virtual token counter (VTC, arXiv 2401.00588). Each tenant has a
// counter of the service it got, in weighted tokens; whoever has waited with the least is next.
//
//   admitted:          c += prompt_cost * prompt tokens / weight
//   a token generated: c += output_cost / weight
//   begins to wait, having had nobody waiting: c = max(c, the least counter of those who wait), or,
//     when nobody waits, of the one whose last request left the queue last: idleness earns nothing
//
// Then, while two tenants of weight 1 both wait, the service they get differs by at most
// 2 max(prompt_cost * longest prompt, output_cost * tokens in a running batch) (theorem 4.8 there).
//
// Within a tenant, requests stand in sched_before's order; those whose adapters are not resident in
// a queue of their own, so that they hold up nobody. Pure bookkeeping: no clock, no device.
// Engine thread only; no allocation after tenants_create.
#ifndef LORAD_SERVER_TENANTS_H
#define LORAD_SERVER_TENANTS_H

#include "server/scheduler.h"

struct tenant_weight {
    const char *name; // borrowed for as long as the tenants live
    double weight;    // > 0; 2 gets twice the service of 1
};

struct tenants;
// capacity: requests that may be inside at once, at least. Others than `weights` have weight 1.
struct tenants *tenants_create(int capacity, const struct tenant_weight *weights, int weight_count);
void tenants_destroy(struct tenants *tenants);

// A request of `name` comes in and goes out: between the two its tenant has a place, whose number
// enter returns. Afterwards the place may go to another; a forgotten counter is lifted on return.
int tenants_enter(struct tenants *tenants, const char *name);
void tenants_leave(struct tenants *tenants, int tenant);

// The item, whose item->tenant and item->cold are set, waits; it waits no longer.
void tenants_wait(struct tenants *tenants, struct sched_item *item);
void tenants_unwait(struct tenants *tenants, struct sched_item *item);

// A waiting item's adapters have come, or gone.
void tenants_set_cold(struct tenants *tenants, struct sched_item *item, bool cold);

void tenants_charge_prompt(struct tenants *tenants, int tenant, int tokens);
void tenants_charge_output(struct tenants *tenants, int tenant, int tokens);
double tenants_counter(const struct tenants *tenants, int tenant);
int tenants_active(const struct tenants *tenants); // with somebody inside

// The first `max` of those who wait and are as `cold` says, in the order in which they would be
// served one after another, each charged for its prompt on the way. Returns how many.
int tenants_window(struct tenants *tenants, bool cold, struct sched_item **window, int max);

#endif
