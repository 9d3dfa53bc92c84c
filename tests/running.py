"""Runs the real `nbd-reactor` for a test and watches what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

# Deadlines, not durations: an emulated CPU is 20 times slower.
START_SECONDS = 300 if os.environ.get("KERNEL_GUEST") == "qemu" else 60
STOP_SECONDS = 60
ROOT = Path(__file__).parents[1]


def copy_program(folder: Path) -> Path:
    """Make a copy of the program that `RunningService` can run; returns where it is."""
    for package in ("reactor", "backends"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    return folder


class RunningService:
    """One service on its own runtime directory.

    `program` is where another version of it is, `installed` the command of one that is installed.
    """

    def __init__(
        self,
        folder: Path,
        config: str | None = None,
        *arguments: str,
        cores: str = "0",
        runtime_dir: Path | None = None,
        program: Path | None = None,
        installed: Path | None = None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.runtime_dir = runtime_dir or folder / "run"
        self.rpc_socket = self.runtime_dir / "rpc.sock"
        self.log_path = folder / "log"
        self.config_path = folder / "disks.yaml"
        command = [str(installed)] if installed else [sys.executable, "-m", "reactor"]
        command += ["--runtime-dir", str(self.runtime_dir)]
        command += ["--cores", cores, *arguments]
        if config is not None:
            self.config_path.write_text(config)
            command += ["--config", str(self.config_path)]
        environment = {**os.environ, **({"PYTHONPATH": str(program)} if program else {})}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder if installed else program,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )

    @property
    def log(self) -> str:
        """Everything written so far."""
        return self.log_path.read_text()

    def await_line(self, part: str, seconds: float = START_SECONDS) -> str:
        """Wait for a line that contains `part`; returns it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in self.log.splitlines():
                if part in line:
                    return line
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no line with {part!r} in:\n{self.log}")

    def rpc(self, method: str, **params: Any) -> Any:
        """Call a JSON-RPC method; returns the result or raises AssertionError with the error."""
        answer = self.rpc_raw(method, **params)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def rpc_raw(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a JSON-RPC method; returns the whole answer."""
        request: dict[str, Any] = {"jsonrpc": "2.0", "id": 1, "method": method}
        if params:
            request["params"] = params
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(START_SECONDS)
            sock.connect(str(self.rpc_socket))
            sock.sendall(json.dumps(request).encode())
            text = b""
            while not text.endswith(b"\n"):
                part = sock.recv(65536)
                assert part, f"the service closed the connection: {text!r}"
                text += part
        answer: dict[str, Any] = json.loads(text)
        return answer

    def workers(self) -> dict[int, psutil.Process]:
        """The living workers by core."""
        living = {}
        for worker in self.rpc("reactor_get_workers"):
            if worker["pid"]:
                with suppress(psutil.NoSuchProcess):  # it has died since
                    living[worker["core"]] = psutil.Process(worker["pid"])
        return living

    def unborn_worker(self, dead: int) -> psutil.Process:
        """Return the process that follows worker `dead`, as early as it can be seen."""
        found: list[psutil.Process] = []

        def look() -> bool:
            with suppress(psutil.Error):
                children = psutil.Process(self.process.pid).children()
                others = (child for child in children if child.pid != dead)
                found.extend(child for child in others if "reactor.data" in child.cmdline())
            return bool(found)

        self.await_true(look, pause=0.002)
        return found[0]

    def await_state(self, name: str, state: str, seconds: float = START_SECONDS) -> dict[str, Any]:
        """Wait until disk `name` is in `state`; returns what reactor_get_disks says of it."""
        deadline = time.monotonic() + seconds
        while True:
            disk: dict[str, Any] = self.rpc("reactor_get_disks", name=name)[0]
            if disk["state"] == state:
                return disk
            assert time.monotonic() < deadline, f"{disk}\n{self.log}"
            time.sleep(0.02)

    def await_true(
        self, condition: Callable[[], bool], seconds: float = START_SECONDS, pause: float = 0.05
    ) -> None:
        """Wait until `condition` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log
            time.sleep(pause)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop it, check that nothing is left, and return the exit status."""
        if self.process.poll() is None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(number)
            self.process.wait(STOP_SECONDS)
            left = [child for child in children if child.is_running()]
            assert not left, f"processes left: {left}\n{self.log}"
        status = self.process.returncode
        instance = self.runtime_dir / "instance"
        if instance.exists():
            prefix = f"nbd-reactor-{instance.read_text().strip()}-"
            kept = [path.name for path in Path("/dev/shm").glob(f"{prefix}*")]
            assert not kept, f"shared memory left: {kept}"
        return status
