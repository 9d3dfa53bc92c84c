"""Applications on devices that must not notice the death of a process, and what they did notice."""

from __future__ import annotations

import mmap
import os
import random
import re
import struct
import subprocess
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.commands import fio_verify_command, run
from tests.mounting import mounted, mounted_new

BLOCK = 4096
END_SECONDS = 300.0
TROUBLE = re.compile(r"\berror\b|\babort", re.IGNORECASE)  # of the block layer, of file systems


class Application(ABC):
    """A thread that does one thing after the other until it is ended, and times each."""

    pause = 0.0  # seconds between two turns

    def __init__(self, name: str) -> None:
        self.name = name
        self.failure: BaseException | None = None
        self._turns: list[tuple[float, float]] = []  # when each began and ended
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Have it finish its turn, and fail with what it has met."""
        self._ended.set()
        self._thread.join(END_SECONDS)
        assert not self._thread.is_alive(), f"{self.name} hangs"
        self.check()
        assert self._turns, f"{self.name} did nothing"

    def check(self) -> None:
        """Fail with what it has met so far."""
        if self.failure is not None:
            raise AssertionError(f"{self.name}: {self.failure}") from self.failure

    def has_gone_on(self, moment: float) -> bool:
        """Whether it has done something that began after `moment`."""
        self.check()
        return bool(self._turns) and self._turns[-1][0] > moment

    def stall(self, since: float) -> float:
        """Return the seconds of the longest turn that ended after `since`."""
        return max((end - begin for begin, end in self._turns if end > since), default=0.0)

    @abstractmethod
    def turn(self) -> None:
        """Do one thing; raises OSError or AssertionError."""

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                begin = time.monotonic()
                self.turn()
                self._turns.append((begin, time.monotonic()))
                self._ended.wait(self.pause)
        except (OSError, AssertionError, subprocess.SubprocessError) as error:
            self.failure = error


class Reader(Application):
    """Reads one block after the other from the disk itself."""

    pause = 0.02

    def __init__(self, device: str) -> None:
        super().__init__(f"reader of {device}")
        self._device = device

    def turn(self) -> None:
        with mmap.mmap(-1, BLOCK) as page:
            fd = os.open(self._device, os.O_RDONLY | os.O_DIRECT)
            try:
                assert os.preadv(fd, [page], 0) == BLOCK
            finally:
                os.close(fd)


class Verifier(Application):
    """fio at depth 32, which reads back and compares all that it wrote, again and again."""

    def __init__(self, device: str) -> None:
        super().__init__(f"fio on {device}")
        self._command = fio_verify_command(device, "12M", loops="3")

    def turn(self) -> None:
        run(*self._command)


class FsyncWriter(Application):
    """Appends and overwrites records in files, and knows which of them are safe."""

    RECORDS = 256  # of a file
    FILES = 16
    RECORD = struct.Struct("<QQQ1024sI")  # file, place in it, number, filling, CRC-32

    def __init__(self, folder: Path) -> None:
        super().__init__(f"writer in {folder}")
        self.acknowledged: dict[tuple[int, int], int] = {}  # (file, place): number
        self._folder = folder
        self._random = random.Random(random.getrandbits(32))
        self._number = 0

    def turn(self) -> None:
        self._number += 1
        count = len(self.acknowledged)
        appends = count < self.RECORDS * self.FILES and self._random.random() < 0.5
        position = count if appends or not count else self._random.randrange(count)
        file, place = divmod(position, self.RECORDS)
        fd = os.open(self._path(file), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(fd, self._record(file, place, self._number), place * self.RECORD.size)
            os.fsync(fd)
        finally:
            os.close(fd)
        if place == 0:
            self._sync_folder()
        self.acknowledged[file, place] = self._number

    def check_records(self) -> None:
        """Fail if what was acknowledged is not there."""
        for (file, place), number in self.acknowledged.items():
            with self._path(file).open("rb") as records:
                records.seek(place * self.RECORD.size)
                found = records.read(self.RECORD.size)
            assert found == self._record(file, place, number), (
                f"{self._path(file)}, record {place}: not what was written as number {number}"
            )

    def _path(self, file: int) -> Path:
        return self._folder / f"records-{file}"

    def _sync_folder(self) -> None:
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _record(self, file: int, place: int, number: int) -> bytes:
        filling = random.Random(number).randbytes(1024)
        return self.RECORD.pack(file, place, number, filling, zlib.crc32(filling))


@contextmanager
def busy(applications: Sequence[Application]) -> Iterator[None]:
    """Have them at work meanwhile; fails with what they have met."""
    for application in applications:
        application.start()
    with ExitStack() as ending:
        for application in applications:
            ending.callback(application.end)
        yield


@contextmanager
def writing_to_ext4(devices: dict[str, Path]) -> Iterator[list[FsyncWriter]]:
    """Writers on new file systems, given by device and mount point; at the end all is checked."""
    writers = []
    with ExitStack() as mounts:
        for device, folder in devices.items():
            mounts.enter_context(mounted_new(device, folder))
            writers.append(FsyncWriter(folder))
        yield writers
    for (device, folder), writer in zip(devices.items(), writers, strict=True):
        run("fsck.ext4", "-fn", device)
        run("sysctl", "-q", "vm.drop_caches=3")
        with mounted(device, folder, "-o", "ro"):
            writer.check_records()


class KernelLog:
    """What the kernel says from now on, read as it comes: it keeps little."""

    POLL_SECONDS = 0.2

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="kernel log")
        self._thread.start()

    def close(self) -> None:
        """Take what it has said so far, and no more."""
        self._ended.set()
        self._thread.join()
        self._take()
        os.close(self._fd)

    def check(self) -> None:
        """Fail if it told of an error."""
        wrong = [line for line in self.lines if is_trouble(line)]
        assert not wrong, "\n".join(wrong)

    def _follow(self) -> None:
        while not self._ended.wait(self.POLL_SECONDS):
            self._take()

    def _take(self) -> None:
        while True:
            try:
                record = os.read(self._fd, 8192).decode(errors="replace")
            except BlockingIOError:
                return
            except BrokenPipeError:
                self.lines.append("(overwritten before it was read)")
            else:
                self.lines.append(record.partition(";")[2].partition("\n")[0])


def is_trouble(line: str) -> bool:
    return "overwritten" in line or ("nbd" in line and bool(TROUBLE.search(line)))


@contextmanager
def no_io_error() -> Iterator[None]:
    """The kernel's log must tell of no I/O error meanwhile."""
    log = KernelLog()
    try:
        yield
    finally:
        log.close()
    log.check()


def await_all(applications: Sequence[Application], seconds: float) -> None:
    """Wait until each has done something that began after now."""
    moment = time.monotonic()
    deadline = moment + seconds
    while not all(application.has_gone_on(moment) for application in applications):
        late = [a.name for a in applications if not a.has_gone_on(moment)]
        assert time.monotonic() < deadline, f"not heard of since: {', '.join(late)}"
        time.sleep(0.05)
