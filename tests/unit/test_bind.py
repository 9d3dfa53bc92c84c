"""Where a listener can listen, and what it leaves behind."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from reactor.spec import Address
from tests.unit.listening import GO, World, free_port


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def unix(tmp_path: Path) -> Address:
    return Address("unix", str(tmp_path / "disk.sock"))


@pytest.fixture
def tcp() -> Address:
    return Address("tcp", "127.0.0.1", free_port())


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
