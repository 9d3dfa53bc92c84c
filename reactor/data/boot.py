"""A worker process, from its core to its exit status."""

from __future__ import annotations

import argparse
import errno
import faulthandler
import fcntl
import os
import resource
import signal
import stat
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from setproctitle import setproctitle

from backends import registry
from reactor import pressure
from reactor.data import garbage
from reactor.data.worker import Worker
from reactor.errors import ReactorError, error_number, reason
from reactor.log import FORMATS, LEVELS, logger, set_up
from reactor.loop import MODES, Reactor
from reactor.messages import BOOT_FAILURE, SHORTAGE, start_line

SHORTAGES: Final = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EAGAIN)
# For a moment the core's lock may be that of a worker whose controller died while it started.
LOCK_SECONDS: Final = 1.0
LOCK_PAUSE_SECONDS: Final = 0.02

LACKING: Final = b"a worker ends: Cannot allocate memory\n"

log = logger(__name__)


def _lock_core(runtime_dir: Path, core: int) -> int:
    """Take the core's lock for this process's life; the next controller reads there who we are."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    path = runtime_dir / f"worker-{core}.lock"
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno in SHORTAGES or not os.path.lexists(path):
            raise
        raise _not_a_file(path, core) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise _not_a_file(path, core)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ReactorError(f"{path}: another process has it locked") from None
            time.sleep(LOCK_PAUSE_SECONDS)
    # Written first: on a full file system there is no room but its own.
    os.ftruncate(fd, os.pwrite(fd, f"{os.getpid()}\n{start_line(sys.argv[1:])}\n".encode(), 0))
    return fd


def _not_a_file(path: Path, core: int) -> ReactorError:
    return ReactorError(
        f"{path} is not a regular file that can be written; remove it, then start a disk of core"
        f" {core}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nbd-reactor worker", allow_abbrev=False)
    parser.add_argument("--runtime-dir", type=Path, required=True)
    parser.add_argument("--instance", required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--lock-memory", action="store_true")
    parser.add_argument("--log-format", choices=FORMATS, required=True)
    parser.add_argument("--log-level", choices=LEVELS, required=True)
    return parser.parse_args()


def _await_core(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """Prepare the process, then wait to be told its core and by whom (a pid).

    None when the controller is gone.
    """
    _name(arguments, "spare worker")
    faulthandler.enable()
    pressure.prepare()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a descriptor for each client
    # A shortage later finds ours loaded; the code of all belongs to what is locked.
    _load_backends(registry.names() if arguments.lock_memory else registry.own_names())
    if arguments.lock_memory:
        pressure.lock_memory()
    told = sys.stdin.buffer.readline()
    if not told:
        return None
    core, controller = map(int, told.split())
    _name(arguments, f"worker core {core}")
    return core, controller


def _pin(core: int) -> None:
    for thread in Path("/proc/self/task").iterdir():  # ZeroMQ's will be where its maker is
        try:
            os.sched_setaffinity(int(thread.name), {core})
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Who waits for its devices is better served from another CPU than by none.
            log.warning("CPU %d is offline, or not for this service: others do its work", core)
            return


def _end_for_memory() -> None:
    """End as one that is killed: a request was lost, which the next worker will be sent again.

    At once: an answer may be half made. Nothing is tidied up or logged, which takes memory, too.
    """
    try:
        os.write(2, LACKING)
    finally:
        os._exit(SHORTAGE)


def _open_parent(controller: int) -> int | None:
    """Return a descriptor of the process that started this one; None when it is gone.

    The next controller knows the workers that it finds locked when it starts, no others.
    """
    try:
        process = os.pidfd_open(controller)
    except ProcessLookupError:
        return None
    # Only now: whoever has this pid is the parent as long as this one is its child.
    return process if os.getppid() == controller else None


def _load_backends(names: Iterable[str]) -> None:
    for name in names:
        try:
            registry.backend(name)
        except ReactorError as error:  # a disk of this backend will say so too
            log.warning("%s", reason(error))


def _name(arguments: argparse.Namespace, name: str) -> None:
    set_up(name, arguments.log_format, arguments.log_level)
    setproctitle(f"nbd-reactor: {name}")


def main() -> int:
    """Run a worker until the controller says `shutdown`; return its exit status."""
    arguments = _arguments()
    try:
        told = _await_core(arguments)
        if told is None:
            return 0
        core, controller = told
        _pin(core)
        lock = _lock_core(arguments.runtime_dir, core)
        parent = _open_parent(controller)
        if parent is None:
            return 0
        reactor = Reactor(arguments.mode, on_loss=_end_for_memory)
        worker = Worker(reactor, core, arguments.runtime_dir, arguments.instance, parent)
        reactor.add_signal(signal.SIGTERM, worker.end_if_orphaned)
    except (OSError, ReactorError, MemoryError) as error:
        log.critical("cannot start: %s", reason(error))
        return SHORTAGE if error_number(error) in SHORTAGES else BOOT_FAILURE
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the controller
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    garbage.collect_by_timer(reactor)
    reactor.run()
    worker.close()
    reactor.close()
    os.close(lock)
    return 0
