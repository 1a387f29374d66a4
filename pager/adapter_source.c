// Where an adapter's files are opened. Nothing else in lorad opens a path that a client named.
#include "pager/adapter_internal.h"

#include "base/memory.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int open_beneath(int root, const char *path, uint64_t flags) {
    struct open_how how = {.flags = flags | O_CLOEXEC,
                           .resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, root, path, &how, sizeof how);
}

static enum status refuse(struct error *err, int error_number) {
    if (error_number == ENOENT)
        return error_set_param(err, STATUS_NOT_FOUND, "lora_path",
                               "there is no such folder under --adapter-dir");
    if (error_number == ENOTDIR)
        return error_set_param(err, STATUS_INVALID, "lora_path", "lora_path must be a folder");
    return error_set_param(err, STATUS_FORBIDDEN, "lora_path",
                           "lora_path must lie inside --adapter-dir, without '..' or links that "
                           "lead out of it");
}

// A link among the files must not lead out either; a missing file is the reader's to explain.
static enum status check_files(int root, const char *path, struct error *err) {
    static const char *const files[] = {"adapter_config.json", ADAPTER_WEIGHTS};
    for (int i = 0; i < 2; i++) {
        char *file = mem_alloc(strlen(path) + strlen(files[i]) + 2);
        sprintf(file, "%s/%s", path, files[i]);
        int fd = open_beneath(root, file, O_PATH), error_number = errno;
        free(file);
        if (fd >= 0) close(fd);
        else if (error_number != ENOENT) return refuse(err, error_number);
    }
    return STATUS_OK;
}

enum status adapter_source_open(int root, const char *path, struct adapter_source *source,
                                struct error *err) {
    *source = (struct adapter_source){.fd = -1};
    if (root < 0) {
        source->folder = mem_strdup(path);
        return STATUS_OK;
    }
    int fd = open_beneath(root, path, O_PATH | O_DIRECTORY);
    if (fd < 0) return refuse(err, errno);
    enum status status = check_files(root, path, err);
    if (status != STATUS_OK) {
        close(fd);
        return status;
    }
    char folder[64];
    snprintf(folder, sizeof folder, "/proc/self/fd/%d", fd);
    *source = (struct adapter_source){fd, mem_strdup(folder)};
    return STATUS_OK;
}

void adapter_source_close(struct adapter_source *source) {
    if (source->fd >= 0) close(source->fd);
    free(source->folder);
    *source = (struct adapter_source){.fd = -1};
}
