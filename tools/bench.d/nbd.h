/* What load.c and floor.c share: NBD's constants and structs in the names of its specification
 * (doc/proto.md of NetworkBlockDevice/nbd), and small things around them. */
#ifndef NBD_H
#define NBD_H

#include <endian.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define NBD_MAGIC UINT64_C(0x4e42444d41474943)
#define NBD_OPTS_MAGIC UINT64_C(0x49484156454f5054)
#define NBD_REP_MAGIC UINT64_C(0x0003e889045565a9)
#define NBD_REQUEST_MAGIC UINT32_C(0x25609513)
#define NBD_SIMPLE_REPLY_MAGIC UINT32_C(0x67446698)

enum { NBD_FLAG_FIXED_NEWSTYLE = 1, NBD_FLAG_NO_ZEROES = 2 };
enum { NBD_OPT_EXPORT_NAME = 1, NBD_OPT_ABORT = 2 };
enum { NBD_REP_ACK = 1 };
#define NBD_REP_ERR_UNSUP UINT32_C(0x80000001)
enum { NBD_FLAG_HAS_FLAGS = 1, NBD_FLAG_SEND_FLUSH = 4 };
enum { NBD_CMD_READ = 0, NBD_CMD_WRITE = 1, NBD_CMD_DISC = 2, NBD_CMD_FLUSH = 3 };

#define WIRE __attribute__((packed))

struct WIRE greeting { uint64_t magic, options_magic; uint16_t flags; };
struct WIRE option_request { uint64_t magic; uint32_t option, length; };
struct WIRE option_reply { uint64_t magic; uint32_t option, type, length; };
struct WIRE export_reply { uint64_t size; uint16_t flags; };
struct WIRE request {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t length;
};
struct WIRE simple_reply { uint32_t magic, error; uint64_t cookie; };

enum { IOVECS_MAX = 1024 }; /* what Linux takes in one sendmsg */

_Noreturn static inline void die(const char *what)
{
    fprintf(stderr, errno ? "%s: %s\n" : "%s\n", what, strerror(errno));
    exit(1);
}

static inline void *allocate(size_t count, size_t bytes)
{
    void *memory = calloc(count, bytes);

    if (!memory)
        die("memory");
    return memory;
}

static inline uint64_t now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* Reads all `length` bytes of the handshake; false when the peer closed. */
static inline bool read_all(int fd, void *to, size_t length)
{
    for (char *at = to; length;) {
        ssize_t done = read(fd, at, length);

        if (done <= 0)
            return false;
        at += done;
        length -= (size_t)done;
    }
    return true;
}

static inline bool write_all(int fd, const void *from, size_t length)
{
    for (const char *at = from; length;) {
        ssize_t done = write(fd, at, length);

        if (done <= 0)
            return false;
        at += done;
        length -= (size_t)done;
    }
    return true;
}

#endif
