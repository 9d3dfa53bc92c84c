"""Who asks things of the service, and notes what the answers promise."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from reactor.control.service import Done
from reactor.spec import Address, DiskSpec
from tests.simulation.host import Host
from tests.simulation.kernel import KernelDevice
from tests.simulation.service import Service
from tests.simulation.subjects import Subject, is_refusal, is_unsaved
from tests.simulation.world import NS

MIB: Final = 1 << 20
NAMES: Final = ("a", "b", "c", "d")
FALLING: Final = ("stop", "remove", "detach")
EXCUSED_SECONDS: Final = 15.0


class Operator:
    """Asks for things at random; at most one is under way for each disk."""

    def __init__(self, host: Host, service: Service) -> None:
        self._host = host
        self._world = host.world
        self._service = service
        self.subjects = {name: Subject(host, name, self._on_error) for name in NAMES}
        self.tires = False  # a start must not be strict any more
        self._stopping = False  # the service was asked to
        self.avoided: int | None = None  # a core that the next life of the service has not
        self._unread = False  # the config, as it is now, by the service
        config = [self._spec(s) for s in self.subjects.values() if self._world.chance(0.6)]
        self._configure(config)
        self._taken = {spec.name for spec in config}  # by the service from the config, for sure
        for spec in config:
            self.subjects[spec.name].is_configured(spec)
        self._look()
        host.store.on_made_anew = lambda name: self.subjects[name].application.forget()

    # --- what it knows ---

    def excuse(self, name: str) -> None:
        """Allow I/O errors on a disk until it is at rest again, and a little longer."""
        subject = self.subjects[name]
        subject.excused, subject.excused_at = True, self._world.now

    def _look(self) -> None:
        """Forget now and then what a disk has got over."""
        self._world.after(1.0, self._look)
        # One that is stopped believes in what was before.
        controller = self._service.controller if self._service.listens else None
        for name, subject in self.subjects.items():
            status = controller.disk(name) if controller is not None else None
            if status is not None and status.state == "online":
                self._host.causes.is_online(name)
                subject.changing = subject.changing and self._host.unsaved
                self._rely_on(subject, status.spec)
            if self._stopping or controller is None or subject.asking in FALLING:
                busy = True
            else:
                busy = status is not None and status.state in ("starting", "stopping")
            if busy and subject.excused:
                self.excuse(name)
            elif self._world.now - subject.excused_at > EXCUSED_SECONDS * NS:
                subject.excused = False

    def _rely_on(self, subject: Subject, spec: DiskSpec) -> None:
        store = self._host.store
        if not (self._stopping or subject.asking or self._host.unsaved):
            store.relied_on.add(store.key(spec.backend, spec.name, spec.options))

    def _leaves_nothing(self, exit_status: int) -> bool:
        """Whether it is a strict start that failed, and had found nothing to leave as it was."""
        return bool(exit_status) and not self._service.must_keep(exit_status)

    def _on_error(self, name: str, device: KernelDevice, error: int) -> None:
        subject, controller = self.subjects[name], self._service.controller
        if device.was_ioctl or subject.excused or device.gave_up_at == self._world.now:
            return
        if controller is not None and self._leaves_nothing(controller.exit_status):
            return
        if subject.keys & self._host.store.lost.keys():
            return
        self._world.violate(f"an I/O error {error} on {device.path}, disk {name}")

    # --- what it asks ---

    def ask_something(self) -> None:
        """Ask for one thing, if the service is there."""
        if not self._service.listens:
            return
        subject = self.subjects[self._world.random.choice(NAMES)]
        verb = self._world.random.choice(
            ("create", "stop", "start", "start", "remove", "resize", "resize", "attach", "detach")
        )
        if self._world.chance(0.25):
            self.reload()
        elif self._service.controller is not None and not subject.asking:
            getattr(self, f"_{verb}")(subject)

    def _begin(
        self,
        subject: Subject,
        verb: str,
        succeeded: Callable[[], None],
        failed: Callable[[Exception], None] = lambda _: None,
    ) -> Done:
        """Return what takes the answer. `failed` is not called when nothing was changed."""
        self._world.note("asked: %s disk %s", verb, subject.name)
        subject.asking = verb
        platform = self._service.platform
        before, checked = set(subject.ends), subject.application.checked
        began, answered = self._world.now, False

        def done(error: Exception | str | None) -> None:
            nonlocal answered
            if answered:
                self._world.violate(f"{verb} of disk {subject.name} was answered twice")
            answered = True
            if platform is not None and platform.dead:
                return
            self._world.note("answered: %s disk %s: %s", verb, subject.name, error or "done")
            if subject.answered(error):
                succeeded()
            elif is_refusal(error) and self._world.now == began:
                subject.ends, subject.application.checked = before, checked
            elif getattr(error, "errno", None) == errno.ESHUTDOWN:  # overtaken by a stop
                subject.forget_details()
            elif isinstance(error, Exception):
                failed(error)

        return done

    def forget_questions(self) -> None:
        """Await no answers of a controller that died, and expect less of what it could not save."""
        if self._leaves_nothing(self._service.exit_status):
            for subject in self.subjects.values():
                subject.expect_loss()
        if self._host.unsaved and self._host.saved is None:
            # What is left of them is nobody's to remove.
            self._host.store.forgotten.update(self.subjects)
        if self._host.unsaved:
            self._host.store.relied_on.clear()
        for subject in self.subjects.values():
            if self._host.unsaved and subject.backend == "null":
                # It may have been moved, and no lock keeps it to one worker.
                self._host.store.forgotten.add(subject.name)
            if subject.at_risk:
                self._world.note("what disk %s should be was not saved", subject.name)
                self._host.store.forgotten.add(subject.name)
                subject.may_be_anything()
                self.excuse(subject.name)
            elif subject.asking:
                subject.forget_details()
            subject.asking = ""

    def _create(self, subject: Subject) -> None:
        assert self._service.controller is not None
        if "gone" not in subject.ends:
            return
        spec = self._spec(subject)
        self._world.note("%s", spec)
        before = set(subject.ends)

        def created() -> None:
            subject.ends = {"online"}
            subject.attached = spec.device is not None
            subject.size = None if subject.backend == "file" else spec.options["size"]
            subject.expect_new()

        def failed(_: Exception) -> None:
            subject.ends = before

        self.excuse(subject.name)  # should it fail, it goes again
        if subject.forgets:
            subject.application.forget()
        done = self._begin(subject, "create", created, failed)
        subject.ends.add("online")
        subject.forget_details()
        self._service.controller.create(spec, done)

    def _stop(self, subject: Subject) -> None:
        assert self._service.controller is not None
        if subject.ends == {"gone"}:
            return
        self.excuse(subject.name)
        subject.allow_new()
        done = self._begin(subject, "stop", lambda: self._becomes(subject, "stopped"))
        subject.ends.add("stopped")
        self._service.controller.stop(subject.name, done)

    def _start(self, subject: Subject) -> None:
        assert self._service.controller is not None
        if subject.ends == {"gone"}:
            return

        def started() -> None:
            self._becomes(subject, "online")

        done = self._begin(subject, "start", started, lambda _: started())
        subject.ends.add("online")
        self._service.controller.start(subject.name, done)

    @staticmethod
    def _becomes(subject: Subject, end: str) -> None:
        # What is on its way to be gone, as a config says, goes.
        subject.ends = {end, *({"gone"} & subject.ends)}

    def _remove(self, subject: Subject) -> None:
        assert self._service.controller is not None
        if subject.ends == {"gone"}:
            return

        def removed() -> None:
            subject.ends = {"gone"}
            subject.forget_details()

        self.excuse(subject.name)
        done = self._begin(subject, "remove", removed)
        subject.expect_loss()
        subject.ends |= {"gone", "removed"}  # the latter if a controller dies before it is saved
        self._service.controller.remove(subject.name, done)

    def _resize(self, subject: Subject) -> None:
        assert self._service.controller is not None
        size = self._world.random.randint(1, 8) * MIB

        def resized() -> None:
            subject.size = size

        def failed(error: Exception) -> None:
            if getattr(error, "errno", None) != errno.ENOSPC:  # else the storage refused
                subject.size = None

        done = self._begin(subject, f"resize to {size}", resized, failed)
        self._service.controller.resize(subject.name, size, done)

    def _attach(self, subject: Subject) -> None:
        assert self._service.controller is not None
        device = self._world.random.choice((None, "/dev/nbd0", "/dev/nbd1"))

        def attached() -> None:
            subject.attached = True

        def failed(_: Exception) -> None:
            subject.attached = None

        done = self._begin(subject, f"attach to {device}", attached, failed)
        self._service.controller.attach(subject.name, device, done)

    def _detach(self, subject: Subject) -> None:
        assert self._service.controller is not None
        status = self._service.controller.disk(subject.name)
        if status is None or status.device is None:
            return
        paths = [disk.device for disk in self._service.controller.disks()]
        if paths.count(status.device) > 1:  # one has lost it and does not know yet
            return
        at_rest = status.state == "online"  # else the device may be on its way to come or go

        subject.device = None

        def detached() -> None:
            subject.attached = False if at_rest else None

        def failed(_: Exception) -> None:
            subject.attached = None

        self.excuse(subject.name)
        done = self._begin(subject, "detach", detached, failed)
        self._service.controller.detach(status.device, done)

    # --- the service ---

    def restart(self) -> None:
        """Stop the service in order; it starts again."""
        controller = self._service.controller
        if controller is None or not self._service.listens:
            return
        on_exit = self._service.options.on_exit
        self._world.note("asked: a stop that is to %s", on_exit)
        for subject in self.subjects.values():
            if on_exit == "disconnect":
                self.excuse(subject.name)
                subject.expect_loss()
        self._stopping = True
        controller.shut_down()

    def stopped(self) -> None:
        """Expect what is so after a stop in order, or after a strict start that failed."""
        status = self._service.exit_status
        self._world.note("the service has stopped with status %d", status)
        if status and not (self._service.options.strict and self._host.causes.any):
            self._world.violate(f"the service ends with status {status}, and all was well")
        self.forget_questions()
        if not self._service.kept:
            if self._host.core_locks:  # a worker outlives a stop by force while its medium hangs
                self._host.store.forgotten.update(self.subjects)
            for subject in self.subjects.values():
                subject.expect_loss()
                self.is_configured(subject)

    def crashed(self, *, keeps_state: bool) -> None:
        """Expect what survives the host: files, what was flushed, and perhaps the saved state."""
        self.forget_questions()
        for subject in self.subjects.values():
            subject.application.crash(keeps=subject.backend == "file")
            if not keeps_state:
                self.is_configured(subject)

    def is_configured(self, subject: Subject) -> None:
        """Expect what the config says, and nothing else."""
        config = {spec.name: spec for spec in self._service.config}
        subject.is_configured(config.get(subject.name))

    def starts(self) -> None:
        """Change what may change between two lives of the service."""
        world, service = self._world, self._service
        self._stopping = False
        for subject in self.subjects.values():
            if not subject.application.checked and subject.backend != "null":
                subject.application.forget()
                subject.application.checked = "gone" not in subject.ends
        if world.chance(0.1):
            self._host.version += 1
        if world.chance(0.2):
            self.change_config()
        avoided, self.avoided = self.avoided, None
        if world.chance(0.15) or avoided is not None:
            cpus = [cpu for cpu in range(self._host.cpus) if cpu != avoided] or [0]
            cores = sorted(world.random.sample(cpus, world.random.randint(1, min(3, len(cpus)))))
            service.change(cores=tuple(cores))
            config = [s if s.core in cores else replace(s, core=None) for s in service.config]
            self._configure(config)
        self._try_again()
        service.change(on_exit=world.random.choice(("keep", "disconnect")))
        service.change(strict=not self.tires and world.chance(0.5))
        self._unread = any(subject.refusable for subject in self.subjects.values())
        names = (spec.name for spec in service.config)
        self._taken = {n for n in names if n in self._taken or not self.subjects[n].refusable}

    # --- the config ---

    def reload(self) -> None:
        """Change the file, and have it read."""
        controller = self._service.controller
        if controller is None or any(subject.asking for subject in self.subjects.values()):
            return
        before = {spec.name: spec for spec in self._service.config}
        was_unread, self._unread = self._unread, True
        self.change_config()
        self._try_again()
        self._world.note("asked: reload %s", self._service.config)
        for spec in self._service.config:
            self._may_rise(self.subjects[spec.name])

        def done(error: Exception | None) -> None:
            self._world.note("answered: reload: %s", error or "done")
            if error is None or is_unsaved(error):
                self._unread = False
                for subject in self.subjects.values():
                    subject.refusable = False
                if not was_unread:
                    self._reloaded(before)
                self._taken = {spec.name for spec in self._service.config}
            for subject in self.subjects.values() if error is not None else ():
                subject.answered(error)

        controller.reload(done)

    def _reloaded(self, before: dict[str, DiskSpec]) -> None:
        """Expect what a reload promises."""
        now = {spec.name: spec for spec in self._service.config}
        for name, subject in self.subjects.items():
            if name in now and now[name] != before.get(name):
                subject.ends = subject.ends & {"online", "stopped"}
                device, earlier = now[name].device, before.get(name)
                if earlier is None or device != earlier.device:  # else a detach counts
                    subject.device = device if device != "auto" else None
            elif name in now:
                subject.ends.discard("gone")
            elif name in before and name not in now and name in self._taken:
                subject.ends = {"gone"}

    def change_config(self) -> None:
        """Write another file."""
        config = []
        for subject in self.subjects.values():
            now = next((s for s in self._service.config if s.name == subject.name), None)
            draw = self._world.random.random()
            if now is not None and draw < 0.5:
                config.append(now)
            elif draw < 0.9:
                config.append(self._spec(subject))
        self._configure(config)

    def _configure(self, config: list[DiskSpec]) -> None:
        before = {spec.name: spec for spec in self._service.config}
        self._service.config = tuple(config)
        now = {spec.name: spec for spec in config}
        for name, subject in self.subjects.items():
            if now.get(name) != before.get(name):
                self._may_change(subject, is_configured=name in now)

    @staticmethod
    def _may_rise(subject: Subject) -> None:
        """Expect that a disk comes up, unless it was stopped."""
        if subject.ends != {"stopped"}:
            subject.ends.add("online")

    def _try_again(self) -> None:
        """Expect that changes which were refused, perhaps, are made when the file is read."""
        configured = {spec.name for spec in self._service.config}
        for name, subject in self.subjects.items():
            if subject.refusable:
                self._may_change(subject, is_configured=name in configured)

    def _may_change(self, subject: Subject, *, is_configured: bool) -> None:
        """Expect what a changed config does to a disk."""
        subject.forget_details()
        subject.allow_new()
        subject.changing = True
        subject.refusable = any(s.application.mounts for s in self.subjects.values())
        if not subject.application.is_mounted:
            self.excuse(subject.name)
        if not is_configured:
            subject.expect_loss()
            subject.ends |= {"gone"}
            return
        if "gone" in subject.ends and subject.forgets:
            subject.application.forget()
        self._may_rise(subject)

    def _spec(self, subject: Subject) -> DiskSpec:
        random = self._world.random
        options: dict[str, object] = {"size": random.randint(1, 8) * MIB}
        if subject.backend == "file":
            options["path"] = random.choice(subject.paths)
        named = f"/dev/nbd{random.randrange(len(self._host.driver.devices))}"
        cores = self._service.options.cores
        core = random.choice((None, None, None, *cores))
        own, common = (Address("unix", f"/run/{name}.sock") for name in (subject.name, "common"))
        return DiskSpec(
            subject.name,
            subject.backend,
            options,
            device=random.choice((None, "auto", "auto", "auto", named)),
            # Disks that share an address cannot be on two cores.
            listen=random.choice(((), (own,), (common,) if core is None else (own,))),
            core=core,
            readonly=random.random() < 0.1,
            block_size=random.choice((None, None, None, None, 512)),
            connections=random.choice((1, 1, 1, 2, 4)),
            timeout=random.choice((None, None, None, None, 8)),
            dead_timeout=random.choice((600, 600, 600, 600, 60)),
            attach=random.choice(subject.ways),
        )
