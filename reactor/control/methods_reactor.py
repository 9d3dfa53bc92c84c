"""The service's own methods, which SPDK has not: everything nbd-reactorctl does."""

from __future__ import annotations

import errno
import os
from collections import Counter
from typing import Any, Final

from backends import registry
from reactor import __version__, config
from reactor.control.call import Method, Reply
from reactor.control.jsonrpc import RpcError
from reactor.control.params import Parameter, integer, mapping, string
from reactor.control.service import DiskStatus, Service, WorkerStatus
from reactor.protocol.wire import NBD_FLAG_READ_ONLY
from reactor.units import SIZE_MAX

_NAME: Final = Parameter("name", string)
_SIZE: Final = Parameter("size", integer(1, SIZE_MAX))


class ReactorMethods:
    """Disks, workers and the service as they are."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def table(self) -> dict[str, Method]:
        """Return the methods by name."""
        return {
            "reactor_get_status": Method(self._get_status),
            "reactor_get_disks": Method(
                self._get_disks, (Parameter("name", string, required=False),)
            ),
            "reactor_get_workers": Method(self._get_workers),
            "reactor_start_disk": Method(
                self._start, (_NAME, Parameter("keys", mapping, required=False))
            ),
            "reactor_stop_disk": Method(self._stop, (_NAME,)),
            "reactor_remove_disk": Method(self._remove, (_NAME,)),
            "reactor_resize_disk": Method(self._resize, (_NAME, _SIZE)),
            "reactor_reload": Method(self._reload),
        }

    def _get_status(self, _params: dict[str, Any], reply: Reply) -> None:
        """Sum up the service: version, pid, uptime (s), and how many are in which state."""
        reply.result(
            {
                "version": __version__,
                "pid": os.getpid(),
                "started_at": self._service.started_at,
                "uptime": (self._service.reactor.clock() - self._service.started_ns) / 1e9,
                "workers": dict(Counter(worker.state for worker in self._service.workers())),
                "disks": dict(Counter(disk.state for disk in self._service.disks())),
            }
        )

    def _get_disks(self, params: dict[str, Any], reply: Reply) -> None:
        """List the disks, or the one called `name` with its `config` as disks.yaml has it."""
        pids = {worker.core: worker.pid for worker in self._service.workers()}
        if "name" not in params:
            reply.result([_disk(disk, pids) for disk in self._service.disks()])
            return
        disk = self._named(params["name"])
        reply.result([{**_disk(disk, pids), "config": config.dump([disk.spec])}])

    def _get_workers(self, _params: dict[str, Any], reply: Reply) -> None:
        """List the workers by core; times in `statistics` are in ns."""
        reply.result([_worker(worker) for worker in self._service.workers()])

    def _start(self, params: dict[str, Any], reply: Reply) -> None:
        """Start a disk that is down; with `keys` (those of disks.yaml), make a new one."""
        name = params["name"]
        if "keys" not in params:
            self._service.start(name, reply.done(True))
            return
        cores = [worker.core for worker in self._service.workers()]
        spec = config.parse_disk(name, params["keys"], registry.schemas(), cores)
        self._service.create(spec, reply.done(True))

    def _stop(self, params: dict[str, Any], reply: Reply) -> None:
        """Drain and stop a disk; it stays known and can be started again."""
        self._service.stop(params["name"], reply.done(True))

    def _remove(self, params: dict[str, Any], reply: Reply) -> None:
        """Hot-remove a disk: its I/O fails, its device is released, it is forgotten."""
        self._service.remove(params["name"], reply.done(True))

    def _resize(self, params: dict[str, Any], reply: Reply) -> None:
        """Change a disk's size (bytes)."""
        disk, size = self._named(params["name"]), params["size"]
        if disk.block_size and size % disk.block_size:
            message = f"{size} is not a multiple of the block size, {disk.block_size}"
            raise RpcError(-errno.EINVAL, message)
        self._service.resize(disk.spec.name, size, reply.done(True))

    def _reload(self, _params: dict[str, Any], reply: Reply) -> None:
        """Read the config file again, as SIGHUP does; nothing is changed when it has problems."""
        self._service.reload(reply.done(True))

    def _named(self, name: str) -> DiskStatus:
        disk = self._service.disk(name)
        if disk is None:
            raise RpcError(-errno.ENODEV, f"there is no disk {name}")
        return disk


def _disk(disk: DiskStatus, pids: dict[int, int | None]) -> dict[str, Any]:
    return {
        "name": disk.spec.name,
        "backend": disk.spec.backend,
        "state": disk.state,
        "reason": disk.reason,
        "core": disk.core,
        "cores": list(disk.cores),
        "pid": pids.get(disk.core),
        "size": disk.size,
        "block_size": disk.block_size,
        "readonly": disk.spec.readonly or bool(disk.flags & NBD_FLAG_READ_ONLY),
        "flags": disk.flags,
        "device": disk.device,
        "listen": [str(address) for address in disk.spec.listen],
        "dead_timeout": disk.spec.dead_timeout,
        "statistics": dict(disk.statistics),
    }


def _worker(worker: WorkerStatus) -> dict[str, Any]:
    return {
        "core": worker.core,
        "pid": worker.pid,
        "state": worker.state,
        "restarts": worker.restarts,
        "disks": list(worker.disks),
        "statistics": dict(worker.statistics),
    }
