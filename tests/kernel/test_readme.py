"""README.md's commands do what it says, in its order."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounting import mounted
from tests.readme import ROOT, commands
from tests.running import RunningService

pytestmark = pytest.mark.kernel

RUNTIME_DIR = Path("/run/nbd-reactor")  # the default


@pytest.fixture
def own_srv() -> Iterator[None]:
    with mounted("tmpfs", Path("/srv"), "-t", "tmpfs"):
        yield


def test_the_commands_of_the_readme_work(tmp_path: Path, own_srv: None) -> None:
    lines = commands(run=True)
    serve = next(line for line in lines if line.startswith("nbd-reactor --config"))
    before, after = lines[: lines.index(serve)], lines[lines.index(serve) + 1 :]
    for line in before:
        shell(line)
    config = (ROOT / shlex.split(serve)[2]).read_text()
    service = RunningService(tmp_path / "service", config, runtime_dir=RUNTIME_DIR)
    try:
        service.await_line("ready:")
        for line in after:
            shell(line)
    finally:
        assert service.stop() == 0


def shell(line: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, f"{line}: {done.returncode}\n{done.stdout}"
