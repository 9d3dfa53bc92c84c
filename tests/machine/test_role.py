"""The life of a host: installed, booted, upgraded under load, gone back, removed. In this order.

What is `extended` takes an hour more where the machine is emulated; without it the rest goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.machine.machine import Machine
from tests.machine.operator import Operator, changes

LONG = pytest.mark.timeout(1800)
EXTENDED = pytest.mark.extended
ONLY_ADD = ("--skip-tags", "nbd_reactor_install,nbd_reactor_disks")
MOUNT = "/srv/data"
DISKS: dict[str, dict[str, Any]] = {
    "data": {
        "backend": "file",
        "path": "/srv/images/data.img",
        "size": "64MiB",
        "device": "/dev/nbd0",
    },
    "raw": {"backend": "malloc", "size": "32MiB", "device": "/dev/nbd1"},
}
#: Verifies again and again what it wrote, slowly, until it is told to stop or finds an error.
LOAD = """\
set -e
while [ ! -e /run/load-stop ]; do
    fio --name=load --filename=/dev/disk/by-nbd/raw --rw=randwrite --bs=16k --size=8m \
        --ioengine=libaio --iodepth=4 --direct=1 --rate_iops=40 --verify=crc32c --verify_fatal=1 \\
        --verify_state_save=0
done
"""
#: All that an installation could leave, without what a host that lives changes by itself.
LISTING = """\
find / -xdev \\( -path /proc -o -path /sys -o -path /tmp -o -path /var/tmp -o -path /var/log \
    -o -path /var/cache -o -path /root -o -path /var/lib/systemd -o -name __pycache__ \\) \
    -prune -o -print
find /dev/shm /run/nbd-reactor* /run/systemd/system /run/tmpfiles.d 2>/dev/null
systemctl list-unit-files --no-legend; getent passwd; getent group
ps -eo args | grep '[n]bd-reactor'
"""
#: A release whose program can check a config but not run, and how it does not.
BROKEN = """\
#!/bin/sh
case " $* " in *" --check "*) exec /opt/nbd-reactor/releases/{whole}/bin/nbd-reactor "$@" ;; esac
echo this release is broken
{end}
"""
ENDS = {"exits": "exit 1", "hangs": "trap '' TERM USR1; exec sleep 900"}
STATUS = "nbd-reactorctl status | head -n 1"
CONTENT = "find /etc /opt -type f -exec sha256sum {} + ; find /etc /opt -type l -printf '%p %l\\n'"


@pytest.fixture(scope="module")
def operator(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    operator = Operator(machine, tmp_path_factory.mktemp("operator"))
    operator.variables["nbd_reactor_disks"] = DISKS
    operator.variables["nbd_reactor_options"] = ["--cores=0-1"]
    machine.run("mkdir -p /srv/images /usr/local/share/zsh/site-functions")
    return operator


@pytest.fixture(scope="module")
def bare(operator: Operator, machine: Machine) -> str:
    return machine.run(LISTING)


@LONG
@EXTENDED
def test_check_mode_on_a_fresh_host_foretells_and_changes_nothing(
    operator: Operator, machine: Machine, bare: str
) -> None:
    disk = ("-e", "add_disk_name=data", "-e", f"add_disk_at={MOUNT}")
    said = operator.play("add_disk", "--check", *disk)
    assert changes(said) > 0
    assert "path: /srv/images/data.img" in said
    assert "data has no device before it is started" in said
    assert machine.run(LISTING) == bare


@LONG
@EXTENDED
def test_bad_disks_on_a_fresh_host_leave_nothing(
    operator: Operator, machine: Machine, bare: str
) -> None:
    bad = {"raw": {**DISKS["raw"], "size": "32 apples"}}
    assert "disks.raw.size" in operator.play("install", fails=True, nbd_reactor_disks=bad)
    assert machine.run(LISTING) == bare


@LONG
def test_a_disk_is_installed_and_carries_a_file_system_through_a_reboot(
    operator: Operator, machine: Machine, bare: str
) -> None:
    disk = ("-e", "add_disk_name=data", "-e", f"add_disk_at={MOUNT}")
    assert changes(operator.play("add_disk", *disk)) > 0
    machine.run(f"sed -i s/_netdev/noatime,_netdev/ /etc/fstab; chmod 0700 {MOUNT}")
    assert changes(operator.play("add_disk", *disk)) == 0
    assert "noatime" in machine.run("grep by-nbd/data /etc/fstab")  # the operator's line stays
    assert machine.run(f"stat -c %a {MOUNT}") == "700"
    machine.run(f"echo kept >{MOUNT}/file && sync")
    machine.reboot()
    assert machine.run(f"findmnt -no FSTYPE,SOURCE {MOUNT}").split() == ["ext4", "/dev/nbd0"]
    assert machine.run(f"cat {MOUNT}/file") == "kept"
    assert machine.run("journalctl -b -g 'ordering cycle' -o cat || true") == ""
    assert machine.run("nbd-reactor --version && man -w nbd-reactor") != ""


@LONG
@EXTENDED
def test_a_disk_that_is_there_is_not_added_again(operator: Operator) -> None:
    disk = ("-e", "add_disk_name=data", "-e", f"add_disk_at={MOUNT}", *ONLY_ADD)
    assert changes(operator.play("add_disk", "--check", *disk)) == 0
    assert changes(operator.play("add_disk", *disk)) == 0


@LONG
@EXTENDED
def test_a_file_system_is_mounted_as_what_it_is_and_nothing_else_is(
    operator: Operator, machine: Machine
) -> None:
    disk = ("-e", "add_disk_name=raw", "-e", "add_disk_at=/srv/raw", *ONLY_ADD)
    machine.run("mkswap -q /dev/disk/by-nbd/raw")
    before = machine.run("cat /etc/fstab")
    assert "but TYPE=swap" in operator.play("add_disk", "--check", *disk, fails=True)
    assert "but TYPE=swap" in operator.play("add_disk", *disk, fails=True)
    assert machine.run("cat /etc/fstab") == before
    machine.run("wipefs -qa /dev/disk/by-nbd/raw && mkfs.ext2 -q /dev/disk/by-nbd/raw")
    operator.play("add_disk", *disk)
    assert machine.run("findmnt -no FSTYPE /srv/raw; findmnt --fstab -no FSTYPE /srv/raw") == (
        "ext2\next2"
    )
    machine.run("umount /srv/raw && rmdir /srv/raw && wipefs -qa /dev/disk/by-nbd/raw")
    machine.run("sed -i '/by-nbd.raw/d' /etc/fstab && systemctl daemon-reload")


@LONG
def test_bad_disks_are_refused_before_anything_changes(
    operator: Operator, machine: Machine
) -> None:
    before = machine.run(CONTENT)
    bad = {**DISKS, "raw": {**DISKS["raw"], "size": "32 apples"}}
    said = operator.play("install", fails=True, nbd_reactor_disks=bad)
    assert "disks.raw.size" in said
    assert machine.run(CONTENT) == before


@LONG
@EXTENDED
def test_a_disk_that_is_mounted_is_not_taken_out(operator: Operator, machine: Machine) -> None:
    before = machine.run(CONTENT)
    said = operator.play("install", fails=True, nbd_reactor_disks={"raw": DISKS["raw"]})
    assert f"mounted at {MOUNT}" in said
    assert machine.run(CONTENT) == before


@LONG
@EXTENDED
def test_an_image_moves_when_nobody_uses_it_any_more(operator: Operator, machine: Machine) -> None:
    play = ("install", "--tags", "nbd_reactor_disks")
    machine.run("mkdir /srv/moved && cp --sparse=always /srv/images/data.img /srv/moved")
    moved = {**DISKS, "data": {**DISKS["data"], "path": "/srv/moved/data.img"}}
    writable = "grep -c /srv/images /etc/systemd/system/nbd-reactor.service.d/50-disks.conf || true"
    said = operator.play(*play, fails=True, nbd_reactor_disks=moved)
    assert f"disk data stays as it was: /dev/nbd0 is in use by the mount {MOUNT}" in said
    assert machine.run(f"echo 1 >/proc/sys/vm/drop_caches; cat {MOUNT}/file") == "kept"
    assert machine.run(writable) == "2"
    machine.run(f"umount {MOUNT} && cp --sparse=always /srv/images/data.img /srv/moved")
    assert changes(operator.play(*play, nbd_reactor_disks=moved)) > 0
    assert machine.run(writable) == "0"
    assert changes(operator.play(*play, nbd_reactor_disks=moved)) == 0
    operator.play(*play)
    machine.run(f"mountpoint -q {MOUNT} || mount {MOUNT}; rm -r /srv/moved")


@LONG
@EXTENDED
def test_what_the_service_did_not_take_is_made_up_for(operator: Operator, machine: Machine) -> None:
    late = {"backend": "malloc", "size": "4MiB", "device": "auto"}
    disks = {**DISKS, "data": {**DISKS["data"], "direct": True}, "late": late}
    changed: dict[str, Any] = {
        "nbd_reactor_disks": disks,
        "nbd_reactor_options": ["--cores=0-1", "--log-level=debug"],  # so that it is restarted
    }
    mounted = machine.run("systemctl show -P InvocationID srv-data.mount")
    assert "disk data stays as it was" in operator.play("install", fails=True, **changed)
    machine.await_success("test -e /dev/disk/by-nbd/late")
    assert machine.run("systemctl show -P InvocationID srv-data.mount") == mounted
    assert machine.run(f"echo 1 >/proc/sys/vm/drop_caches; cat {MOUNT}/file") == "kept"
    machine.run(f"umount {MOUNT}")
    assert changes(operator.play("install", **changed)) > 0
    assert changes(operator.play("install", **changed)) == 0
    operator.play("install")
    machine.run(f"mountpoint -q {MOUNT} || mount {MOUNT}")
    machine.await_success("! test -e /dev/disk/by-nbd/late")


@LONG
@EXTENDED
def test_a_disk_is_measured_and_not_written_to_while_it_is_mounted(
    operator: Operator, tmp_path: Path
) -> None:
    settings = ("-e", "benchmark_seconds=1", "-e", f"benchmark_results={tmp_path}/results")
    said = operator.play("benchmark", "--check", "-e", "benchmark_disk=data", *settings)
    assert "with --check it is not" in said
    assert not (tmp_path / "results").exists()
    said = operator.play("benchmark", "-e", "benchmark_disk=data", *settings)
    assert "IOPS" in said
    (results,) = (tmp_path / "results").iterdir()
    assert json.loads(results.read_text())["jobs"][0]["read"]["total_ios"] > 0
    written = ("-e", "benchmark_rw=randwrite", "-e", "benchmark_destroy_data=true")
    for mode in ((), ("--check",)):
        assert MOUNT in operator.play(
            "benchmark", *mode, "-e", "benchmark_disk=data", *written, *settings, fails=True
        )


@LONG
@EXTENDED
def test_a_host_without_one_of_its_disks_is_not_upgraded(
    operator: Operator, machine: Machine
) -> None:
    machine.run("nbd-reactorctl remove raw")
    said = operator.play(
        "upgrade", fails=True, nbd_reactor_wheel=str(operator.new), nbd_reactor_online_seconds=4
    )
    assert "Not online after 4 s: raw (gone)." in said
    assert "nbd-reactor 1.0.1" in machine.run(STATUS)
    machine.run("systemctl reload nbd-reactor")
    machine.await_success("test -e /dev/disk/by-nbd/raw")


@pytest.fixture
def load(machine: Machine) -> Iterator[None]:
    """fio writes and verifies all the time; without an error, or the test fails."""
    machine.write("/run/load", LOAD)
    machine.run("dmesg --clear; systemd-run --quiet --unit=load --remain-after-exit bash /run/load")
    yield
    machine.run("touch /run/load-stop")
    machine.await_success("test $(systemctl show -P SubState load) != running")
    assert machine.run("systemctl show -P Result load") == "success"
    assert machine.run("dmesg | grep -i 'I/O error' || true") == ""
    machine.run("systemctl stop load; rm /run/load /run/load-stop")


@LONG
def test_upgrade_under_load(operator: Operator, machine: Machine, load: None) -> None:
    assert "nbd-reactor 1.0.1" in machine.run(STATUS)
    operator.play("upgrade", nbd_reactor_wheel=str(operator.new))
    assert "nbd-reactor 1.0.2" in machine.run(STATUS)
    assert machine.run("systemctl is-active load") == "active"


@LONG
@EXTENDED
def test_way_back_under_load(operator: Operator, machine: Machine, load: None) -> None:
    (old,) = machine.run("ls -d /opt/nbd-reactor/releases/1.0.1-*").split()
    operator.play("upgrade", "-e", f"nbd_reactor_release={Path(old).name}")
    assert "nbd-reactor 1.0.1" in machine.run(STATUS)
    assert machine.run("systemctl is-active load") == "active"


@pytest.mark.timeout(3000)
@EXTENDED
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_release_that_does_not_start_gives_way_to_the_one_before(
    operator: Operator, machine: Machine, load: None, end: str
) -> None:
    whole = machine.run("basename $(readlink /opt/nbd-reactor/current)")
    broken = "/opt/nbd-reactor/releases/broken"
    machine.run(
        f"mkdir -p {broken}/bin && ln -s ../{whole}/share {broken} && touch {broken}/installed"
    )
    machine.write(f"{broken}/bin/nbd-reactor", BROKEN.format(whole=whole, end=end))
    machine.run(f"chmod +x {broken}/bin/nbd-reactor")
    before = machine.run(CONTENT)
    release = ("-e", "nbd_reactor_release=broken")
    options = ["--cores=0-1", "--log-level=debug"]
    said = operator.play("upgrade", *release, fails=True, nbd_reactor_options=options)
    assert "What ran before runs again" in said
    assert "this release is broken" in said
    assert ("It was not ready after 300 s." in said) == (end == ENDS["hangs"])
    assert machine.run(CONTENT) == before
    assert "nbd-reactor 1.0.1" in machine.run(STATUS)
    machine.run(f"rm -r {broken}")
    assert changes(operator.play("install")) == 0


@LONG
@EXTENDED
def test_removal_is_refused_when_it_would_leave_something(
    operator: Operator, machine: Machine
) -> None:
    machine.run(f"umount {MOUNT}; cp /etc/fstab /root; sed -i /by-nbd/d /etc/fstab")
    options = machine.run("cat /etc/default/nbd-reactor")
    machine.write("/etc/default/nbd-reactor", "NBD_REACTOR_OPTIONS=--cores 7\n")
    machine.run("systemctl daemon-reload; ! systemctl restart nbd-reactor")
    said = operator.play("uninstall", fails=True)
    assert "systemctl start nbd-reactor" in said
    assert "/dev/nbd1 (nbd-reactor:" in said
    assert "/dev/shm/nbd-reactor-" in said
    machine.run("test -e /run/nbd-reactor/instance && test -e /opt/nbd-reactor/current")
    machine.run("systemctl is-enabled nbd-reactor")
    machine.write("/etc/default/nbd-reactor", f"{options}\n")
    machine.run("systemctl start nbd-reactor")
    before = machine.run(CONTENT)
    assert changes(operator.play("uninstall", "--check", nbd_reactor_remove_images=True)) > 0
    assert machine.run(CONTENT) == before
    machine.run("systemctl is-active nbd-reactor")
    machine.run(f"mv /root/fstab /etc; systemctl daemon-reload; mount {MOUNT}")


@LONG
def test_removal_is_refused_in_use_and_leaves_nothing(
    operator: Operator, machine: Machine, bare: str
) -> None:
    said = operator.play("uninstall", fails=True)
    assert f"mounted at {MOUNT}" in said
    assert f"/etc/fstab has /dev/disk/by-nbd/data for {MOUNT}" in said
    machine.run(f"umount {MOUNT}; sed -i /by-nbd/d /etc/fstab; rmdir {MOUNT}")
    machine.run("systemctl daemon-reload")
    operator.play("uninstall", nbd_reactor_remove_images=True)
    machine.run("rm /srv/images/data.img")
    machine.run("! test -e /root/.cache/pip")
    left, before = set(machine.run(LISTING).splitlines()), set(bare.splitlines())
    assert not left - before
    assert "/usr/local/share/zsh/site-functions" in left  # as Debian's zsh makes it


@LONG
@EXTENDED
def test_where_nothing_is_left_nothing_is_removed(operator: Operator, machine: Machine) -> None:
    machine.write("/etc/systemd/system/nbd-reactor.service", "[Service]\nExecStart=/bin/false\n")
    machine.run("systemctl daemon-reload; systemctl start nbd-reactor")
    machine.await_success("systemctl is-failed nbd-reactor")
    assert changes(operator.play("uninstall")) > 0
    assert machine.run("systemctl is-system-running") == "running"
    assert changes(operator.play("uninstall", nbd_reactor_remove_images=True)) == 0
