"""Compare nbd-reactor with other NBD servers, and with a floor, on this machine."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import goals
import plot
import readme
import record
import tables
from measuring import Plan, measure, profile
from points import CASES, COUNTS, Case
from results import Results
from servers import BenchError

from reactor import __version__
from reactor.units import parse_size

REPETITIONS: Final = 5
SECONDS: Final = 0.7
IDLE_SECONDS: Final = 20.0
QUICK_REPETITIONS: Final = 3
QUICK_SECONDS: Final = 0.2
QUICK_IDLE_SECONDS: Final = 3.0
SIZE: Final = "256MiB"
INTERRUPTED: Final = 128  # and the signal's number, as a shell has it
DIRECTORY: Final = "/var/tmp"  # /tmp may be in memory, and there is no O_DIRECT there
VERSIONS: Final = {
    "nbdkit": ["nbdkit", "--version"],
    "qemu-nbd": ["qemu-nbd", "--version"],
    "nbd-server": ["nbd-server", "-V"],
    "fio": ["fio", "--version"],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 when it proves less than was asked for."""
    options = _parse(arguments)
    if options.earlier:
        _tell(options.earlier, options)
        return 0
    cases = [case for case in CASES if case.quick or not options.quick]
    cases = [case for case in cases if options.only.search(case.name)]
    if options.list or not cases:
        return _list(cases) if options.list else _fail("--only leaves nothing", 2)
    # What was started is stopped either way.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell may have it ignored
        signal.signal(number, _interrupt)
    plan = _plan(options, cases)
    if options.profile:
        return _profile(plan, options.profile)
    results = Results(_about(plan))
    interrupted = 0
    try:
        measure(plan, results)
    except OSError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt as error:
        interrupted = INTERRUPTED + (error.args[0] if error.args else signal.SIGINT)
        print("interrupted; this is what was measured:", file=sys.stderr)
    # As a later --from will read it, so that it will tell the same.
    results = record.from_json(record.as_json(results))
    _tell(results, options)
    return interrupted or _judged(results, cases)


def _judged(results: Results, cases: Sequence[Case]) -> int:
    """Return the exit status of a run that was not interrupted."""
    broken = goals.broken_bounds(results)
    if broken:
        return _fail("a request costs too much:\n" + "\n".join(broken), 1)
    missing = goals.unproven(results, cases, may_trace=os.geteuid() == 0)
    return _fail("not measured: " + ", ".join(missing), 1) if missing else 0


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(number)


def _list(cases: Sequence[Case]) -> int:
    _show("\n".join(case.name for case in cases))
    return 0


def _profile(plan: Plan, case: Case) -> int:
    try:
        _show(profile(plan, case))
    except (BenchError, OSError) as error:
        return _fail(str(error), 1)
    return 0


def _tell(results: Results, options: argparse.Namespace) -> None:
    """Write what was asked for."""
    if options.json:
        options.json.write_text(record.as_json(results))
    if options.plot:
        options.plot.write_text(plot.as_svg(results))
    if options.markdown:
        text = options.markdown.read_text()
        options.markdown.write_text(
            readme.put(readme.as_markdown(results, _picture(options)), text)
        )
    _show(tables.as_text(results))


def _picture(options: argparse.Namespace) -> str | None:
    """Return the plot as the Markdown names it."""
    if options.plot is None:
        return None
    return str(os.path.relpath(options.plot.resolve(), options.markdown.resolve().parent))


def _show(text: str) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader may want only the beginning
    print(text, flush=True)


def _fail(why: str, status: int) -> int:
    print(f"tools/bench: {why}", file=sys.stderr)
    return status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about two minutes")
    parser.add_argument(
        "--only", type=_pattern, default="", metavar="REGEX", help="cases whose names match"
    )
    parser.add_argument("--list", action="store_true", help="show the names of the cases")
    parser.add_argument("--repetitions", type=_positive, metavar="N")
    parser.add_argument("--seconds", type=_duration, metavar="S", help="of each measurement")
    parser.add_argument(
        "--idle-seconds", type=_seconds, metavar="S", help="of watching idle servers; 0: do not"
    )
    parser.add_argument(
        "--size", type=_size, default=SIZE, help="of each disk (default %(default)s)"
    )
    parser.add_argument(
        "--cores", type=_cores, default=None, metavar="SERVER,LOAD", help="default: the first two"
    )
    parser.add_argument(
        "--directory", type=Path, default=DIRECTORY, help="for file disks (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write IOPS over depth as SVG")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="put tables into FILE, where its marks are"
    )
    parser.add_argument(
        "--profile", type=_case, metavar="CASE", help="only tell where our server's CPU time goes"
    )
    parser.add_argument(
        "--from",
        dest="earlier",
        type=_earlier,
        metavar="FILE",
        help="measure nothing; tell what an earlier run wrote with --json",
    )
    options = parser.parse_args(arguments)
    # Better now than after half an hour.
    for path in (options.json, options.plot):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{path}: no such directory")
    if options.markdown and not readme.has_marks(options.markdown):
        parser.error(f"{options.markdown}: needs the lines {readme.BEGIN!r} and {readme.END!r}")
    options.cores = options.cores or _first_cores()
    return options


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def _case(name: str) -> Case:
    for case in CASES:
        if case.name == name and case.kind != COUNTS and case.load != "fio":
            return case
    raise argparse.ArgumentTypeError(f"{name!r} is no case of our generator's; see --list")


def _earlier(name: str) -> Results:
    try:
        return record.from_json(Path(name).read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} is not what --json wrote: {error}") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,4}(\.\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return float(text)


def _duration(text: str) -> float:
    seconds = _seconds(text)
    if not seconds:
        raise argparse.ArgumentTypeError("nothing can be measured in no time")
    return seconds


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if size < 16 << 20 or size % (1 << 20):
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 1MiB from 16MiB on")
    return size


def _cores(text: str) -> tuple[int, int]:
    words = text.split(",")
    allowed = {str(core) for core in os.sched_getaffinity(0)}
    if len(words) != 2 or not allowed.issuperset(words):
        raise argparse.ArgumentTypeError(f"{text!r} is not two of the cores {sorted(allowed)}")
    return int(words[0]), int(words[1])


def _first_cores() -> tuple[int, int]:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) == 1:
        print("tools/bench: only one core: server and load share it", file=sys.stderr)
    return allowed[0], allowed[1 % len(allowed)]


def _plan(options: argparse.Namespace, cases: Sequence[Case]) -> Plan:
    quick = options.quick
    idle = options.idle_seconds
    if idle is None:
        idle = QUICK_IDLE_SECONDS if quick else IDLE_SECONDS
    server_core, load_core = options.cores
    return Plan(
        cases=cases,
        repetitions=options.repetitions or (QUICK_REPETITIONS if quick else REPETITIONS),
        seconds=options.seconds or (QUICK_SECONDS if quick else SECONDS),
        idle_seconds=idle,
        size=options.size,
        server_core=server_core,
        load_core=load_core,
        directory=options.directory,
    )


def _about(plan: Plan) -> dict[str, Any]:
    """Describe the run: when, where, with what."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["tools/bench", *sys.argv[1:]]),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],  # of the machine, before
        "repetitions": plan.repetitions,
        "seconds": plan.seconds,
        "cores": {"server": plan.server_core, "load": plan.load_core},
        "versions": {"nbd-reactor": __version__, **_versions()},
    }


def _cpu_model() -> str:
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return models[0] if models else platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name, command in VERSIONS.items():
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            continue
        match = re.search(r"\d+(\.\d+)+", said.stdout + said.stderr)
        found[name] = match[0] if match else "unknown"
    return found
