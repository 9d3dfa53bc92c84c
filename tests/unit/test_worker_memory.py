"""A worker that lacks memory where a request or a connection would be lost by that."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends import lanes
from backends.threads import Threads
from reactor.bus import ControllerBus
from reactor.data import connection
from reactor.data.connection import Connection
from reactor.data.negotiation import Negotiation
from reactor.data.worker import Worker
from reactor.loop import READABLE, Reactor
from reactor.messages import encode
from reactor.protocol.wire import NBD_CMD_FLUSH, NBD_CMD_READ, NBD_REQUEST_MAGIC, REQUEST
from reactor.spec import DiskSpec


def lacking(*_: object, **__: object) -> None:
    raise MemoryError


@pytest.fixture
def lost() -> list[None]:
    """An item for each time that the process would have ended."""
    return []


@pytest.fixture
def reactor(lost: list[None]) -> Iterator[Reactor]:
    made = Reactor("interrupt", on_loss=lambda: lost.append(None))
    yield made
    made.close()


@pytest.fixture
def worker(reactor: Reactor, tmp_path: Path) -> Iterator[Worker]:
    """A worker with a disk of a file; its controller is this process, which does not listen."""
    controller = os.pidfd_open(os.getpid())
    made = Worker(reactor, 0, tmp_path, "0badcafe", controller)
    options = {"path": str(tmp_path / "image"), "size": 1 << 20}
    spec = DiskSpec("a", "file", options).to_message()
    keys = {"shared": False, "leads": True, "members": [], "least": 0}
    made._on_command({"type": "start", "id": 1, "spec": spec, **keys})
    while not made._disks:
        turn(reactor)
    yield made
    made._on_command({"type": "stop", "id": 2, "disk": "a", "seconds": 0.1})
    while made._disks:
        turn(reactor)
    made.close()
    os.close(controller)


def turn(reactor: Reactor) -> None:
    reactor.call_later(0.01, lambda: None)
    reactor.turn()


def hand_over(folder: Path) -> socket.socket:
    """Give the worker a connection as of the kernel; returns the kernel's end."""
    ours, its = socket.socketpair()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as descriptors, its:
        descriptors.connect(str(folder / "worker-0.sock"))
        header = encode("connection", disk="a", generation=7, position=0)
        socket.send_fds(descriptors, [header], [its.fileno()])
    return ours


@pytest.fixture
def served(
    worker: Worker, reactor: Reactor, tmp_path: Path
) -> Iterator[tuple[socket.socket, Connection]]:
    """A connection of the worker's disk, and the kernel's end of it."""
    with hand_over(tmp_path) as kernel:
        turn(reactor)
        assert worker._disks["a"].report()["connections"] == [(7, 0)]
        (serving,) = worker._disks["a"]._generations
        yield kernel, serving


def send(kernel: socket.socket, command: int, length: int = 0) -> None:
    kernel.send(REQUEST.pack(NBD_REQUEST_MAGIC, 0, command, 1, 0, length))


def test_a_connection_that_there_is_no_memory_for_is_refused(
    worker: Worker,
    reactor: Reactor,
    lost: list[None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[tuple[str, object]] = []

    def say(kind: str, **fields: object) -> bool:
        said.append((kind, fields.get("reason")))
        return True

    with hand_over(tmp_path) as kernel, monkeypatch.context() as short:
        short.setattr(worker._bus, "send", say)
        short.setattr("reactor.data.serving.Connection", lacking)
        turn(reactor)
        assert kernel.recv(1) == b""
    assert ("disconnected", "Cannot allocate memory") in said
    assert not lost


@pytest.mark.parametrize("where", ["decode", "socket.recv_fds"])
@pytest.mark.usefixtures("worker")
def test_a_connection_that_cannot_even_be_refused_ends_it(
    reactor: Reactor,
    lost: list[None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    with hand_over(tmp_path), monkeypatch.context() as short:
        short.setattr(f"reactor.data.worker.{where}", lacking)
        turn(reactor)
    assert lost


def test_an_answer_that_cannot_be_given_ends_it(
    served: tuple[socket.socket, Connection],
    reactor: Reactor,
    lost: list[None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel, _ = served
    send(kernel, NBD_CMD_FLUSH)
    with monkeypatch.context() as short:
        short.setattr(Connection, "_answer", lacking)
        for _ in range(100):
            if not lost:
                turn(reactor)
    assert lost


class Full(list[object]):
    """A list that there is no memory for more of after so many items."""

    def append(self, item: object) -> None:
        if self:
            raise MemoryError
        super().append(item)


def test_an_answer_that_lacks_memory_in_the_middle_is_not_sent(
    served: tuple[socket.socket, Connection], reactor: Reactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, serving = served
    monkeypatch.setattr(serving._outgoing, "buffers", Full())
    send(kernel, NBD_CMD_READ, 4096)
    turn(reactor)
    assert kernel.recv(1) == b""


def test_a_connection_is_closed_whether_that_can_be_logged_or_not(
    served: tuple[socket.socket, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, serving = served
    with monkeypatch.context() as short:
        short.setattr(connection.log, "info", lacking)
        with pytest.raises(MemoryError):
            serving.close("a test")
    assert kernel.recv(1) == b""


def test_a_thread_that_cannot_tell_its_result_ends_the_worker(
    reactor: Reactor, lost: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = Threads(reactor, -1, lambda: None, threads=1)
    monkeypatch.setattr(threads, "_finished", lacking)
    threads.call(lambda: None, (), (lambda *_: None,))
    threads.kick()
    threads.close()
    assert lost


def test_a_place_that_cannot_be_given_up_later_ends_the_worker(
    reactor: Reactor, lost: list[None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "locked").open("wb") as file:
        held = lanes.LaneLocks(file.fileno(), reactor, "a")
        monkeypatch.setattr(lanes, "unlock_range", lacking)
        monkeypatch.setattr(reactor, "call_later", lacking)
        held._unlock(0)
    assert lost


def test_a_bus_looks_again_after_it_lacked_the_memory_for_that(
    reactor: Reactor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = ControllerBus(reactor, tmp_path / "bus", lambda *_: None)
    with monkeypatch.context() as short:
        short.setattr(reactor, "call_from_thread", lacking)
        with pytest.raises(MemoryError):
            bus._look_again()
    bus._look_again()
    assert reactor._calls
    reactor.turn()
    bus.close()


def test_a_request_that_lacks_memory_once_it_is_queued_ends_the_worker(
    served: tuple[socket.socket, Connection],
    worker: Worker,
    reactor: Reactor,
    lost: list[None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel, serving = served
    (channel,) = worker._disks["a"].disk.channels
    send(kernel, NBD_CMD_FLUSH)
    with monkeypatch.context() as short:
        short.setattr(reactor, "mark_kick", lacking)
        serving._on_ready(READABLE)
    assert lost
    assert channel._syncing == []


def test_a_client_that_there_is_no_memory_to_greet_is_dropped_alone(
    reactor: Reactor, lost: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, its = socket.socketpair()
    over: list[Negotiation] = []
    with ours, its:
        negotiation = Negotiation(reactor, its, "a client", {}, over.append)
        monkeypatch.setattr(negotiation, "_send", lacking)
        negotiation.begin()
        assert ours.recv(1) == b""
    assert over == [negotiation]
    assert not lost
