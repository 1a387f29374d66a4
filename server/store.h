// The registry's memory across restarts: which adapters were loaded at run time, in an SQLite
// database under --state-dir. A call that returned STATUS_OK has reached the disk, so that neither
// SIGKILL nor a power cut loses it. Any thread; one call at a time (SQLite's own mutex). Calls wait
// for the disk: never on the engine's or the loop's thread.
#ifndef LORAD_SERVER_STORE_H
#define LORAD_SERVER_STORE_H

#include "pager/adapter.h"

struct store;
// Makes the folder where it is missing (not its parents). STATUS_BUSY: another process has it open.
// STATUS_INVALID: not such a database, or one of a later version.
MUST_CHECK enum status store_open(const char *folder, struct store **out, struct error *err);
void store_close(struct store *store); // NULL is allowed

// Adds or replaces one name. `dtype` is that of the image whose digest it is; `stamp` says which
// state of the files it was (any text).
// STATUS_NO_PAGES: the disk is full; STATUS_IO: anything else. Either way all is as before.
MUST_CHECK enum status store_put(struct store *store, const char *name, const char *path,
                                 const char *digest, const char *dtype, const char *stamp,
                                 bool pinned, struct error *err);
// Of a name that is there; nothing happens to one that is not.
MUST_CHECK enum status store_set_pinned(struct store *store, const char *name, bool pinned,
                                        struct error *err);
MUST_CHECK enum status store_delete(struct store *store, const char *name, struct error *err);

struct store_entry {
    char *name, *path, *digest, *dtype, *stamp;
    bool pinned;
};
// All of them by name; on STATUS_OK *list is the caller's to give to store_list_free.
MUST_CHECK enum status store_list(struct store *store, struct store_entry **list, int *count,
                                  struct error *err);
void store_list_free(struct store_entry *list, int count);

#endif
