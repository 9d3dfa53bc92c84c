"""What the role asks of a host, each in one step; prints JSON.

host.py preflight DEVICES DIRECTORIES   {"python": version, "problems": [line, ...]}
host.py place PREFIX COPIES LINKS MODE  [path, ...] that it changed, or with MODE check would
host.py untaken FILES                   files that are not as the service took them: [path, ...]
host.py taken FILES                     notes that the service took them as they are: null
host.py restore                         puts back what it took last: [path, ...] that was not so;
                                        null where nothing is noted
host.py patience                        for how many seconds all disks, those that ran and those of
                                        the config, let I/O wait: the shortest dead_timeout
host.py remove PATHS MODE               [path, ...] that were there, and with MODE check still are
host.py online SECONDS DISKS WHICH      waits for the disks: [line, ...] about those not online;
                                        with WHICH configured for those that the config has by now
host.py left                            what outlived the service: [line, ...]
host.py used [KEPT]                     what uses devices of the service: [line, ...]
host.py users DEVICE                    what uses one device: [line, ...]
host.py releases                        what runs: {release: [process, ...]}
host.py old CURRENT KEPT                releases that can go: [path, ...]

DEVICES, DIRECTORIES, FILES, PATHS, DISKS and KEPT are JSON lists, COPIES and LINKS JSON objects:
target to source. KEPT: names of disks that stay.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BLOCK = Path("/sys/block")
DEAD_TIMEOUT = 600  # seconds, of a disk that does not say
CLIENT = Path("/opt/nbd-reactor/current/bin/nbd-reactorctl")
CONFIG = Path("/etc/nbd-reactor/disks.yaml")
FINDFS = "/sbin/findfs"
FSTAB = Path("/etc/fstab")
IMAGES = Path("/var/lib/nbd-reactor")  # the unit's StateDirectory=
MEMORY = Path("/dev/shm")
NAMES = Path("/dev/disk/by-nbd")
PARSER = """\
import json, sys, yaml
config = yaml.load(sys.stdin, yaml.BaseLoader)
keys = {name: {**dict(config.get("defaults", "")), **dict(own)}
        for name, own in dict(config["disks"]).items()}
print(json.dumps(keys))
"""
PROC = Path("/proc")
INSTANCE = Path("/run/nbd-reactor/instance")  # begins the tags of the service's devices
REMOTE = "remote-fs-pre.target"
TAG = re.compile(r"(UUID|LABEL|PARTUUID|PARTLABEL)=.")
TAKEN = Path("/opt/nbd-reactor/taken.json")  # path to content
UNIT = "nbd-reactor.service"
HIDDEN = ("/home/", "/root/", "/run/user/")
PYTHON = Path("/opt/nbd-reactor/current/bin/python")  # has the module yaml, as the host's may not
RELEASES = Path("/opt/nbd-reactor/releases")
RELEASE = re.compile(rb" /opt/nbd-reactor/releases/([^/\n]+)/")


def preflight(devices: str, directories: str) -> dict[str, object]:
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
    return {"python": version, "problems": problems}


def late_mount(directory: Path) -> str:
    """Return a unit that mounts it or a parent, if that waits for what the service comes before."""
    real = directory.resolve()
    for point in (real, *real.parents):
        unit = answer("systemd-escape", "--path", "--suffix=mount", str(point))
        after = answer("systemctl", "show", "--property=After", "--value", unit)
        if REMOTE in after.split():
            return unit
    return ""


def place(prefix: str, copies: str, links: str, mode: str) -> list[str]:
    """Copy and link what a release has for the host; return the targets that were not so."""
    changed = []
    for target, source in json.loads(links).items():
        if not (Path(target).is_symlink() and str(Path(target).readlink()) == source):
            changed.append(target)
            if mode != "check":
                replace(Path(target), lambda new, source=source: new.symlink_to(source))
    for target, source in json.loads(copies).items():
        content = read(Path(prefix, source))
        if read(Path(target)) != content:
            changed.append(target)
            if mode != "check":
                replace(Path(target), lambda new, content=content: write(new, content))
    return changed


def replace(target: Path, make: Callable[[Path], object]) -> None:
    """Make a file beside the target, and put it in its place in one step."""
    os.umask(0o022)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.new")
    new.unlink(missing_ok=True)
    make(new)
    new.replace(target)


def write(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file that all may read, unless `mode` says otherwise."""
    path.write_bytes(content)
    path.chmod(mode)


def untaken(files: str) -> list[str]:
    """Return those that are not as the service took them."""
    noted = notes()
    return [name for name in json.loads(files) if content(Path(name)) != noted.get(name)]


def taken(files: str) -> None:
    """Note what is in the files that the service runs by now."""
    noted = json.dumps({name: content(Path(name)) for name in json.loads(files)}, indent=1)
    replace(TAKEN, lambda new: write(new, noted.encode(), 0o600))


def restore() -> list[str] | None:
    """Put back what the service took last, and return what that changed; None without notes."""
    all_noted = notes()
    changed = []
    for name, noted in all_noted.items():
        path = Path(name)
        if content(path) == noted:
            continue
        changed.append(name)
        mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else 0o644
        if noted is None:
            path.unlink()
        elif "link" in noted:
            replace(path, lambda new, target=noted["link"]: new.symlink_to(target))
        else:
            text = noted["text"].encode(errors="surrogateescape")
            replace(path, lambda new, text=text, mode=mode: write(new, text, mode))
    return changed if all_noted else None


def notes() -> dict[str, dict[str, str] | None]:
    """Return what the service took: the contents by path."""
    try:
        return dict(json.loads(read(TAKEN)))
    except ValueError:  # it is not there, or was torn
        return {}


def content(path: Path) -> dict[str, str] | None:
    """Return what is in a file, or where a link leads; None when it is not there."""
    if path.is_symlink():
        return {"link": str(path.readlink())}
    return {"text": read(path).decode(errors="surrogateescape")} if path.exists() else None


def patience() -> int:
    """Return for how many seconds I/O can wait for a service that does not start."""
    running = (notes().get(str(CONFIG)) or {}).get("text", "")
    disks = [*(parsed(running.encode()) or {}).values(), *(config() or {}).values()]
    seconds = (str(disk.get("dead_timeout", "")) for disk in disks)
    return min([DEAD_TIMEOUT, *(int(number) for number in seconds if number.isdecimal())])


def remove(paths: str, mode: str) -> list[str]:
    """Remove files, links, and directories with all that is in them; return those there were.

    A directory where something is mounted is emptied, and stays.
    """
    found = [
        path
        for path in map(Path, json.loads(paths))
        if os.path.lexists(path) and not (path.is_mount() and not any(path.iterdir()))
    ]
    for path in found if mode != "check" else ():
        empty(path)
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif not path.is_mount():
            path.rmdir()
    return [*map(str, found)]


def empty(path: Path) -> None:
    """Remove all that is in a directory; nothing where it is none."""
    for entry in path.iterdir() if path.is_dir() and not path.is_symlink() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def online(seconds: str, disks: str, which: str) -> list[str]:
    """Wait until the disks are online, and return a line for each that is not by then."""
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
        done = subprocess.run([CLIENT, "--json", "list"], capture_output=True, check=False)
    except OSError as error:
        return [str(error)]
    if done.returncode != 0:
        return [done.stderr.decode(errors="replace").strip()]
    found = {disk["name"]: disk for disk in json.loads(done.stdout)}
    return [
        f"{name} ({found[name].get('reason') or found[name]['state'] if name in found else 'gone'})"
        for name in disks
        if found.get(name, {}).get("state") != "online"
    ]


def left() -> list[str]:
    """Return a line for each process, device and memory that outlived the service."""
    tags = {path.name: owner(path.name) for path in BLOCK.glob("nbd*") if is_attached(path.name)}
    return [
        *(f"process {process}" for found in releases().values() for process in found),
        *(f"/dev/{name} ({tag})" for name, tag in tags.items() if tag.startswith("nbd-reactor:")),
        *(str(path) for path in sorted(MEMORY.glob("nbd-reactor-*"))),
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
    named = {Path(str(disk.get("device", ""))).name for disk in (config() or {}).values()}
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
    for maps in PROC.glob("[0-9]*/maps"):
        text = read(maps)
        for release in {match.decode() for match in RELEASE.findall(text)}:
            title = read(maps.parent / "cmdline").replace(b"\0", b" ").decode(errors="replace")
            found.setdefault(release, []).append(f"{maps.parent.name} ({title.strip()})")
    return found


def old(current: str, kept: str) -> list[str]:
    """Return the releases beside `current` that are not among the `kept` youngest, nor used."""
    marks = sorted(RELEASES.glob("*/installed"), key=lambda mark: mark.stat().st_mtime)
    others = [mark.parent for mark in reversed(marks) if mark.parent != Path(current).resolve()]
    used_now = releases()
    return [str(path) for path in others[int(kept) :] if path.name not in used_now]


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


def config() -> dict[str, dict[str, object]] | None:
    """Return the keys of the config's disks; None when they cannot be told."""
    return parsed(read(CONFIG)) if CONFIG.exists() else {}


def parsed(text: bytes) -> dict[str, dict[str, object]] | None:
    """Return the keys of the disks of a config, all as text; None when they cannot be told."""
    command = [str(PYTHON), "-c", PARSER]
    try:
        done = subprocess.run(command, input=text, capture_output=True, check=True)
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
        "place": place,
        "untaken": untaken,
        "taken": taken,
        "restore": restore,
        "patience": patience,
        "remove": remove,
        "online": online,
        "left": left,
        "used": used,
        "users": users,
        "releases": releases,
        "old": old,
    }
    print(json.dumps(steps[sys.argv[1]](*sys.argv[2:])))
