// See tenants.h. Places are an array; the ones with somebody waiting are also listed, so that a window
// costs its length times the tenants who wait, not all who ever came.
#include "server/tenants.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdlib.h>
#include <string.h>

enum { NAME_MAX_BYTES = 64 };
static const double PROMPT_COST = 1, OUTPUT_COST = 2; // w_p and w_q of the paper

struct tenant {
    char name[NAME_MAX_BYTES];
    double counter, weight;
    int inside;                      // requests, waiting and running; 0: the place may be taken
    struct waiting {
        struct sched_item *first, *last;
    } queue[2]; // who waits; [1]: those who are cold
    int listed;                      // its index in `waiting`
    bool known;                      // has a name: its counter means something
};

struct tenants {
    int capacity, active;
    struct tenant *tenant; // [capacity]
    int *waiting;          // tenants with somebody waiting
    int waiting_count;
    int last_left; // the tenant whose queue emptied last; its counter still grows while it runs
    const struct tenant_weight *weights;
    int weight_count;
    // Of the window being made, by place: the counter, and who is next.
    double *virtual_counter;
    struct sched_item **cursor;
};

struct tenants *tenants_create(int capacity, const struct tenant_weight *weights,
                               int weight_count) {
    VERIFY_OP(capacity, >, 0);
    struct tenants *t = mem_zalloc(1, sizeof *t);
    size_t count = (size_t)capacity;
    t->capacity = capacity;
    t->tenant = mem_zalloc(count, sizeof *t->tenant);
    t->waiting = mem_zalloc(count, sizeof *t->waiting);
    t->virtual_counter = mem_zalloc(count, sizeof *t->virtual_counter);
    t->cursor = mem_zalloc(count, sizeof *t->cursor);
    t->weights = weights;
    t->weight_count = weight_count;
    return t;
}

void tenants_destroy(struct tenants *t) {
    if (!t) return;
    free(t->tenant);
    free(t->waiting);
    free(t->virtual_counter);
    free(t->cursor);
    free(t);
}

static bool waits(const struct tenant *tenant) {
    return tenant->queue[0].first || tenant->queue[1].first;
}

static double weight_of(const struct tenants *t, const char *name) {
    for (int i = 0; i < t->weight_count; i++)
        if (strcmp(t->weights[i].name, name) == 0) return t->weights[i].weight;
    return 1;
}

// Its own place, or else one that is empty: unnamed first, then the least served.
static int place_for(const struct tenants *t, const char *name) {
    int best = -1;
    for (int i = 0; i < t->capacity; i++) {
        const struct tenant *tenant = &t->tenant[i];
        if (!tenant->known) return best < 0 || t->tenant[best].known ? i : best;
        if (strcmp(tenant->name, name) == 0) return i;
        if (tenant->inside > 0) continue;
        if (best < 0 || tenant->counter < t->tenant[best].counter) best = i;
    }
    return best;
}

int tenants_enter(struct tenants *t, const char *name) {
    char cut[NAME_MAX_BYTES] = {0};
    strncpy(cut, name, sizeof cut - 1);
    int place = place_for(t, cut);
    VERIFY_OP(place, >=, 0); // there are as many places as requests
    struct tenant *tenant = &t->tenant[place];
    if (!tenant->known || strcmp(tenant->name, cut) != 0) {
        VERIFY_OP(tenant->inside, ==, 0);
        *tenant = (struct tenant){.weight = weight_of(t, cut), .known = true};
        memcpy(tenant->name, cut, sizeof cut);
    }
    t->active += tenant->inside++ == 0;
    return place;
}

void tenants_leave(struct tenants *t, int place) {
    struct tenant *tenant = &t->tenant[place];
    VERIFY_OP(tenant->inside, >, 0);
    t->active -= --tenant->inside == 0;
    VERIFY(tenant->inside > 0 || !waits(tenant));
}

// ------------------------------------------------------------------ who waits

static void lift(struct tenants *t, struct tenant *tenant) {
    double least = t->tenant[t->last_left].counter;
    for (int i = 0; i < t->waiting_count; i++) {
        double counter = t->tenant[t->waiting[i]].counter;
        if (i == 0 || counter < least) least = counter;
    }
    if (tenant->counter < least) tenant->counter = least;
}

static void queue_insert(struct waiting *queue, struct sched_item *item) {
    // Newcomers stand last, who was preempted first: both ends are near.
    struct sched_item *before = queue->last;
    if (queue->first && sched_before(item, queue->first)) before = NULL;
    while (before && sched_before(item, before)) before = before->tenant_previous;
    item->tenant_previous = before;
    item->tenant_next = before ? before->tenant_next : queue->first;
    *(before ? &before->tenant_next : &queue->first) = item;
    *(item->tenant_next ? &item->tenant_next->tenant_previous : &queue->last) = item;
}

static void queue_remove(struct waiting *queue, struct sched_item *item) {
    struct sched_item *previous = item->tenant_previous, *next = item->tenant_next;
    *(previous ? &previous->tenant_next : &queue->first) = next;
    *(next ? &next->tenant_previous : &queue->last) = previous;
    item->tenant_previous = item->tenant_next = NULL;
}

void tenants_wait(struct tenants *t, struct sched_item *item) {
    struct tenant *tenant = &t->tenant[item->tenant];
    VERIFY_OP(tenant->inside, >, 0);
    if (!waits(tenant)) {
        lift(t, tenant);
        tenant->listed = t->waiting_count;
        t->waiting[t->waiting_count++] = item->tenant;
    }
    queue_insert(&tenant->queue[item->cold], item);
}

void tenants_set_cold(struct tenants *t, struct sched_item *item, bool cold) {
    struct tenant *tenant = &t->tenant[item->tenant];
    queue_remove(&tenant->queue[item->cold], item);
    item->cold = cold;
    queue_insert(&tenant->queue[item->cold], item);
}

void tenants_unwait(struct tenants *t, struct sched_item *item) {
    struct tenant *tenant = &t->tenant[item->tenant];
    queue_remove(&tenant->queue[item->cold], item);
    if (waits(tenant)) return;
    t->last_left = item->tenant;
    int moved = t->waiting[--t->waiting_count];
    t->waiting[tenant->listed] = moved;
    t->tenant[moved].listed = tenant->listed;
}

// ------------------------------------------------------------------ what they got, who is next

void tenants_charge_prompt(struct tenants *t, int place, int tokens) {
    t->tenant[place].counter += PROMPT_COST * tokens / t->tenant[place].weight;
}

void tenants_charge_output(struct tenants *t, int place, int tokens) {
    t->tenant[place].counter += OUTPUT_COST * tokens / t->tenant[place].weight;
}

double tenants_counter(const struct tenants *t, int place) {
    return t->tenant[place].counter;
}

int tenants_active(const struct tenants *t) {
    return t->active;
}

int tenants_window(struct tenants *t, bool cold, struct sched_item **window, int max) {
    for (int i = 0; i < t->waiting_count; i++) {
        int place = t->waiting[i];
        t->virtual_counter[place] = t->tenant[place].counter;
        t->cursor[place] = t->tenant[place].queue[cold].first;
    }
    int count = 0;
    while (count < max) {
        int best = -1;
        for (int i = 0; i < t->waiting_count; i++) {
            int place = t->waiting[i];
            struct sched_item *item = t->cursor[place];
            if (!item) continue;
            double behind = best < 0 ? 0 : t->virtual_counter[place] - t->virtual_counter[best];
            if (best < 0 || behind < 0 || (behind == 0 && sched_before(item, t->cursor[best])))
                best = place;
        }
        if (best < 0) break;
        struct sched_item *item = t->cursor[best];
        window[count++] = item;
        t->cursor[best] = item->tenant_next;
        if (!item->charged)
            t->virtual_counter[best] += PROMPT_COST * item->tokens_total / t->tenant[best].weight;
    }
    return count;
}
