"""The results as text."""

from __future__ import annotations

from collections.abc import Sequence

import goals
from results import Ratios, Results, Row, Spread, ratio, ratios
from servers import OURS

HEADS = (
    ("server", 14),
    ("IOPS", 11),
    ("min", 11),
    ("max", 11),
    ("MB/s", 9),
    ("p50 us", 9),
    ("p99 us", 9),
    ("p99.9 us", 10),
    ("CPU us", 10),
    ("syscalls", 9),
    ("load CPU", 9),
    ("ours to it", 19),
)


def as_text(results: Results) -> str:
    """Return everything for people."""
    parts = [_measured(results), _comparison(ratios(results)), _resources(results)]
    parts += [_counted(results), _goals(results)]
    if results.notes:
        parts.append("\n".join(["Notes:", *(f"- {note}" for note in results.notes)]))
    return "\n\n".join(part for part in parts if part)


def _measured(results: Results) -> str:
    if not results.cases():
        return ""
    lines = [
        "Medians of the repetitions; the least and most IOPS; CPU us and system calls of the server"
        " per request;"
    ]
    lines.append("how busy the load's core was; nbd-reactor's IOPS to this server's (least - most)")
    for case in results.cases():
        rows = results.at(case)
        heads = "".join(f"{head:>{width}}" for head, width in HEADS[1:])
        lines += ["", case.name, f"{HEADS[0][0]:<{HEADS[0][1]}}{heads}"]
        lines += [_line(row, rows.get(OURS)) for row in rows.values()]
    return "\n".join(lines)


def _line(row: Row, ours: Row | None) -> str:
    iops = row.spread("iops")
    latencies = [row.spread(f"{name}_us").median for name in ("p50", "p99", "p99.9")]
    compared = ratio(ours, row, "iops") if ours and ours is not row else None
    cells = [
        f"{iops.median:,.0f}",
        f"{iops.least:,.0f}",
        f"{iops.most:,.0f}",
        f"{row.spread('bytes_per_second').median / 1e6:,.0f}",
        *(f"{latency:,.0f}" for latency in latencies),
        f"{row.spread('server_cpu_us').median:,.2f}",
        "" if row.syscalls is None else f"{row.syscalls:.2f}",
        f"{row.spread('load_cpu').median:.0%}",
        _spread(compared),
    ]
    widths = [width for _, width in HEADS[1:]]
    columns = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{row.server:<{HEADS[0][1]}}{columns}"


def _spread(value: Spread | None) -> str:
    return f"{value.median:.2f} ({value.least:.2f}-{value.most:.2f})" if value else ""


def _comparison(found: Sequence[Ratios]) -> str:
    if not found:
        return ""
    lines = [
        "| load | nbd-reactor IOPS | best other | ours to it | ours to the floor | CPU to nbdkit |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.case.name} | {each.iops:,.0f} | {each.best or ''} | {_spread(each.to_best)} "
        f"| {_spread(each.to_floor)} | {_spread(each.cpu_to_nbdkit)} |"
        for each in found
    ]
    return "\n".join(lines)


def _resources(results: Results) -> str:
    lines = [
        f"resident memory without the disk, {name}: "
        + " + ".join(f"{bytes_ / (1 << 20):.1f}" for bytes_ in each)
        + " MiB"
        for name, each in results.memory.items()
    ]
    lines += [f"idle CPU, {name}: {cpu:.2%}" for name, cpu in results.idle.items()]
    lines += [
        f"4 KiB read, depth 1, beside busy disks of its worker, {neighbours}:"
        f" p50 {told['p50_us']:.0f}, p99 {told['p99_us']:.0f} us"
        for neighbours, told in results.fairness.items()
    ]
    return "\n".join(lines)


def _counted(results: Results) -> str:
    lines = [f"{'counted, nbd-reactor':<40}{'a request':>12}{'at most':>12}"]
    lines += [
        f"{name.split('/')[-1] + ': ' + measure:<40}{found:>12.3f}{most:>12g}"
        for name, measure, found, most in goals.counted(results)
    ]
    return "\n".join(lines) if len(lines) > 1 else ""


def _goals(results: Results) -> str:
    """Tell of every goal that anything of was measured."""
    found = goals.verdicts(results)
    if all(verdict.met is None for verdict in found):
        return ""
    words = {True: "met", False: "MISSED", None: "not measured"}
    width = max(len(verdict.goal) for verdict in found) + 2
    lines = [f"{'goal':<{width}}{'wanted':>10}{'found':>10}"]
    for verdict in found:
        value = "" if verdict.found is None else verdict.shown
        line = f"{verdict.goal:<{width}}{verdict.wanted:>10}{value:>10}  {words[verdict.met]}"
        lines.append(line)
    return "\n".join(lines)
