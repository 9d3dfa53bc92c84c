"""The pump of one socket in the transmission phase, a client's or the kernel's.

Per turn of the loop: one receive that may bring many requests, each submitted to the channel, and
one gathered send of all replies. What was received and may not be submitted yet waits in the
backlog; while there is one nothing is received, so that the views of its payloads stay valid.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable
from typing import Final

from backends.api import COMMAND, COOKIE, LENGTH, OFFSET, Buffer, Busy, Channel, Releasable, Request
from reactor.data.clientmemory import RESERVE, ClientMemory, Share
from reactor.data.counters import Counters
from reactor.data.outgoing import REPLY_BYTES, Outgoing
from reactor.data.shortcut import MemoryShortcut
from reactor.errors import error_number, reason
from reactor.log import logger
from reactor.loop import HANGUP, READABLE, WRITABLE, Reactor, Timer
from reactor.protocol.export import Export
from reactor.protocol.transmission import COMMAND_NAMES, Receiver, validate
from reactor.protocol.wire import (
    NBD_CMD_DISC,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_WRITE,
    NBD_SIMPLE_REPLY_MAGIC,
    SIMPLE_REPLY,
    nbd_error,
)

# Above this and `Share.most` bytes the socket is not read; below half of both it is read again. A
# batch that was begun may pass them: by REQUESTS_MAX requests, and by one request's bytes.
QUEUE_MAX: Final = 1024  # requests in flight plus buffers to be sent
DISCONNECT_SECONDS: Final = 10.0  # what is in flight when the peer ends may take so long
DISCONNECT_SECONDS_MAX: Final = 600.0  # ... or, while the peer takes its replies, so long
FAILURES_LOGGED: Final = 10  # per connection in that time; all are counted
FAILURES_SECONDS: Final = 600.0

log = logger(__name__)


class _ShortRead(Exception):
    """A backend's bug: it returned fewer or more bytes than the client asked for."""

    def __init__(self, length: int) -> None:
        super().__init__(f"the backend returned {length} bytes")


class Connection:
    """Serves `export` on `sock` through `channel` until the peer ends, or we do.

    `on_closed(connection, reason)` is called once, from the loop, when the socket is closed and
    nothing is in flight in the channel any more. `trailing` is what came behind the handshake.
    `resends`: a peer that has hung up sends elsewhere what it has no answer to, as the kernel does.
    `memory` bounds what many occupy together; None for a peer that may be trusted, the kernel.
    """

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        export: Export,
        channel: Channel,
        on_closed: Callable[[Connection, str], None],
        *,
        trailing: bytes = b"",
        resends: bool = False,
        memory: ClientMemory | None = None,
    ) -> None:
        self.counters = Counters()
        self.flush_due = False
        self._reactor = reactor
        self._sock = sock
        self._export = export
        self._channel = channel
        self._on_closed = on_closed
        self._resends = resends
        self._outgoing = Outgoing()
        self._receiver = Receiver(export, self._take_memory)
        self._share = Share(memory)
        self._shortcut: MemoryShortcut | None = None
        if channel.memory is not None:
            self._shortcut = MemoryShortcut(
                *(channel.memory, export, self._outgoing, self.counters),
                receiver=self._receiver,
            )
            self._receiver.shortcut = self._shortcut.answer
        self._backlog: list[Request] = []
        self._in_flight = self._in_flight_bytes = 0
        self._blocked = False  # the socket took no more; EPOLLOUT will come
        self._paused = False  # nothing is received until the backlog is gone
        self._busy = False  # the channel refused; it will call resume
        self._refusing = False
        self._ending: str | None = None  # why; nothing is received any more
        self._closed: str | None = None
        self._deadline: Timer | None = None
        self._until = sys.maxsize  # when it is closed by force, whatever the peer takes
        self._failures_logged = self._failures_until = 0
        sock.setblocking(False)
        self._events = READABLE
        reactor.add_fd(sock.fileno(), self._on_ready, name=f"connection to {export.name}")
        if trailing:
            self._take_trailing(trailing)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight and nothing waits to be submitted or sent."""
        waiting = self._in_flight or self._outgoing.waiting or self._backlog or self._receiver.more
        return not waiting

    def rest(self) -> None:
        """Give memory back that only traffic needs."""
        if self.idle:
            self._receiver.rest()
            self._count_memory()

    @property
    def moved(self) -> int:
        """The bytes that the peer has taken and sent, about."""
        return self._outgoing.sent + self.counters.written_bytes + self._receiver.arrived

    @property
    def waits_for_peer(self) -> bool:
        """Whether the peer must take a reply or send the rest of a payload."""
        return self._blocked or self._receiver.receives_large

    # --- ending ---

    def drain(self, seconds: float) -> None:
        """Receive no more, finish and answer what was received, then close.

        After `seconds` the connection is closed by force; being told again puts nothing off.
        """
        self._end("drained", seconds)

    def refuse(self) -> None:
        """Answer every request with ESHUTDOWN from now on; what is in flight finishes."""
        self._refusing = True
        if self._shortcut is not None:
            self._shortcut.stop()
        self._busy = False  # what waits for room is refused too
        self._reactor.mark_flush(self)

    def close(self, why: str) -> None:
        """Close the socket now; what is in flight in the channel finishes unanswered."""
        if self._closed is not None:
            return
        self._closed = why
        if self._deadline is not None:
            self._deadline.cancel()
        self._reactor.remove_fd(self._sock.fileno())
        self._sock.close()
        self._channel.abandon(self)
        self._reactor.mark_flush(self)
        log.info("disk %s: connection closed: %s", self._export.name, why)

    def _end(self, why: str, seconds: float, seconds_max: float = 0) -> None:
        """Close once all is answered, and after `seconds` by force.

        Whoever takes replies meanwhile gets as many again, and `seconds_max` in all.
        """
        if self._closed is not None:
            return
        self._ending = self._ending or why
        if self._deadline is not None:
            self._deadline.cancel()
        until = self._reactor.clock() + int(max(seconds, seconds_max) * 1e9)
        self._until = min(self._until, until)
        self._await_end(seconds)
        self._reactor.mark_flush(self)

    def _end_for_peer(self, why: str) -> None:
        self._end(why, DISCONNECT_SECONDS, DISCONNECT_SECONDS_MAX)

    def _await_end(self, seconds: float) -> None:
        sent = self._outgoing.sent

        def expire() -> None:
            if self._outgoing.sent > sent and self._reactor.clock() < self._until:
                self._await_end(seconds)
            else:
                self.close(f"{self._ending}, but not finished in {seconds:g} s")

        left = (self._until - self._reactor.clock()) / 1e9
        self._deadline = self._reactor.call_later(min(seconds, left), expire)

    def _release(self) -> None:
        """Let go of what a closed connection holds; say so when the channel has finished too."""
        self._outgoing.clear()
        self._receiver.clear()
        self._backlog.clear()
        self._share.give_up(self)
        if not self._in_flight and self._closed is not None:
            on_closed, self._on_closed = self._on_closed, lambda *_: None
            on_closed(self, self._closed)

    # --- receiving ---

    def _on_ready(self, events: int) -> bool:
        try:
            if events & HANGUP and self._resends:
                # What is still in the socket may be done already, and what was written then, lost.
                self.close("the kernel is gone")
                return True
            if events & WRITABLE:
                self._blocked = False
                self._reactor.mark_flush(self)
            if events & READABLE and not (self._paused or self._ending):
                return self._receive()
            if events & HANGUP:
                self.close("the peer is gone")
        except MemoryError:
            self.close("there is no memory for it")
        except Exception:
            log.exception("disk %s: a bug in its connection", self._export.name)
            self.close("internal error")
        return True

    def _receive(self) -> bool:
        receiver = self._receiver
        try:
            spaces = receiver.recv_spaces()
            if len(spaces) == 1:
                received = self._sock.recv_into(spaces[0])
            else:
                received = self._sock.recvmsg_into(spaces)[0]
        except BlockingIOError:
            return False
        except OSError as error:
            shortcut = self._shortcut
            if error.errno == errno.EFAULT and shortcut is not None and shortcut.lose_place():
                return True
            self.close(f"receiving failed: {reason(error)}")
            return True
        self.counters.receives += 1
        if received:
            requests = receiver.received(received)
            if requests:
                self._submit(requests)
            else:
                self._submitted()
        elif receiver.within_request:
            self._end_for_peer("the peer closed it in the middle of a request")
        else:
            self._end_for_peer("the peer closed it")
        return True

    def _take_trailing(self, trailing: bytes) -> None:
        self._receiver.recv_spaces()[0][: len(trailing)] = trailing
        self._backlog = self._receiver.received(len(trailing))
        self._submitted()

    # --- submitting ---

    def _submit(self, requests: list[Request]) -> None:
        """Submit in order, until the bytes reach their maximum or the channel is busy."""
        export, outgoing, buffers = self._export, self._outgoing, self._outgoing.buffers
        submit, append, pack = self._channel.submit, buffers.append, SIMPLE_REPLY.pack
        before = len(buffers)
        # Plain requests are validated here, others by _admit: validate() takes 0.39 us, this 0.09,
        # of 1.2 for all of a request's Python. After refuse() no request is plain.
        size = -1 if self._refusing else export.size
        unaligned = export.block_size - 1
        last_plain = NBD_CMD_READ if export.readonly else NBD_CMD_WRITE
        room = self._share.most() - self._in_flight_bytes - outgoing.waiting
        reads = read_bytes = writes = written_bytes = 0
        rest = iter(requests)
        for request in rest:
            command, flags, cookie, offset, length, _ = request
            try:
                if (
                    flags
                    or command > last_plain
                    or not 0 < length <= RESERVE
                    or (offset | length) & unaligned
                    or offset + length > size
                ) and not self._admit(request):
                    continue
                data = submit(request, self)
                if data is None:
                    room -= self._hold(command, length)
                elif command == NBD_CMD_READ:
                    if len(data) != length:
                        raise _ShortRead(len(data))
                    append(pack(NBD_SIMPLE_REPLY_MAGIC, 0, cookie))
                    append(data)
                    reads += 1
                    read_bytes += length
                else:
                    append(pack(NBD_SIMPLE_REPLY_MAGIC, 0, cookie))
                    if command == NBD_CMD_WRITE:
                        writes += 1
                        written_bytes += length
                    else:
                        self.counters.done(command, length)
            except Busy:
                self._busy = True
                self._backlog = [request, *rest]
            except Exception as error:  # noqa: BLE001 - one disk's bug must not stop the others
                self._answer_failure(request, error)
            if read_bytes >= room:
                self._backlog += rest
        counters = self.counters
        counters.reads += reads
        counters.read_bytes += read_bytes
        counters.writes += writes
        counters.written_bytes += written_bytes
        outgoing.waiting += (len(buffers) - before - reads) * REPLY_BYTES + read_bytes
        self._submitted()

    def _submitted(self) -> None:
        """Decide, after a batch, whether to receive on."""
        receiver, outgoing = self._receiver, self._outgoing
        queued = self._in_flight + len(outgoing.buffers)
        moved = self._in_flight_bytes + outgoing.waiting
        if moved > RESERVE or self._share.bytes:
            self._count_memory()
        if (self._backlog or receiver.more or queued > QUEUE_MAX) or (
            moved > RESERVE and moved > self._share.most()
        ):
            self._paused = True
        if receiver.error is not None and self._ending is None:
            self._end_for_peer(str(receiver.error))
        if not self.flush_due:
            self._reactor.mark_flush(self)

    def _hold(self, command: int, length: int) -> int:
        """Count a request that is pending now; returns the bytes that it counts for."""
        self._in_flight += 1
        if command > NBD_CMD_WRITE:
            return 0
        self._in_flight_bytes += length
        return length

    def _admit(self, request: Request) -> bool:
        """Judge a request that is not plain; False when it is answered already."""
        command, _flags, cookie, _offset, length, _payload = request
        if command == NBD_CMD_DISC:
            self._end_for_peer("the client disconnected")
            return False
        error = errno.ESHUTDOWN if self._refusing else validate(request, self._export)
        if error or (length == 0 and command != NBD_CMD_FLUSH):
            self._answer(cookie, error)
            return False
        if command == NBD_CMD_READ and length > RESERVE and not self._take_memory(length):
            raise Busy
        return True

    def _answer(self, cookie: int, error: int) -> None:
        """Append a reply without data. The caller adds it to the bytes to be sent."""
        if error:
            self.counters.errors += 1
            error = nbd_error(error)
        self._outgoing.buffers.append(SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, error, cookie))

    def _answer_failure(self, request: Request, error: Exception) -> None:
        if isinstance(error, MemoryError):
            self._reactor.lose()  # it may be answered by half, or be pending, and answered later
            raise error
        self._answer(request[COOKIE], self._failed(request, error))

    def _failed(self, request: Request, error: Exception) -> int:
        """Log what the client will only see as a number; returns the errno."""
        bug = not isinstance(error, (OSError, MemoryError))
        self.counters.bugs += bug
        now = self._reactor.clock()
        if now >= self._failures_until:
            self._failures_until = now + int(FAILURES_SECONDS * 1e9)
            self._failures_logged = 0
        if self._failures_logged < FAILURES_LOGGED:
            self._failures_logged += 1
            log.error(
                "disk %s: %s of %d bytes at %d failed: %s",
                *(self._export.name, COMMAND_NAMES[request[COMMAND]]),
                *(request[LENGTH], request[OFFSET]),
                reason(error),
                exc_info=error if bug else None,
            )
        return error_number(error)

    # --- completions ---

    def complete(
        self, request: Request, error: int, data: Buffer, lent: Releasable | None = None
    ) -> None:
        """Take the result of a pending request, as `backends.api.Owner` says."""
        command, _flags, cookie, _offset, length, _payload = request
        self._in_flight -= 1
        if command <= NBD_CMD_WRITE:
            self._in_flight_bytes -= length
        assert self._in_flight >= 0
        assert self._in_flight_bytes >= 0
        self._reactor.mark_flush(self)
        if self._closed is not None:
            if lent is not None:
                lent.release()
            return
        if error:
            error = self._failed(request, OSError(error, os.strerror(error)))
        elif command == NBD_CMD_READ and len(data) != length:
            error = self._failed(request, _ShortRead(len(data)))
        outgoing = self._outgoing
        self._answer(cookie, error)
        outgoing.waiting += REPLY_BYTES
        if not error:
            self.counters.done(command, length)
            if command == NBD_CMD_READ:
                outgoing.buffers.append(data)
                outgoing.waiting += length
        if lent is not None:
            outgoing.lend(lent)

    def resume(self) -> None:
        """Submit again what the channel had no room for."""
        if self._busy:
            self._busy = False
            try:
                self._go_on()
            except MemoryError:
                self.close("there is no memory for it")

    def _go_on(self) -> None:
        """Submit more of what was received; when all is, receive again, or end."""
        if self._closed is not None:
            return
        queued = self._in_flight + len(self._outgoing.buffers)
        moved = self._in_flight_bytes + self._outgoing.waiting
        if self._share.bytes:
            self._count_memory()
        if not self._busy and queued <= QUEUE_MAX // 2 and moved <= self._share.most() // 2:
            if self._backlog or self._receiver.more:
                requests = self._backlog or self._receiver.received(0)
                self._backlog = []
                self._submit(requests)
            else:
                self._paused = False
        if self._ending is not None and self.idle:
            self.close(self._ending)
            return
        wanted = WRITABLE if self._blocked else 0
        if not (self._paused or self._ending):
            wanted |= READABLE
        if wanted != self._events:
            self._events = wanted
            self._reactor.modify_fd(self._sock.fileno(), wanted)

    # --- memory ---

    def _take_memory(self, length: int) -> bool:
        """Occupy memory for a large request; False: later, `resume` will be called."""
        if self._share.take(self, length):
            return True
        self._busy = True
        return False

    def _count_memory(self) -> None:
        # Of a memory disk's replies only what was never written is no view of the disk.
        waiting = self._outgoing.own_bytes if self._shortcut else self._outgoing.waiting
        total = self._receiver.memory_bytes + self._in_flight_bytes + waiting
        self._share.count(self, total)

    # --- sending ---

    def flush(self) -> bool:
        """Send what the turn has appended, with one system call."""
        sent = False
        try:
            if self._closed is None:
                outgoing = self._outgoing
                if outgoing.waiting and not self._blocked:
                    self._blocked = not outgoing.send(self._sock)
                    self.counters.sends += 1
                    sent = True
                    if outgoing.waiting and not self._blocked:
                        # All that one call takes went; the rest does next turn.
                        self._reactor.mark_flush(self)
                calm = self._events == READABLE and not self._share.bytes
                if self._blocked or self._paused or self._ending or not calm:
                    self._go_on()
        except OSError as error:
            self.close(f"sending failed: {reason(error)}")
        except MemoryError:
            self.close("there is no memory for it")
        except Exception:
            log.exception("disk %s: a bug in its connection", self._export.name)
            self.close("internal error")
        if self._closed is not None:
            self._release()
        return sent
