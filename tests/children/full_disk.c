/* A layer in front of libc (LD_PRELOAD) that refuses, as a full disk does, from the n-th write of this process on, all
   writes, fsyncs, new files and new folders under paths that a pattern matches. Python's, torch's, safetensors' and the
   C++ library's writes alike go through libc.

   FULL_DISK=PATTERN in the environment, as a shell matches it but with * for slashes, too; FULL_DISK_FROM=N, else from
   the first. A process may say it itself: full_disk(pattern, n), where an empty pattern ends it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char pattern[PATH_MAX];
static long writes = 0, full_from = -1;

void full_disk(const char *matching, long n) {
    snprintf(pattern, sizeof pattern, "%s", matching);
    full_from = n;
    writes = 0;
}

long full_disk_writes(void) { return writes; } /* so far, refused or not */

__attribute__((constructor)) static void begin(void) {
    const char *matching = getenv("FULL_DISK"), *from = getenv("FULL_DISK_FROM");
    if (matching) full_disk(matching, from ? atol(from) : 1);
}

static int refuses(const char *path) {
    if (!pattern[0] || path[0] != '/' || !strncmp(path, "/memfd:", 7) || fnmatch(pattern, path, 0)) return 0;
    long n = __atomic_add_fetch(&writes, 1, __ATOMIC_SEQ_CST);
    if (full_from < 0 || n < full_from) return 0;
    errno = ENOSPC;
    return 1;
}

static int refuses_file(int fd) {
    char link[64], path[PATH_MAX];
    if (!pattern[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return refuses(path);
}

static int refuses_new(int folder, const char *name) {
    char at[64], path[PATH_MAX];
    if (!pattern[0] || !faccessat(folder, name, F_OK, AT_SYMLINK_NOFOLLOW)) return 0;
    if (name[0] == '/') return refuses(name);
    snprintf(at, sizeof at, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    ssize_t n = readlink(at, path, sizeof path - 1);
    if (n < 0) return 0;
    snprintf(path + n, sizeof path - n, "/%s", name);
    return refuses(path);
}

#define REAL(name, type, ...) static type (*real)(__VA_ARGS__) = 0; if (!real) real = dlsym(RTLD_NEXT, name)
#define MODE(after) mode_t mode = 0; if (__OPEN_NEEDS_MODE(flags)) { \
    va_list rest; va_start(rest, after); mode = va_arg(rest, mode_t); va_end(rest); }

ssize_t write(int fd, const void *b, size_t n) {
    REAL("write", ssize_t, int, const void *, size_t); return refuses_file(fd) ? -1 : real(fd, b, n); }
ssize_t writev(int fd, const struct iovec *v, int n) {
    REAL("writev", ssize_t, int, const struct iovec *, int); return refuses_file(fd) ? -1 : real(fd, v, n); }
ssize_t pwrite64(int fd, const void *b, size_t n, off_t o) {
    REAL("pwrite64", ssize_t, int, const void *, size_t, off_t); return refuses_file(fd) ? -1 : real(fd, b, n, o); }
int fsync(int fd) { REAL("fsync", int, int); return refuses_file(fd) ? -1 : real(fd); }

int open(const char *path, int flags, ...) {
    MODE(flags) REAL("open", int, const char *, int, ...);
    return flags & O_CREAT && refuses_new(AT_FDCWD, path) ? -1 : real(path, flags, mode); }
int open64(const char *path, int flags, ...) {
    MODE(flags) REAL("open64", int, const char *, int, ...);
    return flags & O_CREAT && refuses_new(AT_FDCWD, path) ? -1 : real(path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) {
    MODE(flags) REAL("openat", int, int, const char *, int, ...);
    return flags & O_CREAT && refuses_new(folder, path) ? -1 : real(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags) REAL("openat64", int, int, const char *, int, ...);
    return flags & O_CREAT && refuses_new(folder, path) ? -1 : real(folder, path, flags, mode); }
FILE *fopen64(const char *path, const char *how) {
    REAL("fopen64", FILE *, const char *, const char *);
    return how[0] != 'r' && refuses_new(AT_FDCWD, path) ? 0 : real(path, how); }
int mkdir(const char *path, mode_t mode) {
    REAL("mkdir", int, const char *, mode_t); return refuses_new(AT_FDCWD, path) ? -1 : real(path, mode); }
