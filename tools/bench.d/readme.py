"""What the README shows of a run, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import goals
from points import COUNTED, COUNTS, LARGE, MIXED, SMALL, Case
from results import Results, ratios
from servers import FLOOR

BEGIN: Final = "<!-- written by tools/bench -->"
END: Final = "<!-- end of what tools/bench writes -->"

#: What kinds of disk other than memory are called.
KIND_NAMES: Final = {
    "file": "file in the page cache",
    "direct": "file, O_DIRECT",
    "python": "30 lines of Python",
}
#: What loads other than the batched one are called.
LOAD_NAMES: Final = {"apart": "header and payload apart", "fio": "fio"}
COUNTED_HEADS: Final = {
    "syscalls": "system calls",
    "allocations": "allocations",
    "copies": "copies of the payload in user space",
}


def has_marks(path: Path) -> bool:
    """Whether a file has one place for the tables."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [line for line in lines if line in {BEGIN, END}] == [BEGIN, END]


def put(tables: str, text: str) -> str:
    """Replace what is between the marks of `text`."""
    before, _, rest = text.partition(f"{BEGIN}\n")
    _, _, after = rest.partition(f"{END}\n")
    return f"{before}{BEGIN}\n{tables}{END}\n{after}"


def as_markdown(results: Results, picture: str | None) -> str:
    """Return the tables; `picture` is the path of the plot."""
    parts = [_about(results)]
    if picture:
        parts.append(f"![IOPS over requests in flight, for each server]({picture})")
    parts += [_iops_on_memory(results), _details(results), _iops_on_others(results)]
    parts += [_resting(results), _fairness(results), _counts(results), _goals(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(results: Results) -> str:
    about = results.about
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"Measured on {about['date'][:10]} with `{about['command']}` on {about['cpu']}"
        f" ({about['cpus']} CPUs, Linux {about['kernel']}, Python {about['python']}): {versions}."
        f" Medians of {about['repetitions']} repetitions of {about['seconds']:g} s, by turns."
    )


def _iops_on_memory(results: Results) -> str:
    cases = [Case("memory", "batched", point) for point in (*SMALL, *LARGE, *MIXED)]
    cases += [Case("memory", load, point) for load in ("apart", "fio") for point in SMALL]
    return _iops(results, "IOPS on a memory disk", cases)


def _iops_on_others(results: Results) -> str:
    cases = [Case("file", "batched", point) for point in (*SMALL, *LARGE) if point.depth in {8, 32}]
    cases += [case for kind in ("direct", "python") for case in _deep(kind, "batched")]
    return _iops(results, "IOPS on other disks", cases)


def _iops(results: Results, head: str, cases: Sequence[Case]) -> str:
    """Tell the IOPS of every server, a column for each, and what ours are to the best."""
    found = {case: results.at(case) for case in cases}
    servers = list(dict.fromkeys(name for rows in found.values() for name in rows))
    compared = {each.case: each for each in ratios(results)}
    lines = []
    for case, rows in found.items():
        if case not in compared:
            continue
        iops = [
            f"{rows[name].spread('iops').median:,.0f}" if name in rows else "" for name in servers
        ]
        each = compared[case]
        to = [f"{spread.median:.2f}" if spread else "" for spread in (each.to_best, each.to_floor)]
        lines.append([_described(case), *iops, *to[: 1 + (FLOOR in servers)]])
    heads = [head, *servers, "ours to the best other", "ours to the floor"]
    return _table(heads[: len(lines[0])], lines) if lines else ""


def _described(case: Case) -> str:
    words = [KIND_NAMES.get(case.kind), LOAD_NAMES.get(case.load), case.point.description]
    return ": ".join(filter(None, words))


def _details(results: Results) -> str:
    """Tell everything of each server at the same depth."""
    lines = [
        [
            f"{row.server}, {case.point.description}",
            f"{row.spread('bytes_per_second').median / 1e6:,.0f}",
            *(f"{row.spread(f'{name}_us').median:,.0f}" for name in ("p50", "p99", "p99.9")),
            f"{row.spread('server_cpu_us').median:.2f}",
            "" if row.syscalls is None else f"{row.syscalls:.2f}",
        ]
        for case in _deep("memory", "batched")
        for row in results.at(case).values()
    ]
    heads = ["memory disk", "MB/s", "p50 us", "p99 us", "p99.9 us", "CPU us", "system calls"]
    by = results.about.get("syscalls_counted_by")
    heads[-1] += f", counted by {by}" * bool(by)
    return _table(heads, lines) if lines else ""


def _resting(results: Results) -> str:
    """Tell what each server needs when nothing is asked of it."""
    lines = []
    for name, cpu in results.idle.items():
        memory = results.memory.get(f"memory/{name}", [])
        mib = " + ".join(f"{bytes_ / (1 << 20):.0f}" for bytes_ in memory)
        lines.append([name, f"{cpu:.1%}", mib])
    heads = ["at rest", "CPU", "resident MiB of each process, without its disks"]
    return _table(heads, lines) if lines else ""


def _fairness(results: Results) -> str:
    """Tell what a quiet disk feels of busy ones."""
    lines = [
        [neighbours, *(f"{told[f'{name}_us']:,.0f}" for name in ("p50", "p99", "p99.9"))]
        for neighbours, told in results.fairness.items()
    ]
    heads = ["a reader of 4 KiB, depth 1, and busy disks on its worker", "p50 us", "p99 us"]
    return _table([*heads, "p99.9 us"], lines) if lines else ""


def _counts(results: Results) -> str:
    """Tell what a request costs ours."""
    lines = []
    for point in COUNTED:
        found = results.counts.get(Case(COUNTS, "batched", point).name, {})
        cells = [f"{found[name]:.2f}" if name in found else "" for name in COUNTED_HEADS]
        if found:
            lines.append([point.description, *cells])
    return _table(["counted for a request", *COUNTED_HEADS.values()], lines) if lines else ""


def _goals(results: Results) -> str:
    """Tell how many goals were met, and which were not."""
    found = [each for each in goals.verdicts(results) if each.met is not None]
    missed = [each for each in found if not each.met]
    lines = [[each.goal, each.wanted, each.shown] for each in missed]
    said = f"{len(found) - len(missed)} of {len(found)} goals were met."
    return f"{said} Missed:\n\n{_table(['goal', 'wanted', 'found'], lines)}" if lines else said


def _deep(kind: str, load: str) -> Iterator[Case]:
    return (Case(kind, load, point) for point in SMALL if point.depth == 32)


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---", *["--:"] * (len(heads) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
