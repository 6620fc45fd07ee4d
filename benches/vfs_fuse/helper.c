/* Runs the system calls of benches/vfs_fuse.py's data rows without an interpreter between them.
 * Each mode prints one number: seconds per operation (or of the whole, for `first`). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *doing, const char *path) {
    fprintf(stderr, "helper: %s %s: %s\n", doing, path, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

/* The same xorshift sequence for every side; jobs differ by their seed. */
static uint64_t next(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static long transfer(const char *path, int writing, int random, size_t block, double until, uint64_t seed) {
    int fd = open(path, writing ? O_WRONLY : O_RDONLY);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) != 0)
        fail("opening", path);
    long blocks = st.st_size / block, done = 0;
    char *buffer = aligned_alloc(4096, block);
    memset(buffer, (int)seed + 1, block);
    do {
        for (int burst = 0; burst < (block > 65536 ? 1 : 64); burst++, done++) {
            off_t at = (random ? next(&seed) % blocks : done % blocks) * block;
            ssize_t got = writing ? pwrite(fd, buffer, block, at) : pread(fd, buffer, block, at);
            if (got != (ssize_t)block)
                fail(writing ? "writing" : "reading", path);
        }
    } while (until ? now() < until : done < blocks);
    if (close(fd) != 0)
        fail("closing", path);
    return done;
}

/* io read|write seq|random SECONDS BLOCK FILE…: one job for each file; SECONDS 0 goes over each file once. */
static double io(int count, char **words) {
    int writing = !strcmp(words[0], "write"), random = !strcmp(words[1], "random"), jobs = count - 4;
    double seconds = atof(words[2]), start = now();
    size_t block = atol(words[3]);
    long *done = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), total = 0;
    for (int job = 0; job < jobs; job++)
        if (fork() == 0) {
            done[job] = transfer(words[4 + job], writing, random, block, seconds ? start + seconds : 0, job + 1);
            _exit(0);
        }
    for (int job = 0, status; job < jobs; job++)
        if (wait(&status) < 0 || status != 0)
            exit(1);
    double took = now() - start;
    for (int job = 0; job < jobs; job++)
        total += done[job];
    return took / total;
}

/* small SECONDS DIRECTORY COUNT: open, read, close of DIRECTORY/0 … COUNT-1, round and round (SECONDS 0: once). */
static double small(char **words) {
    double start = now(), until = start + atof(words[0]);
    int once = atof(words[0]) == 0, count = atoi(words[2]);
    long done = 0;
    char name[32], buffer[65536];
    if (chdir(words[1]) != 0)
        fail("entering", words[1]);
    do {
        for (int i = 0; i < 50; i++, done++) {
            sprintf(name, "%ld", done % count);
            int fd = open(name, O_RDONLY);
            if (fd < 0 || read(fd, buffer, sizeof buffer) <= 0 || close(fd) != 0)
                fail("reading", name);
        }
    } while (once ? done < count : now() < until);
    return (now() - start) / done;
}

/* create|stat|missing|unlink DIRECTORY COUNT */
static double names(const char *mode, char **words) {
    int count = atoi(words[1]);
    char name[32];
    struct stat st;
    if (chdir(words[0]) != 0)
        fail("entering", words[0]);
    double start = now();
    for (int i = 0; i < count; i++) {
        sprintf(name, "n%d", i);
        if (!strcmp(mode, "create")) {
            int fd = open(name, O_CREAT | O_EXCL | O_WRONLY, 0644);
            if (fd < 0 || close(fd) != 0)
                fail("creating", name);
        } else if (!strcmp(mode, "stat") ? lstat(name, &st) != 0 : !strcmp(mode, "unlink") && unlink(name) != 0)
            fail(mode, name);
        else if (!strcmp(mode, "missing") && (lstat(name, &st) == 0 || errno != ENOENT))
            fail("expecting no", name);
    }
    return (now() - start) / count;
}

/* first FILE: open for writing, 4 KiB into the middle, close. */
static double first(const char *path) {
    static char buffer[4096];
    memset(buffer, 'x', sizeof buffer);
    double start = now();
    int fd = open(path, O_WRONLY);
    if (fd < 0 || pwrite(fd, buffer, sizeof buffer, 512 << 20) != sizeof buffer || close(fd) != 0)
        fail("writing", path);
    return now() - start;
}

int main(int count, char **words) {
    double result;
    if (count > 6 && !strcmp(words[1], "io"))
        result = io(count - 2, words + 2);
    else if (count == 5 && !strcmp(words[1], "small"))
        result = small(words + 2);
    else if (count == 3 && !strcmp(words[1], "first"))
        result = first(words[2]);
    else if (count == 4)
        result = names(words[1], words + 2);
    else
        return 2;
    printf("%.12f\n", result);
    return 0;
}
