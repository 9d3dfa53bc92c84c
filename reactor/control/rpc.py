"""The JSON-RPC server: a unix socket in the controller's loop, driven by SPDK's own client."""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from reactor.control.call import Method, Reply
from reactor.control.jsonrpc import (
    INCOMPLETE,
    INTERNAL_ERROR,
    MESSAGE_MAX,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    RESPONSE_MAX,
    Decoder,
    RpcError,
    StreamError,
    error_reply,
    request,
)
from reactor.control.owned_socket import OwnedSocket
from reactor.errors import reason
from reactor.log import logger
from reactor.loop import HANGUP, READABLE, WRITABLE, Reactor

CONNECTIONS_MAX: Final = 64
BACKLOG: Final = 512
ACCEPTS_PER_TURN: Final = 16
ACCEPT_RETRY_SECONDS: Final = 1.0
RECEIVE_BYTES: Final = 64 << 10
CALLS_PER_TURN: Final = 64  # of one connection
CALLS_NS: Final = 100_000_000  # ... and no more once they have taken so long
WAITING_MAX: Final = 64  # calls of one connection that are not answered yet
OUTGOING_MAX: Final = 1 << 20  # bytes; a client that does not read beyond starts nothing new

_NO_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logger(__name__)


class RpcServer:
    """Serves `methods` on `path`, for its owner only. Raises ReactorError when it cannot."""

    def __init__(self, reactor: Reactor, path: Path, methods: Mapping[str, Method]) -> None:
        self.reactor = reactor
        self.methods = methods
        self._socket = OwnedSocket(path, BACKLOG)
        self._sock = self._socket.sock
        self._connections: set[_Connection] = set()
        reactor.add_fd(self._sock.fileno(), self._accept, name="rpc")

    def close(self) -> None:
        """Send what is answered, close every connection and remove the socket."""
        for connection in list(self._connections):
            connection.transmit()
            connection.close()
        self.reactor.remove_fd(self._sock.fileno())
        self._socket.close()

    def forget(self, connection: _Connection) -> None:
        """Drop a connection that is closed."""
        self._connections.discard(connection)

    def _accept(self, _events: int) -> bool:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _NO_RESOURCES:
                    self._pause(error)
                break
            sock.setblocking(False)
            if len(self._connections) < CONNECTIONS_MAX:
                self._connections.add(_Connection(self, sock))
            else:
                _refuse(sock)
        return True

    def _pause(self, error: OSError) -> None:
        # The waiting client keeps the listener readable: asking again at once would spin.
        log.warning("RPC: cannot accept a connection: %s", reason(error))
        self.reactor.modify_fd(self._sock.fileno(), 0)
        self.reactor.call_later(ACCEPT_RETRY_SECONDS, self._resume)

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self.reactor.modify_fd(self._sock.fileno(), READABLE)


class _Batch:
    """The calls of one array, answered by one array when the last is answered."""

    def __init__(self, calls: int) -> None:
        self._unanswered = calls
        self._replies: list[bytes] = []
        self._size = 0

    def add(self, encoded: bytes | None) -> bytes | None:
        """Take an answer; returns the array when it was the last and there is anything to say."""
        self._unanswered -= 1
        if encoded is not None and self._size <= RESPONSE_MAX:
            self._size += len(encoded)
            if self._size > RESPONSE_MAX:
                too_large = f"The results are larger than {RESPONSE_MAX} bytes"
                encoded = error_reply(None, RpcError(INTERNAL_ERROR, too_large))
            self._replies.append(encoded)
        if self._unanswered or not self._replies:
            return None
        return b"[" + b",".join(self._replies) + b"]"


class _Connection:
    """A client: what it sent and is not started, what runs, and what it has not yet read."""

    def __init__(self, server: RpcServer, sock: socket.socket) -> None:
        self.flush_due = False
        self._server = server
        self._reactor = server.reactor
        self._sock = sock
        self._decoder = Decoder()
        self._queue: deque[tuple[Any, _Batch | None]] = deque()  # of one message
        self._waiting: dict[Reply, _Batch | None] = {}
        self._barrier: Reply | None = None
        self._outgoing = bytearray()
        self._ended = False  # nothing more is read; closed once everything is answered
        self._closed = False
        self._events = READABLE
        self._reactor.add_fd(sock.fileno(), self._on_ready, name="rpc client")

    def close(self) -> None:
        """Close at once; answers that come later are dropped."""
        if self._closed:
            return
        self._closed = True
        for reply in self._waiting:
            reply.abandon()
        self._waiting.clear()
        self._queue.clear()
        self._reactor.remove_fd(self._sock.fileno())
        self._sock.close()
        self._server.forget(self)

    def flush(self) -> bool:
        """Send what is answered, then go on with what waits."""
        if not self._closed:
            self.transmit()
            self._advance()
        return True

    def transmit(self) -> None:
        """Send what the client takes now."""
        try:
            while self._outgoing:
                del self._outgoing[: self._sock.send(self._outgoing)]
        except BlockingIOError:
            pass
        except OSError as error:  # the client is gone, perhaps without its answer
            log.debug("RPC client: %s", reason(error))
            self.close()

    # --- receiving ---

    def _on_ready(self, events: int) -> bool:
        if events & HANGUP and not self._events & READABLE:
            self.close()  # it can neither send nor hear any more
        elif events & READABLE:
            self._receive()
        elif events & HANGUP:
            self.close()
        if events & WRITABLE and not self._closed:
            self._reactor.mark_flush(self)
        return True

    def _receive(self) -> None:
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            log.debug("RPC client: %s", reason(error))
            self.close()
            return
        if data:
            self._decoder.feed(data)
        else:
            self._ended = True
        self._advance()

    def _advance(self) -> None:
        """Start what may start, and settle what to wait for."""
        calls, clock = 0, self._reactor.clock
        late = clock() + CALLS_NS
        while self._may_start():
            if calls == CALLS_PER_TURN or (calls and clock() >= late):
                self._reactor.mark_flush(self)  # comes back here in the next turn
                break
            if self._queue:
                calls += 1
                self._start(*self._queue.popleft())
            elif not self._next_message():
                break
        if self._closed:  # by the method that was called
            return
        if self._ended and not (self._queue or self._waiting or self._outgoing or self.flush_due):
            self.close()
            return
        may_read = self._may_start() and self._decoder.pending < MESSAGE_MAX and not self._ended
        events = (READABLE if may_read else 0) | (WRITABLE if self._short() else 0)
        if events != self._events:
            self._events = events
            self._reactor.modify_fd(self._sock.fileno(), events)

    def _may_start(self) -> bool:
        return (
            not self._closed
            and self._barrier is None
            and len(self._waiting) < WAITING_MAX
            and len(self._outgoing) < OUTGOING_MAX
        )

    def _short(self) -> bool:
        # What was answered just now is first tried at the end of the turn.
        return bool(self._outgoing) and not self.flush_due

    def _next_message(self) -> bool:
        try:
            value = self._decoder.next()
        except StreamError as error:
            self._ended = True
            self._decoder = Decoder()
            self._send(error_reply(None, RpcError(PARSE_ERROR, str(error))))
            return False
        if value is INCOMPLETE:
            return False
        if isinstance(value, list) and value:
            batch = _Batch(len(value))
            self._queue.extend((element, batch) for element in value)
        else:
            self._queue.append((value, None))
        return True

    # --- calling and answering ---

    def _start(self, value: Any, batch: _Batch | None) -> None:
        try:
            call = request(value)
        except RpcError as error:
            self._answer(batch, error_reply(None, error))
            return
        method = self._server.methods.get(call.method)
        if method is None:
            unknown = RpcError(METHOD_NOT_FOUND, "Method not found")
            self._answer(batch, error_reply(call.id, unknown))
            return
        log.debug("RPC %s", call.method)
        reply = Reply(self._reactor, call.id, self._answered)
        self._waiting[reply] = batch
        if method.barrier:
            self._barrier = reply
        method.call(call.params, reply)

    def _answered(self, reply: Reply, encoded: bytes | None) -> None:
        if self._barrier is reply:
            self._barrier = None
        self._answer(self._waiting.pop(reply), encoded)

    def _answer(self, batch: _Batch | None, encoded: bytes | None) -> None:
        if batch is not None:
            encoded = batch.add(encoded)
        if encoded is not None:
            self._send(encoded)
        else:
            self._reactor.mark_flush(self)

    def _send(self, encoded: bytes) -> None:
        self._outgoing += encoded
        self._outgoing += b"\n"
        self._reactor.mark_flush(self)


def _refuse(sock: socket.socket) -> None:
    message = f"{CONNECTIONS_MAX} connections are open already"
    with sock:
        try:
            sock.send(error_reply(None, RpcError(-errno.EAGAIN, message)) + b"\n")
        except OSError as error:
            log.debug("RPC client: %s", reason(error))
