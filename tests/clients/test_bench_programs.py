"""tools/bench: its generator, its floor and its counting library."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench import BENCH
from tests.running import RunningService

SIZE = 16 << 20
REQUEST_BYTES = 28


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compile one of our C programs, without any warning."""

    def compile_program(name: str) -> Path:
        path = tmp_path_factory.getbasetemp() / name
        flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["gcc", *flags, "-o", path, BENCH / f"{name}.c"], check=True)
        return path

    return compile_program


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Run a server until the end of the test; gives its socket."""
    started = []
    path = tmp_path / "server.sock"

    def start(*command: str) -> Path:
        started.append(subprocess.Popen([word.replace("SOCKET", str(path)) for word in command]))
        while True:
            try:
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(str(path))
                    return path
            except OSError:
                assert started[-1].poll() is None

    yield start
    for process in started:
        process.terminate()
        process.wait(10)


def load(
    program: Path, path: Path, *options: str, core: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the generator from its beginning to its end."""
    pinned = [] if core is None else ["taskset", "--cpu-list", str(core)]
    return subprocess.run(
        [*pinned, str(program), "--seconds=0.1", *options, str(path), "bench"],
        input="go\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    ready, result = done.stdout.splitlines()
    assert ready == "ready"
    measured: dict[str, Any] = json.loads(result)
    return measured


@pytest.mark.parametrize(("reads", "counter"), [(100, "reads"), (0, "writes")])
def test_a_request_costs_less_than_a_quarter_of_a_system_call_at_depth_32(
    program: Callable[[str], Path],
    service: Callable[..., RunningService],
    tmp_path: Path,
    reads: int,
    counter: str,
) -> None:
    core = min(os.sched_getaffinity(0))
    path = tmp_path / "disk.sock"
    disk = f"{{backend: malloc, size: 16MiB, listen: 'unix:{path}'}}"
    running = service(f"disks: {{bench: {disk}}}", cores=str(core))
    # On the worker's own core: how two cores happen to run beside each other counts for nothing.
    done = load(program("load"), path, "--depth=32", f"--reads={reads}", core=core)
    requests = told(done)["requests"]
    counts: dict[str, int] = {}

    def all_are_counted() -> bool:
        counts.update(running.rpc("reactor_get_disks", name="bench")[0]["statistics"])
        return counts.get(counter) == requests

    running.await_true(all_are_counted)
    assert (counts["receives"] + counts["sends"]) / requests < 0.25


def test_a_library_that_counts_too_little_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from counts import MemoryCounter  # noqa: PLC0415
    from servers import BenchError  # noqa: PLC0415

    source = (BENCH / "counting.c").read_text()
    broken = {
        "good": source,
        "no-copies": source.replace("COPY_BYTES_MIN = 512", "COPY_BYTES_MIN = 1 << 30"),
        "no-allocations": source.replace("count(ALLOCATIONS, 1)", "count(ALLOCATIONS, 0)"),
        "mute": "",
    }
    for name, text in broken.items():
        (tmp_path / f"{name}.c").write_text(text)
        library, folder = tmp_path / f"{name}.so", tmp_path / name
        folder.mkdir()
        flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-fno-builtin", "-shared", "-fPIC"]
        subprocess.run(["gcc", *flags, "-o", library, tmp_path / f"{name}.c"], check=True)
        counter = MemoryCounter(library, folder)
        if name == "good":
            counter.check()
        else:
            with pytest.raises(BenchError, match=r"saw|did not count"):
                counter.check()


def test_fio_keeps_the_depth(serve: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from loads import _fio  # noqa: PLC0415
    from points import Point  # noqa: PLC0415

    slow = ["--filter=delay", "memory", "16M", "rdelay=20ms"]
    path = serve("nbdkit", "-f", "-t", "64", "-U", "SOCKET", *slow)
    target = ["--ioengine=nbd", f"--uri=nbd+unix:///?socket={path}", "--size=16M"]
    job = _fio(min(os.sched_getaffinity(0)), target, Point(100, 4096, 32), 0.5)
    assert job["iodepth_level"]["32"] > 80  # percent of the time


@pytest.mark.parametrize("options", [[], ["--apart"], ["--bytes=1048576"]], ids=str)
def test_the_floor_keeps_what_is_written(
    program: Callable[[str], Path], serve: Callable[..., Path], options: list[str]
) -> None:
    path = serve(str(program("floor")), "SOCKET", str(SIZE))
    done = load(program("load"), path, "--verify", "--depth=8", "--reads=50", *options)
    assert told(done)["requests"] > 0


def test_apart_makes_a_system_call_for_each_header_and_payload(
    program: Callable[[str], Path], serve: Callable[..., Path]
) -> None:
    path = serve(str(program("floor")), "SOCKET", str(SIZE))
    for reads, sends, receives in ((100, 1, 2), (0, 2, 1)):
        measured = told(load(program("load"), path, "--apart", f"--reads={reads}"))
        assert measured["sends"] == sends * measured["requests"]
        assert measured["receives"] == receives * measured["requests"]


def test_what_is_due_goes_out_in_one_system_call(
    program: Callable[[str], Path], serve: Callable[..., Path]
) -> None:
    path = serve(str(program("floor")), "SOCKET", str(SIZE))
    measured = told(load(program("load"), path, "--depth=32"))
    assert measured["sends"] <= measured["receives"] + 1


def test_verify_finds_a_disk_that_forgets(
    program: Callable[[str], Path], serve: Callable[..., Path]
) -> None:
    path = serve("nbdkit", "-f", "-U", "SOCKET", "null", "16M")
    done = load(program("load"), path, "--verify")
    assert done.returncode == 1
    assert "did not return what was written" in done.stderr


def test_what_is_wrong_only_when_it_is_read_back_fails_the_verification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from loads import verify  # noqa: PLC0415
    from servers import BenchError, Place, Server  # noqa: PLC0415

    program = tmp_path / "load"
    program.write_text("#!/bin/sh\necho ready\nread run\necho '{}'\necho lost >&2\nexit 1\n")
    program.chmod(0o755)
    server = Server("fake", "memory", Place(tmp_path, tmp_path, SIZE, 0, None), os.getpid())
    with pytest.raises(BenchError, match="lost"):
        verify(program, min(os.sched_getaffinity(0)), server)


def test_a_failed_request_ends_the_generator(
    program: Callable[[str], Path], serve: Callable[..., Path]
) -> None:
    failing = ["--filter=error", "memory", "16M", "error=EIO", "error-rate=100%"]
    path = serve("nbdkit", "-f", "-U", "SOCKET", *failing)
    done = load(program("load"), path)
    assert done.returncode == 1
    assert "a request failed: Input/output error" in done.stderr


@pytest.mark.parametrize(
    ("magic", "cookie_change", "message"),
    [
        (0x67446698, 1, "cookie that is not in flight"),
        (0x67446698, 1 << 16, "cookie that is not in flight"),
        (0x67446699, 0, "wrong magic"),
    ],
)
def test_a_reply_that_answers_nothing_is_noticed(
    program: Callable[[str], Path], tmp_path: Path, magic: int, cookie_change: int, message: str
) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer_wrongly() -> None:
            client, _ = listener.accept()
            with client, client.makefile("rb") as received:
                client.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
                received.read(4 + 16 + len("bench"))
                client.sendall(struct.pack(">QH", SIZE, 1))
                cookie = struct.unpack(">IHHQQI", received.read(REQUEST_BYTES))[3]
                # The generator's cookies are in its own byte order.
                wrong = int.from_bytes(cookie.to_bytes(8, "big"), sys.byteorder) ^ cookie_change
                header = struct.pack(">II", magic, 0) + wrong.to_bytes(8, sys.byteorder)
                client.sendall(header + bytes(4096))

        server = threading.Thread(target=answer_wrongly)
        server.start()
        done = load(program("load"), path)
        server.join()
    assert done.returncode == 1
    assert message in done.stderr
