"""What the role asks of a host, each in one step; prints JSON.

host.py preflight DEVICES DIRECTORIES OPTIONS
                                        {"python": version, "problems": [line, ...]}
host.py patience                        for how many seconds I/O can wait on each device: the least
                                        dead_timeout; 0 when the service does not say
host.py online SECONDS DISKS WHICH      waits for the disks: [line, ...] about those not online;
                                        with WHICH configured for those that the config has by now
host.py left                            what outlived the services: [line, ...]
host.py used [KEPT]                     what uses devices of the service: [line, ...]
host.py users DEVICE                    what uses one device: [line, ...]
host.py releases                        what runs: {release: [process, ...]}
host.py old CURRENT KEPT                releases that can go: [path, ...]

DEVICES, DIRECTORIES, OPTIONS, DISKS and KEPT are JSON lists. KEPT: names of disks that stay.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

BLOCK = Path("/sys/block")
CLIENT = Path("/opt/nbd-reactor/current/bin/nbd-reactorctl")
CONFIG = Path("/etc/nbd-reactor/disks.yaml")
CORES = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)
FINDFS = "/sbin/findfs"
FSTAB = Path("/etc/fstab")
IMAGES = Path("/var/lib/nbd-reactor")  # the unit's StateDirectory=
MASK = re.compile(r"0x[0-9a-f]+", re.IGNORECASE)
MEMORY = Path("/dev/shm")
NAMES = Path("/dev/disk/by-nbd")
NO_DEVICE_SECONDS = 600  # nothing waits
PARSER = """\
import json, sys, yaml
config = yaml.load(sys.stdin, yaml.BaseLoader)
keys = {name: {**dict(config.get("defaults", "")), **dict(own)}
        for name, own in dict(config["disks"]).items()}
print(json.dumps({name: str(own.get("device", "")) for name, own in keys.items()}))
"""
PROC = Path("/proc")
RUNTIME = Path("/run")
INSTANCE = RUNTIME / "nbd-reactor/instance"  # begins the tags of the service's devices
REMOTE = "remote-fs-pre.target"
TAG = re.compile(r"(UUID|LABEL|PARTUUID|PARTLABEL)=.")
UNIT = "nbd-reactor.service"
HIDDEN = ("/home/", "/root/", "/run/user/")
PYTHON = Path("/opt/nbd-reactor/current/bin/python")  # has the module yaml, as the host's may not
RELEASES = Path("/opt/nbd-reactor/releases")


def preflight(devices: str, directories: str, options: str) -> dict[str, object]:
    """Return Python's version, and a line for each reason why the host cannot have it."""
    problems = []
    version = platform.python_version()
    if sys.version_info < (3, 11) or not (has("ensurepip") and has("venv")):
        problems.append(
            f"{sys.executable} is Python {version}: 3.11 or later with its module venv is needed"
            " (Debian: apt-get install python3-venv); name another in nbd_reactor_python"
        )
    base = os.path.realpath(sys.base_prefix)
    if base.startswith(HIDDEN):
        problems.append(
            f"{sys.executable} is in {base}, which the service does not see (ProtectHome=): name"
            " another in nbd_reactor_python"
        )
    driver = ["/sbin/modprobe", "--dry-run", "nbd"]
    if subprocess.run(driver, capture_output=True, check=False).returncode != 0:
        problems.append(
            f"the kernel {platform.release()} has no module nbd: install it (Ubuntu: "
            f"linux-modules-extra-{platform.release()}, Fedora: kernel-modules-extra), or reboot if"
            " the kernel was upgraded"
        )
    problems += missing_cores([*map(str, json.loads(options))])
    for name in (Path(device).name for device in json.loads(devices)):
        if is_attached(name) and not is_ours(name):
            tag = owner(name) or "another program"
            problems.append(f"/dev/{name} is attached by {tag}: choose another, or detach it")
    problems += [
        f"{directory} is not a directory: make or mount it"
        for directory in json.loads(directories)
        if not Path(directory).is_dir()
    ]
    problems += [
        f"{directory}: {unit} starts after the service, as all that the network mounts (After="
        f"{REMOTE}), and the service needs it: give that unit the drop-in of systemd.md"
        for directory in [str(IMAGES), *json.loads(directories)]
        if (unit := late_mount(Path(directory)))
    ]
    problems += [
        f"{directory} is a symbolic link to {real}, and what is mounted there may come after the"
        f" service, which does not know: name {real} itself"
        for directory in [str(IMAGES), *json.loads(directories)]
        if (real := os.path.realpath(directory)) != directory
    ]
    return {"python": version, "problems": problems}


def missing_cores(options: list[str]) -> list[str]:
    """Return a line for each --cores with one that `nbd-reactor --check` will not find here."""
    usable = os.sched_getaffinity(0)
    problems = []
    for text in re.findall(r"(?:^| )--cores[= ](\S+)", " ".join(options)):
        core = next((core for core in cores(text) if core not in usable), None)
        if core is not None:
            problems.append(
                f"--cores={text}: core {core} is not online, or not allowed for this process"
                f" ({', '.join(map(str, sorted(usable)))} are): name others in nbd_reactor_options"
            )
    return problems


def cores(text: str) -> Iterable[int]:
    """Return the cores that the text lists; none where it is no list, as of what means all."""
    if MASK.fullmatch(text):
        mask = int(text, 16)
        return (core for core in range(mask.bit_length()) if mask >> core & 1)
    parts = [part for part in map(CORES.fullmatch, text.split(",")) if part]
    if len(parts) <= text.count(","):
        return ()
    ranges = (range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts)
    return itertools.chain.from_iterable(ranges)


def late_mount(directory: Path) -> str:
    """Return a unit that mounts it or a parent, if that waits for what the service comes before."""
    for point in (directory, *directory.parents):
        unit = answer("systemd-escape", "--path", "--suffix=mount", str(point))
        after = answer("systemctl", "show", "--property=After", "--value", unit)
        if REMOTE in after.split():
            return unit
    return ""


def patience() -> int:
    """Return for how many seconds I/O can wait for a service that does not start."""
    try:
        disks = listed()
    except OSError:
        return 0
    waits = (disk.get("dead_timeout", 0) for disk in disks if disk["device"])
    return min(waits, default=NO_DEVICE_SECONDS)


def online(seconds: str, disks: str, which: str) -> list[str]:
    """Wait until the disks are online, and return a line for each that is not by then."""
    if not CLIENT.exists():
        return [f"{CLIENT} is not there: the service is not installed"]
    deadline = time.monotonic() + float(seconds)
    names = [*map(str, json.loads(disks))]
    if which == "configured":
        names = sorted(configured({*names}))
    while True:
        late = offline(names)
        if not late or time.monotonic() >= deadline:
            return late
        time.sleep(0.5)


def offline(disks: list[str]) -> list[str]:
    """Return a line for each of the disks that is not online, or why that cannot be told."""
    try:
        found = {disk["name"]: disk for disk in listed()}
    except OSError as error:
        return [str(error)]
    return [
        f"{name} ({found[name].get('reason') or found[name]['state'] if name in found else 'gone'})"
        for name in disks
        if found.get(name, {}).get("state") != "online"
    ]


def listed() -> list[dict[str, Any]]:
    """Return what the service says of its disks; raises OSError when it does not."""
    command = [str(CLIENT), "--timeout", "10", "--json", "list"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise OSError(done.stderr.decode(errors="replace").strip())
    return list(json.loads(done.stdout))


def left() -> list[str]:
    """Return a line for each process, device and memory that outlived the services of the units.

    Not of others, which somebody runs from elsewhere.
    """
    devices = sorted(path.name for path in BLOCK.glob("nbd*") if is_attached(path.name))
    instances = [read(path).decode().strip() for path in RUNTIME.glob("nbd-reactor*/instance")]
    ours = tuple(f"nbd-reactor:{instance}:" for instance in instances if instance)
    memory = tuple(tag.replace(":", "-") for tag in ours)
    return [
        *(f"process {process}" for found in releases().values() for process in found),
        *(f"/dev/{name} ({owner(name)})" for name in devices if owner(name).startswith(ours)),
        *(str(path) for path in sorted(MEMORY.glob("*")) if path.name.startswith(memory)),
    ]


def used(kept: str = "") -> list[str]:
    """Return a line for every use of a device that the service has attached, and of its names.

    Of those `kept`, and of what the config does not name, such as disks made at run time, it is not
    asked; nor, then, of devices by ioctl, which do not say whose they are, nor of names.
    """
    names = [path.name for path in BLOCK.glob("nbd*")]
    disks = {name: disk(name) for name in names if is_attached(name) and is_ours(name)}
    if not kept:
        return [*uses(*disks), *promises(*disks)]
    gone = {*disks.values()} - {"", *map(str, json.loads(kept))}
    if gone:
        gone = configured(gone)
    return uses(*(name for name in disks if disks[name] in gone))


def users(device: str) -> list[str]:
    """Return a line for every use of a device, or of the whole of a partition."""
    return uses(re.sub(r"p\d+$", "", Path(device).resolve().name))


def uses(*names: str) -> list[str]:
    """Return a line for every use of the devices."""
    opened = openers()
    return [
        line
        for name in names
        for line in (*mounts(name), *swaps(name), *holders(name), *opened.get(name, ()))
    ]


def promises(*names: str) -> list[str]:
    """Return what the next boot would mount or swap to: lines of fstab that are of the service.

    By its name, by a name in by-nbd, by the devices that are given or that the config names.
    """
    named = {Path(device).name for device in (config() or {}).values()}
    lines = ([decoded(word) for word in line.split()] for line in read(FSTAB).splitlines())
    return [
        f"{FSTAB} has {words[0]}{f' for {words[1]}' if len(words) > 1 else ''}"
        for words in lines
        if words
        and not words[0].startswith("#")
        and (
            words[0].startswith(f"{NAMES}/")
            or any(option.endswith(f"={UNIT}") for option in ",".join(words[3:4]).split(","))
            or any(is_part(meant(words[0]), name) for name in {*names, *named})
        )
    ]


def decoded(word: bytes) -> str:
    """Return a word of fstab, which has blanks and backslashes in octal."""
    plain = re.sub(rb"\\([0-3][0-7]{2})", lambda octal: bytes([int(octal[1], 8)]), word)
    return plain.decode(errors="replace")


def meant(source: str) -> str:
    """Return the device that a line of fstab means by now, by whatever name."""
    if TAG.match(source):
        source = answer(FINDFS, source)
    return os.path.realpath(source) if source.startswith("/dev/") else source


def releases() -> dict[str, list[str]]:
    """Return the releases from which processes run, with these."""
    found: dict[str, list[str]] = {}
    of_release = re.compile(re.escape(f" {RELEASES.resolve()}/").encode() + rb"([^/\n]+)/")
    for maps in PROC.glob("[0-9]*/maps"):
        text = read(maps)
        for release in {match.decode() for match in of_release.findall(text)}:
            title = read(maps.parent / "cmdline").replace(b"\0", b" ").decode(errors="replace")
            found.setdefault(release, []).append(f"{maps.parent.name} ({title.strip()})")
    return found


def old(current: str, kept: str) -> list[str]:
    """Return the releases beside `current` that are not among the `kept` youngest, nor used.

    Of what interrupted runs left, which has no mark, nothing is kept; by hand none has `wheels`.
    """
    marks = sorted(RELEASES.glob("*/installed"), key=lambda mark: mark.stat().st_mtime)
    whole = [mark.parent for mark in reversed(marks)]
    parts = [wheels.parent for wheels in RELEASES.glob("*/wheels") if wheels.parent not in whole]
    stay = {Path(current).resolve(), *(RELEASES.resolve() / name for name in releases())}
    others = [path for path in whole if path.resolve() != Path(current).resolve()]
    return [str(path) for path in others[int(kept) :] + parts if path.resolve() not in stay]


def answer(*command: str) -> str:
    """Return what a command prints; nothing when the host does not have it."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def has(module: str) -> bool:
    """Whether Python has the module; Debian has some in packages of their own."""
    return importlib.util.find_spec(module) is not None


def is_attached(name: str) -> bool:
    """Whether something has configured the device."""
    return (BLOCK / name / "pid").exists()


def is_ours(name: str) -> bool:
    """Whether the service has: by its tag, or, attached by ioctl, by the process that holds it."""
    instance = read(INSTANCE).decode().strip()
    tag = owner(name)
    if tag:
        return bool(instance) and tag.startswith(f"nbd-reactor:{instance}:")
    return is_of_service(read(BLOCK / name / "pid").decode().strip())


def is_of_service(pid: str) -> bool:
    """Whether a process is one of the service's."""
    return read(PROC / pid / "cgroup").decode().strip().endswith(f"/{UNIT}")


def owner(name: str) -> str:
    """Return the tag that the device was connected with; nothing for most programs."""
    return read(BLOCK / name / "backend").decode(errors="replace").strip()


def disk(name: str) -> str:
    """Return the name of the disk on a device of ours; nothing of one attached by ioctl."""
    return owner(name).rpartition(":")[2]


def configured(disks: set[str]) -> set[str]:
    """Return which of the disks the config has; all of them when that cannot be told."""
    known = config()
    return disks if known is None else disks & {*known}


def config() -> dict[str, str] | None:
    """Return the disks of the config, each with its device; None when they cannot be told."""
    if not CONFIG.exists():
        return {}
    command = [str(PYTHON), "-c", PARSER]
    try:
        done = subprocess.run(command, input=read(CONFIG), capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return dict(json.loads(done.stdout))


def mounts(name: str) -> list[str]:
    """Return where the device or a partition of it is mounted, in whatever mount namespace."""
    numbers = {read(path).decode().strip() for path in BLOCK.glob(f"{name}/**/dev")}
    lines = {line for table in PROC.glob("[0-9]*/mountinfo") for line in read(table).splitlines()}
    found = (line.decode(errors="replace").split()[2:5] for line in lines)
    points = {point for number, _, point in found if number in numbers}
    return [f"/dev/{name} is mounted at {point}" for point in sorted(points)]


def openers() -> dict[str, list[str]]:
    """Return who has a device open, by the device's name; but for the service, and udev's look."""
    found: dict[str, dict[str, None]] = {}
    for process in PROC.glob("[0-9]*"):
        title = read(process / "comm").decode(errors="replace").strip()
        if is_of_service(process.name) or "udev" in title:
            continue
        for target in links(process / "fd"):
            match = re.fullmatch(r"/dev/(nbd\d+)(p\d+)?", target)
            if match:
                line = f"/dev/{match[1]} is held open by {process.name} ({title})"
                found.setdefault(match[1], {})[line] = None
    return {name: list(lines) for name, lines in found.items()}


def links(folder: Path) -> list[str]:
    """Return where the links in a folder lead, those that vanish left out."""
    targets = []
    try:
        for link in folder.iterdir():
            with contextlib.suppress(OSError):
                targets.append(str(link.readlink()))
    except OSError:
        pass
    return targets


def swaps(name: str) -> list[str]:
    """Return which swap is on the device."""
    devices = [line.split()[0] for line in read(PROC / "swaps").decode().splitlines()]
    return [f"{device} is swap" for device in devices if is_part(device, name)]


def holders(name: str) -> list[str]:
    """Return the block devices that are built on the device or a partition of it."""
    paths = [*BLOCK.glob(f"{name}/holders/*"), *BLOCK.glob(f"{name}/{name}p*/holders/*")]
    return [f"/dev/{path.name} is built on /dev/{name}" for path in paths]


def is_part(device: str, name: str) -> bool:
    """Whether `device` is /dev/NAME or a partition of it."""
    return re.fullmatch(rf"/dev/{re.escape(name)}(p\d+)?", device) is not None


def read(path: Path) -> bytes:
    """Return what is in the file; nothing when it cannot be read, as of a process that ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("root is needed: run the play with become: true")
    steps: dict[str, Callable[..., object]] = {
        "preflight": preflight,
        "patience": patience,
        "online": online,
        "left": left,
        "used": used,
        "users": users,
        "releases": releases,
        "old": old,
    }
    print(json.dumps(steps[sys.argv[1]](*sys.argv[2:])))
