"""The RPC server over real sockets: framing, order, limits, and clients that behave badly."""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from reactor.control import rpc
from reactor.control.call import Method, Reply
from reactor.control.jsonrpc import MESSAGE_MAX, NESTING_MAX
from reactor.errors import ReactorError
from tests.unit.rpc_running import RunningRpc, encode

PARSE_ERROR = {"jsonrpc": "2.0", "id": None, "error": {"code": -32700, "message": "Parse error"}}
INVALID = {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "Invalid request"}}

waiting: list[Reply] = []


def _wait(_params: dict[str, Any], reply: Reply) -> None:
    waiting.append(reply)


def _fail(_params: dict[str, Any], _reply: Reply) -> None:
    raise KeyError("a bug")


def _big(_params: dict[str, Any], reply: Reply) -> None:
    reply.result("x" * (300 << 10))


def _huge(_params: dict[str, Any], reply: Reply) -> None:
    reply.result("x" * (33 << 20))


def _not_json(_params: dict[str, Any], reply: Reply) -> None:
    reply.result({1, 2})


def _euro(_params: dict[str, Any], reply: Reply) -> None:
    reply.result("€")


METHODS = {
    "wait": Method(_wait, deadline=None),
    "wait_shortly": Method(_wait, deadline=0.05),
    "wait_first": Method(_wait, deadline=None, barrier=True),
    "fail": Method(_fail),
    "big": Method(_big),
    "huge": Method(_huge),
    "not_json": Method(_not_json),
    "euro": Method(_euro),
}


@pytest.fixture
def running(tmp_path: Path) -> Iterator[RunningRpc]:
    waiting.clear()
    with RunningRpc(tmp_path / "rpc.sock", METHODS) as started:
        yield started


def until(running: RunningRpc, count: int) -> list[Reply]:
    """Return the replies that wait, once there are `count`."""
    deadline = time.monotonic() + 20
    while running.in_loop(lambda: len(waiting)) < count:
        assert time.monotonic() < deadline, f"only {len(waiting)} calls came"
    return list(waiting)


# --- framing ---


def test_a_reply_is_one_compact_line_with_its_keys_in_spdks_order(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(b'{"method":"nbd_get_disks","id":7}')
        assert client.line() == b'{"jsonrpc":"2.0","id":7,"result":[]}\n'
        client.send(b'{"method":"no such","id":"x"}')
        assert client.line() == (
            b'{"jsonrpc":"2.0","id":"x","error":{"code":-32601,"message":"Method not found"}}\n'
        )


def test_a_request_is_understood_byte_by_byte(running: RunningRpc) -> None:
    with running.client() as client:
        for byte in b' {"method" : "nbd_get_disks", "id": "a\\"}{\\\\" }':
            client.send(bytes([byte]))
        assert client.reply() == {"jsonrpc": "2.0", "id": 'a"}{\\', "result": []}


def test_pipelined_requests_are_all_answered(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(b"".join(encode("nbd_get_disks", call_id=n) for n in range(500)))
        assert [client.reply()["id"] for _ in range(500)] == list(range(500))


def test_replies_are_ascii(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(encode("euro"))
        assert client.line() == b'{"jsonrpc":"2.0","id":1,"result":"\\u20ac"}\n'


@pytest.mark.parametrize(
    "text",
    [
        b'{"a" "b"}',
        b"{]",
        b"}",
        b"garbage",
        b"GET / HTTP/1.1\r\n",
        b"\xff\xfe",
        b'{"method":"\xff"}',
        b'{"method":NaN}',
        b'{"id":1e999}',
        b'{"id":' + b"9" * 5000 + b"}",
        b"[" * (NESTING_MAX + 1),
    ],
)
def test_what_is_not_json_is_answered_and_the_connection_closed(
    running: RunningRpc, text: bytes
) -> None:
    with running.client() as client:
        client.send(text)
        assert client.reply() == PARSE_ERROR
        assert client.line() == b""
    assert running.call("nbd_get_disks")["result"] == []


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"1 ",
        b'"nbd_get_disks"',
        b"null\n",
        b"{}",
        b'{"method":1,"id":1}',
        b'{"method":"nbd_get_disks","id":1,"more":2}',
        b'{"method":"nbd_get_disks","id":[1]}',
        b'{"method":"nbd_get_disks","id":true}',
        b'{"method":"nbd_get_disks","params":"x"}',
        b'{"method":"nbd_get_disks","id":1,"id":2}',
        b'{"jsonrpc":"1.0","method":"nbd_get_disks","id":1}',
        b'{"jsonrpc":null,"method":"nbd_get_disks","id":1}',
    ],
)
def test_what_is_no_request_is_answered_and_the_connection_lives(
    running: RunningRpc, text: bytes
) -> None:
    with running.client() as client:
        client.send(text)
        assert client.reply() == INVALID
        assert client.call("nbd_get_disks")["result"] == []


def test_a_nesting_that_is_allowed_is_no_parse_error(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(b"[" * NESTING_MAX + b"]" * NESTING_MAX)
        assert client.reply() == [INVALID]


def test_an_endless_message_is_refused(running: RunningRpc) -> None:
    with running.client() as client:
        with pytest.raises(BrokenPipeError):
            client.send(b'{"method":"' + b"x" * (16 * MESSAGE_MAX))
        assert client.reply()["error"]["message"] == f"Message of more than {MESSAGE_MAX} bytes"


def test_the_largest_message_is_taken(running: RunningRpc) -> None:
    request = encode("nbd_get_disks", call_id="")
    padded = request.replace(b'"id": ""', b'"id": "' + b"x" * (MESSAGE_MAX - len(request)) + b'"')
    assert len(padded) == MESSAGE_MAX
    with running.client() as client:
        client.send(padded)
        assert client.reply()["result"] == []


# --- notifications and batches ---


@pytest.mark.parametrize("call_id", [b"", b',"id":null'])
def test_a_notification_is_answered_only_when_it_fails(running: RunningRpc, call_id: bytes) -> None:
    with running.client() as client:
        client.send(b'{"method":"nbd_get_disks"' + call_id + b"}")
        client.send(b'{"method":"nope"' + call_id + b"}")
        assert client.reply()["error"]["code"] == -32601
        assert client.call("nbd_get_disks")["id"] == 1


def test_a_batch_is_answered_by_one_array_in_order_of_completion(running: RunningRpc) -> None:
    batch = [encode("wait", call_id=1), encode("nbd_get_disks", call_id=2), b"5"]
    with running.client() as client:
        client.send(b"[" + b",".join(batch) + b"]")
        [reply] = until(running, 1)
        running.in_loop(lambda: reply.result("late"))
        assert client.reply() == [
            {"jsonrpc": "2.0", "id": 2, "result": []},
            INVALID,
            {"jsonrpc": "2.0", "id": 1, "result": "late"},
        ]


def test_a_batch_of_notifications_is_not_answered(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(b'[{"method":"nbd_get_disks"},{"method":"nbd_get_disks"}]')
        assert client.call("nbd_get_disks")["id"] == 1


# --- answers that come later ---


def test_later_answers_may_come_in_any_order(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(encode("wait", call_id=1) + encode("wait", call_id=2))
        first, second = until(running, 2)
        running.in_loop(lambda: second.result(True))
        assert client.reply()["id"] == 2
        running.in_loop(lambda: first.result(True))
        assert client.reply()["id"] == 1


def test_nothing_behind_a_barrier_starts_before_it_is_answered(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(encode("wait_first", call_id=1) + encode("nbd_get_disks", call_id=2))
        [reply] = until(running, 1)
        assert running.call("nbd_get_disks")["result"] == [], "another client waits too"
        running.in_loop(lambda: reply.result(True))
        assert [client.reply()["id"], client.reply()["id"]] == [1, 2]


def test_a_call_is_answered_once(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(encode("wait"))
        [reply] = until(running, 1)
        running.in_loop(lambda: (reply.result(1), reply.result(2), reply.fail(OSError(5, "x"))))
        assert client.reply()["result"] == 1
        assert client.call("nbd_get_disks")["result"] == []


def test_a_call_that_takes_too_long_is_answered_and_its_late_answer_dropped(
    running: RunningRpc,
) -> None:
    with running.client() as client:
        assert client.call("wait_shortly")["error"]["code"] == -110
        running.in_loop(lambda: waiting[0].result(True))
        assert client.call("nbd_get_disks")["result"] == []


def test_a_half_closed_client_gets_its_late_answer(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(encode("wait"))
        client.sock.shutdown(socket.SHUT_WR)
        [reply] = until(running, 1)
        running.in_loop(lambda: reply.result("late"))
        assert client.reply()["result"] == "late"
        assert client.line() == b""


def test_answers_to_a_client_that_left_are_dropped(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(encode("wait"))
        [reply] = until(running, 1)
    while running.in_loop(lambda: reply.waiting):
        pass
    running.in_loop(lambda: reply.result(True))
    assert running.call("nbd_get_disks")["result"] == []


def test_a_client_that_leaves_without_reading_is_survived(running: RunningRpc) -> None:
    for _ in range(20):
        with running.client() as client:
            client.send(encode("big") * 50)
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert running.call("nbd_get_disks")["result"] == []


def test_closing_the_server_sends_what_is_answered(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(encode("wait"))
        [reply] = until(running, 1)
        running.in_loop(lambda: (reply.result("bye"), running.close_server()))
        assert client.reply()["result"] == "bye"
        assert client.line() == b""


# --- failures ---


def test_a_bug_in_a_method_is_logged_and_answered(
    running: RunningRpc, caplog: pytest.LogCaptureFixture
) -> None:
    for method in ("fail", "not_json"):
        assert running.call(method)["error"] == {"code": -32603, "message": "Internal error"}
    assert "KeyError: 'a bug'" in caplog.text
    assert "not JSON serializable" in caplog.text


def test_a_result_that_is_too_large_is_an_error(running: RunningRpc) -> None:
    assert running.call("huge")["error"]["code"] == -32603


# --- bounds ---


def test_a_client_that_does_not_read_is_not_served_on(running: RunningRpc) -> None:
    before = psutil.Process().memory_info().rss
    with running.client() as client:
        client.send(encode("big") * 2000)  # 600 MB of answers
        assert running.call("nbd_get_disks")["result"] == []
        assert psutil.Process().memory_info().rss - before < 200 << 20
        assert len(client.line()) > 300 << 10


def test_calls_of_a_client_beyond_the_bound_wait(running: RunningRpc) -> None:
    count = rpc.WAITING_MAX + 10
    with running.client() as client:
        client.send(b"".join(encode("wait", call_id=n) for n in range(count)))
        first = until(running, rpc.WAITING_MAX)
        assert len(first) == rpc.WAITING_MAX
        running.in_loop(lambda: [reply.result(True) for reply in first])
        rest = until(running, count)[len(first) :]
        running.in_loop(lambda: [reply.result(True) for reply in rest])
        assert [client.reply()["id"] for _ in range(count)] == list(range(count))


def test_a_connection_too_many_is_told_so_and_closed(running: RunningRpc) -> None:
    clients = [running.client() for _ in range(rpc.CONNECTIONS_MAX)]
    for client in clients:
        assert client.call("nbd_get_disks")["result"] == []
    with running.client() as late:
        assert late.reply()["error"]["message"] == "64 connections are open already"
        assert late.line() == b""
    clients.pop().__exit__(None, None, None)
    while "error" in running.call("nbd_get_disks"):
        pass
    for client in clients:
        client.__exit__(None, None, None)


def test_calls_that_take_long_are_spread_over_turns(tmp_path: Path) -> None:
    turns: list[int] = []

    def slow(_params: dict[str, Any], reply: Reply) -> None:
        turns.append(running.reactor.turns)
        time.sleep(rpc.CALLS_NS / 1e9)
        reply.result(True)

    with (
        RunningRpc(tmp_path / "rpc.sock", {"slow": Method(slow)}) as running,
        running.client() as client,
    ):
        client.send(encode("slow") * 3)
        for _ in range(3):
            assert client.reply()["result"] is True
    assert len(set(turns)) > 1


def test_idle_connections_cost_no_turns(running: RunningRpc) -> None:
    clients = [running.client() for _ in range(20)]
    for client in clients:
        client.call("nbd_get_disks")
    assert running.turns_while_idle() < 10
    for client in clients:
        client.__exit__(None, None, None)


def test_half_closed_and_paused_connections_cost_no_turns(running: RunningRpc) -> None:
    with running.client() as half, running.client() as paused, running.client() as full:
        half.send(encode("wait"))
        half.sock.shutdown(socket.SHUT_WR)
        paused.send(encode("wait_first") + encode("nbd_get_disks") * 9)
        full.send(encode("big") * 30)
        until(running, 2)
        assert running.turns_while_idle() < 10


# --- the socket ---


def test_the_socket_is_for_its_owner_only(running: RunningRpc) -> None:
    assert stat.S_IMODE(running.path.stat().st_mode) == 0o600


def test_a_second_server_on_the_path_is_refused(running: RunningRpc) -> None:
    with pytest.raises(ReactorError, match=f"{running.path}: another service serves it"):
        RunningRpc(running.path)
    assert running.call("nbd_get_disks")["result"] == []


def test_the_socket_of_a_dead_service_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "rpc.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with RunningRpc(path) as running:
        assert running.call("nbd_get_disks")["result"] == []
    assert list(tmp_path.iterdir()) == []


def test_another_programs_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rpc.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ReactorError, match="another program serves it"):
            RunningRpc(path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["rpc.sock"]


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rpc.sock"
    path.write_text("mine")
    with pytest.raises(ReactorError, match="not a socket"):
        RunningRpc(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["missing/rpc.sock", "x" * 120])
def test_a_path_that_cannot_be_is_a_clear_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ReactorError, match=name[:7]):
        RunningRpc(tmp_path / name)


def test_descriptors_running_out_is_survived(running: RunningRpc) -> None:
    with running.client() as client:
        held: list[int] = []
        try:
            while True:
                held.append(os.dup(0))
        except OSError:
            os.close(held.pop())
        waiting_client = running.client()  # takes the last one; the server has none to accept it
        assert client.call("nbd_get_disks")["result"] == []
        for fd in held:
            os.close(fd)
        with waiting_client:
            assert waiting_client.call("nbd_get_disks")["result"] == []


def test_json_of_all_kinds_comes_back_as_the_id(running: RunningRpc) -> None:
    with running.client() as client:
        for call_id in ("", "ü€😀", 0, -1, 1 << 70, 1.5):
            client.send(encode("nbd_get_disks", call_id=call_id))
            assert client.reply()["id"] == json.loads(json.dumps(call_id))
