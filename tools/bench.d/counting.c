/* Usage: LD_PRELOAD=counting.so COUNTS=FOLDER PYTHONMALLOC=malloc PROGRAM...
 *
 * Counts what a program asks of memory. Each process keeps its counters in FOLDER/PID, in the order
 * of `enum counter`, as 64-bit integers of this machine, where others may read them at any time.
 *
 * It sees calls that leave the program or a library for glibc: copies that a compiler has put inline
 * and calls within glibc are not seen. What an allocator of the program's own hands out is not seen
 * either; PYTHONMALLOC=malloc makes Python ask glibc for everything but its free lists.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum counter { ALLOCATIONS, LARGE_ALLOCATIONS, COPIES, COPIED_BYTES, COUNTERS };
enum { LARGE_BYTES = 64 << 10, COPY_BYTES_MIN = 512 };

void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t count, size_t bytes);
void *__libc_realloc(void *memory, size_t bytes);
void *__memmove_chk(void *to, const void *from, size_t bytes, size_t room);

static uint64_t before_start[COUNTERS];
static uint64_t *counters = before_start;

static void count(enum counter counter, uint64_t amount)
{
    __atomic_fetch_add(&counters[counter], amount, __ATOMIC_RELAXED);
}

static void count_allocation(size_t bytes)
{
    count(ALLOCATIONS, 1);
    if (bytes >= LARGE_BYTES)
        count(LARGE_ALLOCATIONS, 1);
}

static void *copy(void *to, const void *from, size_t bytes)
{
    if (bytes >= COPY_BYTES_MIN) {
        count(COPIES, 1);
        count(COPIED_BYTES, bytes);
    }
    return __memmove_chk(to, from, bytes, SIZE_MAX); /* glibc's own, by a name that is not ours */
}

void *malloc(size_t bytes)
{
    count_allocation(bytes);
    return __libc_malloc(bytes);
}

void *calloc(size_t number, size_t bytes)
{
    count_allocation(number * bytes);
    return __libc_calloc(number, bytes);
}

void *realloc(void *memory, size_t bytes)
{
    count_allocation(bytes);
    return __libc_realloc(memory, bytes);
}

void *mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    count_allocation(bytes);
    return (void *)syscall(SYS_mmap, at, bytes, protection, flags, fd, offset);
}

void *mmap64(void *at, size_t bytes, int protection, int flags, int fd, off_t offset)
    __attribute__((alias("mmap")));

void *memcpy(void *restrict to, const void *restrict from, size_t bytes)
{
    return copy(to, from, bytes);
}

void *memmove(void *to, const void *from, size_t bytes)
{
    return copy(to, from, bytes);
}

__attribute__((constructor)) static void start(void)
{
    const char *folder = getenv("COUNTS");
    char path[4096];

    if (!folder || snprintf(path, sizeof path, "%s/%d", folder, getpid()) >= (int)sizeof path)
        return;
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, sizeof before_start))
        return;
    void *shared = mmap(NULL, sizeof before_start, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (shared != MAP_FAILED)
        counters = shared;
}
