"""The spread of a disk's clients, over real sockets: whoever cannot take a client, it is served."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from reactor.bus import RECEIVE_BYTES
from reactor.data import spread as spreading
from reactor.data.spread import REFUSAL_SECONDS, SILENCE_SECONDS, TAKE_SECONDS, ClientSpread
from reactor.messages import HANDOVERS, decode
from tests.unit.listening import World


class Member:
    """Another worker's socket for descriptors, with what the test wants to answer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.bind(str(path))

    def offered(self) -> tuple[bytes, socket.socket, socket.socket]:
        """Return what a client sent, its socket and its leash; raises BlockingIOError."""
        header, fds, _, _ = socket.recv_fds(self._sock, RECEIVE_BYTES, 2)
        client, leash = (socket.socket(fileno=fd) for fd in fds)
        return decode(header, HANDOVERS)["trailing"], client, leash

    def take(self) -> tuple[socket.socket, socket.socket]:
        _, client, leash = self.offered()
        leash.send(b"\1")
        return client, leash

    def refuse(self) -> None:
        for sock in self.offered()[1:]:
            sock.close()

    def close(self) -> None:
        self._sock.close()


class Spread:
    """A spread to one member, with the clients that came back."""

    def __init__(self, world: World, member: Member) -> None:
        self.world = world
        self.member = member
        self.served: list[tuple[socket.socket, bytes]] = []
        self.clients: list[socket.socket] = []
        self.spread = ClientSpread(
            world.reactor, "w", [member.path], lambda *client: self.served.append(client)
        )

    def give(self, own: int = 10) -> socket.socket:
        """Give a client away; returns its own end."""
        ours, theirs = socket.socketpair()
        self.clients.append(ours)
        self.spread.give(theirs, b"request", own)
        return ours

    def turn(self) -> None:
        """Have what the member said heard."""
        for _ in range(3):
            self.world.reactor.turn()

    def close(self) -> None:
        self.spread.close()
        for client, _ in self.served:
            client.close()
        for client in self.clients:
            client.close()


@pytest.fixture
def spread(tmp_path: Path) -> Iterator[Spread]:
    with ExitStack() as stack:
        world, member = World(), Member(tmp_path / "member.sock")
        stack.callback(world.close)
        stack.callback(member.close)
        spread = Spread(world, member)
        stack.callback(spread.close)
        yield spread


def test_a_client_that_was_taken_is_kept_no_longer(spread: Spread) -> None:
    client = spread.give()
    taken, leash = spread.member.take()
    with taken, leash:
        spread.turn()
        spread.world.skip(TAKE_SECONDS)
        spread.turn()
        assert not spread.served
    assert client.recv(1) == b"", "the member had the last descriptor of it"


def test_a_client_that_is_refused_is_served_here_and_the_member_is_spared(spread: Spread) -> None:
    spread.give()
    spread.member.refuse()
    spread.turn()
    assert [trailing for _, trailing in spread.served] == [b"request"]
    spread.give()
    assert len(spread.served) == 2
    with pytest.raises(BlockingIOError):
        spread.member.offered()
    spread.world.skip(REFUSAL_SECONDS)
    spread.give()
    assert len(spread.served) == 2
    spread.member.refuse()


def test_a_silent_member_can_take_no_client_that_is_served_here(spread: Spread) -> None:
    spread.give()
    _, client, leash = spread.member.offered()
    with client, leash:
        spread.world.skip(TAKE_SECONDS)
        spread.turn()
        assert len(spread.served) == 1
        with pytest.raises(BrokenPipeError):
            leash.send(b"\1")
        spread.world.skip(SILENCE_SECONDS - 0.1)
        spread.give()
        assert len(spread.served) == 2


def test_a_client_that_is_taken_as_the_time_ends_is_served_once(spread: Spread) -> None:
    spread.give()
    taken, leash = spread.member.take()
    with taken, leash:
        spread.spread._silent(spread.member.path, next(iter(spread.spread._offers)))
        assert not spread.served


def test_a_member_gets_no_more_clients_than_it_may_have(
    spread: Spread, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(spreading, "HANDED_MAX", 2)
    with ExitStack() as stack:
        other = Member(tmp_path / "other.sock")
        stack.callback(other.close)
        spread.spread.members = [spread.member.path, other.path]
        for _ in range(5):
            spread.give()
        assert len(spread.served) == 1
        for member in (spread.member, other):
            for _ in range(2):
                for sock in member.take():
                    stack.callback(sock.close)


def test_new_members_change_no_counts(spread: Spread) -> None:
    with ExitStack() as stack:
        for own in (1, 2):
            spread.give(own)
            for sock in spread.member.take():
                stack.callback(sock.close)
        spread.spread.members = [spread.member.path]
        spread.give(2)
        assert len(spread.served) == 1


def test_without_descriptors_a_client_is_served_here(spread: Spread) -> None:
    ours, theirs = socket.socketpair()
    spread.clients.append(ours)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    hoard = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (theirs.fileno() + 8, limits[1]))
    try:
        with suppress(OSError):
            while True:
                hoard.append(ours.dup())
        spread.spread.give(theirs, b"", 10)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for sock in hoard:
            sock.close()
    assert len(spread.served) == 1


def test_a_client_that_nobody_took_ends_with_the_disk(spread: Spread) -> None:
    client = spread.give()
    _, offered, leash = spread.member.offered()
    spread.spread.close()
    with pytest.raises(BrokenPipeError):
        leash.send(b"\1")
    leash.close()
    offered.close()
    assert client.recv(1) == b""
