/* Usage: load [OPTION]... SOCKET EXPORT
 *
 * Plays the part of the kernel on one NBD connection: keeps a depth of requests in flight, sends
 * all that is due in one system call, and checks the cookie of every reply.
 *
 *   --depth N        requests in flight (default 1)
 *   --bytes N        bytes of a request (default 4096)
 *   --seconds S      how long (default 1)
 *   --requests N     how many requests instead
 *   --reads PERCENT  of the requests, the others write (default 100)
 *   --sequential     ascending offsets instead of random ones
 *   --apart          a system call for each header and each payload, both ways, as the kernel does
 *   --verify         write the whole disk before, read it back after, and check all that is read
 *
 * It says "ready" after the handshake, begins at a line on standard input, tells the result as a
 * line of JSON, and disconnects at the end of its input: what happens between can be measured.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>

#include "histogram.h"
#include "nbd.h"

enum { DEPTH_MAX = IOVECS_MAX / 2, BYTES_MAX = 4 << 20, BUFFER_BYTES = 2 * BYTES_MAX + 4096 };

enum phase { MIX, FILL, READ_BACK };

struct slot {
    struct request request;
    char *payload;
    uint64_t block, started;
    bool writes, in_flight;
};

static struct options {
    unsigned depth, bytes, reads, requests;
    double seconds;
    bool sequential, apart, verify;
    const char *path, *export;
} options = { .depth = 1, .bytes = 4096, .reads = 100, .seconds = 1 };

static struct load {
    int fd;
    uint64_t blocks, position, chosen, random, cookie;
    enum phase phase;
    struct slot slots[DEPTH_MAX];
    unsigned idle[DEPTH_MAX], idles;
    struct iovec out[2 * DEPTH_MAX], *next; /* what is being sent */
    size_t pieces;
    char *buffer;
    size_t at, have;
    uint32_t *generations; /* of each block: how often it was written */
    bool *busy;            /* blocks with a request in flight, when verifying */
    uint64_t sends, receives, began, finished;
    struct histogram latencies;
} load = { .random = UINT64_C(88172645463325252) };

_Noreturn static void fail(const char *what)
{
    errno = 0;
    die(what);
}

/* --- data that tells which block it belongs to, and which write of it --- */

static uint64_t key(uint64_t block)
{
    uint64_t mixed = (block << 32 | load.generations[block]) + UINT64_C(0x9e3779b97f4a7c15);

    mixed = (mixed ^ mixed >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    mixed = (mixed ^ mixed >> 27) * UINT64_C(0x94d049bb133111eb);
    return mixed ^ mixed >> 31;
}

static void fill(char *payload, uint64_t block)
{
    uint64_t word = key(block);

    for (size_t i = 0; i < options.bytes; i += sizeof word, word += block | 1)
        memcpy(payload + i, &word, sizeof word);
}

static void check(const char *payload, uint64_t block)
{
    uint64_t word = key(block), found;

    for (size_t i = 0; i < options.bytes; i += sizeof word, word += block | 1) {
        memcpy(&found, payload + i, sizeof found);
        if (found != word)
            fail("the disk did not return what was written");
    }
}

/* --- what comes next --- */

static uint64_t next_random(void)
{
    load.random ^= load.random << 13;
    load.random ^= load.random >> 7;
    load.random ^= load.random << 17;
    return load.random;
}

static bool over(uint64_t now)
{
    if (load.phase != MIX)
        return load.position >= load.blocks;
    if (options.requests)
        return load.chosen >= options.requests;
    return now >= load.began + (uint64_t)(options.seconds * 1e9);
}

static void choose(struct slot *slot)
{
    bool in_order = options.sequential || load.phase != MIX;

    load.chosen++;
    slot->block = (in_order ? load.position++ : next_random()) % load.blocks;
    slot->writes = load.phase == FILL
        || (load.phase == MIX && (next_random() >> 32) % 100 >= options.reads);
    if (!options.verify)
        return;
    /* Which of two requests for one block is done first is the server's choice. */
    while (load.busy[slot->block])
        slot->block = (slot->block + 1) % load.blocks;
    load.busy[slot->block] = true;
    if (slot->writes) {
        load.generations[slot->block]++;
        fill(slot->payload, slot->block);
    }
}

static void prepare(unsigned index, uint64_t now)
{
    struct slot *slot = &load.slots[index];

    choose(slot);
    slot->started = now;
    slot->in_flight = true;
    slot->request = (struct request){
        htobe32(NBD_REQUEST_MAGIC), 0, htobe16(slot->writes ? NBD_CMD_WRITE : NBD_CMD_READ),
        ++load.cookie << 16 | index, htobe64(slot->block * options.bytes), htobe32(options.bytes)
    };
    load.out[load.pieces++] = (struct iovec){ &slot->request, sizeof slot->request };
    if (slot->writes)
        load.out[load.pieces++] = (struct iovec){ slot->payload, options.bytes };
}

/* --- sending and receiving --- */

/* Sends what the socket takes; never waits, as a server may first want its replies received. */
static void send_due(void)
{
    while (load.pieces) {
        struct msghdr message = { .msg_iov = load.next, .msg_iovlen = load.pieces };
        int flags = MSG_DONTWAIT | MSG_NOSIGNAL;

        if (options.apart) {
            bool is_header = load.next->iov_len == sizeof(struct request);

            message.msg_iovlen = 1;
            if (is_header && load.pieces > 1 && load.next[1].iov_len != sizeof(struct request))
                flags |= MSG_MORE;
        }
        ssize_t sent = sendmsg(load.fd, &message, flags);
        load.sends++;
        if (sent < 0 && errno == EAGAIN)
            return;
        if (sent < 0)
            die("send");
        for (; load.pieces && (size_t)sent >= load.next->iov_len; load.next++, load.pieces--)
            sent -= (ssize_t)load.next->iov_len;
        if (load.pieces) {
            load.next->iov_base = (char *)load.next->iov_base + sent;
            load.next->iov_len -= (size_t)sent;
        }
    }
}

static struct slot *slot_of(const struct simple_reply *reply)
{
    uint64_t index = reply->cookie & 0xffff;

    if (be32toh(reply->magic) != NBD_SIMPLE_REPLY_MAGIC)
        fail("a reply has a wrong magic");
    if (index >= options.depth || !load.slots[index].in_flight
        || load.slots[index].request.cookie != reply->cookie)
        fail("a reply has a cookie that is not in flight");
    if (reply->error) {
        errno = (int)be32toh(reply->error);
        die("a request failed");
    }
    return &load.slots[index];
}

/* How many bytes the reply at `load.at` has, as far as it is known. */
static size_t reply_bytes(void)
{
    struct simple_reply reply;

    if (load.have - load.at < sizeof reply)
        return sizeof reply;
    memcpy(&reply, load.buffer + load.at, sizeof reply);
    return sizeof reply + (slot_of(&reply)->writes ? 0 : options.bytes);
}

static void take_reply(size_t bytes, uint64_t now)
{
    struct simple_reply reply;

    memcpy(&reply, load.buffer + load.at, sizeof reply);
    struct slot *slot = slot_of(&reply);
    if (options.verify) {
        if (!slot->writes)
            check(load.buffer + load.at + sizeof reply, slot->block);
        load.busy[slot->block] = false;
    }
    if (load.phase == MIX)
        histogram_add(&load.latencies, now - slot->started);
    load.at += bytes;
    slot->in_flight = false;
    load.idle[load.idles++] = (unsigned)(slot - load.slots);
}

static void make_room(size_t needed)
{
    if (load.at == load.have)
        load.at = load.have = 0;
    if (BUFFER_BYTES - load.at >= needed)
        return;
    load.have -= load.at;
    memmove(load.buffer, load.buffer + load.at, load.have);
    load.at = 0;
}

static void receive(void)
{
    size_t needed = reply_bytes(), have;

    make_room(needed);
    have = load.have - load.at;
    size_t room = options.apart ? needed - have : BUFFER_BYTES - load.have;
    int flags = load.pieces ? MSG_DONTWAIT : options.apart ? MSG_WAITALL : 0;
    ssize_t got = recv(load.fd, load.buffer + load.have, room, flags);
    load.receives++;
    if (got < 0 && errno == EAGAIN) {
        struct pollfd either = { load.fd, POLLIN | POLLOUT, 0 };

        poll(&either, 1, -1);
        return;
    }
    if (got == 0)
        fail("the server closed the connection");
    if (got < 0)
        die("receive");
    load.have += (size_t)got;
    uint64_t now = now_ns();
    while (load.have > load.at && load.have - load.at >= (needed = reply_bytes()))
        take_reply(needed, now);
}

static void run(enum phase phase)
{
    load.phase = phase;
    load.position = load.chosen = 0;
    load.began = now_ns();
    do {
        uint64_t now = now_ns();

        if (!load.pieces) {
            load.next = load.out;
            while (load.idles && !over(now))
                prepare(load.idle[--load.idles], now);
        }
        send_due();
        if (load.idles < options.depth)
            receive();
    } while (load.idles < options.depth || !over(now_ns()));
    load.finished = now_ns();
}

/* --- the beginning and the end --- */

static void negotiate(void)
{
    struct greeting greeting;
    struct export_reply export;
    uint32_t flags = htobe32(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    struct option_request option = {
        htobe64(NBD_OPTS_MAGIC), htobe32(NBD_OPT_EXPORT_NAME),
        htobe32((uint32_t)strlen(options.export))
    };

    if (!read_all(load.fd, &greeting, sizeof greeting))
        fail("the server closed the connection");
    if (be64toh(greeting.magic) != NBD_MAGIC || be64toh(greeting.options_magic) != NBD_OPTS_MAGIC)
        fail("this is no NBD server");
    if (!(be16toh(greeting.flags) & NBD_FLAG_NO_ZEROES))
        fail("the server does not know NO_ZEROES");
    if (!write_all(load.fd, &flags, sizeof flags) || !write_all(load.fd, &option, sizeof option)
        || !write_all(load.fd, options.export, strlen(options.export))
        || !read_all(load.fd, &export, sizeof export))
        fail("the server refused the export");
    load.blocks = be64toh(export.size) / options.bytes;
    if (load.blocks <= options.depth)
        fail("the disk is too small for this depth");
}

static void connect_to_server(void)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };

    if (strlen(options.path) >= sizeof address.sun_path)
        fail("the socket's path is too long");
    strcpy(address.sun_path, options.path);
    load.fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(load.fd, (struct sockaddr *)&address, sizeof address))
        die(options.path);
}

_Noreturn static void usage(void)
{
    fprintf(stderr, "usage: load [--depth N] [--bytes N] [--seconds S | --requests N]"
                    " [--reads PERCENT] [--sequential] [--apart] [--verify] SOCKET EXPORT\n");
    exit(2);
}

static unsigned number(const char *text, unsigned least, unsigned most)
{
    char *end;
    unsigned long value = strtoul(text, &end, 10);

    if (*end || end == text || value < least || value > most)
        usage();
    return (unsigned)value;
}

static void parse(int count, char **arguments)
{
    static const struct option names[] = {
        { "depth", required_argument, NULL, 'd' },  { "bytes", required_argument, NULL, 'b' },
        { "seconds", required_argument, NULL, 's' }, { "reads", required_argument, NULL, 'r' },
        { "requests", required_argument, NULL, 'n' },
        { "sequential", no_argument, NULL, 'q' },   { "apart", no_argument, NULL, 'a' },
        { "verify", no_argument, NULL, 'v' },       { NULL, 0, NULL, 0 },
    };
    int name;

    while ((name = getopt_long(count, arguments, "", names, NULL)) != -1) {
        switch (name) {
        case 'd': options.depth = number(optarg, 1, DEPTH_MAX); break;
        case 'b': options.bytes = number(optarg, 512, BYTES_MAX) & ~511U; break;
        case 's': options.seconds = strtod(optarg, NULL); break;
        case 'n': options.requests = number(optarg, 1, INT32_MAX); break;
        case 'r': options.reads = number(optarg, 0, 100); break;
        case 'q': options.sequential = true; break;
        case 'a': options.apart = true; break;
        case 'v': options.verify = true; break;
        default: usage();
        }
    }
    if (count - optind != 2)
        usage();
    options.path = arguments[optind];
    options.export = arguments[optind + 1];
}

static void prepare_memory(void)
{
    load.buffer = allocate(1, BUFFER_BYTES);
    load.generations = allocate(load.blocks, sizeof *load.generations);
    load.busy = allocate(load.blocks, sizeof *load.busy);
    for (load.idles = 0; load.idles < options.depth; load.idles++) {
        load.idle[load.idles] = load.idles;
        load.slots[load.idles].payload = allocate(1, options.bytes);
        fill(load.slots[load.idles].payload, load.idles);
    }
}

static double cpu_seconds(void)
{
    struct rusage used;

    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec)
        + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

int main(int count, char **arguments)
{
    struct request disconnect = { htobe32(NBD_REQUEST_MAGIC), 0, htobe16(NBD_CMD_DISC), 0, 0, 0 };
    char line[16];

    parse(count, arguments);
    connect_to_server();
    negotiate();
    prepare_memory();
    printf("ready\n");
    fflush(stdout);
    if (!fgets(line, sizeof line, stdin))
        return 0;
    if (options.verify)
        run(FILL);
    double used = cpu_seconds();
    run(MIX);
    printf("{\"requests\": %llu, \"seconds\": %.6f, \"p50_us\": %.2f, \"p99_us\": %.2f,"
           " \"p99.9_us\": %.2f, \"sends\": %llu, \"receives\": %llu, \"load_cpu_seconds\": %.6f}\n",
           (unsigned long long)load.latencies.count, (double)(load.finished - load.began) / 1e9,
           percentile_us(&load.latencies, 0.5), percentile_us(&load.latencies, 0.99),
           percentile_us(&load.latencies, 0.999),
           (unsigned long long)load.sends, (unsigned long long)load.receives,
           cpu_seconds() - used);
    if (options.verify)
        run(READ_BACK);
    fflush(stdout);
    while (fgets(line, sizeof line, stdin))
        continue;
    write_all(load.fd, &disconnect, sizeof disconnect);
    return 0;
}
