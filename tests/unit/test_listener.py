"""The listener over real sockets, in a real reactor that the test turns itself."""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from reactor.data.listener import ACCEPT_RETRY_SECONDS, NEGOTIATIONS_MAX, Listener
from reactor.data.negotiation import HANDSHAKE_SECONDS
from reactor.loop import Reactor
from reactor.protocol.export import Export
from reactor.spec import Address
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

GO = FIXED_NO_ZEROES + option(7, info(b"disk"))
GREETING_BYTES = 18
GO_REPLY_BYTES = 20 + 12 + 20 + 14 + 20
SECONDS = 20.0  # until a test that waits fails


class World:
    """A reactor whose clock can be put forward, with its listener, clients and guests."""

    def __init__(self) -> None:
        self.skipped_ns = 0
        self.reactor = Reactor("poll", clock=lambda: time.monotonic_ns() + self.skipped_ns)
        self.handed: list[tuple[socket.socket, Export, bytes]] = []
        self.clients: list[socket.socket] = []
        self.listeners: list[Listener] = []

    def listen(self, address: Address, sock: socket.socket | None = None) -> Listener:
        listener = Listener(
            self.reactor, address, lambda *client: self.handed.append(client), sock=sock
        )
        listener.exports["disk"] = disk()
        self.listeners.append(listener)
        return listener

    def connect(self, address: Address) -> socket.socket:
        where: str | tuple[str, int]
        if address.kind == "unix":
            client, where = socket.socket(socket.AF_UNIX), address.target
        else:
            family = socket.AF_INET6 if ":" in address.target else socket.AF_INET
            client, where = socket.socket(family), (address.target, address.port)
        self.clients.append(client)
        client.connect(where)
        client.setblocking(False)
        return client

    def greet(self, address: Address) -> socket.socket:
        client = self.connect(address)
        self.read(client, GREETING_BYTES)
        return client

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            self.reactor.turn()

    def read(self, client: socket.socket, length: int) -> bytes:
        """Turn until the client has so many bytes; fewer when its stream ends before."""
        received, ended = b"", False

        def enough() -> bool:
            nonlocal received, ended
            with suppress(BlockingIOError):
                data = client.recv(length - len(received))
                ended = not data
                received += data
            return ended or len(received) == length

        self.until(enough)
        return received

    def ended(self, client: socket.socket) -> bool:
        """Turn until the client's stream ends; False when something comes instead."""
        try:
            return self.read(client, 1) == b""
        except ConnectionResetError:
            return True

    def skip(self, seconds: float) -> None:
        self.skipped_ns += int(seconds * 1e9)
        self.reactor.turn()

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()
        for sock in (*self.clients, *(sock for sock, _, _ in self.handed)):
            sock.close()
        self.reactor.close()


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
    with socket.create_server(("127.0.0.1", 0)) as free:
        return Address("tcp", "127.0.0.1", free.getsockname()[1])


# --- clients ---


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


def test_more_clients_than_may_negotiate_wait_for_their_turn(world: World, unix: Address) -> None:
    world.listen(unix)
    silent = [world.greet(unix) for _ in range(NEGOTIATIONS_MAX)]
    waiting = world.connect(unix)
    waiting.sendall(GO)
    for _ in range(100):
        world.reactor.turn()
    assert not world.handed
    silent[0].close()
    world.until(lambda: world.handed)


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


# --- addresses ---


def refusal(world: World, address: Address) -> tuple[int | None, str]:
    with pytest.raises(OSError, match="cannot listen on") as refused:
        world.listen(address)
    return refused.value.errno, str(refused.value.strerror)


def test_a_unix_socket_is_removed_at_the_end(world: World, unix: Address) -> None:
    listener = world.listen(unix)
    assert stat.S_ISSOCK(Path(unix.target).lstat().st_mode)
    world.listeners.remove(listener)
    listener.close()
    assert not Path(unix.target).exists()


def test_a_unix_socket_that_another_service_has_replaced_is_left(
    world: World, unix: Address
) -> None:
    first = world.listen(unix)
    Path(unix.target).unlink()
    world.listen(unix)
    world.listeners.remove(first)
    first.close()
    world.greet(unix)


def test_a_unix_socket_has_the_permissions_that_the_umask_leaves(
    world: World, unix: Address
) -> None:
    umask = os.umask(0o027)
    try:
        world.listen(unix)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(Path(unix.target).lstat().st_mode) == 0o750


def test_a_unix_socket_that_a_killed_service_left_is_replaced(world: World, unix: Address) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(unix.target)
        killed.listen()
    world.listen(unix)
    world.greet(unix)


def test_a_unix_socket_that_somebody_listens_on_is_left(world: World, unix: Address) -> None:
    world.listen(unix)
    number, said = refusal(world, unix)
    assert number == errno.EADDRINUSE
    assert said == f"cannot listen on {unix}: another process uses this socket"
    world.greet(unix)


def test_a_unix_socket_whose_service_is_too_busy_to_accept_is_left(
    world: World, unix: Address
) -> None:
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(unix.target)
        busy.listen(0)
        world.connect(unix)
        number, _ = refusal(world, unix)
        assert number == errno.EADDRINUSE
        assert Path(unix.target).exists()


def test_a_file_at_the_path_of_a_unix_socket_is_left(world: World, unix: Address) -> None:
    Path(unix.target).write_text("precious")
    number, said = refusal(world, unix)
    assert number == errno.EADDRINUSE
    assert said.endswith("the path exists and is not a socket")
    assert Path(unix.target).read_text() == "precious"


def test_a_missing_directory_is_named(world: World) -> None:
    number, said = refusal(world, Address("unix", "/nonexistent/dir/disk.sock"))
    assert number == errno.ENOENT
    assert said == (
        "cannot listen on unix:/nonexistent/dir/disk.sock: there is no directory /nonexistent/dir"
    )


def test_a_file_as_directory_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    number, said = refusal(world, Address("unix", str(tmp_path / "file" / "disk.sock")))
    assert number == errno.ENOTDIR
    assert said.endswith("Not a directory")


def test_a_path_with_a_nul_is_refused(world: World, tmp_path: Path) -> None:
    number, _ = refusal(world, Address("unix", f"{tmp_path}/a\0b"))
    assert number == errno.EINVAL
    assert not list(tmp_path.iterdir())


def test_a_tcp_port_in_use_is_refused(world: World, tcp: Address) -> None:
    world.listen(tcp)
    number, said = refusal(world, tcp)
    assert number == errno.EADDRINUSE
    assert said == f"cannot listen on {tcp}: Address already in use"


def test_an_address_of_another_host_is_refused(world: World) -> None:
    number, said = refusal(world, Address("tcp", "192.0.2.1", 10809))
    assert number == errno.EADDRNOTAVAIL
    assert "tcp:192.0.2.1:10809" in said


def test_a_host_name_is_refused_as_looking_it_up_may_block(world: World) -> None:
    number, said = refusal(world, Address("tcp", "nbd.example", 10809))
    assert number == errno.EINVAL
    assert said.endswith("nbd.example is neither an IP address nor localhost")


def test_localhost_is_an_address(world: World, tcp: Address) -> None:
    world.listen(Address("tcp", "localhost", tcp.port))
    world.greet(tcp)


def test_ipv6_is_served(world: World, tcp: Address) -> None:
    address = Address("tcp", "::1", tcp.port)
    world.listen(address)
    world.connect(address).sendall(GO)
    world.until(lambda: world.handed)


def test_a_socket_that_was_handed_over_is_served_and_its_path_left(
    world: World, unix: Address
) -> None:
    handed = socket.socket(socket.AF_UNIX)
    handed.bind(unix.target)
    handed.listen()
    listener = world.listen(Address("systemd", "disk"), sock=handed)
    world.greet(unix)
    world.listeners.remove(listener)
    listener.close()
    assert Path(unix.target).exists()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_handed_socket_that_does_not_listen_is_refused(
    world: World, kind: socket.SocketKind
) -> None:
    handed = socket.socket(socket.AF_UNIX, kind)
    with pytest.raises(OSError, match="systemd:disk is not a listening stream socket"):
        world.listen(Address("systemd", "disk"), sock=handed)
    assert handed.fileno() == -1
