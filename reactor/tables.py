"""Disks and workers as text for people. Everything shown comes from the service's RPC results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from reactor.units import format_size

NOTHING: Final = "-"


def show_status(
    status: dict[str, Any], workers: list[dict[str, Any]], disks: list[dict[str, Any]]
) -> str:
    """Return the service in one line, its workers, and the disks that are not online."""
    states = ", ".join(f"{count} {state}" for state, count in sorted(status["disks"].items()))
    parts = [
        f"nbd-reactor {status['version']}, pid {status['pid']},"
        f" up {_duration(status['uptime'])}; disks: {states or 'none'}",
        _worker_table(workers),
    ]
    down = [disk for disk in disks if disk["state"] != "online"]
    if down:
        rows = [[disk["name"], disk["state"], disk["reason"] or NOTHING] for disk in down]
        parts.append(table(("DISK", "STATE", "REASON"), rows))
    return "\n\n".join(parts)


def disk_table(disks: list[dict[str, Any]]) -> str:
    """Return a line a disk."""
    if not disks:
        return "no disks"
    header = [
        *("NAME", "STATE", "SIZE", "BACKEND", "CORE", "PID", "DEVICE", "ADDRESSES"),
        *("CLIENTS", "READS", "READ", "WRITES", "WRITTEN", "ERRORS", "REASON"),
    ]
    rows = [_disk_row(disk) for disk in disks]
    if not any(disk["reason"] for disk in disks):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return table(header, rows)


def disk_line(disk: dict[str, Any]) -> str:
    """Return a disk's state, size and where it is served, in one line."""
    where = [disk["device"]] if disk["device"] else []
    parts = [disk["state"], _size(disk["size"]), *where, *disk["listen"]]
    if disk["reason"]:
        parts.append(disk["reason"])
    return printable(f"{disk['name']}: {', '.join(parts)}")


def show_disk(disk: dict[str, Any]) -> str:
    """Return a disk's config as disks.yaml has it, then its live state."""
    live = {
        "state": disk["state"],
        "reason": disk["reason"],
        "size": f"{_size(disk['size'])} ({disk['size']} bytes)",
        "block size": f"{disk['block_size']} bytes",
        "readonly": "yes" if disk["readonly"] else "no",
        "device": disk["device"] or NOTHING,
        "addresses": " ".join(disk["listen"]) or NOTHING,
        "worker": f"core {_cores(disk)}, pid {_number(disk['pid'])}",
    }
    live |= {name.replace("_", " "): str(n) for name, n in sorted(disk["statistics"].items())}
    width = max(len(name) for name in live) + 2
    lines = [f"{name + ':':{width}}{printable(value)}" for name, value in live.items() if value]
    return "\n".join([disk["config"].rstrip(), "", *lines])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns, two spaces apart."""
    lines = [list(header), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def printable(text: str) -> str:
    """Return `text` without what a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _worker_table(workers: list[dict[str, Any]]) -> str:
    rows = [
        [
            str(worker["core"]),
            _number(worker["pid"]),
            worker["state"],
            str(worker["restarts"]),
            _busy(worker["statistics"]),
            " ".join(worker["disks"]) or NOTHING,
        ]
        for worker in workers
    ]
    return table(("CORE", "PID", "STATE", "RESTARTS", "BUSY", "DISKS"), rows)


def _disk_row(disk: dict[str, Any]) -> list[str]:
    counters = disk["statistics"]

    def count(name: str) -> str:
        return str(counters[name]) if name in counters else NOTHING

    def amount(name: str) -> str:
        return format_size(counters[name]) if name in counters else NOTHING

    return [
        disk["name"],
        disk["state"],
        _size(disk["size"]),
        disk["backend"],
        _cores(disk),
        _number(disk["pid"]),
        disk["device"] or NOTHING,
        " ".join(disk["listen"]) or NOTHING,
        count("connections"),
        count("reads"),
        amount("read_bytes"),
        count("writes"),
        amount("written_bytes"),
        count("errors"),
        disk["reason"] or NOTHING,
    ]


def _size(size: int) -> str:
    return format_size(size) if size else NOTHING  # not known before the disk was opened


def _cores(disk: dict[str, Any]) -> str:
    """Return the cores that serve a disk, first its owner's, whose pid is shown."""
    return ",".join(str(core) for core in disk["cores"]) or NOTHING


def _number(number: int | None) -> str:
    return NOTHING if number is None else str(number)


def _busy(statistics: dict[str, int]) -> str:
    busy, idle = statistics.get("busy_ns", 0), statistics.get("idle_ns", 0)
    return f"{100 * busy / (busy + idle):.1f}%" if busy + idle else NOTHING


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour}h"
    if hour:
        return f"{hour}h {minute}m"
    return f"{minute}m {second}s" if minute else f"{second}s"
