"""The process that makes the calls which wait for a device, for a controller that must not.

What the kernel lets wait for a device cannot be killed, and a process that has such a thread does
not end: whoever is to start the next controller would wait for it, and the device for that one.
This process nobody needs to await. It ends with its controller, and what is left of it then holds
nothing but the devices that it waits for.

Controller and process exchange packets on standard input: a request, then its answer. It imports
little, to be small.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import signal
import sys
from enum import IntEnum
from functools import partial
from struct import Struct
from typing import Final

from setproctitle import setproctitle

from reactor import background

REQUEST: Final = Struct("=QBIQ")  # its number, What, the device's index, a value
ANSWER: Final = Struct("=Qi")  # the request's number, an errno or 0
READY: Final = 0  # the number of the first answer: to no request
CONTROLLER: Final = 0  # the descriptor
CLONE_FILES: Final = 0x400  # include/uapi/linux/sched.h
IGNORED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

_libc = ctypes.CDLL(None, use_errno=True)


class What(IntEnum):
    """What is asked for, and what the value is then."""

    SAY_READY = 0  # none: it is answered at once, as at the start
    READ = 1  # the first block, past the page cache: its length in bytes
    WRITE_BACK = 2  # what the page cache holds, and flush the device
    LOOK = 3  # whether somebody claims it: EBUSY then
    SET_IO_TIMEOUT = 4  # after how many milliseconds the driver is asked about a request


def main() -> None:
    """Serve the controller until it is gone."""
    for number in IGNORED:  # the controller's end is ours
        signal.signal(number, signal.SIG_IGN)
    setproctitle("nbd-reactor: device I/O")
    # What else keeps a process going while memory is short was inherited.
    if "--lock-memory" in sys.argv[1:]:
        from reactor import pressure  # noqa: PLC0415 - it is large

        pressure.lock_memory()
    _hold_nothing()
    try:
        _serve()
    except OSError:  # the controller is gone
        pass
    finally:
        os._exit(0)  # whatever still waits


def _hold_nothing() -> None:
    """Let go of what others may wait for: a folder to be unmounted, a log's end."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _serve() -> None:
    answers, answer_end = os.pipe()
    ready = select.poll()
    for descriptor in (CONTROLLER, answers):
        ready.register(descriptor, select.POLLIN)
    os.write(CONTROLLER, ANSWER.pack(READY, 0))
    while True:
        for descriptor, _ in ready.poll():
            if descriptor == answers:
                os.write(CONTROLLER, os.read(answers, ANSWER.size))
            elif request := os.read(CONTROLLER, REQUEST.size):
                _take(request, answer_end)
            else:
                return


def _take(request: bytes, answer_end: int) -> None:
    number, what, index, value = REQUEST.unpack(request)
    if what == What.SAY_READY:
        os.write(CONTROLLER, ANSWER.pack(number, 0))
        return
    try:
        background.start(partial(_answer, answer_end, number, what, index, value))
    except OSError as error:
        os.write(CONTROLLER, ANSWER.pack(number, error.errno))


def _answer(answer_end: int, number: int, what: int, index: int, value: int) -> None:
    failure = 0
    try:
        _leave_controller()
        _do(what, index, value)
    except OSError as error:
        failure = error.errno or errno.EIO
    except MemoryError:
        failure = errno.ENOMEM
    os.write(answer_end, ANSWER.pack(number, failure))


def _leave_controller() -> None:
    """Have this thread hold no end of the controller's socket, which tells when we are killed."""
    if _libc.unshare(CLONE_FILES) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    os.close(CONTROLLER)


def _do(what: int, index: int, value: int) -> None:
    path = f"/dev/nbd{index}"
    if what == What.READ:
        _read(path, value)
    elif what == What.WRITE_BACK:
        _write_back(path)
    elif what == What.LOOK:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    else:
        _write(f"/sys/block/nbd{index}/queue/io_timeout", str(value))


def _read(path: str, length: int) -> None:
    device = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    try:
        with mmap.mmap(-1, length) as buffer:
            if os.preadv(device, [buffer], 0) != length:
                raise OSError(errno.EIO, "short read")
    finally:
        os.close(device)


def _write_back(path: str) -> None:
    device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(device)
    finally:
        os.close(device)


def _write(path: str, text: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


if __name__ == "__main__":
    main()
