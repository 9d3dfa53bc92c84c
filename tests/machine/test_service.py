"""nbd-reactor.service under the real systemd: start, restart, crash, hang, reload, stop, boot."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine.deployed import ROOT, deploy
from tests.machine.machine import Machine

DISKS = """\
disks:
  vm1: {backend: file, path: /var/lib/nbd-reactor/vm1.img, size: 64MiB, direct: true, device: auto}
  wide: {backend: malloc, size: 64MiB, device: /dev/nbd7, connections: 2}
  load: {backend: malloc, size: 16MiB, device: auto, listen: "unix:/run/nbd-reactor/load.sock"}
"""
FSTAB = "/dev/disk/by-nbd/vm1 /srv/vm1 ext4 _netdev,nofail,x-systemd.after=nbd-reactor.service 0 2"
OPTIONS = "NBD_REACTOR_OPTIONS=--metrics 127.0.0.1:9100 --log-level debug"
CTL = "/opt/nbd-reactor/current/bin/nbd-reactorctl"
#: Writes and verifies the whole disk again and again, and counts how often.
LOAD = """\
while :; do
    fio --name=load --filename=/dev/disk/by-nbd/load --rw=randwrite --bs=4k --iodepth=16 \\
        --ioengine=libaio --direct=1 --size=16M --verify=crc32c --verify_fatal=1 >/run/fio 2>&1 ||
        exit 1
    echo done >>/run/passes
done
"""


@pytest.fixture(scope="module", autouse=True)
def _deployed(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> None:
    deploy(machine, tmp_path_factory.mktemp("release"))
    machine.write("/etc/nbd-reactor/disks.yaml", DISKS)
    machine.write("/etc/default/nbd-reactor", OPTIONS)


@pytest.fixture
def running(machine: Machine) -> Machine:
    machine.run("systemctl start nbd-reactor && udevadm settle")
    return machine


@pytest.fixture
def under_load(running: Machine) -> Iterator[Machine]:
    """The machine while fio writes and verifies; the test fails when fio has failed."""
    running.write("/root/load.sh", LOAD)
    running.run("rm -f /run/passes; systemd-run --quiet --unit=load sh /root/load.sh")
    running.await_success("test -s /run/passes")
    yield running
    await_passes(running, 2)
    running.run("systemctl stop load")
    running.run("! dmesg | grep -E 'I/O error|Buffer I/O'")


def await_passes(machine: Machine, number: int) -> None:
    """Wait until fio has verified the disk `number` times more."""
    passes = int(machine.run("wc -l </run/passes"))
    enough = f"test $(wc -l </run/passes) -ge {passes + number}"
    machine.await_success(f"{enough} || ! systemctl is-active --quiet load")
    assert machine.succeeds(enough), machine.run("cat /run/fio; journalctl -u nbd-reactor -n 60")


def controller(machine: Machine) -> int:
    return int(machine.run("systemctl show -P MainPID nbd-reactor"))


def workers(machine: Machine) -> str:
    return machine.run("pgrep -f '^nbd-reactor: worker'")


def await_next_controller(machine: Machine, before: int) -> None:
    changed = f'test "$(systemctl show -P MainPID nbd-reactor)" != {before}'
    machine.await_success(f"{changed} && systemctl is-active --quiet nbd-reactor")
    assert controller(machine) not in (0, before)


def test_the_files_have_no_problems(machine: Machine) -> None:
    units = "/etc/systemd/system/nbd-reactor.service /etc/systemd/system/nbd-reactor@.service"
    assert machine.run(f"systemd-analyze verify {units} 2>&1") == ""
    assert machine.run("journalctl -b -u systemd-udevd -g 60-nbd-reactor -o cat || true") == ""


def test_the_documented_exposure_is_what_systemd_says(machine: Machine) -> None:
    said = machine.run("systemd-analyze security --offline=true nbd-reactor.service | tail -n 1")
    found = re.search(r"exposure level for nbd-reactor.service: ([0-9.]+)", said)
    assert found is not None
    assert f"exposure level of {found[1]}" in (ROOT / "deploy/systemd.md").read_text()


def test_start_is_over_when_the_disks_are_up_and_named(machine: Machine) -> None:
    machine.run("systemctl start nbd-reactor")
    states = json.loads(machine.run(f"{CTL} --json list"))
    assert {disk["name"]: disk["state"] for disk in states} == dict.fromkeys(
        ("vm1", "wide", "load"), "online"
    )
    machine.run("udevadm settle")
    for disk in states:
        link = f"/dev/disk/by-nbd/{disk['name']}"
        assert machine.run(f"readlink -f {link}") == disk["device"]
        queue = f"/sys/block/{disk['device'].removeprefix('/dev/')}/queue"
        assert "[none]" in machine.run(f"cat {queue}/scheduler")
    assert machine.run("readlink -f /dev/disk/by-nbd/wide") == "/dev/nbd7"
    assert "ready: 3 of 3 disks" in machine.run("systemctl show -P StatusText nbd-reactor")


def test_a_stopped_disk_loses_its_name_and_gets_it_back(running: Machine) -> None:
    running.run(f"{CTL} stop wide && udevadm settle && ! test -e /dev/disk/by-nbd/wide")
    running.run(f"{CTL} start wide && udevadm settle && test -e /dev/disk/by-nbd/wide")


def test_partitions_have_names_too(running: Machine) -> None:
    entry = struct.pack("<B3sB3sII", 0, b"", 0x83, b"", 2048, 16384)  # 8 MiB from 1 MiB on
    table = bytes(446) + entry + bytes(48) + b"\x55\xaa"
    write = f"bytes.fromhex('{table.hex()}')"
    running.run(
        f"python3 -c \"open('/dev/disk/by-nbd/wide', 'r+b').write({write})\""
        " && blockdev --rereadpt /dev/disk/by-nbd/wide && udevadm settle"
    )
    assert running.run("readlink -f /dev/disk/by-nbd/wide-part1") == "/dev/nbd7p1"
    running.run("wipefs -qa /dev/disk/by-nbd/wide && blockdev --rereadpt /dev/disk/by-nbd/wide")
    running.run("udevadm settle && ! test -e /dev/disk/by-nbd/wide-part1")


def test_everything_works_inside_the_sandbox(running: Machine) -> None:
    invocation = "$(systemctl show -P InvocationID nbd-reactor)"
    log = running.run(f"journalctl -o cat _SYSTEMD_INVOCATION_ID={invocation}")
    assert "ready: " in log
    assert "WARNING" not in log
    assert "ERROR" not in log
    running.run(
        "fio --name=d --filename=/dev/disk/by-nbd/vm1 --rw=randwrite --bs=64k --size=8M --direct=1"
        " --verify=crc32c --fsync=8 && blkdiscard /dev/disk/by-nbd/vm1"
    )
    running.run(
        "fio --name=w --filename=/dev/disk/by-nbd/wide --rw=randwrite --bs=4k --size=2M --direct=1"
        " --numjobs=2 --verify=crc32c --offset_increment=4M"
    )
    assert running.run("nbdinfo --size 'nbd+unix:///load?socket=/run/nbd-reactor/load.sock'") == (
        str(16 << 20)
    )
    metrics = running.run(
        "python3 -c 'import urllib.request as r;"
        ' print(r.urlopen("http://127.0.0.1:9100/metrics").read().decode())\''
    )
    assert "nbd_reactor" in metrics
    engines = running.run("grep -l io_uring /proc/[0-9]*/maps /proc/[0-9]*/fdinfo/* || true")
    links = running.run(f"ls -l $(printf '/proc/%s/fd ' {workers(running).replace(chr(10), ' ')})")
    assert "io_uring" in engines + links


def test_restart_keeps_the_devices(under_load: Machine) -> None:
    before = controller(under_load)
    under_load.run("systemctl restart nbd-reactor")
    assert controller(under_load) != before


def test_a_killed_controller_finds_its_workers_again(under_load: Machine) -> None:
    before, serving = controller(under_load), workers(under_load)
    under_load.run(f"kill -9 {before}")
    await_next_controller(under_load, before)
    assert workers(under_load) == serving


def test_a_hung_controller_is_replaced_by_the_watchdog(under_load: Machine) -> None:
    before, serving = controller(under_load), workers(under_load)
    drop_in = "/run/systemd/system/nbd-reactor.service.d/quick.conf"
    under_load.write(drop_in, "[Service]\nWatchdogSec=4s\nTimeoutAbortSec=2s\n")
    under_load.run("systemctl daemon-reload && systemctl restart nbd-reactor")
    before, serving = controller(under_load), workers(under_load)
    under_load.run(f"kill -STOP {before}")
    await_next_controller(under_load, before)
    assert workers(under_load) == serving
    assert "Watchdog timeout" in under_load.run("journalctl -b -u nbd-reactor -o cat")
    under_load.run(f"rm {drop_in} && systemctl daemon-reload && systemctl restart nbd-reactor")


def test_reload_says_what_is_refused_and_ends_when_it_is_done(running: Machine) -> None:
    running.write("/etc/nbd-reactor/disks.yaml", DISKS.replace("direct: true", "direct: perhaps"))
    assert not running.succeeds("systemctl reload nbd-reactor")
    journal = running.run("journalctl -b -u nbd-reactor -o cat -n 20")
    assert "expected true or false" in journal
    assert "ready: 3 of 3 disks" in running.run("systemctl show -P StatusText nbd-reactor")
    running.write(
        "/etc/nbd-reactor/disks.yaml",
        DISKS + "  more: {backend: malloc, size: 8MiB, device: auto}\n",
    )
    running.run("systemctl reload nbd-reactor && udevadm settle && test -e /dev/disk/by-nbd/more")
    assert "ready: 4 of 4 disks" in running.run("systemctl show -P StatusText nbd-reactor")
    running.write("/etc/nbd-reactor/disks.yaml", DISKS)
    running.run("systemctl reload nbd-reactor && udevadm settle && ! test -e /dev/disk/by-nbd/more")


def test_two_instances_run_beside_each_other(running: Machine) -> None:
    running.write(
        "/etc/nbd-reactor/db.yaml", "disks:\n  db1: {backend: malloc, size: 8MiB, device: auto}\n"
    )
    running.write("/etc/default/nbd-reactor-db", "NBD_REACTOR_OPTIONS=--lock-memory --cores 0")
    running.run("systemctl start nbd-reactor@db && udevadm settle")
    assert "ready: 1 of 1" in running.run("systemctl show -P StatusText nbd-reactor@db")
    running.run("dd if=/dev/disk/by-nbd/db1 of=/dev/null bs=1M count=4 iflag=direct")
    assert "VmLck:\t       0 kB" not in running.run(
        "grep VmLck /proc/$(systemctl show -P MainPID nbd-reactor@db)/status"
    )
    running.run("systemctl stop nbd-reactor@db && udevadm settle")
    running.run("! test -e /dev/disk/by-nbd/db1 && test -e /dev/disk/by-nbd/wide")
    assert "WARNING" not in running.run("journalctl -b -u nbd-reactor@db -o cat")


def test_a_file_system_of_fstab_survives_restarts_and_reboots(running: Machine) -> None:
    running.run("mkfs.ext4 -q -F /dev/disk/by-nbd/vm1 && udevadm settle && mkdir -p /srv/vm1")
    running.run(f"echo '{FSTAB}' >>/etc/fstab && systemctl daemon-reload")
    running.run("systemctl start srv-vm1.mount && echo kept >/srv/vm1/file")
    mounted = running.run("systemctl show -P InvocationID srv-vm1.mount")
    before = controller(running)
    running.run("systemctl restart nbd-reactor")
    before = controller(running)
    running.run(f"kill -9 {before}")
    await_next_controller(running, before)
    assert running.run("systemctl show -P InvocationID srv-vm1.mount") == mounted
    running.run("systemctl stop nbd-reactor")  # unmounts first
    assert running.run("systemctl show -P ActiveState srv-vm1.mount") == "inactive"
    running.run("systemctl enable nbd-reactor && systemctl start nbd-reactor srv-vm1.mount")
    assert running.run("cat /srv/vm1/file") == "kept"
    running.run("echo again >/srv/vm1/file")
    running.reboot()
    assert running.run("findmnt -no SOURCE /srv/vm1; cat /srv/vm1/file").split()[1:] == ["again"]
    recovered = "journalctl -b -k -g 'recover|error count' -o cat || true"
    assert running.run(recovered) == ""  # it was unmounted in time


def test_stop_leaves_nothing(running: Machine) -> None:
    running.run("systemctl stop nbd-reactor && udevadm settle")
    assert not running.succeeds("pgrep -f '^nbd-reactor:'")
    left = "ls -d /sys/block/nbd*/pid /dev/disk/by-nbd /dev/shm/nbd-reactor-* /run/nbd-reactor/*"
    assert set(running.run(f"{left} 2>/dev/null || true").split()) == {
        "/run/nbd-reactor/instance",
        "/run/nbd-reactor/lock",
    }


def test_the_template_differs_from_the_unit_by_the_instance_alone() -> None:
    units = Path(ROOT / "deploy/systemd")
    template = (units / "nbd-reactor@.service").read_text()
    assert "%i" in template
    template = template.replace("nbd-reactor %i:", "nbd-reactor:").replace(
        "/%i.yaml", "/disks.yaml"
    )
    assert template.replace("-%i", "") == (units / "nbd-reactor.service").read_text()
