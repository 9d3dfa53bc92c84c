"""What the service exports to Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, get_args

from reactor import __version__
from reactor.control.service import DiskState, DiskStatus, Service, WorkerStatus
from reactor.metrics import Family

#: The workers' counters of a disk, and what each counts.
DISK_COUNTERS: Final = {
    "reads": "Read requests.",
    "read_bytes": "Bytes read.",
    "writes": "Write requests.",
    "written_bytes": "Bytes written.",
    "flushes": "Flush requests.",
    "trims": "Trim requests.",
    "trimmed_bytes": "Bytes trimmed.",
    "zeroes": "Write-zeroes requests.",
    "errors": "Requests answered with an error.",
    "receives": "Receive system calls.",
    "sends": "Send system calls.",
}
WORKER_TIMES: Final = {
    "busy_ns": ("busy_seconds_total", "Time in which the reactor did work."),
    "idle_ns": ("idle_seconds_total", "Time in which the reactor found nothing to do."),
}


def measure(service: Service) -> Iterator[Family]:
    """Yield the state and the counters of everything, as they are now."""
    info = Family("nbd_reactor_info", "gauge", "The version of the service.")
    info.add(1, version=__version__)
    yield info
    start = Family("nbd_reactor_start_time_seconds", "gauge", "When it started, Unix time.")
    start.add(service.started_at)
    yield start
    yield from _measure_workers(service.workers())
    yield from _measure_disks(service.disks())


def _measure_workers(workers: list[WorkerStatus]) -> Iterator[Family]:
    up = Family("nbd_reactor_worker_up", "gauge", "Whether the worker runs.")
    restarts = Family("nbd_reactor_worker_restarts_total", "counter", "Restarts of the worker.")
    turns = Family("nbd_reactor_worker_turns_total", "counter", "Turns of the reactor loop.")
    times = {
        key: Family(f"nbd_reactor_worker_{name}", "counter", text)
        for key, (name, text) in WORKER_TIMES.items()
    }
    for worker in workers:
        core = str(worker.core)
        up.add(int(worker.state == "running"), core=core)
        restarts.add(worker.restarts, core=core)
        if "turns" in worker.statistics:
            turns.add(worker.statistics["turns"], core=core)
        for key, family in times.items():
            if key in worker.statistics:
                family.add(worker.statistics[key] / 1e9, core=core)
    yield from (up, restarts, turns, *times.values())


def _measure_disks(disks: list[DiskStatus]) -> Iterator[Family]:
    state = Family("nbd_reactor_disk_state", "gauge", "1 for the state that the disk is in.")
    served = Family("nbd_reactor_disk_core", "gauge", "1 for each core whose worker serves it.")
    size = Family("nbd_reactor_disk_size_bytes", "gauge", "The size of the disk.")
    connections = Family(
        "nbd_reactor_disk_connections", "gauge", "Clients, and sockets of the kernel."
    )
    counters = {
        key: Family(f"nbd_reactor_disk_{key}_total", "counter", text)
        for key, text in DISK_COUNTERS.items()
    }
    for disk in disks:
        name = disk.spec.name
        for possible in get_args(DiskState):
            state.add(int(disk.state == possible), disk=name, state=possible)
        for core in disk.cores:
            served.add(1, disk=name, core=str(core))
        size.add(disk.size, disk=name)
        if "connections" in disk.statistics:
            connections.add(disk.statistics["connections"], disk=name)
        for key, family in counters.items():
            if key in disk.statistics:
                family.add(disk.statistics[key], disk=name)
    yield from (state, served, size, connections, *counters.values())
