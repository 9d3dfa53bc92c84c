"""A real RPC server in a real loop on a thread, and a raw client for it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from reactor.control.call import Method
from reactor.control.methods import methods
from reactor.control.rpc import RpcServer
from reactor.loop import Reactor
from tests.unit.memory_service import MemoryService

T = TypeVar("T")
ANSWER_SECONDS = 20.0
OBSERVATION_SECONDS = 0.2


class RunningRpc:
    """The server on `path`; `more` adds methods to the service's own."""

    def __init__(self, path: Path, more: dict[str, Method] | None = None) -> None:
        self.path = path
        self.reactor = Reactor("interrupt")
        self.service = MemoryService(self.reactor)
        table = {**methods(self.service), **(more or {})}
        try:
            self.server = RpcServer(self.reactor, path, table)
        except BaseException:
            self.reactor.close()
            raise
        self._closed = False
        self._thread = threading.Thread(target=self.reactor.run)
        self._thread.start()

    def __enter__(self) -> RunningRpc:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.reactor.call_from_thread(self.reactor.stop)
        self._thread.join()
        self.close_server()
        self.reactor.close()

    def close_server(self) -> None:
        """Close the server, once."""
        if not self._closed:
            self._closed = True
            self.server.close()

    def in_loop(self, function: Callable[[], T]) -> T:
        """Run `function` in the loop and return what it returned."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - the test gets it
                future.set_exception(error)

        self.reactor.call_from_thread(run)
        return future.result(ANSWER_SECONDS)

    def turns_while_idle(self) -> int:
        """Return how many turns the loop does while nobody asks for anything."""
        future: Future[int] = Future()
        before = self.in_loop(lambda: self.reactor.turns)
        self.reactor.call_from_thread(
            lambda: self.reactor.call_later(
                OBSERVATION_SECONDS, lambda: future.set_result(self.reactor.turns)
            )
        )
        return future.result(ANSWER_SECONDS) - before

    def client(self) -> RawClient:
        """Return a new connection."""
        return RawClient(self.path)

    def call(self, method: str, params: Any = None) -> dict[str, Any]:
        """Call on a connection of its own; returns the whole reply."""
        with self.client() as client:
            return client.call(method, params)


class RawClient:
    """Sends any bytes and reads replies, one a line."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ANSWER_SECONDS)
        self.sock.connect(str(path))
        self._lines = self.sock.makefile("rb")

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._lines.close()
        self.sock.close()

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(data)

    def line(self) -> bytes:
        """Return the next reply, or nothing at the end of the stream."""
        return self._lines.readline()

    def reply(self) -> Any:
        """Return the next reply, decoded."""
        line = self.line()
        assert line.endswith(b"\n"), f"the stream ended with {line!r}"
        return json.loads(line)

    def call(self, method: str, params: Any = None) -> dict[str, Any]:
        """Send a request and return its whole reply."""
        self.send(encode(method, params))
        reply: dict[str, Any] = self.reply()
        return reply


def encode(method: str, params: Any = None, call_id: Any = 1) -> bytes:
    """Return a request."""
    request = {"jsonrpc": "2.0", "id": call_id, "method": method}
    if params is not None:
        request["params"] = params
    return json.dumps(request).encode()
