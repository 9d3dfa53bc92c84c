"""What the role's script says of a host."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.deploy.script import load


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with a /sys and releases in `tmp_path`."""
    module = load("host", monkeypatch)
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    for name in ("block", "releases", "memory"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(module, name.upper(), tmp_path / name)
    monkeypatch.setattr(module, "RUNTIME", tmp_path / "run")
    monkeypatch.setattr(module, "INSTANCE", tmp_path / "run/nbd-reactor/instance")
    monkeypatch.setattr(module, "CONFIG", tmp_path / "disks.yaml")
    monkeypatch.setattr(module, "FSTAB", tmp_path / "fstab")
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    module.INSTANCE.parent.mkdir(parents=True)
    module.INSTANCE.write_text("0123abcd\n")
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
    said = host.preflight(json.dumps(devices), json.dumps(directories), "[]")["problems"]
    about = [line for line in said if "no module nbd" not in line]  # of this very kernel
    assert [line.split()[0] for line in about] == ["/dev/nbd1", str(tmp_path / "nothing")]


def test_a_directory_that_is_a_link_is_a_problem(host: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    both = json.dumps([str(tmp_path / "real"), str(tmp_path / "link")])
    said = host.preflight("[]", both, "[]")
    about = [line for line in said["problems"] if "no module nbd" not in line]
    assert [line.split(" is a symbolic link to ")[0] for line in about] == [str(tmp_path / "link")]
    assert f"name {tmp_path}/real itself" in about[0]


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (["--cores=0-1,5"], []),
        (["--mode=poll", "--cores=0-2"], [2]),
        (["--cores", "5,3-4,7"], [3]),
        (["--cores", 6], [6]),  # YAML makes a number of it
        (["--cores=0-999999999"], [2]),
        (["--cores=0X23", "--cores=0x63", "--cores=8"], [6, 8]),
        (["--cores=all"], []),
        (["--cores=1-0", "--cores=0,x,9", "--cores=9,", "--cores=", "--cores"], []),
        (["--metrics=127.0.0.1:9", "--no-cores=9"], []),
    ],
)
def test_cores_that_the_host_does_not_have_are_problems(
    host: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str | int],
    missing: list[int],
) -> None:
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: {0, 1, 5})
    said = host.preflight("[]", "[]", json.dumps(options))["problems"]
    about = [line for line in said if line.startswith("--cores=")]
    assert len(about) == len(missing)
    for line, core in zip(about, missing, strict=True):
        assert f": core {core} is not online, or not allowed for this process (0, 1, 5 " in line


def test_what_the_network_mounts_above_a_directory_comes_late(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = {"srv.mount": "network.target remote-fs-pre.target", "-.mount": "local-fs-pre.target"}

    def answer(command: str, *arguments: str) -> str:
        if command == "systemd-escape":
            return f"{arguments[-1].strip('/').replace('/', '-') or '-'}.mount"
        return orders.get(arguments[-1], "")

    monkeypatch.setattr(host, "answer", answer)
    assert host.late_mount(Path("/srv/images/deep")) == "srv.mount"
    assert host.late_mount(Path("/var/images")) == ""


def test_a_python_that_the_service_does_not_see_is_a_problem(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any("ProtectHome" in line for line in host.preflight("[]", "[]", "[]")["problems"])
    monkeypatch.setattr(sys, "base_prefix", "/run/user/1000/python")
    assert any("ProtectHome" in line for line in host.preflight("[]", "[]", "[]")["problems"])


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
    (host.RUNTIME / "nbd-reactor-db").mkdir()
    (host.RUNTIME / "nbd-reactor-db/instance").write_text("4567cdef\n")
    for name, tag in enumerate(("0123abcd", "4567cdef", "another0")):
        attach(host, f"nbd{name}", f"nbd-reactor:{tag}:0:data")
        (host.MEMORY / f"nbd-reactor-{tag}-data").touch()
    attach(host, "nbd3", "somebody")
    (host.MEMORY / "other").touch()
    (tmp_path / "proc/10").mkdir(parents=True)
    line = f"7f00 r-xp 0 08:01 1 {host.RELEASES}/1-a/lib/yaml.so"
    (tmp_path / "proc/10/maps").write_text(f"{line}\n")
    (tmp_path / "proc/10/cmdline").write_text("nbd-reactor: worker\0")
    assert host.left() == [
        "process 10 (nbd-reactor: worker)",
        "/dev/nbd0 (nbd-reactor:0123abcd:0:data)",
        "/dev/nbd1 (nbd-reactor:4567cdef:0:data)",
        str(host.MEMORY / "nbd-reactor-0123abcd-data"),
        str(host.MEMORY / "nbd-reactor-4567cdef-data"),
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
    assert "is not installed" in host.online("60", '["well"]', "all")[0]
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


@pytest.mark.parametrize(
    ("disks", "seconds"),
    [
        ([], 600),
        ([(None, 30)], 600),
        ([("/dev/nbd0", 600), ("/dev/nbd1", 30)], 30),
        ([("/dev/nbd0", 600), (None, 30)], 600),
        ([("/dev/nbd0", None)], 0),
        (None, 0),
    ],
)
def test_io_waits_as_long_as_on_the_least_patient_device(
    host: ModuleType, tmp_path: Path, disks: list[tuple[str, int | None]] | None, seconds: int
) -> None:
    said = [
        {"device": d} if s is None else {"device": d, "dead_timeout": s} for d, s in disks or ()
    ]
    status = 1 if disks is None else 0
    (tmp_path / "client").write_text(f"#!/bin/sh\necho '{json.dumps(said)}'\nexit {status}\n")
    (tmp_path / "client").chmod(0o755)
    host.CLIENT = tmp_path / "client"
    assert host.patience() == seconds


def test_old_releases_are_those_beside_the_current_and_the_youngest(host: ModuleType) -> None:
    for age, name in enumerate(("current", "young", "old", "older")):
        (host.RELEASES / name).mkdir()
        mark = host.RELEASES / name / "installed"
        mark.touch()
        os.utime(mark, (1000 - age, 1000 - age))
    (host.RELEASES / "by-hand").mkdir()
    current = str(host.RELEASES / "current")
    assert [Path(path).name for path in host.old(current, "1")] == ["old", "older"]
    assert host.old(current, "3") == []


def test_what_an_interrupted_run_left_of_a_release_is_old_unless_it_is_used(
    host: ModuleType, tmp_path: Path
) -> None:
    for name in ("1.0-01234567", "1.1-89abcdef", "1.2-01234567"):
        (host.RELEASES / name / "wheels").mkdir(parents=True)
    (tmp_path / "proc/7").mkdir(parents=True)
    line = f"7f00 r-xp 0 08:01 1 {host.RELEASES}/1.1-89abcdef/lib/yaml.so"
    (tmp_path / "proc/7/maps").write_text(f"{line}\n")
    host.PROC = tmp_path / "proc"
    current = host.RELEASES / "1.2-01234567"
    assert host.old(str(current), "1") == [str(host.RELEASES / "1.0-01234567")]
