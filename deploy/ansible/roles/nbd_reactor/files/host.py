"""What the role must know of a host before it changes anything. Looks only; prints JSON.

host.py occupied DEVICE...   what others do with these devices: [line, ...]
host.py used                 what uses devices of the service: [line, ...]
host.py releases             releases that processes run from: {release: [process, ...]}
host.py missing DIRECTORY... those that are not there: [directory, ...]
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

BLOCK = Path("/sys/block")
INSTANCE = Path("/run/nbd-reactor/instance")  # begins the tags of the service's devices
UNIT = "/nbd-reactor.service"
RELEASE = re.compile(rb" /opt/nbd-reactor/releases/([^/\n]+)/")


def occupied(*devices: str) -> list[str]:
    """Return a line for every device that is attached by something else than the service."""
    return [
        f"{device} is attached by {owner(Path(device).name) or 'another program'}"
        for device in devices
        if is_attached(Path(device).name) and not is_ours(Path(device).name)
    ]


def used() -> list[str]:
    """Return a line for every use of a device that the service has attached."""
    names = [path.name for path in BLOCK.glob("nbd*")]
    ours = [name for name in names if is_attached(name) and is_ours(name)]
    return [line for name in ours for line in (*mounts(name), *swaps(name), *holders(name))]


def releases() -> dict[str, list[str]]:
    """Return the releases from which processes run, with these."""
    found: dict[str, list[str]] = {}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        text = read(maps)
        for release in {match.decode() for match in RELEASE.findall(text)}:
            title = read(maps.parent / "cmdline").replace(b"\0", b" ").decode(errors="replace")
            found.setdefault(release, []).append(f"{maps.parent.name} ({title.strip()})")
    return found


def missing(*directories: str) -> list[str]:
    """Return those of the directories that are not there."""
    return [directory for directory in directories if not Path(directory).is_dir()]


def is_attached(name: str) -> bool:
    """Whether something has configured the device."""
    return (BLOCK / name / "pid").exists()


def is_ours(name: str) -> bool:
    """Whether the service has: by its tag, or, attached by ioctl, by the process that holds it."""
    instance = read(INSTANCE).decode().strip()
    tag = owner(name)
    if tag:
        return bool(instance) and tag.startswith(f"nbd-reactor:{instance}:")
    pid = read(BLOCK / name / "pid").decode().strip()
    return read(Path("/proc") / pid / "cgroup").decode().strip().endswith(UNIT)


def owner(name: str) -> str:
    """Return the tag that the device was connected with; nothing for most programs."""
    return read(BLOCK / name / "backend").decode(errors="replace").strip()


def mounts(name: str) -> list[str]:
    """Return where the device or a partition of it is mounted."""
    pairs = [line.split()[:2] for line in read(Path("/proc/mounts")).decode().splitlines()]
    return [f"{device} is mounted at {at}" for device, at in pairs if is_part(device, name)]


def swaps(name: str) -> list[str]:
    """Return which swap is on the device."""
    devices = [line.split()[0] for line in read(Path("/proc/swaps")).decode().splitlines()]
    return [f"{device} is swap" for device in devices if is_part(device, name)]


def holders(name: str) -> list[str]:
    """Return the block devices that are built on the device or a partition of it."""
    paths = [*BLOCK.glob(f"{name}/holders/*"), *BLOCK.glob(f"{name}/{name}p*/holders/*")]
    return [f"/dev/{path.name} is built on /dev/{name}" for path in paths]


def is_part(device: str, name: str) -> bool:
    """Whether `device` is /dev/NAME or a partition of it."""
    return re.fullmatch(rf"/dev/{name}(p\d+)?", device) is not None


def read(path: Path) -> bytes:
    """Return what is in the file; nothing when it cannot be read, as of a process that ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("root is needed: run the play with become: true")
    questions = {"occupied": occupied, "used": used, "releases": releases, "missing": missing}
    print(json.dumps(questions[sys.argv[1]](*sys.argv[2:])))
