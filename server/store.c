// One SQLite database, registry.sqlite, with one row an adapter. Write-ahead log with
// synchronous=FULL: a commit returns after fsync. The connection holds the file's lock for as long
// as it is open, so that two servers cannot take turns on one folder. Statements are prepared for
// each call: they are rare and wait for the disk anyway.
#include "server/store.h"

#include "base/file.h"
#include "base/memory.h"

#include <errno.h>
#include <sqlite3.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { SCHEMA_VERSION = 2 };

struct store {
    sqlite3 *db;
};

// What a user reads never holds the folder: clients see it too.
static enum status refuse(struct store *store, struct error *err) {
    int code = sqlite3_errcode(store->db);
    enum status status = code == SQLITE_FULL                              ? STATUS_NO_PAGES
                         : code == SQLITE_BUSY || code == SQLITE_LOCKED   ? STATUS_BUSY
                         : code == SQLITE_NOTADB || code == SQLITE_CORRUPT ? STATUS_INVALID
                                                                           : STATUS_IO;
    const char *hint = status == STATUS_BUSY      ? "; another process has it open"
                       : status == STATUS_INVALID ? "; move registry.sqlite away to start anew"
                                                  : "";
    return error_set(err, status, "the registry in --state-dir: %.120s%s",
                     sqlite3_errmsg(store->db), hint);
}

static enum status run(struct store *store, const char *sql, struct error *err) {
    return sqlite3_exec(store->db, sql, NULL, NULL, NULL) == SQLITE_OK ? STATUS_OK
                                                                       : refuse(store, err);
}

// The version found; 0: a new database.
static enum status check_version(struct store *store, int *version, struct error *err) {
    sqlite3_stmt *statement;
    if (sqlite3_prepare_v2(store->db, "PRAGMA user_version", -1, &statement, NULL) != SQLITE_OK)
        return refuse(store, err);
    enum status status = STATUS_OK;
    if (sqlite3_step(statement) != SQLITE_ROW) status = refuse(store, err);
    *version = status ? 0 : sqlite3_column_int(statement, 0);
    if (*version > SCHEMA_VERSION)
        status = error_set(err, STATUS_INVALID, "the registry in --state-dir has version %d; this "
                           "lorad knows versions up to %d", *version, SCHEMA_VERSION);
    sqlite3_finalize(statement);
    return status;
}

enum status store_open(const char *folder, struct store **out, struct error *err) {
    *out = NULL;
    if (mkdir(folder, 0700) != 0 && errno != EEXIST)
        return error_set(err, STATUS_IO, "--state-dir %.200s cannot be made: %s", folder,
                         strerror(errno));
    struct store *store = mem_zalloc(1, sizeof *store);
    char *path = path_join(folder, "registry.sqlite");
    int code = sqlite3_open_v2(path, &store->db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE |
                               SQLITE_OPEN_FULLMUTEX, NULL);
    free(path);
    enum status status = code == SQLITE_OK ? STATUS_OK : refuse(store, err);
    // The lock is taken by the first write, and kept.
    if (!status) status = run(store, "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL;"
                              "PRAGMA synchronous=FULL; BEGIN IMMEDIATE", err);
    int version = 0;
    if (!status) status = check_version(store, &version, err);
    if (!status && version == 1)
        status = run(store, "ALTER TABLE adapters ADD COLUMN stamp TEXT NOT NULL DEFAULT '';"
                     "ALTER TABLE adapters ADD COLUMN pinned TEXT NOT NULL DEFAULT '0'", err);
    if (!status)
        status = run(store, "CREATE TABLE IF NOT EXISTS adapters(name TEXT PRIMARY KEY NOT NULL,"
                     "path TEXT NOT NULL, digest TEXT NOT NULL, dtype TEXT NOT NULL,"
                     "stamp TEXT NOT NULL, pinned TEXT NOT NULL) WITHOUT ROWID; PRAGMA user_version=2; COMMIT", err);
    if (status) {
        store_close(store);
        return status;
    }
    *out = store;
    return STATUS_OK;
}

void store_close(struct store *store) {
    if (!store) return;
    sqlite3_close(store->db);
    free(store);
}

// Runs one statement with up to six texts bound, in a transaction of its own.
static enum status change(struct store *store, const char *sql, const char *const *texts, int count,
                          struct error *err) {
    // Another thread's call must not come between a failure and its message.
    sqlite3_mutex *mutex = sqlite3_db_mutex(store->db);
    sqlite3_mutex_enter(mutex);
    sqlite3_stmt *statement = NULL;
    int code = sqlite3_prepare_v2(store->db, sql, -1, &statement, NULL);
    for (int i = 0; i < count && code == SQLITE_OK; i++)
        code = sqlite3_bind_text(statement, i + 1, texts[i], -1, SQLITE_STATIC);
    if (code == SQLITE_OK) code = sqlite3_step(statement);
    enum status status = code == SQLITE_DONE ? STATUS_OK : refuse(store, err);
    sqlite3_finalize(statement);
    sqlite3_mutex_leave(mutex);
    return status;
}

enum status store_put(struct store *store, const char *name, const char *path, const char *digest,
                      const char *dtype, const char *stamp, bool pinned,
                      struct error *err) {
    const char *const texts[] = {name, path, digest, dtype, stamp, pinned ? "1" : "0"};
    return change(store, "INSERT OR REPLACE INTO adapters(name, path, digest, dtype, stamp, "
                  "pinned) VALUES(?, ?, ?, ?, ?, ?)", texts, 6, err);
}

enum status store_set_pinned(struct store *store, const char *name, bool pinned,
                             struct error *err) {
    const char *const texts[] = {pinned ? "1" : "0", name};
    return change(store, "UPDATE adapters SET pinned = ? WHERE name = ?", texts, 2, err);
}

enum status store_delete(struct store *store, const char *name, struct error *err) {
    return change(store, "DELETE FROM adapters WHERE name = ?", &name, 1, err);
}

static char *column_copy(sqlite3_stmt *statement, int column) {
    const unsigned char *text = sqlite3_column_text(statement, column);
    return mem_strdup(text ? (const char *)text : "");
}

enum status store_list(struct store *store, struct store_entry **list, int *count,
                       struct error *err) {
    *list = NULL;
    *count = 0;
    sqlite3_stmt *statement;
    if (sqlite3_prepare_v2(store->db, "SELECT name, path, digest, dtype, stamp, pinned FROM adapters "
                           "ORDER BY name", -1, &statement, NULL) != SQLITE_OK)
        return refuse(store, err);
    struct store_entry *found = NULL;
    int n = 0, room = 0, code;
    while ((code = sqlite3_step(statement)) == SQLITE_ROW) {
        if (n == room) found = mem_realloc(found, (size_t)(room = room ? 2 * room : 16) *
                                           sizeof *found);
        found[n++] = (struct store_entry){column_copy(statement, 0), column_copy(statement, 1),
                                          column_copy(statement, 2), column_copy(statement, 3),
                                          column_copy(statement, 4),
                                          sqlite3_column_int(statement, 5) != 0};
    }
    enum status status = code == SQLITE_DONE ? STATUS_OK : refuse(store, err);
    sqlite3_finalize(statement);
    if (status) {
        store_list_free(found, n);
        return status;
    }
    *list = found;
    *count = n;
    return STATUS_OK;
}

void store_list_free(struct store_entry *list, int count) {
    for (int i = 0; i < count; i++) {
        free(list[i].name);
        free(list[i].path);
        free(list[i].digest);
        free(list[i].dtype);
        free(list[i].stamp);
    }
    free(list);
}
