"""Where our server's CPU time goes at one case, by perf: the kernel, the interpreter, libraries."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Final

import loads
import processes
from points import Case
from servers import BenchError, Server

SAMPLES_PER_SECOND: Final = 4999  # not in step with anything else
SECONDS: Final = 3.0
LEAST_PERCENT: Final = 0.7
PERF_SECONDS: Final = 60.0


def profile(load: Path, core: int, server: Server, case: Case, work: Path) -> str:
    """Load the server at a case; returns a table of CPU us per request. Raises BenchError."""
    if shutil.which("perf") is None:
        raise BenchError("a profile needs perf (Debian package linux-perf)")
    data = work / "perf.data"
    pids = ",".join(str(process.pid) for process in processes.tree(server.pid))
    command = ["perf", "record", "-q", "-F", str(SAMPLES_PER_SECOND), "-o", str(data), "-p", pids]
    options = loads.options_of(case.point, f"--seconds={SECONDS}", apart=case.load == "apart")
    with (
        loads.connected(load, core, server, options) as generator,
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as perf,
    ):
        before = processes.cpu_seconds(server.pid)
        requests = generator.run(SECONDS)["requests"]
        used = (processes.cpu_seconds(server.pid) - before) * 1e6 / requests
        perf.send_signal(signal.SIGINT)
        _, said = perf.communicate(timeout=PERF_SECONDS)
    if not data.exists():
        raise BenchError(f"perf: {said.strip()}")
    parts = [f"{case.name}: {used:.2f} us of CPU per request"]
    parts += [_report(data, keys, used) for keys in ("dso", "dso,symbol")]
    return "\n\n".join(parts)


def _report(data: Path, keys: str, used: float) -> str:
    command = ["perf", "report", "-i", str(data), "--stdio", "-q", f"--sort={keys}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"perf report: {done.stderr.strip()}")
    # Symbols are followed by two empty columns.
    found = re.findall(r"^\s*(\d+\.\d+)%\s+(.*?)[\s-]*$", done.stdout, re.MULTILINE)
    return "\n".join(
        f"{float(percent) * used / 100:8.3f} us {float(percent):6.1f} %  {what}"
        for percent, what in found
        if float(percent) >= LEAST_PERCENT
    )
