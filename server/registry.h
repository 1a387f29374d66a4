// Names -> adapter generations. Any thread (one mutex inside; never held over file reading).
#ifndef LORAD_SERVER_REGISTRY_H
#define LORAD_SERVER_REGISTRY_H

#include "pager/adapter.h"

struct registry;
struct registry *registry_create(const char *base_id); // copied; a name no adapter may take
void registry_destroy(struct registry *registry);

// 1 to 128 bytes of printable ASCII without '/' or '\\', not "." or "..", not the base's id.
MUST_CHECK enum status registry_check_name(const struct registry *registry, const char *name,
                                           struct error *err);
// Reserves the name while its adapter loads. STATUS_EXISTS: taken (and not replace);
// STATUS_BUSY: another load of that name is under way.
MUST_CHECK enum status registry_begin(struct registry *registry, const char *name, bool replace,
                                      struct error *err);
// Ends a reservation: with an adapter (its reference is taken over; one it replaces is retired), or
// with NULL (the load failed; all is as before).
void registry_commit(struct registry *registry, const char *name, struct adapter *adapter);
// A new reference, or NULL.
struct adapter *registry_find(struct registry *registry, const char *name);
// Another registered adapter whose content is the same by digest (known once it has been read), so
// that its pages can serve both names: a new reference, or NULL. Of several the first one found
// serves all, until it is replaced or removed; then another does.
struct adapter *registry_twin(struct registry *registry, const struct adapter *adapter);
MUST_CHECK enum status registry_remove(struct registry *registry, const char *name,
                                       struct error *err);
// The same in two halves, for a caller that must write between them: after _begin the name still
// serves and refuses other changes (STATUS_BUSY); _end removes it, or leaves all as it was.
MUST_CHECK enum status registry_begin_remove(struct registry *registry, const char *name,
                                             struct error *err);
void registry_end_remove(struct registry *registry, const char *name, bool remove);
// All of them, sorted by name, each with a new reference; *list is malloc'd.
int registry_list(struct registry *registry, struct adapter ***list);

#endif
