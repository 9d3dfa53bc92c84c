"""Who asks things of the service, and knows what each disk must be in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from reactor.control.service import Done
from reactor.spec import AttachWay, DiskSpec
from tests.simulation.application import Application
from tests.simulation.host import Host
from tests.simulation.kernel import KernelDevice
from tests.simulation.service import Service
from tests.simulation.world import NS

MIB: Final = 1 << 20
NAMES: Final = ("a", "b", "c", "d")
FALLING: Final = ("stop", "remove", "detach")
EXCUSED_SECONDS: Final = 15.0


class Subject:
    """One disk by its name, whether it is there or not."""

    def __init__(self, host: Host, name: str, on_error: Callable[[str, KernelDevice, int], None]):
        random = host.world.random
        self.name = name
        self.backend = random.choice(("malloc", "malloc", "file", "null"))
        self.ways: tuple[AttachWay, ...] = random.choice((("auto",), ("auto",), ("ioctl", "auto")))
        self.ends: set[str] = {"gone"}  # what it may be in the end
        self.asking = ""  # what was asked and is not answered
        self.excused = False  # I/O errors are allowed
        self.excused_at = 0
        self.application = Application(host, name, on_error)
        self.application.checked = self.backend != "null"

    @property
    def forgets(self) -> bool:
        """Whether the data go with the disk."""
        return self.backend == "malloc"


class Operator:
    """Asks for things at random; at most one is under way for each disk."""

    def __init__(self, host: Host, service: Service) -> None:
        self._host = host
        self._world = host.world
        self._service = service
        self.subjects = {name: Subject(host, name, self._on_error) for name in NAMES}
        self._stopping = False  # the service was asked to
        self.avoided: int | None = None  # a core that the next life of the service has not
        config = [self._spec(s) for s in self.subjects.values() if self._world.chance(0.6)]
        self._configure(config)
        for spec in config:
            self.subjects[spec.name].ends = {"online"}
        self._excuse_no_longer()

    # --- what it knows ---

    def excuse(self, name: str) -> None:
        """Allow I/O errors on a disk until it is at rest again, and a little longer."""
        subject = self.subjects[name]
        subject.excused, subject.excused_at = True, self._world.now

    def _excuse_no_longer(self) -> None:
        self._world.after(1.0, self._excuse_no_longer)
        controller = self._service.controller
        for name, subject in self.subjects.items():
            status = controller.disk(name) if controller is not None else None
            if self._stopping or controller is None or subject.asking in FALLING:
                busy = True
            else:
                busy = status is not None and status.state in ("starting", "stopping")
            if busy and subject.excused:
                self.excuse(name)
            elif self._world.now - subject.excused_at > EXCUSED_SECONDS * NS:
                subject.excused = False

    def _on_error(self, name: str, device: KernelDevice, error: int) -> None:
        subject = self.subjects[name]
        if device.was_ioctl or subject.excused:
            return
        self._world.violate(f"an I/O error {error} on {device.path}, disk {name}")

    # --- what it asks ---

    def ask_something(self) -> None:
        """Ask for one thing, if the service is there."""
        subject = self.subjects[self._world.random.choice(NAMES)]
        verb = self._world.random.choice(
            ("create", "stop", "start", "start", "remove", "resize", "resize", "attach", "detach")
        )
        if self._world.chance(0.25):
            self.reload()
        elif self._service.controller is not None and not subject.asking:
            getattr(self, f"_{verb}")(subject)

    def _begin(self, subject: Subject, verb: str, *ends: str) -> Done:
        self._world.note("asked: %s disk %s", verb, subject.name)
        subject.asking = verb
        platform = self._service.platform
        answered = False

        def done(error: Exception | str | None) -> None:
            nonlocal answered
            if answered:
                self._world.violate(f"{verb} of disk {subject.name} was answered twice")
            answered = True
            if platform is not None and platform.dead:
                return
            self._world.note("answered: %s disk %s: %s", verb, subject.name, error or "done")
            subject.asking = ""
            if not isinstance(error, Exception):
                if ends:
                    subject.ends = set(ends)
                self._succeeded(subject, verb)

        return done

    def _succeeded(self, subject: Subject, verb: str) -> None:
        if verb == "create":
            subject.application.checked = subject.backend != "null"

    def forget_questions(self) -> None:
        """Await no answers of a controller that died."""
        for subject in self.subjects.values():
            subject.asking = ""
            if self._host.unsaved:
                self._host.forgot = self._host.store.forgotten = True
                subject.ends |= {"online", "stopped", "gone"}
                self._expect_loss(subject)
                self.excuse(subject.name)

    def _create(self, subject: Subject) -> None:
        assert self._service.controller is not None
        if subject.ends == {"gone"}:
            self._world.note("%s", self._spec(subject))
        if "gone" not in subject.ends:
            return
        subject.ends.add("online")
        done = self._begin(subject, "create", "online")
        self.excuse(subject.name)  # should it fail, it goes again
        if subject.forgets:
            subject.application.ledger.forget()
        self._service.controller.create(self._spec(subject), done)

    def _stop(self, subject: Subject) -> None:
        assert self._service.controller is not None
        if subject.ends == {"gone"}:
            return
        self.excuse(subject.name)
        subject.ends.add("stopped")
        ends = ("stopped",) if "gone" not in subject.ends else ("stopped", "gone")
        self._service.controller.stop(subject.name, self._begin(subject, "stop", *ends))

    def _start(self, subject: Subject) -> None:
        assert self._service.controller is not None
        if subject.ends == {"gone"}:
            return
        subject.ends.add("online")
        ends = ("online",) if "gone" not in subject.ends else ("online", "gone")
        self._service.controller.start(subject.name, self._begin(subject, "start", *ends))

    def _remove(self, subject: Subject) -> None:
        assert self._service.controller is not None
        if subject.ends == {"gone"}:
            return
        self.excuse(subject.name)
        self._expect_loss(subject)
        subject.ends.add("gone")
        self._service.controller.remove(subject.name, self._begin(subject, "remove", "gone"))

    def _resize(self, subject: Subject) -> None:
        assert self._service.controller is not None
        size = self._world.random.randint(1, 8) * MIB
        done = self._begin(subject, f"resize to {size}")
        self._service.controller.resize(subject.name, size, done)

    def _attach(self, subject: Subject) -> None:
        assert self._service.controller is not None
        device = self._world.random.choice((None, "/dev/nbd0", "/dev/nbd1"))
        done = self._begin(subject, f"attach to {device}")
        self._service.controller.attach(subject.name, device, done)

    def _detach(self, subject: Subject) -> None:
        assert self._service.controller is not None
        status = self._service.controller.disk(subject.name)
        if status is not None and status.device is not None:
            self.excuse(subject.name)
            done = self._begin(subject, "detach")
            self._service.controller.detach(status.device, done)

    def _expect_loss(self, subject: Subject) -> None:
        if subject.forgets:
            subject.application.checked = False

    # --- the service ---

    def restart(self) -> None:
        """Stop the service in order; it starts again."""
        controller = self._service.controller
        if controller is None:
            return
        on_exit = self._service.options.on_exit
        self._world.note("asked: a stop that is to %s", on_exit)
        for subject in self.subjects.values():
            if on_exit == "disconnect":
                self.excuse(subject.name)
                self._expect_loss(subject)
        self._stopping = True
        controller.shut_down()

    def stopped(self) -> None:
        """Expect what is so after an orderly stop."""
        self._world.note("the service has stopped")
        self.forget_questions()
        if self._service.options.on_exit == "keep":
            return
        configured = {spec.name for spec in self._service.config}
        for name, subject in self.subjects.items():
            subject.ends = {"online"} if name in configured else {"gone"}

    def starts(self) -> None:
        """Change what may change between two lives of the service."""
        world, service = self._world, self._service
        self._stopping = False
        for subject in self.subjects.values():
            if not subject.application.checked and subject.backend != "null":
                subject.application.ledger.forget()
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
        service.change(on_exit=world.random.choice(("keep", "disconnect")))

    # --- the config ---

    def reload(self) -> None:
        """Change the file, and have it read."""
        controller = self._service.controller
        if controller is None or any(subject.asking for subject in self.subjects.values()):
            return
        self.change_config()
        self._world.note("asked: reload %s", self._service.config)

        def done(error: Exception | None) -> None:
            self._world.note("answered: reload: %s", error or "done")

        controller.reload(done)

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
            elif now is not None:
                self.excuse(subject.name)
                self._expect_loss(subject)
        self._configure(config)

    def _configure(self, config: list[DiskSpec]) -> None:
        before = {spec.name: spec for spec in self._service.config}
        self._service.config = tuple(config)
        now = {spec.name: spec for spec in config}
        for name, subject in self.subjects.items():
            if name in now and now[name] != before.get(name):
                self.excuse(name)
                if "gone" in subject.ends and subject.forgets:
                    subject.application.ledger.forget()
                subject.ends |= {"online"}
            elif name in now:
                subject.ends |= {"online"}
            elif name in before:
                subject.ends |= {"gone"}

    def _spec(self, subject: Subject) -> DiskSpec:
        random = self._world.random
        options: dict[str, object] = {"size": random.randint(1, 8) * MIB}
        if subject.backend == "file":
            options["path"] = f"/images/{subject.name}"
        named = f"/dev/nbd{random.randrange(len(self._host.driver.devices))}"
        cores = self._service.options.cores
        return DiskSpec(
            subject.name,
            subject.backend,
            options,
            device=random.choice((None, "auto", "auto", "auto", named)),
            core=random.choice((None, None, None, *cores)),
            connections=random.choice((1, 1, 1, 2, 4)),
            timeout=random.choice((None, None, None, None, 8)),
            dead_timeout=600,
            attach=random.choice(subject.ways),
        )
