"""What a disk will be is saved before anybody can rely on it, and not what it will not be."""

from __future__ import annotations

import errno
import signal

import pytest

from reactor.control.saved import Wish, decode
from reactor.control.saving import Saving
from reactor.spec import Address
from tests.simulation.host import INSTANCE
from tests.simulation.hosts import Hosts
from tests.simulation.world import NS

SAVE_SECONDS = 0.3  # as with thousands of disks


def saved(hosts: Hosts, name: str) -> Wish:
    assert hosts.host.saved is not None
    assert hosts.service.platform is not None
    state = decode(hosts.host.saved, INSTANCE, hosts.service.platform.boot)
    (wish,) = (wish for wish in state.wishes if wish.spec.name == name)
    return wish


def device(hosts: Hosts, name: str) -> str | None:
    controller = hosts.service.controller
    return {d.spec.name: d.device for d in controller.disks()}.get(name) if controller else None


def test_an_attach_that_is_refused_is_not_saved(hosts: Hosts) -> None:
    controller, before = hosts.service.controller, hosts.host.saves
    assert controller is not None
    answers: list[str | Exception] = []
    controller.attach("stays", "/dev/nbd3", answers.append)
    assert isinstance(answers[0], OSError)
    assert hosts.host.saves == before


def test_an_attach_that_was_not_answered_is_forgotten_with_its_controller(hosts: Hosts) -> None:
    controller = hosts.service.controller
    assert controller is not None
    controller.attach("plain", "/dev/nbd3", lambda _: None)
    assert saved(hosts, "plain").attaching
    hosts.service.die()
    hosts.await_states(stays="online", moves="online", plain="online", wide="online")
    assert not saved(hosts, "plain").attaching
    assert saved(hosts, "plain").spec.device is None


def attach_without_worker(hosts: Hosts, answers: list[str | Exception | None]) -> None:
    assert hosts.service.controller is not None
    hosts.worker(1).send_signal(signal.SIGKILL)
    hosts.await_true(lambda: hosts.states()["plain"] == "starting")
    hosts.service.controller.attach("plain", "/dev/nbd3", answers.append)


def test_a_reload_ends_an_attach_that_is_under_way(hosts: Hosts) -> None:
    """And what the config says is done, also by a next controller."""
    controller, answers = hosts.service.controller, []
    assert controller is not None
    attach_without_worker(hosts, answers)
    hosts.configure("plain", device="/dev/nbd3")
    controller.reload(answers.append)
    assert [getattr(answer, "errno", None) for answer in answers] == [errno.ECANCELED, None]
    assert not saved(hosts, "plain").attaching
    hosts.service.die()
    hosts.await_true(lambda: device(hosts, "plain") == "/dev/nbd3")


@pytest.mark.parametrize("taken", ["/dev/nbd9", "/dev/nbd3"])  # nobody can have, and all can
def test_an_attach_in_flight_ends_alone(hosts: Hosts, taken: str) -> None:
    """A reload ends it, with another `listen`: its failure is nobody's then."""
    controller, answers = hosts.service.controller, []
    assert controller is not None
    controller.attach("plain", taken, answers.append)
    hosts.configure("plain", listen=(Address("unix", "/run/plain.sock"),))
    controller.reload(answers.append)
    assert [getattr(answer, "errno", None) for answer in answers] == [errno.ECANCELED, None]
    hosts.let_pass(10)
    assert hosts.states()["plain"] == "online"
    assert device(hosts, "plain") is None


def test_each_who_asks_for_a_device_is_answered(hosts: Hosts) -> None:
    controller, answers, others = hosts.service.controller, [], []
    assert controller is not None
    controller.attach("plain", "/dev/nbd9", answers.append)
    controller.detach("/dev/nbd9", lambda _: None)
    controller.attach("plain", "/dev/nbd3", others.append)
    hosts.await_true(lambda: bool(answers and others))
    assert getattr(answers[0], "errno", None) == errno.ECANCELED
    assert others == ["/dev/nbd3"]


def test_an_attach_that_a_stop_overtakes_leaves_nothing(hosts: Hosts) -> None:
    controller, answers = hosts.service.controller, []
    assert controller is not None
    attach_without_worker(hosts, answers)
    controller.stop("plain", lambda _: None)
    hosts.await_true(lambda: bool(answers))
    assert isinstance(answers[0], OSError)
    controller.start("plain", answers.append)
    hosts.await_true(lambda: len(answers) == 2)
    assert answers[1] is None
    assert device(hosts, "plain") is None


def test_what_takes_the_place_of_a_disk_is_saved_before_it_is_attached(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, save_for_all = hosts.service.controller, Saving._save_for_all
    assert controller is not None

    def save_slowly(saving: Saving) -> None:
        save_for_all(saving)
        saving._took = SAVE_SECONDS

    monkeypatch.setattr(Saving, "_save_for_all", save_slowly)
    for application in hosts.applications:
        application.finish()
    hosts.let_pass(3)
    hosts.configure("moves", block_size=4096)
    controller.reload(lambda _: None)

    def is_made_anew() -> bool:
        disk = controller.disk("moves")
        return disk is not None and disk.spec.block_size == 4096

    hosts.await_true(is_made_anew)
    hosts.worker(0).send_signal(signal.SIGKILL)  # all others may go on now
    hosts.await_true(lambda: any(d.disk == "moves" for d in hosts.host.driver.configured()))
    assert saved(hosts, "moves").spec.block_size == 4096


def test_a_stopped_disk_stays_so(hosts: Hosts) -> None:
    """What else was to be noted of it was noted before its stop was answered."""
    hosts.finish_applications()
    answers: list[object] = []
    assert hosts.service.controller is not None
    hosts.service.controller.stop("stays", answers.append)
    hosts.await_true(lambda: bool(answers))
    seen, end = set(), hosts.world.now + 15 * NS

    def look() -> bool:
        seen.add(hosts.states()["stays"])
        return hosts.world.now > end

    hosts.await_true(look)
    assert seen == {"stopped"}
