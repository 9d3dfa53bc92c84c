"""The metrics over real HTTP, and clients of it that behave badly."""

from __future__ import annotations

import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from reactor.control import exporter as module
from reactor.control.exporter import CLIENTS_MAX, HEAD_MAX, Exporter
from reactor.errors import ReactorError
from reactor.loop import Reactor
from reactor.metrics import Family, render
from reactor.spec import DiskSpec
from tests.unit.memory_service import MemoryService

SAMPLE = re.compile(
    r'nbd_reactor_[a-z_]+(\{[a-z]+="(\\.|[^"\\])*"(,[a-z]+="(\\.|[^"\\])*")*\})? [-+.0-9e]+'
)


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    reactor = Reactor("interrupt")
    service = MemoryService(reactor)
    service.create(DiskSpec("ram0", "malloc", {"size": 1 << 20}), lambda _: None)
    exporter = Exporter(reactor, ("127.0.0.1", 0), service)
    thread = threading.Thread(target=reactor.run)
    thread.start()
    yield exporter.address
    reactor.call_from_thread(reactor.stop)
    thread.join()
    exporter.close()
    reactor.close()


def get(address: tuple[str, int], path: str = "/metrics", method: str = "GET") -> str:
    request = urllib.request.Request(f"http://{address[0]}:{address[1]}{path}", method=method)
    with urllib.request.urlopen(request, timeout=20) as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return str(response.read().decode())


def raw(address: tuple[str, int], request: bytes) -> bytes:
    with socket.create_connection(address, 20) as sock:
        sock.sendall(request)
        response = b""
        while part := sock.recv(65536):
            response += part
        return response


def test_the_page_holds_the_counters_of_disks_and_workers(address: tuple[str, int]) -> None:
    page = get(address)
    for line in (
        'nbd_reactor_disk_reads_total{disk="ram0"} 3',
        'nbd_reactor_disk_read_bytes_total{disk="ram0"} 12288',
        'nbd_reactor_disk_connections{disk="ram0"} 1',
        'nbd_reactor_disk_core{disk="ram0",core="0"} 1',
        'nbd_reactor_disk_state{disk="ram0",state="online"} 1',
        'nbd_reactor_disk_state{disk="ram0",state="failed"} 0',
        'nbd_reactor_disk_size_bytes{disk="ram0"} 1048576',
        'nbd_reactor_worker_busy_seconds_total{core="0"} 0.25',
        'nbd_reactor_worker_restarts_total{core="0"} 1',
    ):
        assert f"\n{line}\n" in page


def test_the_page_is_in_prometheus_format(address: tuple[str, int]) -> None:
    described = set()
    for line in get(address).splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.split()[2:]
            assert name not in described
            assert (kind == "counter") == name.endswith("_total")
            described.add(name)
        elif not line.startswith("# HELP "):
            assert SAMPLE.fullmatch(line), line
            assert re.split(r"[{ ]", line)[0] in described


def test_labels_are_escaped() -> None:
    family = Family("n", "gauge", "Help.")
    family.add(1, disk='a"b\\c\nd')
    assert render([family]).splitlines()[-1] == r'n{disk="a\"b\\c\nd"} 1'


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/", "GET", 404), ("/metrics/x", "GET", 404), ("/metrics", "POST", 405)],
)
def test_other_requests_are_refused(
    address: tuple[str, int], path: str, method: str, status: int
) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(address, path, method)
    with refused.value:
        assert refused.value.code == status


def test_a_query_is_ignored_and_head_has_no_body(address: tuple[str, int]) -> None:
    assert "nbd_reactor_info" in get(address, "/metrics?x=1")
    assert get(address, method="HEAD") == ""


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"garbage\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x00\xff\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * HEAD_MAX, b"431"),
    ],
)
def test_garbage_is_answered(address: tuple[str, int], request_: bytes, status: bytes) -> None:
    assert raw(address, request_).split()[1] == status


def test_a_request_may_come_byte_by_byte(address: tuple[str, int]) -> None:
    with socket.create_connection(address, 20) as sock:
        for byte in b"GET /metrics HTTP/1.0\r\n\r\n":
            sock.sendall(bytes([byte]))
        assert sock.recv(12) == b"HTTP/1.0 200"


def test_a_client_that_says_nothing_is_closed(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLIENT_SECONDS", 0.05)
    with socket.create_connection(address, 20) as sock:
        sock.sendall(b"GET /")
        assert sock.recv(1) == b""


def test_clients_beyond_the_bound_wait_for_their_turn(address: tuple[str, int]) -> None:
    idle = [socket.create_connection(address, 20) for _ in range(CLIENTS_MAX)]
    with socket.create_connection(address, 20) as late:
        late.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        idle.pop().close()
        assert late.recv(12) == b"HTTP/1.0 200"
    for sock in idle:
        sock.close()


def test_an_address_in_use_is_a_clear_error(address: tuple[str, int]) -> None:
    reactor = Reactor()
    with pytest.raises(ReactorError, match=f"metrics address 127.0.0.1:{address[1]}: Address"):
        Exporter(reactor, address, MemoryService(reactor))
    with pytest.raises(ReactorError, match=r"metrics address no\.such\.host\.invalid:1: "):
        Exporter(reactor, ("no.such.host.invalid", 1), MemoryService(reactor))
    reactor.close()
