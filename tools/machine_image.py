"""The disk image of the machine that tools/machine boots: Debian 12 with systemd, made once."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guest_kernels import Missing, require

SUITE = "bookworm"
PACKAGES = (
    *("systemd-sysv", "dbus", "udev", "kmod", "linux-image-cloud-amd64"),
    *("openssh-server", "iproute2", "procps", "python3", "python3-apt", "python3-venv"),
    *("e2fsprogs", "xfsprogs", "fio", "libnbd-bin", "man-db"),
)
IMAGE_SIZE = 8 << 30  # sparse
TREE_SECONDS = 1200
#: Files of the machine. The kernel's command line carries the ssh key of the run.
FILES = {
    "etc/hostname": "machine\n",
    "etc/hosts": "127.0.0.1 localhost machine\n",
    "etc/fstab": "/dev/nvme0n1 / ext4 noatime 0 1\n",
    "etc/systemd/network/10-machine.network": (
        "[Match]\nType=ether\n[Network]\nAddress=10.0.2.15/24\nLinkLocalAddressing=no\n"
    ),
    "etc/ssh/sshd_config.d/machine.conf": (
        "PermitRootLogin prohibit-password\nAuthorizedKeysFile /run/machine.key\nUseDNS no\n"
        "MaxStartups 100\nMaxSessions 100\n"
    ),
    "etc/systemd/system/machine-key.service": """\
[Unit]
Description=The ssh key of this run
Before=ssh.service
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'sed -n "s/.*machine_key=\\\\([^ ]*\\\\).*/ssh-ed25519 \\\\1/p" /proc/cmdline \
    >/run/machine.key'
[Install]
WantedBy=multi-user.target
""",
    "etc/machine-id": "",
}
ENABLED = ("machine-key.service", "ssh.service", "systemd-networkd.service")
#: What only costs time here. Of the host's services nothing that ours meets is missing.
MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "man-db.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "systemd-networkd-wait-online.service"),
    *("serial-getty@ttyS0.service", "getty@tty1.service"),
)


@dataclass(frozen=True)
class Image:
    """What a machine is booted from."""

    disk: Path
    kernel: Path
    host_key: str  # of its ssh server


def machine_image() -> Image:
    """Return the image, made first if it is not there; raises Missing."""
    require({"apt-get": "apt"})
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nbd-reactor"
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    place = cache / f"machine-{recipe}"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "machine.lock"):
        if not place.exists():
            make(place)
    host_key = (place / "host_key.pub").read_text().split()
    return Image(place / "image", place / "vmlinuz", " ".join(host_key[:2]))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until nobody else makes an image."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(place: Path) -> None:
    """Make the image at `place`, wholly or not at all; raises Missing."""
    require({"debootstrap": "debootstrap", "mkfs.ext4": "e2fsprogs"})
    if os.geteuid() != 0:
        raise Missing("the machine's disk image is made once, by root; run tools/machine as root")
    print("machine: making the disk image (90 s, 600 MB), once", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=place.parent) as directory:
        tree, made = Path(directory) / "tree", Path(directory) / "made"
        made.mkdir()
        # In namespaces of its own, so that no mount and no process is left when it is killed.
        command(
            [
                *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
                *("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"),
                *(SUITE, str(tree), mirror()),
            ]
        )
        configure(tree)
        shutil.copy2(tree / "etc/ssh/ssh_host_ed25519_key.pub", made / "host_key.pub")
        shutil.copy2(next((tree / "boot").glob("vmlinuz-*")), made / "vmlinuz")
        image = made / "image"
        image.touch()
        os.truncate(image, IMAGE_SIZE)
        command(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", "-d", str(tree), str(image)])
        made.rename(place)


def configure(tree: Path) -> None:
    """Set up `tree` as a machine that boots by itself and answers ssh."""
    for name, text in FILES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    command(["chroot", str(tree), "systemctl", "--quiet", "enable", *ENABLED])
    command(["chroot", str(tree), "systemctl", "--quiet", "mask", *MASKED])
    for package in (tree / "var/cache/apt/archives").glob("*.deb"):
        package.unlink()


def mirror() -> str:
    """Return the Debian mirror that this host's apt uses; raises Missing."""
    listing = subprocess.run(
        [
            *("apt-get", "indextargets", "Created-By: Packages"),
            *("--format", "$(ORIGIN) $(COMPONENT) $(CODENAME) $(REPO_URI)"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    for line in listing.stdout.splitlines():
        origin, component, codename, _, address = (line + "    ").split(" ")[:5]
        if (origin, component) == ("Debian", "main") and "-" not in codename:
            return address
    raise Missing("apt knows no Debian mirror here; run apt-get update")


def command(words: list[str]) -> None:
    """Run a command that only speaks when it fails; raises Missing."""
    with tempfile.TemporaryFile() as output:
        try:
            subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=True,
                timeout=TREE_SECONDS,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            output.seek(0)
            tail = output.read().decode(errors="replace").splitlines()[-15:]
            raise Missing("\n".join([f"{words[0]} failed: {error}", *tail])) from error
