"""Media that fail as they are told to: block devices of the device mapper, and drivers for them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.commands import run

MIB = 1 << 20
SECTOR = 512
#: Where Debian keeps the modules of User-Mode Linux.
UML = Path("/usr/lib/uml")


def load_drivers(folder: Path, *modules: str) -> None:
    """Load drivers that the kernel has as modules; `folder` is for the time that takes."""
    root = []
    if (UML / "modules" / platform.release()).exists():
        (folder / "lib").mkdir(exist_ok=True)
        if not (folder / "lib" / "modules").exists():
            (folder / "lib" / "modules").symlink_to(UML / "modules")
        root = ["--dirname", str(folder)]
    for module in modules:
        run("modprobe", *root, *module.split())


needs_drivers = pytest.mark.skipif(
    not any(
        (modules / platform.release()).exists()
        for modules in (UML / "modules", Path("/lib/modules"))
    ),
    reason="needs a kernel with all its modules: tools/kernel without --smp",
)


class Medium:
    """A block device on a file; what is put below it (`healthy`, `failing`...) takes its I/O."""

    def __init__(self, name: str, backing: Path, size: int) -> None:
        self.path = Path("/dev/mapper") / name
        self.size = size
        self._name = name
        with backing.open("wb") as file:
            file.truncate(size)
        self._loop = run("losetup", "--find", "--show", str(backing)).strip()
        try:
            self._dmsetup("create", name, "--table", self.healthy())
        except BaseException:
            run("losetup", "--detach", self._loop)
            raise

    def healthy(self, begin: int = 0, end: int | None = None) -> str:
        """Return the table of a range (bytes) that works."""
        return self._range("linear", begin, end, f"{self._loop} {begin // SECTOR}")

    def failing(self, begin: int = 0, end: int | None = None) -> str:
        """Return that of one whose every I/O ends with EIO."""
        return self._range("error", begin, end)

    def slow(self, milliseconds: int) -> str:
        """Return that of a medium whose every I/O takes so long."""
        return self._range("delay", 0, None, f"{self._loop} 0 {milliseconds}")

    def slow_to_write(self, milliseconds: int) -> str:
        """Return that of a medium that reads at once, but whose every write takes so long."""
        writes = f"{self._loop} 0 {milliseconds}"
        return self._range("delay", 0, None, f"{self._loop} 0 0 {writes}")

    def become(self, *tables: str) -> None:
        """Replace what is below; I/O that waits goes there."""
        self._dmsetup("load", self._name, "--table", "\n".join(tables))
        self.go_on()

    def hang(self) -> None:
        """Let every I/O wait until `go_on` or `become`."""
        self._dmsetup("suspend", "--noflush", "--nolockfs", self._name)

    def go_on(self) -> None:
        """Do what waits, and what comes."""
        self._dmsetup("resume", self._name)

    def close(self) -> None:
        """Take the device away; nobody may have it open."""
        self.go_on()
        self._dmsetup("remove", "--retry", self._name)
        run("losetup", "--detach", self._loop)

    def _range(self, kind: str, begin: int, end: int | None, arguments: str = "") -> str:
        length = (self.size if end is None else end) - begin
        return f"{begin // SECTOR} {length // SECTOR} {kind} {arguments}".strip()

    @staticmethod
    def _dmsetup(*arguments: str) -> None:
        # There is no udev in the guests to make and remove the names.
        run("dmsetup", "--noudevsync", "--noudevrules", "--verifyudev", *arguments)


@contextmanager
def medium(name: str, folder: Path, size: int = 64 * MIB) -> Iterator[Medium]:
    """Make a medium, and take it away when everybody has closed it."""
    load_drivers(folder, "loop", "dm_mod", "dm_delay")
    made = Medium(name, folder / f"{name}.medium", size)
    try:
        yield made
    finally:
        made.close()


def state(pid: int) -> str:
    """Return the letter of what a process does, as proc(5) has it: D waits for a medium."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def few_dirty_pages(size: int) -> Iterator[None]:
    """Let a writer wait for its medium when the page cache has so many bytes to be written."""
    vm = Path("/proc/sys/vm")
    before = {name: (vm / name).read_text() for name in ("dirty_background_ratio", "dirty_ratio")}
    (vm / "dirty_background_bytes").write_text(str(size // 2))
    (vm / "dirty_bytes").write_text(str(size))
    try:
        yield
    finally:
        for name, value in before.items():
            (vm / name).write_text(value)
