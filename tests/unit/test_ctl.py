"""nbd-reactorctl against an RPC server: what it prints, and how it fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reactor import ctl
from reactor.tables import show_status, table
from tests.unit.rpc_running import RunningRpc

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rpc.sock"


@pytest.fixture
def running(path: Path) -> Iterator[RunningRpc]:
    with RunningRpc(path) as started:
        yield started


@pytest.fixture
def run(path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = ctl.main(["--socket", str(path), *arguments])
        except SystemExit as exit_:
            status = int(str(exit_.code))
        captured = capsysbinary.readouterr()
        return status, captured.out.decode(), captured.err.decode()

    return run


def test_a_disk_is_made_shown_and_listed(running: RunningRpc, run: Run) -> None:
    status, out, _ = run("start", "d", "backend=malloc", "size=2MiB", "readonly=true")
    assert (status, out) == (0, "d: online, 2MiB\n")
    status, out, _ = run("show", "d")
    assert out.startswith("disks:\n  d:\n    backend: malloc\n    size: 2MiB\n")
    assert "\nstate:       online\n" in out
    assert "worker:      core 0, pid 4242" in out
    header, line = run("list")[1].splitlines()
    assert header.index("SIZE") == line.index("2MiB")
    assert "REASON" not in header
    assert run("resize", "d", "4MiB")[1] == "d: online, 4MiB\n"
    assert run("stop", "d")[1] == "d: stopped\n"
    assert run("start", "d")[1] == "d: online, 4MiB\n"
    assert run("remove", "d")[1] == "d: removed\n"
    assert run("list")[1] == "no disks\n"


def test_the_status_shows_workers_and_what_is_down(running: RunningRpc, run: Run) -> None:
    run("start", "d", "backend=null", "size=2MiB")
    run("stop", "d")
    status, out, _ = run("status")
    assert status == 0
    first, *_ = out.splitlines()
    assert f"pid {os.getpid()}, up 0s; disks: 1 stopped" in first
    assert ["0", "4242", "running", "1", "25.0%", "d"] in [
        line.split() for line in out.splitlines()
    ]
    assert ["d", "stopped", "-"] in [line.split() for line in out.splitlines()]


def test_json_is_for_machines_wherever_the_option_stands(running: RunningRpc, run: Run) -> None:
    run("start", "d", "backend=null", "size=2MiB")
    assert json.loads(run("--json", "list")[1])[0]["size"] == 2 << 20
    assert json.loads(run("list", "--json")[1])[0]["size"] == 2 << 20
    assert json.loads(run("show", "d", "--json")[1])["name"] == "d"
    status = json.loads(run("status", "--json")[1])
    assert status["workers"][0]["core"] == 0
    assert status["disks"][0]["name"] == "d"
    assert json.loads(run("reload", "--json")[1]) is True


def test_any_method_can_be_called(running: RunningRpc, run: Run) -> None:
    params = '{"name": "n", "num_blocks": 8, "block_size": 512}'
    assert run("rpc", "bdev_null_create", params)[1] == '"n"\n'
    assert json.loads(run("rpc", "bdev_get_bdevs")[1])[0]["name"] == "n"


def test_a_relative_path_starts_where_the_person_is(
    running: RunningRpc, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ctl._key("path=x.img") == ("path", f"{tmp_path}/x.img")
    assert ctl._key("path=/x.img") == ("path", "/x.img")
    assert ctl._key("listen=[1, 2]") == ("listen", [1, 2])


@pytest.mark.parametrize("verb", ["show", "stop", "remove", "start"])
def test_the_services_error_is_one_line_and_status_1(
    running: RunningRpc, run: Run, verb: str
) -> None:
    status, out, err = run(verb, "nope")
    assert (status, out) == (1, "")
    assert err.startswith("nbd-reactorctl: reactor_")
    assert err.endswith(": there is no disk nope\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["show"],
        ["resize", "d", "0"],
        ["resize", "d", "huge"],
        ["start", "d", "size"],
        ["start", "d", "=1"],
        ["rpc", "m", "{"],
        ["--timeout", "0", "list"],
        ["--timeout", "nan", "list"],
    ],
)
def test_wrong_usage_is_status_2(run: Run, arguments: list[str]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "nbd-reactorctl" in err


def test_no_service_is_told_in_one_line(run: Run, path: Path) -> None:
    status, _, err = run("list")
    assert status == 1
    assert err == (
        f"nbd-reactorctl: no service at {path}; is nbd-reactor running? (--socket names another)\n"
    )
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert "no service at" in run("list")[2]
    path.unlink()
    path.mkdir()
    assert run("list")[0] == 1


def test_a_service_that_does_not_answer_is_given_up(run: Run, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        status, _, err = run("list", "--timeout", "0.1")
    assert (status, err) == (1, "nbd-reactorctl: the service did not answer within 0.1 s\n")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"", "the service closed the connection without an answer"),
        (b"HTTP/1.0 400\n", "what answered is no JSON-RPC service"),
        (b"{}\n", "what answered is no JSON-RPC service"),
        (b'{"error":null}\n', "what answered is no JSON-RPC service"),
        (b"[]\n", "what answered is no JSON-RPC service"),
    ],
)
def test_what_is_no_service_is_told(run: Run, path: Path, answer: bytes, text: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            with server.accept()[0] as client:
                client.recv(65536)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        status, _, err = run("list")
        thread.join()
    assert status == 1
    assert text in err


def test_a_reader_that_stops_reading_is_no_traceback(running: RunningRpc, path: Path) -> None:
    command = [sys.executable, "-m", "reactor.ctl", "--socket", str(path), "rpc", "rpc_get_methods"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(writer)
    assert done.stderr == b""


def test_nothing_but_the_standard_library_is_imported() -> None:
    code = "import sys, reactor.ctl; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"zmq", "yaml", "msgpack", "psutil"} & set(done.stdout.split())


def test_what_a_terminal_would_obey_is_not_printed() -> None:
    assert table(["NAME"], [["a\x1b[31m\n"]]) == "NAME\na?[31m?"


def test_a_service_without_disks_has_a_status() -> None:
    status = {"version": "1", "pid": 1, "uptime": 90061.0, "disks": {}}
    worker = {"core": 0, "pid": None, "state": "waiting", "restarts": 0, "disks": []}
    text = show_status(status, [{**worker, "statistics": {}}], [])
    assert "up 1d 1h; disks: none" in text
    assert ["0", "-", "waiting", "0", "-", "-"] in [line.split() for line in text.splitlines()]
