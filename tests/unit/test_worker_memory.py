"""A worker that lacks memory where a request or a connection would be lost by that."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from reactor.data.connection import Connection
from reactor.data.worker import Worker
from reactor.loop import Reactor
from reactor.messages import encode
from reactor.protocol.wire import NBD_CMD_FLUSH, NBD_REQUEST_MAGIC, REQUEST
from reactor.spec import DiskSpec


def lacking(*_: object, **__: object) -> None:
    raise MemoryError


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor("interrupt", stop_at_loss=True)
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


def test_a_connection_that_there_is_no_memory_for_is_refused(
    worker: Worker, reactor: Reactor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, object]] = []

    def send(kind: str, **fields: object) -> bool:
        said.append((kind, fields.get("reason")))
        return True

    with hand_over(tmp_path) as kernel, monkeypatch.context() as short:
        short.setattr(worker._bus, "send", send)
        short.setattr("reactor.data.serving.Connection", lacking)
        turn(reactor)
        assert kernel.recv(1) == b""
    assert ("disconnected", "Cannot allocate memory") in said
    assert not reactor.lost


@pytest.mark.parametrize("where", ["decode", "socket.recv_fds"])
@pytest.mark.usefixtures("worker")
def test_a_connection_that_cannot_even_be_refused_ends_it(
    reactor: Reactor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with hand_over(tmp_path), monkeypatch.context() as short:
        short.setattr(f"reactor.data.worker.{where}", lacking)
        turn(reactor)
    assert reactor.lost


def test_an_answer_that_cannot_be_given_ends_it(
    worker: Worker, reactor: Reactor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hand_over(tmp_path) as kernel:
        turn(reactor)
        assert worker._disks["a"].report()["connections"] == [(7, 0)]
        kernel.send(REQUEST.pack(NBD_REQUEST_MAGIC, 0, NBD_CMD_FLUSH, 1, 0, 0))
        with monkeypatch.context() as short:
            short.setattr(Connection, "_answer", lacking)
            for _ in range(100):
                if not reactor.lost:
                    turn(reactor)
    assert reactor.lost
