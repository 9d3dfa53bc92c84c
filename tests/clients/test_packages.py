"""The sdist and the wheel: what they hold, and that they work where nothing else is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

from reactor import __version__
from tests import commands
from tests.running import RunningService
from tests.test_tidy import ROOT, show, tracked

NAME = f"nbd_reactor-{__version__}"
VERSIONS = ("3.11", "3.12", "3.13")
OLDEST = VERSIONS[0]

#: Where files of the checkout are below share/ once the wheel is installed.
SHARED = {
    "CHANGELOG.md": "doc/nbd-reactor",
    "LICENSE": "doc/nbd-reactor",
    "README.md": "doc/nbd-reactor",
    "deploy/*.md": "doc/nbd-reactor/deploy",
    "deploy/completions/bash/*": "bash-completion/completions",
    "deploy/completions/fish/*": "fish/vendor_completions.d",
    "deploy/completions/zsh/*": "zsh/site-functions",
    "deploy/disks.schema.json": "nbd-reactor",
    "deploy/man/*.5": "man/man5",
    "deploy/man/*.8": "man/man8",
    "deploy/systemd/*": "nbd-reactor/systemd",
    "deploy/udev/*": "nbd-reactor/udev",
    "examples/*": "nbd-reactor/examples",
}


def run(*words: str | Path) -> str:
    """Return what it says on both outputs; it must succeed."""
    return commands.run(*map(str, words))


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("packages")
    checkout = folder / "checkout"
    for path in tracked():
        copy = checkout / show(path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    stray = checkout / "reactor/__pycache__/stray.cpython-311.pyc"
    stray.parent.mkdir()
    stray.touch()
    run(sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", folder, checkout)
    return folder


def files_of_wheel(packages: Path) -> set[str]:
    with ZipFile(packages / f"{NAME}-py3-none-any.whl") as wheel:
        return set(wheel.namelist())


@pytest.mark.timeout(300)
def test_the_sdist_is_the_checkout(packages: Path) -> None:
    with tarfile.open(packages / f"{NAME}.tar.gz") as sdist:
        members = {
            member.name.removeprefix(f"{NAME}/"): member.mode & 0o111
            for member in sdist
            if member.isfile()
        }
    made = {"PKG-INFO", "setup.cfg"}
    theirs = {name for name in members if "egg-info/" not in name and name not in made}
    assert theirs == {show(path) for path in tracked()}
    programs = {show(path) for path in tracked() if os.access(path, os.X_OK)}
    assert {name for name in theirs if members[name]} == programs


@pytest.mark.timeout(300)
def test_the_sdist_can_be_tested(packages: Path, tmp_path: Path) -> None:
    with tarfile.open(packages / f"{NAME}.tar.gz") as sdist:
        sdist.extractall(tmp_path, filter="data")
    checkout = tmp_path / NAME
    tidy = ("lines_are_short", "documents_that_are_named", "links_to_files", "functions_and_files")
    for command in (
        [sys.executable, "-m", "pytest", "-q", "tests/unit/test_units.py"],
        [sys.executable, "-m", "pytest", "-q", "tests/test_tidy.py", "-k", " or ".join(tidy)],
        [sys.executable, "tools/bench.d", "--list"],
        [sys.executable, "tools/documents.d", "--check"],
    ):
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(300)
def test_the_wheel_holds_the_program_and_what_a_host_installs(packages: Path) -> None:
    program = {show(p) for top in ("reactor", "backends") for p in (ROOT / top).rglob("*.py")}
    program |= {"reactor/py.typed", "backends/py.typed"}
    shared = {
        f"{NAME}.data/data/share/{folder}/{path.name}"
        for pattern, folder in SHARED.items()
        for path in ROOT.glob(pattern)
    }
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    expected = program | shared | {f"{NAME}.dist-info/{name}" for name in about}
    assert files_of_wheel(packages) == expected


@pytest.mark.timeout(300)
def test_the_metadata_says_what_it_is(packages: Path) -> None:
    with ZipFile(packages / f"{NAME}-py3-none-any.whl") as wheel:
        text = wheel.read(f"{NAME}.dist-info/METADATA").decode()
    for line in (
        "Name: nbd-reactor",
        f"Version: {__version__}",
        "License-Expression: BSD-3-Clause",
        "License-File: LICENSE",
        "Requires-Python: >=3.11",
        "Description-Content-Type: text/markdown",
        *(f"Classifier: Programming Language :: Python :: {version}" for version in VERSIONS),
    ):
        assert f"\n{line}\n" in text


def interpreter(version: str) -> str | None:
    """Return the path of a Python that can make virtual environments, or None."""
    ask = "import ensurepip, sys, venv; print(sys.executable, *sys.version_info[:2])"
    # Where pyenv is, its commands are there but know no version unless they are told.
    environment = {**os.environ, "PYENV_VERSION": version}
    for command in (sys.executable, f"python{version}", "/usr/bin/python3"):
        try:
            found = subprocess.check_output(
                [command, "-c", ask], env=environment, text=True, stderr=subprocess.DEVNULL
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        path, major, minor = found.rsplit(maxsplit=2)
        if f"{major}.{minor}" == version:
            return path
    return None


@pytest.fixture(params=VERSIONS)
def installed(request: pytest.FixtureRequest, packages: Path, tmp_path: Path) -> Path:
    """The folder of the commands, in a virtual environment with the wheel and what it needs."""
    python = interpreter(request.param)
    if python is None:
        missing = f"Python {request.param} with venv is not installed: not tried with it"
        (pytest.fail if request.param == OLDEST else pytest.skip)(missing)
    folder = tmp_path / "venv"
    run(python, "-m", "venv", folder)
    wheel = packages / f"{NAME}-py3-none-any.whl"
    run(folder / "bin/python", "-P", "-m", "pip", "install", "--quiet", wheel)
    return folder / "bin"


@pytest.mark.timeout(300)
def test_the_wheel_serves_in_an_empty_environment(
    installed: Path, tmp_path: Path, service: Callable[..., RunningService]
) -> None:
    program, control = installed / "nbd-reactor", installed / "nbd-reactorctl"
    assert run(program, "--version") == f"nbd-reactor {__version__}\n"
    assert run(control, "--version") == f"nbd-reactorctl {__version__}\n"
    assert "--config FILE" in run(program, "--help")
    assert "COMMAND" in run(control, "--help")
    share = installed.parent / "share/nbd-reactor"
    for example in (share / "examples").iterdir():
        assert "no problems" in run(program, "--check", "--cores", "all", "--config", example)
    assert json.loads((share / "disks.schema.json").read_text())

    socket = tmp_path / "a.sock"
    config = f"disks: {{ram: {{backend: malloc, size: 1MiB, listen: 'unix:{socket}'}}}}"
    running = service(config, installed=program)
    uri = f"nbd+unix:///ram?socket={socket}"
    data, back = tmp_path / "data", tmp_path / "back"
    data.write_bytes(os.urandom(1 << 20))
    run("nbdcopy", data, uri)
    run("nbdcopy", uri, back)
    assert back.read_bytes() == data.read_bytes()
    assert "ram" in run(control, "--socket", running.rpc_socket, "list")
