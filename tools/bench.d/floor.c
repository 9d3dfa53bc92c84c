/* Usage: floor SOCKET BYTES
 *
 * The floor under a server's costs: a memory disk of BYTES on a unix socket with nbd-reactor's
 * batching (one receive takes many requests, one send carries all their replies, data by reference,
 * a short spin before sleeping) and nothing else. One client at a time.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>

#include "nbd.h"

enum { BUFFER_BYTES = 1 << 20, SPIN_NS = 50000, OPTION_BYTES_MAX = 64 << 10 };

struct disk {
    char *data;
    uint64_t size;
};

struct connection {
    int fd;
    struct disk *disk;
    char *buffer;
    size_t have;                /* bytes in the buffer */
    char *to;                   /* where the rest of a write's payload goes */
    size_t left;                /* how much of it is still to come */
    uint64_t cookie;            /* of that write */
    struct iovec out[IOVECS_MAX];
    int pieces;
    struct simple_reply replies[IOVECS_MAX];
    int replied;
};

static bool answer_option(int fd, const struct option_request *option, struct disk *disk, bool zeroes)
{
    struct option_reply refusal = {
        htobe64(NBD_REP_MAGIC), option->option, htobe32(NBD_REP_ERR_UNSUP), 0
    };
    char reply[sizeof(struct export_reply) + 124] = { 0 };
    struct export_reply export = {
        htobe64(disk->size), htobe16(NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH)
    };

    if (be32toh(option->option) != NBD_OPT_EXPORT_NAME)
        return write_all(fd, &refusal, sizeof refusal);
    memcpy(reply, &export, sizeof export);
    return write_all(fd, reply, zeroes ? sizeof reply : sizeof export);
}

static bool negotiate(int fd, struct disk *disk)
{
    static char data[OPTION_BYTES_MAX];
    struct greeting greeting = {
        htobe64(NBD_MAGIC), htobe64(NBD_OPTS_MAGIC),
        htobe16(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)
    };
    struct option_request option = { 0 };
    uint32_t flags;

    if (!write_all(fd, &greeting, sizeof greeting) || !read_all(fd, &flags, sizeof flags))
        return false;
    while (be32toh(option.option) != NBD_OPT_EXPORT_NAME) {
        if (!read_all(fd, &option, sizeof option) || be64toh(option.magic) != NBD_OPTS_MAGIC)
            return false;
        if (be32toh(option.option) == NBD_OPT_ABORT || be32toh(option.length) > sizeof data)
            return false;
        if (!read_all(fd, data, be32toh(option.length)))
            return false;
        if (!answer_option(fd, &option, disk, !(be32toh(flags) & NBD_FLAG_NO_ZEROES)))
            return false;
    }
    return true;
}

/* Waits for more; the rest of a payload goes straight into the disk. */
static bool receive(struct connection *c)
{
    struct iovec in[2] = { { c->to, c->left }, { c->buffer + c->have, BUFFER_BYTES - c->have } };
    struct msghdr message = { .msg_iov = in, .msg_iovlen = 2 };
    uint64_t sleep_at = now_ns() + SPIN_NS;
    ssize_t got;

    do
        got = recvmsg(c->fd, &message, now_ns() < sleep_at ? MSG_DONTWAIT : 0);
    while (got < 0 && errno == EAGAIN);
    if (got <= 0)
        return false;
    size_t payload = (size_t)got < c->left ? (size_t)got : c->left;
    c->to += payload;
    c->left -= payload;
    c->have += (size_t)got - payload;
    return true;
}

static bool send_replies(struct connection *c)
{
    struct msghdr message = { .msg_iov = c->out, .msg_iovlen = (size_t)c->pieces };

    while (message.msg_iovlen) {
        ssize_t sent = sendmsg(c->fd, &message, MSG_NOSIGNAL);

        if (sent < 0)
            return false;
        for (; message.msg_iovlen && (size_t)sent >= message.msg_iov->iov_len; message.msg_iov++) {
            sent -= (ssize_t)message.msg_iov->iov_len;
            message.msg_iovlen--;
        }
        if (message.msg_iovlen) {
            message.msg_iov->iov_base = (char *)message.msg_iov->iov_base + sent;
            message.msg_iov->iov_len -= (size_t)sent;
        }
    }
    c->pieces = c->replied = 0;
    return true;
}

static void reply(struct connection *c, uint64_t cookie, char *data, size_t length)
{
    struct simple_reply *header = &c->replies[c->replied++];

    *header = (struct simple_reply){ htobe32(NBD_SIMPLE_REPLY_MAGIC), 0, cookie };
    c->out[c->pieces++] = (struct iovec){ header, sizeof *header };
    if (length)
        c->out[c->pieces++] = (struct iovec){ data, length };
}

/* Does every request that is in the buffer; false when the client is to be left. */
static bool serve_buffer(struct connection *c)
{
    struct request request;
    size_t at = 0;

    while (!c->left && c->have - at >= sizeof request) {
        memcpy(&request, c->buffer + at, sizeof request);
        uint64_t offset = be64toh(request.offset);
        uint32_t length = be32toh(request.length);
        uint16_t type = be16toh(request.type);

        if (be32toh(request.magic) != NBD_REQUEST_MAGIC || type > NBD_CMD_FLUSH
            || type == NBD_CMD_DISC || offset > c->disk->size || length > c->disk->size - offset)
            return false;
        at += sizeof request;
        char *data = c->disk->data + offset;
        if (type == NBD_CMD_WRITE) {
            size_t here = c->have - at < length ? c->have - at : length;

            memcpy(data, c->buffer + at, here);
            at += here;
            c->to = data + here;
            c->left = length - here;
            c->cookie = request.cookie;
        }
        if (!c->left)
            reply(c, request.cookie, data, type == NBD_CMD_READ ? length : 0);
        if (c->pieces > IOVECS_MAX - 2 && !send_replies(c))
            return false;
    }
    c->have -= at;
    memmove(c->buffer, c->buffer + at, c->have);
    return true;
}

static void serve(struct connection *c)
{
    for (;;) {
        bool in_payload = c->left;

        if (!receive(c))
            return;
        if (in_payload && !c->left)
            reply(c, c->cookie, NULL, 0);
        if (!serve_buffer(c) || !send_replies(c))
            return;
    }
}

int main(int count, char **arguments)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    struct disk disk = { 0 };
    static struct connection connection;

    if (count != 3 || strlen(arguments[1]) >= sizeof address.sun_path) {
        fprintf(stderr, "usage: floor SOCKET BYTES\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    disk.size = strtoull(arguments[2], NULL, 10);
    disk.data = mmap(NULL, disk.size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (disk.data == MAP_FAILED)
        die("memory");
    strcpy(address.sun_path, arguments[1]);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8))
        die(arguments[1]);
    connection.buffer = allocate(1, BUFFER_BYTES);
    for (;;) {
        connection.fd = accept(listener, NULL, NULL);
        connection.disk = &disk;
        connection.have = connection.left = 0;
        connection.pieces = connection.replied = 0;
        if (connection.fd < 0)
            die("accept");
        if (negotiate(connection.fd, &disk))
            serve(&connection);
        close(connection.fd);
    }
}
