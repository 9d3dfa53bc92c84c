"""Images where the network mounts something, with what the page of systemd says that this needs."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.machine.machine import Machine
from tests.machine.operator import ROOT, Operator, changes

pytestmark = [pytest.mark.extended, pytest.mark.timeout(1800)]

PAGE = ROOT / "deploy/systemd.md"
DROP_IN = "/etc/systemd/system/srv-images.mount.d/nbd-reactor.conf"
DISK = {"backend": "file", "path": "/srv/images/data.img", "size": "16MiB", "device": "auto"}
ONLINE = "nbd-reactorctl list | grep -q 'data .*online'"
LISTING = "find /etc /opt /usr/local /var/lib -xdev | grep -v /var/lib/systemd"


@pytest.fixture(scope="module")
def operator(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    operator = Operator(machine, tmp_path_factory.mktemp("operator"))
    operator.variables["nbd_reactor_disks"] = {"data": DISK}
    machine.run("mkdir /srv/images && truncate -s 128M /srv/network && mkfs.ext4 -q /srv/network")
    machine.run(
        "cp /etc/fstab /root && echo /srv/network /srv/images ext4 loop,_netdev 0 0 >>/etc/fstab"
    )
    machine.run("systemctl daemon-reload && systemctl start srv-images.mount")
    yield operator
    machine.run("mv /root/fstab /etc && umount /srv/images && rm -r /srv/images /srv/network")
    machine.run(f"rm -r {DROP_IN.rpartition('/')[0]} && systemctl daemon-reload")


def test_a_host_whose_mount_comes_after_the_service_is_refused(
    operator: Operator, machine: Machine
) -> None:
    before = machine.run(LISTING)
    assert "srv-images.mount starts after the service" in operator.play("install", fails=True)
    assert machine.run(LISTING) == before


def test_with_the_drop_in_the_images_are_there_after_a_reboot(
    operator: Operator, machine: Machine
) -> None:
    found = re.search(r"<<'END'\n(.*?)^END$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    machine.write(DROP_IN, found[1])
    machine.run("systemctl daemon-reload")
    assert changes(operator.play("install")) > 0
    machine.reboot()
    assert machine.run("journalctl -b -g 'ordering cycle' -o cat || true") == ""
    machine.run(f"{ONLINE} && test -e /srv/images/data.img && mountpoint -q /srv/images")


def test_without_its_mount_the_service_does_not_start(operator: Operator, machine: Machine) -> None:
    machine.run("systemctl stop nbd-reactor && umount /srv/images && mv /srv/network /srv/away")
    machine.run("! systemctl start nbd-reactor")
    assert machine.run("journalctl -b -u nbd-reactor -g '^Dependency failed' -o cat") != ""
    assert "srv-images.mount" in machine.run("systemctl list-units --failed '*.mount'")
    machine.run("mv /srv/away /srv/network && systemctl start nbd-reactor")
    machine.await_success(ONLINE)
    operator.play("uninstall", nbd_reactor_remove_images=True)
