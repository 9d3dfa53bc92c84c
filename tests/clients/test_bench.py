"""tools/bench: that it measures what it says, and the counts that hold on any machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.running import RunningService

BENCH = Path(__file__).parents[2] / "tools/bench.d"
SIZE = 16 << 20
REQUEST_BYTES = 28


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
        env={**os.environ, **environment},
    )


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


# --- the counts that hold on any machine ---


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


# --- the whole command ---


def test_a_short_run_measures_every_server(tmp_path: Path) -> None:
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.svg"
    only = "^(memory|python)/batched/randread-4k-32$"
    size = ["--size", "16MiB", "--directory", str(tmp_path)]
    once = ["--repetitions", "2", "--seconds", "0.1", "--idle-seconds", "0.1"]
    done = bench("--only", only, *size, *once, "--json", str(numbers), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    results = json.loads(numbers.read_text())
    assert results["notes"] == []
    found = {(row["kind"], row["server"]) for row in results["rows"]}
    peers = {"nbdkit", "qemu-nbd", "nbd-server"}
    memory = {("memory", server) for server in {"nbd-reactor", "floor", *peers}}
    assert found == memory | {("python", "nbd-reactor"), ("python", "nbdkit")}
    for row in results["rows"]:
        assert all(len(values) == 2 for values in row["repetitions"].values()), row
        assert all(value > 0 for value in row["repetitions"]["iops"]), row
        median = row["median"]
        assert median["bytes_per_second"] == pytest.approx(median["iops"] * 4096)
        assert 0 < median["p50_us"] <= median["p99_us"] <= median["p99.9_us"]
        assert row["syscalls"] is None or row["syscalls"] > 0
    assert [ratio["case"] for ratio in results["ratios"]] == [
        "memory/batched/randread-4k-32",
        "python/batched/randread-4k-32",
    ]
    assert set(results["idle_cpu"]) == {"nbd-reactor", "nbd-reactor, 64 disks", "floor", *peers}
    labels = {element.text for element in ElementTree.parse(picture).iter()}
    assert {"nbd-reactor", "floor", *peers} <= labels
    assert "| memory/batched/randread-4k-32 |" in done.stdout
    assert [path for path in tmp_path.iterdir() if path not in (numbers, picture)] == []


def test_what_is_not_installed_is_named_and_left_out(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("taskset", "nice"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    done = bench("--only", "^memory/.*/randread-4k-32$", "--idle-seconds", "0", PATH=str(tools))
    assert "no C compiler" in done.stderr
    assert "fio: not installed" in done.stderr
    assert done.returncode == 0
    assert "| memory" not in done.stdout


@pytest.mark.parametrize("name", ["nbdkit", "qemu-nbd", "nbd-server"])
def test_a_server_that_is_not_installed_is_left_out(tmp_path: Path, name: str) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for other in ("taskset", "nice", "gcc", "as", "ld", "nbdkit", "qemu-nbd", "nbd-server"):
        found = shutil.which(other)
        assert found
        if other != name:
            (tools / other).symlink_to(found)
    numbers = tmp_path / "numbers.json"
    once = ["--repetitions", "1", "--seconds", "0.01", "--idle-seconds", "0", "--size", "16MiB"]
    only = "^memory/batched/randread-4k-32$"
    done = bench("--only", only, *once, "--json", str(numbers), PATH=str(tools))
    assert done.returncode == 0, done.stderr
    assert f"left out: {name}: not installed" in done.stderr
    servers = {row["server"] for row in json.loads(numbers.read_text())["rows"]}
    assert servers == {"nbd-reactor", "floor", "nbdkit", "qemu-nbd", "nbd-server"} - {name}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "("], "--only"),
        (["--only", "unheard-of"], "leaves nothing"),
        (["--repetitions", "0"], "not a positive number"),
        (["--seconds", "0"], "no time"),
        (["--seconds", "fast"], "not a number of seconds"),
        (["--size", "1KiB"], "from 16MiB on"),
        (["--cores", "0"], "not two of the cores"),
        (["--plot", "/nowhere/plot.svg"], "no such directory"),
    ],
)
def test_wrong_usage_ends_with_status_2(arguments: list[str], message: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_list_names_the_cases_of_a_quick_run() -> None:
    everything = bench("--list").stdout.splitlines()
    quick = bench("--list", "--quick").stdout.splitlines()
    assert set(quick) < set(everything)
    assert len(everything) == len(set(everything))
    assert {name.split("/")[0] for name in quick} == {"memory", "file", "direct", "python"}


# --- the generator and the floor ---


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
