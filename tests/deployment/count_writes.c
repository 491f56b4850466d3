/* Preloaded into a run: counts what it does to files below a folder, and kills it at the n-th, a write half done. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char where[PATH_MAX];
static int left = -1;
int medvit_count = 0;

void medvit_arm(const char *folder, int calls) {
    strncpy(where, folder, sizeof where - 1);
    left = calls;
    medvit_count = 0;
}

static int last(const char *path) {
    if (!where[0] || strncmp(path, where, strlen(where))) return 0;
    medvit_count++;
    return left > 0 && --left == 0;
}

static int last_of(int descriptor) {
    char link[64], path[PATH_MAX];
    if (!where[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return last(path);
}

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

#define REAL(name, type) static __typeof__(type) *real; if (!real) real = (__typeof__(type) *)dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL("write", ssize_t (int, const void *, size_t));
    if (last_of(fd)) { real(fd, data, size / 2); die(); }
    return real(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL("pwrite", ssize_t (int, const void *, size_t, off_t));
    if (last_of(fd)) { real(fd, data, size / 2, at); die(); }
    return real(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL("pwrite64", ssize_t (int, const void *, size_t, off64_t));
    if (last_of(fd)) { real(fd, data, size / 2, at); die(); }
    return real(fd, data, size, at);
}
int fsync(int fd) {
    REAL("fsync", int (int));
    if (last_of(fd)) die();
    return real(fd);
}
int fdatasync(int fd) {
    REAL("fdatasync", int (int));
    if (last_of(fd)) die();
    return real(fd);
}
int ftruncate64(int fd, off64_t size) {
    REAL("ftruncate64", int (int, off64_t));
    if (last_of(fd)) die();
    return real(fd, size);
}
int rename(const char *from, const char *to) {
    REAL("rename", int (const char *, const char *));
    if (last(from)) die();
    return real(from, to);
}
int unlink(const char *path) {
    REAL("unlink", int (const char *));
    if (last(path)) die();
    return real(path);
}
