"""The listener and its clients, over real sockets."""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from reactor.data.listener import ACCEPT_RETRY_SECONDS, NEGOTIATIONS_MAX, Listener
from reactor.data.negotiation import HANDSHAKE_SECONDS
from reactor.spec import Address
from tests.unit.listening import GO, GO_REPLY_BYTES, World, free_port
from tests.unit.test_handshake import (
    ACK,
    FIXED_NO_ZEROES,
    INFO,
    INVALID,
    SERVER,
    disk,
    info,
    kinds,
    option,
)


@pytest.fixture
def world(caplog: pytest.LogCaptureFixture) -> Iterator[World]:
    caplog.set_level(logging.INFO)
    world = World()
    yield world
    world.close()


@pytest.fixture
def unix(tmp_path: Path) -> Address:
    return Address("unix", str(tmp_path / "disk.sock"))


@pytest.fixture
def tcp() -> Address:
    return Address("tcp", "127.0.0.1", free_port())


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_a_client_is_handed_over_with_the_requests_that_came_already(
    world: World, family: str, request: pytest.FixtureRequest
) -> None:
    address = request.getfixturevalue(family)
    listener = world.listen(address)
    client = world.greet(address)
    client.sendall(GO + b"first request")
    assert kinds(world.read(client, GO_REPLY_BYTES)) == [INFO, INFO, ACK]
    world.until(lambda: world.handed)
    ((sock, export, trailing),) = world.handed
    assert export is listener.exports["disk"]
    assert trailing == b"first request"
    assert not sock.getblocking()
    assert not os.get_inheritable(sock.fileno())
    client.sendall(b"second")
    world.reactor.turn()
    assert sock.recv(100) == b"second"  # the listener has let go of it


def test_a_client_over_tcp_waits_for_no_delayed_reply(world: World, tcp: Address) -> None:
    world.listen(tcp)
    world.connect(tcp).sendall(GO)
    world.until(lambda: world.handed)
    assert world.handed[0][0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_client_whose_host_vanishes_is_found_out(world: World, tcp: Address) -> None:
    world.listen(tcp)
    world.connect(tcp).sendall(GO)
    world.until(lambda: world.handed)
    served = world.handed[0][0]
    assert served.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    idle, interval, count = (served.getsockopt(socket.IPPROTO_TCP, option) for option in options)
    assert idle + interval * count <= 120


def test_a_client_that_dribbles_its_bytes_is_served(world: World, unix: Address) -> None:
    world.listen(unix)
    client = world.greet(unix)
    for byte in GO:
        client.send(bytes([byte]))
        world.reactor.turn()
    world.until(lambda: world.handed)


def test_exports_come_and_go_while_a_client_negotiates(world: World, unix: Address) -> None:
    listener = world.listen(unix)
    client = world.greet(unix)
    listener.exports["more"] = disk("more", description="")
    client.sendall(FIXED_NO_ZEROES + option(3))
    replies = world.read(client, 2 * (20 + 4 + 4) + len("malloc disk") + 20)
    assert kinds(replies) == [SERVER, SERVER, ACK]
    del listener.exports["more"]
    client.sendall(option(7, info(b"")))  # alone, it is the default again
    world.until(lambda: world.handed)


def test_a_client_that_aborts_is_let_go_without_a_line(
    world: World, unix: Address, caplog: pytest.LogCaptureFixture
) -> None:
    world.listen(unix)
    client = world.greet(unix)
    client.sendall(FIXED_NO_ZEROES + option(2))
    assert kinds(world.read(client, 20)) == [ACK]
    assert world.ended(client)
    assert not caplog.records


def test_a_client_that_aborts_and_does_not_wait_is_let_go_without_a_line(
    world: World, unix: Address, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    world.listen(unix)
    client = world.greet(unix)
    client.sendall(FIXED_NO_ZEROES + option(2))
    client.close()
    world.until(lambda: caplog.records)
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG


def one_line(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.exc_info is None
    return record.getMessage()


@pytest.mark.parametrize(
    ("garbage", "said"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "unknown client flags 0x47455420"),
        (FIXED_NO_ZEROES + b"GET / HTTP/1.1\r\n\r\n", "bad option magic 0x474554202f204854"),
        (FIXED_NO_ZEROES + option(1, b"a\nb"), r"no export is called 'a\nb'"),
    ],
)
def test_a_client_that_sends_what_no_server_takes_is_dropped_with_one_line(
    world: World, unix: Address, caplog: pytest.LogCaptureFixture, garbage: bytes, said: str
) -> None:
    world.listen(unix)
    client = world.greet(unix)
    client.sendall(garbage)
    assert world.ended(client)
    who = f"{unix}: client pid {os.getpid()} of user {os.getuid()}"
    assert one_line(caplog) == f"{who} is dropped: {said}"


def test_a_client_that_disconnects_is_one_line(
    world: World, tcp: Address, caplog: pytest.LogCaptureFixture
) -> None:
    world.listen(tcp)
    client = world.greet(tcp)
    port = client.getsockname()[1]
    client.close()
    world.until(lambda: caplog.records)
    assert one_line(caplog) == (f"{tcp}: client 127.0.0.1:{port} disconnected in the handshake")


def test_a_client_that_is_gone_before_it_is_greeted_is_one_line(
    world: World, unix: Address, caplog: pytest.LogCaptureFixture
) -> None:
    world.listen(unix)
    world.connect(unix).close()
    world.until(lambda: caplog.records)
    assert one_line(caplog).endswith("disconnected in the handshake")


def test_a_client_that_resets_its_connection_is_one_line(
    world: World, tcp: Address, caplog: pytest.LogCaptureFixture
) -> None:
    world.listen(tcp)
    client = world.greet(tcp)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes.fromhex("0100000000000000"))
    client.close()
    world.until(lambda: caplog.records)
    assert one_line(caplog).endswith("was lost in the handshake: Connection reset by peer")


def test_a_client_that_is_silent_is_dropped_at_the_deadline(
    world: World, unix: Address, caplog: pytest.LogCaptureFixture
) -> None:
    world.listen(unix)
    client = world.greet(unix)
    world.skip(HANDSHAKE_SECONDS - 1)
    assert not caplog.records
    world.skip(1)
    assert world.ended(client)
    assert one_line(caplog).endswith("did not finish the handshake in 10 s")


def test_a_client_that_is_handed_over_has_no_deadline_any_more(
    world: World, unix: Address, caplog: pytest.LogCaptureFixture
) -> None:
    world.listen(unix)
    client = world.greet(unix)
    client.sendall(GO)
    world.read(client, GO_REPLY_BYTES)
    world.until(lambda: world.handed)
    world.skip(HANDSHAKE_SECONDS + 1)
    world.handed[0][0].send(b"still here")
    assert world.read(client, 10) == b"still here"
    assert not caplog.records


def large_list(listener: Listener) -> int:
    """Give the listener a list that fills any socket's buffer; returns the bytes of its reply."""
    description = "d" * 1000
    for number in range(400):
        listener.exports[f"{number:04}"] = disk(f"{number:04}", description=description)
    return 400 * (20 + 4 + 4 + 1000) + (20 + 4 + 4 + len("malloc disk")) + 20


def test_a_client_that_reads_slowly_gets_all_its_replies(world: World, unix: Address) -> None:
    length = large_list(world.listen(unix))
    client = world.greet(unix)
    client.sendall(FIXED_NO_ZEROES + option(3))
    for _ in range(10):
        world.reactor.turn()
    replies = b"".join(world.read(client, length // 5) for _ in range(5))
    replies += world.read(client, length % 5)
    assert kinds(replies) == [SERVER] * 401 + [ACK]
    client.sendall(option(3, b"x"))
    assert kinds(world.read(client, 20 + len("LIST carries no data"))) == [INVALID]


def test_a_client_that_does_not_read_is_not_read_from(world: World, unix: Address) -> None:
    large_list(world.listen(unix))
    client = world.greet(unix)
    client.sendall(FIXED_NO_ZEROES + option(3))
    for _ in range(10):
        world.reactor.turn()
    sent = 0
    with suppress(BlockingIOError):
        for _ in range(10_000):
            sent += client.send(option(99, bytes(16384)))
            world.reactor.turn()
    assert sent < 4 << 20  # what two socket buffers hold
    assert not world.reactor.turn()  # and it costs nothing


def test_an_export_that_goes_while_its_client_is_late_is_not_served(
    world: World, unix: Address, caplog: pytest.LogCaptureFixture
) -> None:
    listener = world.listen(unix)
    length = large_list(listener)
    client = world.greet(unix)
    client.sendall(FIXED_NO_ZEROES + option(3) + option(7, info(b"disk")))
    for _ in range(10):
        world.reactor.turn()
    del listener.exports["disk"]
    assert len(world.read(client, length + GO_REPLY_BYTES)) == length + GO_REPLY_BYTES
    assert world.ended(client)
    assert not world.handed
    assert one_line(caplog).endswith("came too late: disk is gone")


def test_a_client_that_cannot_be_served_is_dropped(
    world: World, unix: Address, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    listener = Listener(world.reactor, unix, fail)
    world.listeners.append(listener)
    listener.exports["disk"] = disk()
    client = world.greet(unix)
    client.sendall(GO)
    world.read(client, GO_REPLY_BYTES)
    assert world.ended(client)
    (record,) = caplog.records
    assert record.getMessage().endswith("cannot be served: Too many open files")


def test_clients_that_say_nothing_shut_nobody_out(world: World, unix: Address) -> None:
    world.listen(unix)
    silent = [world.greet(unix) for _ in range(NEGOTIATIONS_MAX)]
    late = world.connect(unix)
    late.sendall(GO)
    world.until(lambda: world.handed)
    assert world.ended(silent[0])


def test_running_out_of_descriptors_is_survived(
    world: World, unix: Address, caplog: pytest.LogCaptureFixture
) -> None:
    world.listen(unix)
    client = world.connect(unix)
    client.sendall(GO)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd.name) for fd in Path("/proc/self/fd").iterdir())
    spare = [os.dup(client.fileno()) for _ in range(highest)]  # so that no lower one is free
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, hard))
        for _ in range(100):
            world.reactor.turn()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in spare:
            os.close(fd)
    assert not world.handed
    (record,) = caplog.records  # said once, and no busy loop
    assert record.getMessage() == f"cannot accept a client on {unix}: Too many open files"
    world.skip(ACCEPT_RETRY_SECONDS)
    world.until(lambda: world.handed)


def test_closing_drops_the_clients_that_are_still_negotiating(world: World, unix: Address) -> None:
    listener = world.listen(unix)
    client = world.greet(unix)
    world.listeners.remove(listener)
    listener.close()
    assert world.ended(client)
    with pytest.raises(FileNotFoundError):
        world.connect(unix)
