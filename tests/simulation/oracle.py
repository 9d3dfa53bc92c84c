"""What must be true in the end, and when the end is."""

from __future__ import annotations

from reactor.control.service import DiskStatus
from tests.simulation.host import INSTANCE, Host
from tests.simulation.kernel import SEVERAL_TIMEOUT, KernelDevice
from tests.simulation.operations import Operator, Subject
from tests.simulation.service import Service

AT_REST = ("online", "stopped", "failed", "removed")


class Oracle:
    """Compares the host and the service with what was asked for."""

    def __init__(self, host: Host, service: Service, operator: Operator) -> None:
        self._host = host
        self._world = host.world
        self._service = service
        self._operator = operator

    # --- when ---

    def describe(self) -> str:
        """Return what there is, in a line."""
        controller = self._service.controller
        if controller is None:
            return "no controller"
        disks = ", ".join(f"{d.spec.name} {d.state} {d.reason}" for d in controller.disks())
        workers = ", ".join(f"{w.core} {w.state}" for w in controller.workers())
        asked = ", ".join(
            f"{subject.asking} of {name}"
            for name, subject in self._operator.subjects.items()
            if subject.asking
        )
        return f"disks: {disks}; workers: {workers}; unanswered: {asked or 'nothing'}"

    def is_settled(self) -> bool:
        """Whether everything is at rest, and every question answered."""
        controller = self._service.controller
        return (
            controller is not None
            and all(disk.state in AT_REST for disk in controller.disks())
            and all(worker.state in ("running", "failed") for worker in controller.workers())
            and not any(subject.asking for subject in self._operator.subjects.values())
            and not any(process.stopped for process in self._host.core_locks.values())
            and not any(d._shares._resting for d in controller._disks.values() if d.rising)
        )

    def is_idle(self) -> bool:
        """Whether no program waits for the kernel."""
        return all(s.application.idle for s in self._operator.subjects.values())

    # --- what ---

    def check(self) -> None:
        """Complain of what is not as it should be."""
        controller = self._service.controller
        assert controller is not None
        disks = {disk.spec.name: disk for disk in controller.disks()}
        for name, subject in self._operator.subjects.items():
            self._check_disk(subject, disks.get(name))
        for worker in controller.workers():
            if worker.state == "failed" and not self._host.causes.gave_up(worker.core):
                self._world.violate(f"the worker of core {worker.core} is given up without need")
        self._check_devices(disks)
        self._check_ends()

    def _check_disk(self, subject: Subject, disk: DiskStatus | None) -> None:
        state = disk.state if disk is not None else "gone"
        self._world.note("disk %s is %s; it may be %s", subject.name, state, sorted(subject.ends))
        causes = self._host.causes
        if state in ("failed", "removed") and state not in subject.ends:
            assert disk is not None
            explained = causes.explain(disk.spec.name, disk.reason) or self._hung(subject, disk)
            if not subject.ends & {"online", "stopped"} or not explained:
                self._world.violate(f"disk {subject.name} {state}: {disk.reason or 'no reason'}")
        elif state not in subject.ends:
            self._world.violate(
                f"disk {subject.name} is {state}, not {' or '.join(sorted(subject.ends))}"
            )
        if disk is not None and state == "online":
            self._check_details(subject, disk)
            self._check_data(subject, disk)

    def _hung(self, subject: Subject, disk: DiskStatus) -> bool:
        """Whether its medium hung for longer than a disk waits that is to stop."""
        storage = self._host.store.find(disk.spec)
        hung = storage is not None and storage.outlasted and "did not answer start" in disk.reason
        return hung and "stopped" in subject.ends

    def _check_details(self, subject: Subject, disk: DiskStatus) -> None:
        if subject.size not in (None, disk.size):
            self._world.violate(
                f"disk {subject.name} has {disk.size} bytes, not {subject.size} as was acknowledged"
            )
        causes, controller = self._host.causes, self._service.controller
        assert controller is not None
        placed = controller._disks[subject.name].placement
        missing = [c for c in placed.cores if c not in disk.cores and not causes.gave_up(c)]
        if missing and not causes.any_ever(disk.spec.name):
            self._world.violate(f"disk {subject.name} does without cores {missing}")
        if subject.device not in (None, disk.device):
            self._world.violate(
                f"disk {subject.name} is on {disk.device}, not on {subject.device} as is configured"
            )
        if subject.attached not in (None, disk.device is not None):
            self._world.violate(
                f"disk {subject.name} is on {disk.device or 'no device'}, not as was acknowledged"
            )

    def _check_data(self, subject: Subject, disk: DiskStatus) -> None:
        storage = self._host.store.find(disk.spec)
        if storage is None:
            self._world.violate(f"disk {subject.name} is online and has no storage")
            return
        if disk.size > storage.size and disk.spec.backend != "null":  # which has what is shown
            self._world.violate(f"disk {subject.name} has {disk.size} bytes, its storage less")
        application = subject.application
        ledger = application.ledgers[str(storage)]
        for block in ledger.acknowledged:
            application.check(ledger, block, storage.blocks.get(block, 0), "finds")

    def _check_devices(self, disks: dict[str, DiskStatus]) -> None:
        for device in self._host.driver.configured():
            if not device.tag.startswith(f"nbd-reactor:{INSTANCE}:") or device.disconnected:
                continue
            disk = disks.get(device.disk)
            if disk is None or disk.device != device.path:
                self._world.violate(f"{device.path} is left, of disk {device.disk}")
            elif disk.state == "online":
                self._check_device(device, disk)
        for disk in disks.values():
            if disk.state == "online" and disk.spec.device is not None and disk.device is None:
                self._world.violate(f"disk {disk.spec.name} is online without a device")

    def _check_device(self, device: KernelDevice, disk: DiskStatus) -> None:
        spec = disk.spec
        forgotten = spec.name in self._host.store.forgotten
        timeout = spec.timeout or (SEVERAL_TIMEOUT if len(device.sockets) > 1 else 0)
        for what, has, should in (
            ("bytes", device.size, disk.size),
            ("seconds a request may take", device.timeout, timeout),
            ("seconds to wait for us", device.dead_timeout, spec.dead_timeout),
        ):
            if has != should and device.way == "netlink" and not forgotten:
                self._world.violate(f"{device.path} has {has} {what}, disk {spec.name} {should}")

    def _check_ends(self) -> None:
        platform = self._service.platform
        assert platform is not None
        if platform.ends:
            self._world.violate(f"the controller keeps {len(platform.ends)} sockets open")

    # --- the stop ---

    def expect_stop(self) -> None:
        """Allow what an orderly stop does."""
        for name in self._operator.subjects:
            self._operator.excuse(name)

    def check_stopped(self, *, keeps: bool) -> None:
        """Complain of what an orderly stop leaves; `keeps`: devices and memory are to stay."""
        for process in self._host.processes.values():
            self._world.violate(f"{process} is left")
        if keeps:
            return
        for device in self._host.driver.configured():
            if not device.disconnected:
                self._world.violate(f"{device.path} is left, of disk {device.disk}")
        for disk in self._host.store.memories():
            if disk not in self._host.store.forgotten:
                self._world.violate(f"memory is left: {disk}")
