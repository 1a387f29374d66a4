// How fast adapters' files come into host memory: read() by one and by two threads, as the loaders do
// it, against io_uring with many blocks under way. file_read.py builds and runs it.
//
// The folder gets 96 files of 9 MB, the size of a rank-16 adapter of a 300M model; they are removed at the
// end. As root also without the page cache (drop_caches). Prints MB/s, best of three.
#define _GNU_SOURCE
#include <fcntl.h>
#include <liburing.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { FILES = 96, FILE_BYTES = 9 << 20, BLOCK_BYTES = 256 << 10, DEPTH = 32, ROUNDS = 3 };

static char folder[4000];
static char *images; // one file's image for each thread
static atomic_int next_file;

static double now_s(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static int file_open(int number, int flags) {
    char path[4100];
    snprintf(path, sizeof path, "%s/file_read_%d", folder, number);
    int fd = open(path, flags, 0600);
    if (fd < 0) die(path);
    return fd;
}

static void files_create(void) {
    for (int i = 0; i < FILE_BYTES; i++) images[i] = (char)(i * 2654435761u >> 24);
    for (int f = 0; f < FILES; f++) {
        int fd = file_open(f, O_CREAT | O_WRONLY | O_TRUNC);
        if (write(fd, images, FILE_BYTES) != FILE_BYTES || fsync(fd)) die("write");
        close(fd);
    }
}

static void files_remove(void) {
    for (int f = 0; f < FILES; f++) {
        char path[4100];
        snprintf(path, sizeof path, "%s/file_read_%d", folder, f);
        unlink(path);
    }
}

static void *read_files(void *image) {
    for (int f; (f = atomic_fetch_add(&next_file, 1)) < FILES;) {
        int fd = file_open(f, O_RDONLY);
        for (size_t at = 0; at < FILE_BYTES; at += BLOCK_BYTES)
            if (pread(fd, (char *)image + at, BLOCK_BYTES, (off_t)at) != BLOCK_BYTES) die("pread");
        close(fd);
    }
    return NULL;
}

static void by_threads(int count) {
    pthread_t threads[8];
    atomic_store(&next_file, 0);
    for (int i = 0; i < count; i++)
        pthread_create(&threads[i], NULL, read_files, images + (size_t)i * FILE_BYTES);
    for (int i = 0; i < count; i++) pthread_join(threads[i], NULL);
}

static void by_ring(int unused) {
    (void)unused;
    struct io_uring ring;
    if (io_uring_queue_init(DEPTH, &ring, 0) < 0) die("io_uring_queue_init");
    for (int f = 0; f < FILES; f++) {
        int fd = file_open(f, O_RDONLY), under_way = 0;
        for (size_t at = 0; at < FILE_BYTES || under_way > 0;) {
            for (; at < FILE_BYTES && under_way < DEPTH; at += BLOCK_BYTES, under_way++)
                io_uring_prep_read(io_uring_get_sqe(&ring), fd, images + at, BLOCK_BYTES, at);
            if (io_uring_submit_and_wait(&ring, 1) < 0) die("io_uring_submit");
            struct io_uring_cqe *done;
            while (io_uring_peek_cqe(&ring, &done) == 0) {
                if (done->res != BLOCK_BYTES) die("io_uring read");
                io_uring_cqe_seen(&ring, done);
                under_way--;
            }
        }
        close(fd);
    }
    io_uring_queue_exit(&ring);
}

static bool drop_caches(void) {
    sync();
    FILE *file = fopen("/proc/sys/vm/drop_caches", "w");
    return file && fputs("1", file) >= 0 && fclose(file) == 0;
}

static void measure(const char *name, void (*run)(int), int threads, bool cold) {
    double best_s = 1e9;
    for (int round = 0; round < ROUNDS; round++) {
        if (cold && !drop_caches()) return;
        double begin_s = now_s();
        run(threads);
        double took_s = now_s() - begin_s;
        if (took_s < best_s) best_s = took_s;
    }
    printf("%-24s %-12s %8.0f MB/s\n", name, cold ? "from disk" : "page cache",
           FILES * (double)FILE_BYTES / best_s / 1e6);
    fflush(stdout);
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: file_read FOLDER\n");
        return 2;
    }
    snprintf(folder, sizeof folder, "%s", argv[1]);
    images = aligned_alloc(4096, (size_t)2 * FILE_BYTES);
    memset(images, 1, (size_t)2 * FILE_BYTES);
    files_create();
    for (int cold = 0; cold < 2; cold++) {
        measure("pread, 1 thread", by_threads, 1, cold);
        measure("pread, 2 threads", by_threads, 2, cold);
        measure("io_uring, 1 thread", by_ring, 1, cold);
    }
    files_remove();
    return 0;
}
