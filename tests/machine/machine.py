"""The machine that tools/machine booted, as its operator reaches it: by ssh, as root."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

#: Deadlines, not durations: an emulated CPU is 20 times slower, and others run beside it.
COMMAND_SECONDS = 120
REBOOT_SECONDS = 240


class Machine:
    """A root shell there; what fails there fails the test, with what it said."""

    def __init__(self, ssh_config: Path, console: Path) -> None:
        self.ssh_config = ssh_config
        self.console = console

    def run(
        self, script: str, *, check: bool = True, timeout: float = COMMAND_SECONDS, stdin: str = ""
    ) -> str:
        """Run `script` in a shell there and return what it wrote to standard output, stripped."""
        done = self._call(["ssh", "machine", script], timeout, stdin)
        if check:
            assert done.returncode == 0, f"{script}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def succeeds(self, script: str, timeout: float = COMMAND_SECONDS) -> bool:
        """Whether `script` exits with 0 there."""
        return self._call(["ssh", "machine", script], timeout).returncode == 0

    def await_success(self, script: str, seconds: float = COMMAND_SECONDS) -> None:
        """Return as soon as `script` exits with 0 there, tried again and again."""
        self.run(f"timeout {seconds} sh -c {shlex.quote(f'until {script}; do sleep 0.2; done')}")

    def write(self, path: str, text: str) -> None:
        """Write a file there, and the directories above it."""
        quoted = shlex.quote(path)
        self.run(f'mkdir -p "$(dirname {quoted})" && cat >{quoted}', stdin=text)

    def copy(self, sources: Sequence[Path], target: str) -> None:
        """Copy files and directories into the directory `target` there."""
        self.run(f"mkdir -p {shlex.quote(target)}")
        words = ["scp", "-q", "-r", *(str(source) for source in sources), f"machine:{target}/"]
        done = self._call(words, COMMAND_SECONDS)
        assert done.returncode == 0, done.stderr

    def reboot(self) -> None:
        """Reboot as an operator does; returns when it is up again with all its services."""
        before = self.run("cat /proc/sys/kernel/random/boot_id")
        self._call(["ssh", "machine", "systemctl reboot"], COMMAND_SECONDS)
        self._call(["ssh", "-O", "exit", "machine"], COMMAND_SECONDS)
        deadline = time.monotonic() + REBOOT_SECONDS
        script = "cat /proc/sys/kernel/random/boot_id && systemctl is-system-running --wait"
        lines: list[str] = []
        while len(lines) < 2 or lines[0] == before:
            assert time.monotonic() < deadline, f"not up again: {self.console.read_text()[-4000:]}"
            time.sleep(0.5)
            try:
                done = self._call(["ssh", "-o", "ConnectTimeout=5", "machine", script], 120)
            except subprocess.TimeoutExpired:
                continue
            lines = done.stdout.split()
        assert lines[1] == "running", self.run("systemctl --failed; journalctl -b -p warning")

    def _call(
        self, words: Sequence[str], timeout: float, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        command = [words[0], "-F", os.fspath(self.ssh_config), *words[1:]]
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False
        )
