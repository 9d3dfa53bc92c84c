"""The command line: what it prints and how it exits, tried as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reactor import __version__

ROOT = Path(__file__).parents[2]
SECONDS = 60
NOBODY = 65534


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "reactor", *map(str, arguments))


def run_code(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python("-c", code, **environment)


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def wrong_usage(*arguments: str | Path) -> str:
    """Return the one line of standard error, without the program's name."""
    done = run(*arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line.removeprefix("nbd-reactor: ")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "disks.yaml"
    path.write_text("disks:\n  ram0: {backend: malloc, size: 1MiB}\n")
    return path


# --- help ---


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"nbd-reactor {__version__}\n")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_every_option_and_exit_status(option: str) -> None:
    done = run(option)
    assert done.returncode == 0
    for expected in (
        *("--cores LIST", "--config FILE", "--runtime-dir DIR", "--rpc-socket PATH"),
        *("--metrics HOST:PORT", "--mode MODE", "--on-exit ACTION", "--log-format FORMAT"),
        *("--log-level LEVEL", "--check", "--demo", "--strict", "--version", "--help"),
        *("examples:", "exit status:", "adaptive", "disconnect"),
    ):
        assert expected in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_help_shows_a_runtime_directory_with_a_percent_sign() -> None:
    code = "import os; os.geteuid = lambda: 1; from reactor.cli import main; main(['--help'])"
    done = run_code(code, XDG_RUNTIME_DIR="/run/100%d", COLUMNS="100")
    assert "default: /run/100%d/" in done.stdout, done


def test_asking_for_the_version_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom reactor.cli import main\n"
        "try: main(['--version'])\nexcept SystemExit: print(*sys.modules)"
    )
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"yaml", "zmq", "msgpack", "psutil", "backends", "reactor.control"} & set(loaded)


# --- wrong usage ---


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--confg", "x"], "unrecognized arguments: --confg x"),
        (["disks.yaml"], "unrecognized arguments: disks.yaml"),
        (["--conf", "x"], "unrecognized arguments: --conf x"),
        (["--cores"], "--cores: expected one argument"),
        (["--cores", "3-1"], "--cores: the range 3-1 runs backwards; write 1-3"),
        (
            ["--cores", "a"],
            '--cores: "a" is not a list of cores; write 0-3, 0,2,4-7, 0x0f or all',
        ),
        (["--demo", "--config", "x"], "--config: not allowed with argument --demo"),
        (["--check"], "--check needs --config"),
        (["--check", "--demo"], "--check needs --config"),
        (["--mode", "fast"], "--mode: invalid choice: 'fast' (choose from "),
        (["--on-exit", "leave"], "--on-exit: invalid choice: 'leave' (choose from "),
        (["--log-format", "xml"], "--log-format: invalid choice: 'xml' (choose from "),
        (["--log-level", "loud"], "--log-level: invalid choice: 'loud' (choose from "),
        (
            ["--metrics", "9090"],
            '--metrics: "9090" is not HOST:PORT with a port from 1 to 65535',
        ),
        (
            ["--metrics", ":9090"],
            '--metrics: ":9090" is not HOST:PORT with a port from 1 to 65535',
        ),
        (
            ["--metrics", "localhost:99999"],
            '--metrics: "localhost:99999" is not HOST:PORT with a port from 1 to 65535',
        ),
        (["--runtime-dir", ""], '--runtime-dir: "" is not a path'),
        (["--rpc-socket", "/" + "x" * 107], "--rpc-socket: the path is longer than 107 bytes"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_2(arguments: list[str], problem: str) -> None:
    line = wrong_usage(*arguments)
    assert line.startswith(problem)
    assert line.endswith("; see nbd-reactor --help")


@pytest.mark.parametrize("check", [[], ["--check", "--config", "/dev/null"]])
def test_realtime_workers_must_sleep(check: list[str]) -> None:
    line = wrong_usage("--lock-memory", "--mode", "poll", *check)
    assert line.endswith("not with --mode poll")


def test_a_core_that_does_not_exist() -> None:
    present = os.sysconf("SC_NPROCESSORS_CONF")
    cores = f"0-{present - 1}" if present > 1 else "0"
    assert wrong_usage("--cores", f"0,{present}") == (
        f"--cores: core {present} does not exist (this machine has {cores}); see nbd-reactor --help"
    )


# --- configs ---


def test_check_of_a_good_config(config: Path) -> None:
    done = run("--check", "--config", config)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{config}: 1 disk, no problems found\n"


def test_check_counts_the_disks(config: Path) -> None:
    config.write_text("disks: {a: {backend: 'null'}, b: {backend: null}}")
    assert run("--check", "--config", config).stdout == f"{config}: 2 disks, no problems found\n"


BAD = "disks:\n  ram0:\n    backend: malloc\n    sise: 1MiB\n  ram1: {backend: mallok}\n"


def check_bad(done: subprocess.CompletedProcess[str], config: Path) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"{config}:2: disks.ram0.size: missing; the backend malloc needs it",
        f'{config}:4: disks.ram0.sise: unknown key "sise"; did you mean "size"?',
        f'{config}:5: disks.ram1.backend: unknown backend "mallok"; did you mean "malloc"?'
        " there are file, malloc, null",
    ]


def test_check_prints_every_problem_and_exits_2(config: Path) -> None:
    config.write_text(BAD)
    check_bad(run("--check", "--config", config), config)


def test_a_start_with_problems_prints_them_and_starts_nothing(config: Path, tmp_path: Path) -> None:
    config.write_text(BAD)
    check_bad(run("--config", config, "--runtime-dir", tmp_path / "run"), config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("check", [["--check"], []])
def test_a_config_that_is_not_there(tmp_path: Path, check: list[str]) -> None:
    path = tmp_path / "no.yaml"
    line = wrong_usage(*check, "--config", path, "--runtime-dir", tmp_path / "run")
    assert line == f"config {path} cannot be read: No such file or directory"


@pytest.mark.parametrize("key", ["size: 0", "size: 1000", "size: 1MiB, core: 999"])
def test_the_cores_of_the_command_line_hold_for_the_check(config: Path, key: str) -> None:
    config.write_text(f"disks: {{a: {{backend: malloc, {key}}}}}")
    assert "disks.a." in wrong_usage("--check", "--config", config, "--cores", "all")


def test_an_interrupt_while_the_config_is_read(tmp_path: Path) -> None:
    fifo = tmp_path / "disks.yaml"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [sys.executable, "-m", "reactor", "--check", "--config", fifo],
        stderr=subprocess.PIPE,
        text=True,
    )
    with fifo.open("w"):  # returns once it reads
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (1, "nbd-reactor: interrupted\n")


# --- where it runs ---


def test_the_runtime_directory_of_root_and_of_others() -> None:
    code = (
        "import os, sys\nfrom reactor.options import default_runtime_dir as where\n"
        "os.geteuid = lambda: int(sys.argv[1])\nprint(where())"
    )

    def where(user: int, **environment: str) -> str:
        return subprocess.check_output(
            [sys.executable, "-c", code, str(user)], env=environment, text=True, cwd=ROOT
        ).strip()

    assert where(0, XDG_RUNTIME_DIR="/run/user/0") == "/run/nbd-reactor"
    assert where(1000, XDG_RUNTIME_DIR="/run/user/1000") == "/run/user/1000/nbd-reactor"
    assert where(1000) == where(1000, XDG_RUNTIME_DIR="") == "/tmp/nbd-reactor-1000"


@pytest.fixture
def runtime_dir_of_others() -> Iterator[Path]:
    """Take, as root, the directory in /tmp that the user nobody would make."""
    path = Path(f"/tmp/nbd-reactor-{NOBODY}")
    path.mkdir(mode=0o777)
    yield path
    path.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to act as two users")
def test_a_directory_that_somebody_else_made_in_tmp_is_not_used(
    runtime_dir_of_others: Path,
) -> None:
    # Loaded as root: the checkout and Python itself may be in root's home.
    code = f"import locale, os; from reactor.cli import main; os.setuid({NOBODY}); exit(main([]))"
    done = run_code(code, XDG_RUNTIME_DIR="")
    assert done.returncode == 2
    assert done.stderr == (
        f"nbd-reactor: {runtime_dir_of_others} is not a directory that only this user may write to;"
        " remove it or choose another with --runtime-dir\n"
    )
