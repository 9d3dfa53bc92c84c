"""What the role's script says of a host, and does to it."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy/ansible/roles/nbd_reactor/files/host.py"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with a /sys and releases in `tmp_path`."""
    specification = importlib.util.spec_from_file_location("host", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # else the collection would hold it
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    for name in ("block", "releases", "memory"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(module, name.upper(), tmp_path / name)
    monkeypatch.setattr(module, "INSTANCE", tmp_path / "instance")
    monkeypatch.setattr(module, "CONFIG", tmp_path / "disks.yaml")
    monkeypatch.setattr(module, "FSTAB", tmp_path / "fstab")
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(module, "TAKEN", tmp_path / "taken.json")
    (tmp_path / "instance").write_text("0123abcd\n")
    return module


def attach(host: ModuleType, name: str, tag: str) -> None:
    device = host.BLOCK / name
    device.mkdir()
    (device / "pid").write_text("1\n")
    (device / "backend").write_text(f"{tag}\n")


def test_devices_of_others_and_missing_directories_are_problems(
    host: ModuleType, tmp_path: Path
) -> None:
    attach(host, "nbd0", "nbd-reactor:0123abcd:data")
    attach(host, "nbd1", "nbd-reactor:another0:data")
    devices = [f"/dev/nbd{index}" for index in range(3)]
    directories = [str(tmp_path), str(tmp_path / "nothing")]
    said = host.preflight(json.dumps(devices), json.dumps(directories))["problems"]
    about = [line for line in said if "no module nbd" not in line]  # of this very kernel
    assert [line.split()[0] for line in about] == ["/dev/nbd1", str(tmp_path / "nothing")]


def test_a_python_that_the_service_does_not_see_is_a_problem(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any("ProtectHome" in line for line in host.preflight("[]", "[]")["problems"])
    monkeypatch.setattr(sys, "base_prefix", "/run/user/1000/python")
    assert any("ProtectHome" in line for line in host.preflight("[]", "[]")["problems"])


def test_a_device_is_used_by_mounts_swap_and_processes_of_whatever_namespace(
    host: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc = tmp_path / "proc"
    monkeypatch.setattr(host, "PROC", proc)
    attach(host, "nbd0", "nbd-reactor:0123abcd:0:data")
    attach(host, "nbd1", "nbd-reactor:another0:0:data")
    for name, number in (("nbd0", "43:0"), ("nbd0/nbd0p1", "43:1"), ("nbd1", "43:32")):
        (host.BLOCK / name).mkdir(exist_ok=True)
        (host.BLOCK / name / "dev").write_text(f"{number}\n")
    for pid, title, cgroup, target in (
        ("10", "qemu", "/machine", "/dev/nbd0"),
        ("11", "nbd-reactor: wor", "/system.slice/nbd-reactor.service", "/dev/nbd0"),
        ("12", "(udev-worker)", "/system.slice", "/dev/nbd0"),
        ("13", "dd", "/user", "/dev/nbd1"),
    ):
        (proc / pid / "fd").mkdir(parents=True)
        (proc / pid / "fd/7").symlink_to(target)
        (proc / pid / "comm").write_text(f"{title}\n")
        (proc / pid / "cgroup").write_text(f"0::{cgroup}\n")
        (proc / pid / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    with (proc / "13/mountinfo").open("a") as table:
        table.write("23 1 43:1 / /inside rw - ext4 /dev/nbd0p1 rw\n")
    (proc / "swaps").write_text("Filename Type\n/dev/nbd0p1 partition\n")
    assert host.used() == [
        "/dev/nbd0 is mounted at /inside",
        "/dev/nbd0p1 is swap",
        "/dev/nbd0 is held open by 10 (qemu)",
    ]
    assert host.used('["data"]') == []
    assert host.used('["other"]') == []  # made at run time: it stays
    host.CONFIG.write_text("disks:\n  data:\n    backend: malloc\n")
    assert host.used('["data"]') == []
    assert len(host.used('["other"]')) == 3
    assert host.used('["other", "data", 7]') == []
    assert host.users("/dev/nbd1p2") == ["/dev/nbd1 is held open by 13 (dd)"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("disks:\n  data: {backend: malloc}\n", {"data"}),
        ("disks: {data: {backend: malloc}}\n", {"data"}),
        ('{"disks": {"data": {"backend": "malloc"}}}', {"data"}),
        ("disks:\n  ? data\n  : backend: malloc\n  7: {backend: malloc}\n", {"data", "7"}),
        ("defaults: {direct: true}\ndisks: {data: }\n", {"data"}),
        ("defaults:\n  data: 1\ndisks:\n", set()),
        ("disks: {data: {", {"data", "late", "7"}),  # it cannot be told
        ("[]", {"data", "late", "7"}),
    ],
)
def test_disks_of_the_config_are_known_however_it_is_written(
    host: ModuleType, text: str, named: set[str]
) -> None:
    host.CONFIG.write_text(text)
    assert host.configured({"data", "late", "7"}) == named


def test_names_that_fstab_has_are_used(host: ModuleType) -> None:
    host.FSTAB.write_text(
        "# /dev/disk/by-nbd/old /srv/old ext4\n/dev/sda1 / ext4\n\n"
        "/dev/disk/by-nbd/data  /srv/data  ext4  _netdev,nofail  0  2\n"
    )
    assert host.used() == [f"{host.FSTAB} has /dev/disk/by-nbd/data for /srv/data"]
    assert host.used("[]") == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("/dev/nbd3", True),
        ("/dev/nbd3p1", True),
        ("UUID=0b9a", True),
        ("LABEL=here", True),
        ("LABEL=unknown", False),
        ("/dev/nbd4", False),  # of another service
        ("/dev/nbd33", False),
        ("server:/export", False),
        ("#/dev/nbd3", False),
    ],
)
def test_devices_that_fstab_has_by_other_names_are_used(
    host: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, *, found: bool
) -> None:
    attach(host, "nbd3", "nbd-reactor:0123abcd:0:data")
    attach(host, "nbd4", "nbd-reactor:another0:0:data")
    findfs = tmp_path / "findfs"
    findfs.write_text("#!/bin/sh\ncase $1 in *unknown) exit 1 ;; esac; echo /dev/nbd3p2\n")
    findfs.chmod(0o755)
    monkeypatch.setattr(host, "FINDFS", findfs)
    host.FSTAB.write_text(f"{source} /srv/data ext4 defaults 0 2\n")
    assert host.used() == [f"{host.FSTAB} has {source} for /srv/data"] * found


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/dev/nbd5 /srv/data ext4 defaults", True),
        ("/dev/nbd6p1 none swap sw", True),
        ("/dev/nbd7 /srv/data ext4 defaults", False),
        ("UUID=0b9a /srv/data ext4 noatime,x-systemd.after=nbd-reactor.service", True),
        ("UUID=0b9a /srv/data ext4 x-systemd.requires=nbd-reactor.service,nofail", True),
        ("UUID=0b9a /srv/data ext4 x-systemd.after=nbd-reactor@db.service", False),
        ("UUID=0b9a /srv/data", False),
    ],
)
def test_what_fstab_has_of_a_service_that_is_stopped_is_used(
    host: ModuleType, line: str, *, found: bool
) -> None:
    host.CONFIG.write_text(
        "defaults: {device: /dev/nbd5}\n"
        "disks: {data: {}, raw: {device: /dev/nbd6}, late: {device: auto}}\n"
    )
    host.FSTAB.write_text(f"{line}\n")
    assert len(host.used()) == found


@pytest.mark.parametrize(
    "source", [r"LABEL=my\040data", r"/dev/disk/by-label/my\134x20data", r"LABEL=\303\244"]
)
def test_escapes_of_fstab_are_understood(
    host: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    attach(host, "nbd3", "nbd-reactor:0123abcd:0:data")
    findfs = tmp_path / "findfs"
    findfs.write_text('#!/bin/sh\ncase $1 in "LABEL=my data"|LABEL=ä) echo /dev/nbd3 ;; esac\n')
    findfs.chmod(0o755)
    monkeypatch.setattr(host, "FINDFS", findfs)
    real = os.path.realpath
    by_label = {r"/dev/disk/by-label/my\x20data": "/dev/nbd3"}
    monkeypatch.setattr(host.os.path, "realpath", lambda path: by_label.get(path, real(path)))
    host.FSTAB.write_text(f"{source} /srv/my\\040data ext4 defaults 0 2\n")
    assert len(host.used()) == 1
    assert "for /srv/my data" in host.used()[0]


def test_what_outlived_the_service_is_named(
    host: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    assert host.left() == []
    attach(host, "nbd0", "nbd-reactor:another0:0:data")
    attach(host, "nbd1", "somebody")
    (host.MEMORY / "nbd-reactor-data").touch()
    (host.MEMORY / "other").touch()
    (tmp_path / "proc/10").mkdir(parents=True)
    line = "7f00 r-xp 0 08:01 1 /opt/nbd-reactor/releases/1-a/lib/yaml.so"
    (tmp_path / "proc/10/maps").write_text(f"{line}\n")
    (tmp_path / "proc/10/cmdline").write_text("nbd-reactor: worker\0")
    assert host.left() == [
        "process 10 (nbd-reactor: worker)",
        "/dev/nbd0 (nbd-reactor:another0:0:data)",
        str(host.MEMORY / "nbd-reactor-data"),
    ]


def test_disks_that_are_not_online_are_told_with_the_reason(
    host: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [
        {"name": "well", "state": "online", "reason": "device: it stays as it was"},
        {"name": "ill", "state": "failed", "reason": "no such file"},
        {"name": "7", "state": "starting", "reason": ""},
    ]
    client = tmp_path / "client"
    monkeypatch.setattr(host, "CLIENT", client)
    assert "No such file" in host.online("0", '["well"]', "all")[0]
    client.write_text(f"#!/bin/sh\necho '{json.dumps(listed)}'\n")
    client.chmod(0o755)
    assert host.online("0", '["well"]', "all") == []
    assert host.online("0", '["well", "ill", 7, "late"]', "all") == [
        "ill (no such file)",
        "7 (starting)",
        "late (gone)",
    ]
    host.CONFIG.write_text("disks: {well: {}, ill: {}, other: {}}")
    assert host.online("0", '["well", "ill", 7]', "configured") == ["ill (no such file)"]
    client.write_text("#!/bin/sh\necho no service >&2; exit 1\n")
    before = time.monotonic()
    assert host.online("1", '["well"]', "all") == ["no service"]
    assert 1 <= time.monotonic() - before < 30


def test_files_and_links_are_placed_once(host: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "unit").write_text("first")
    files = json.dumps({str(tmp_path / "etc/system/unit"): "unit"})
    links = json.dumps({str(tmp_path / "sbin/program"): "/opt/program"})
    both = [str(tmp_path / "sbin/program"), str(tmp_path / "etc/system/unit")]
    arguments = (str(tmp_path), files, links)
    assert host.place(*arguments, "check") == both
    assert not (tmp_path / "sbin").exists()
    assert host.place(*arguments, "change") == both
    assert host.place(*arguments, "change") == []
    (tmp_path / "unit").write_text("second")
    assert host.place(*arguments, "change") == both[1:]
    assert (tmp_path / "etc/system/unit").read_text() == "second"
    assert (tmp_path / "etc/system/unit").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "sbin/program").readlink() == Path("/opt/program")


def test_what_was_made_is_removed_once(host: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "home/releases").mkdir(parents=True)
    (tmp_path / "home/releases/file").touch()
    (tmp_path / "unit").touch()
    (tmp_path / "link").symlink_to("home")
    (tmp_path / "dangling").symlink_to("nothing")
    made = [str(tmp_path / name) for name in ("dangling", "link", "unit", "home")]
    paths = json.dumps([*made, str(tmp_path / "other")])
    kept = sorted(tmp_path.rglob("*"))
    assert host.remove(paths, "check") == made
    assert sorted(tmp_path.rglob("*")) == kept
    assert host.remove(paths, "change") == made
    assert not any(os.path.lexists(path) for path in made)
    assert host.remove(paths, "change") == []


@pytest.mark.parametrize(
    ("running", "configured", "seconds"),
    [
        (None, "disks: {a: {}}", 600),
        ("disks: {a: {dead_timeout: 30}}", "disks: {b: {dead_timeout: 90}}", 30),
        ("{defaults: {dead_timeout: 120}, disks: {a: {}}}", "disks: {a: {}}", 120),
        (
            "disks: {a: {}}",
            "{defaults: {dead_timeout: 900}, disks: {a: {}, b: {dead_timeout: 0}}}",
            0,
        ),
        ("disks: {a: {dead_timeout: 30}}", "disks: [", 30),
        ("disks: {a: {dead_timeout: soon}}", "", 600),
    ],
)
def test_io_waits_as_long_as_the_least_patient_of_the_disks_that_run_and_are_to(
    host: ModuleType, running: str | None, configured: str, seconds: int
) -> None:
    if running is not None:
        host.CONFIG.write_text(running)
        host.taken(json.dumps([str(host.CONFIG)]))
    host.CONFIG.write_text(configured)
    assert host.patience() == seconds


def test_what_changed_since_the_service_took_it_is_untaken(
    host: ModuleType, tmp_path: Path
) -> None:
    unit, link = tmp_path / "unit", tmp_path / "current"
    files = json.dumps([str(unit), str(link)])
    assert host.untaken(files) == []  # a fresh host
    unit.write_text("first")
    link.symlink_to("one")
    assert host.untaken(files) == [str(unit), str(link)]
    host.taken(files)
    assert host.untaken(files) == []
    unit.write_text("second")
    assert host.untaken(files) == [str(unit)]
    host.taken(files)
    link.unlink()
    link.symlink_to("two")
    assert host.untaken(files) == [str(link)]


def test_what_the_service_took_can_be_put_back(host: ModuleType, tmp_path: Path) -> None:
    unit, link, late = tmp_path / "unit", tmp_path / "current", tmp_path / "late"
    files = json.dumps([str(unit), str(link), str(late)])
    assert host.restore() is None  # nothing is noted
    unit.write_bytes(b"first \xff")
    unit.chmod(0o640)
    link.symlink_to("one")
    host.taken(files)
    assert host.restore() == []
    unit.write_text("second")
    link.unlink()
    link.symlink_to("two")
    late.touch()
    assert host.restore() == [str(unit), str(link), str(late)]
    assert unit.read_bytes() == b"first \xff"
    assert unit.stat().st_mode & 0o777 == 0o640
    assert link.readlink() == Path("one")
    assert not late.exists()
    assert host.TAKEN.stat().st_mode & 0o777 == 0o600  # it holds what only root may read


def test_old_releases_are_those_beside_the_current_and_the_youngest(host: ModuleType) -> None:
    for age, name in enumerate(("current", "young", "old", "older")):
        (host.RELEASES / name).mkdir()
        mark = host.RELEASES / name / "installed"
        mark.touch()
        os.utime(mark, (1000 - age, 1000 - age))
    (host.RELEASES / "unfinished").mkdir()
    current = str(host.RELEASES / "current")
    assert [Path(path).name for path in host.old(current, "1")] == ["old", "older"]
    assert host.old(current, "3") == []
