"""tools/bench: the whole command."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest

from tests.bench import BENCH, ROOT, bench, path_with
from tests.descriptors import open_files

RECORD = BENCH / "record.json"
GOALS = 36


def test_a_short_run_measures_every_server(tmp_path: Path) -> None:
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.svg"
    only = "^(counts|memory|python)/batched/randread-4k-32$"
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
        assert median["bytes_per_second"] == pytest.approx(median["iops"] * 4096, rel=1e-4)
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
    goals = {goal["goal"]: goal for goal in results["goals"]}
    assert len(goals) == GOALS
    to_floor = goals["memory, 4 KiB random reads, depth 32: IOPS to those of the floor"]
    assert to_floor["found"] == results["ratios"][0]["to_floor"]["median"]
    assert to_floor["met"] == (to_floor["found"] >= 0.6)
    measured = {name for name, goal in goals.items() if goal["met"] is not None}
    assert {name.split(":")[0] for name in measured} == {
        "memory, 4 KiB random reads, depth 32",
        "python, 4 KiB random reads, depth 32",
        "nbd-reactor, 64 disks",
        "memory of a worker without its disks, MiB",
    }
    assert all(f"{name} " in done.stdout for name in goals)


def test_what_is_not_installed_is_named_and_left_out(tmp_path: Path) -> None:
    path = path_with(tmp_path)
    done = bench("--only", "^memory/.*/randread-4k-32$", "--idle-seconds", "0", PATH=path)
    assert "no C compiler" in done.stderr
    assert "fio: not installed" in done.stderr
    assert "not measured: memory/batched/randread-4k-32" in done.stderr
    assert done.returncode == 1
    assert "| memory" not in done.stdout


@pytest.mark.parametrize("name", ["nbdkit", "qemu-nbd", "nbd-server"])
def test_a_server_that_is_not_installed_is_left_out(tmp_path: Path, name: str) -> None:
    path = path_with(tmp_path, "gcc", "as", "ld", *{"nbdkit", "qemu-nbd", "nbd-server"} - {name})
    numbers = tmp_path / "numbers.json"
    once = ["--repetitions", "1", "--seconds", "0.01", "--idle-seconds", "0", "--size", "16MiB"]
    only = "^memory/batched/randread-4k-32$"
    done = bench("--only", only, *once, "--json", str(numbers), PATH=path)
    assert done.returncode == 0, done.stderr
    assert f"left out: {name}: not installed" in done.stderr
    servers = {row["server"] for row in json.loads(numbers.read_text())["rows"]}
    assert servers == {"nbd-reactor", "floor", "nbdkit", "qemu-nbd", "nbd-server"} - {name}


@contextlib.contextmanager
def begun(numbers: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of several points that is at its second one."""
    only = ["--only", "^memory/batched/rand(read|write)-4k-(1|32)$", "--size", "16MiB"]
    times = ["--seconds", "0.2", "--repetitions", "2", "--idle-seconds", "0.1"]
    with subprocess.Popen(
        [sys.executable, str(BENCH), *only, *times, "--json", str(numbers)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr
        for line in running.stderr:
            if line.startswith("[2/4"):
                break
        yield running


def test_a_server_that_dies_on_the_way_is_left_out_from_there_on(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    with begun(numbers) as running:
        assert running.stderr
        (nbdkit,) = [
            child
            for child in psutil.Process(running.pid).children(recursive=True)
            if child.name() == "nbdkit"
        ]
        nbdkit.kill()
        said = running.stderr.read()
    assert running.returncode == 0, said
    assert "left out from here on" in said
    results = json.loads(numbers.read_text())
    last = [row for row in results["rows"] if row["name"] == "memory/batched/randwrite-4k-32"]
    assert {row["server"] for row in last} == {"nbd-reactor", "floor", "qemu-nbd", "nbd-server"}
    assert "nbdkit" not in results["idle_cpu"]
    assert "nbd-reactor, 64 disks" in results["idle_cpu"]


def test_a_run_without_ours_fails(tmp_path: Path) -> None:
    stop = "import sys\nif sys.orig_argv[1:3] == ['-m', 'reactor']: sys.exit(3)\n"
    (tmp_path / "sitecustomize.py").write_text(stop)
    once = ["--repetitions", "1", "--seconds", "0.01", "--idle-seconds", "0", "--size", "16MiB"]
    only = "^memory/batched/randread-4k-32$"
    done = bench("--only", only, *once, PYTHONPATH=str(tmp_path))
    assert "not measured: memory/batched/randread-4k-32: nbd-reactor" in done.stderr
    assert done.returncode == 1


def test_ours_without_its_controller_is_left_out_and_its_worker_ended(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    with begun(numbers) as running:
        assert running.stderr
        started = psutil.Process(running.pid).children(recursive=True)
        (controller,) = [each for each in started if "controller" in "".join(each.cmdline())]
        (worker,) = controller.children()
        (memory,) = {
            path for path in open_files(worker.pid) if path.startswith("/dev/shm/nbd-reactor-")
        }
        controller.kill()
        said = running.stderr.read()
    assert "nbd-reactor: it has died; left out from here on" in said
    assert "not measured: " in said
    assert running.returncode == 1
    assert "memory/nbd-reactor" not in json.loads(numbers.read_text())["memory_bytes"]
    assert not worker.is_running()
    assert not Path(memory).exists()


@pytest.mark.parametrize("status", [0, 1])
def test_a_server_that_does_not_start_is_left_out(tmp_path: Path, status: int) -> None:
    path = path_with(tmp_path, "gcc", "as", "ld")
    nbdkit = tmp_path / "bin/nbdkit"
    nbdkit.write_text(f"#!/bin/sh\nexit {status}\n")
    nbdkit.chmod(0o755)
    once = ["--repetitions", "1", "--seconds", "0.01", "--idle-seconds", "0", "--size", "16MiB"]
    done = bench("--only", "^memory/batched/randread-4k-32$", *once, PATH=path)
    assert done.returncode == 0, done.stderr
    assert f"left out: memory: nbdkit: exit status {status}" in done.stderr
    assert "| memory/batched/randread-4k-32 |" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_fails(number: signal.Signals) -> None:
    only = ["--only", "^memory/batched/randread-4k-32$", "--size", "16MiB", "--seconds", "60"]
    with subprocess.Popen(
        [sys.executable, str(BENCH), *only],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr
        for line in running.stderr:
            if line.startswith("[1/1"):
                break
        running.send_signal(number)
        said = running.stderr.read()
    assert running.returncode == 128 + number, said
    assert "interrupted" in said
    assert "Traceback" not in said


def test_an_interrupt_while_it_is_loaded_is_no_traceback(tmp_path: Path) -> None:
    interrupt = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "psutil.py").write_text(interrupt)  # one of its imports
    done = bench("--list", PYTHONPATH=str(tmp_path))
    assert done.returncode == 130
    assert done.stderr == ""


def test_what_is_to_be_counted_but_cannot_be_fails_the_run(tmp_path: Path) -> None:
    done = bench("--only", "^counts/batched/randread-4k-1$", PATH=path_with(tmp_path))
    assert done.returncode == 1
    assert "not measured: counts/batched/randread-4k-1" in done.stderr


# --- what it counts ---


def counts_of(path: Path) -> dict[str, dict[str, float]]:
    counts = json.loads(path.read_text())["counts"]
    return {name.removeprefix("counts/batched/"): found for name, found in counts.items()}


def test_what_a_request_costs_is_counted_and_within_its_bounds(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    done = bench("--quick", "--only", "^counts/", "--json", str(numbers))
    assert done.returncode == 0, done.stderr
    counts = counts_of(numbers)
    sizes = [("read", "4k"), ("write", "4k"), ("write", "128k"), ("write", "1m")]
    assert counts.keys() == {f"rand{verb}-{size}-{d}" for verb, size in sizes for d in (1, 32)}
    for name, found in counts.items():
        # Three calls when nothing can be batched: wait, receive, send.
        assert "syscalls" in found or os.geteuid(), name
        assert name != "randread-4k-1" or found.get("syscalls", 3) == pytest.approx(3, abs=0.1)
        assert found["allocations"] > 5, name
        # What comes in a batch is copied once, from where it was received.
        assert "4k" not in name or found["copies"] == pytest.approx(float("write" in name)), name
    batched = counts["randwrite-4k-32"]
    assert batched.get("syscalls", 0) <= 0.1
    assert batched["allocations"] < counts["randwrite-4k-1"]["allocations"] / 2


def test_strace_counts_the_same_system_calls(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    path = path_with(tmp_path, "strace", "gcc", "as", "ld")
    only = ["--only", "^counts/batched/randwrite-4k-(1|32)$"]
    done = bench(*only, "--json", str(numbers), PATH=path)
    assert done.returncode == 0, done.stderr
    if "Operation not permitted" in done.stderr:
        pytest.skip("strace is not allowed here")
    counts = counts_of(numbers)
    assert counts["randwrite-4k-1"]["syscalls"] == pytest.approx(3, abs=0.1)
    assert counts["randwrite-4k-32"]["syscalls"] == pytest.approx(3 / 32, abs=0.05)


def test_where_nothing_may_trace_the_rest_is_counted(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    only = ["--only", "^counts/batched/randwrite-4k-32$"]
    done = bench(*only, "--json", str(numbers), PATH=path_with(tmp_path, "gcc", "as", "ld"))
    assert done.returncode == (0 if os.geteuid() else 1)
    assert "system calls are not counted" in done.stderr
    found = counts_of(numbers)["randwrite-4k-32"]
    assert found.keys() == {"allocations", "large allocations", "copies"}


def test_a_request_that_costs_too_much_fails_the_run() -> None:
    tighten = "import goals\nfor bound in goals.BOUNDS.values(): bound['allocations'] = 2\n"
    run = f"import runpy\nrunpy.run_path({str(BENCH)!r}, run_name='__main__')"
    case = "counts/batched/randwrite-4k-32"
    done = subprocess.run(
        [sys.executable, "-c", tighten + run, "--only", f"^{case}$"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(BENCH)},
    )
    assert done.returncode == 1
    assert f"{case}: allocations: " in done.stderr
    assert "more than 2" in done.stderr
    assert "copies: " not in done.stderr


# --- the record ---


def test_the_readme_shows_the_record(tmp_path: Path) -> None:
    readme, picture = tmp_path / "README.md", tmp_path / "tools/bench.d/record.svg"
    picture.parent.mkdir(parents=True)
    shutil.copy(ROOT / "README.md", readme)
    lines = readme.read_text().splitlines()
    marks = [line for line in lines if line.startswith("<!--") and "tools/bench" in line]
    readme.write_text(f"{marks[0]}\nwritten by hand\n{marks[1]}\n")
    done = bench("--from", str(RECORD), "--markdown", str(readme), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    tables = readme.read_text()
    assert "written by hand" not in tables
    assert "| nbd-reactor |" in tables
    assert tables in (ROOT / "README.md").read_text()
    record = json.loads(RECORD.read_text())
    assert f"system calls, counted by {record['about']['syscalls_counted_by']} |" in tables
    for kind in ("header and payload apart", "file in the page cache"):
        assert f"| {kind}: 4 KiB random writes, depth 8 |" in tables
    assert "| file in the page cache: 1 MiB sequential reads, depth 8 |" in tables
    for verdict in bench("--from", str(RECORD)).stdout.splitlines():
        goal, _, end = verdict.partition("  ")
        if end.endswith(("  met", "  MISSED")):
            assert (f"| {goal} |" in tables) == end.endswith("MISSED"), goal
    assert picture.read_text() == (BENCH / "record.svg").read_text()


def test_what_json_wrote_is_told_again_alike(tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    assert bench("--from", str(RECORD), "--json", str(copy)).returncode == 0
    again = bench("--from", str(copy))
    assert again.stdout == bench("--from", str(RECORD)).stdout
    assert json.loads(copy.read_text())["rows"] == json.loads(RECORD.read_text())["rows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "README.md"], "is not what --json wrote"),
        (["--from", "/nowhere/record.json"], "is not what --json wrote"),
        (["--profile", "memory/fio/randread-4k-32"], "no case of our generator's"),
        (["--markdown", "CHANGELOG.md"], "needs the lines"),
        (["--markdown", "/nowhere/README.md"], "needs the lines"),
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
    kinds = {"counts", "memory", "file", "direct", "python"}
    assert {name.split("/")[0] for name in quick} == kinds


# --- a profile ---


def test_a_profile_tells_of_kernel_and_interpreter() -> None:
    done = bench("--profile", "memory/batched/randread-4k-32", "--size", "16MiB")
    if done.returncode:
        assert "perf" in done.stderr
        pytest.skip(f"no profile here: {done.stderr.strip()}")
    assert "us of CPU per request" in done.stdout
    assert "_PyEval_EvalFrameDefault" in done.stdout


def test_a_profile_needs_perf(tmp_path: Path) -> None:
    path = path_with(tmp_path, "gcc", "as", "ld")
    done = bench("--profile", "memory/batched/randread-4k-32", "--size", "16MiB", PATH=path)
    assert done.returncode == 1
    assert "needs perf" in done.stderr
