"""A process under memory pressure: the host may be writing its pages to the disks it serves."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from functools import cache
from logging import DEBUG
from pathlib import Path
from typing import Final

from reactor.errors import reason
from reactor.log import logger

PR_SET_IO_FLUSHER: Final = 57  # include/uapi/linux/prctl.h, Linux 5.6
OOM_SCORE_ADJ: Final = -900  # -1000 would hide a leak for ever
MCL_CURRENT: Final = 1  # include/uapi/asm-generic/mman.h
MCL_FUTURE: Final = 2
MCL_ONFAULT: Final = 4  # Linux 4.4

log = logger(__name__)


def prepare(level: int = DEBUG) -> None:
    """Keep the kernel from freeing memory through our own disks, and from killing us for it.

    For this thread and those that it makes, and for processes too. Needs CAP_SYS_RESOURCE; without
    it, goes on without, and says so in the log at `level`.
    """
    if _libc().prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) < 0:
        log.log(
            level,
            "the kernel may free memory through our disks, which can hang: PR_SET_IO_FLUSHER: %s;"
            " it needs CAP_SYS_RESOURCE",
            os.strerror(ctypes.get_errno()),
        )
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
    except OSError as error:
        log.log(
            level,
            "a host without memory may kill us first: oom_score_adj: %s; it needs CAP_SYS_RESOURCE",
            reason(error),
        )


def lock_memory() -> None:
    """Keep all memory of this process, but not of its children, out of swap; raises OSError.

    What is mapped now, the program above all, is read in at once. What is mapped later is locked
    page by page as it is touched: buffers and memory disks are large and mostly empty.

    What is served is answered even so only with a little more memory, and the pages that are being
    written out are not free before the answer: the process becomes a realtime one, for which the
    kernel has a quarter of its reserve (gfp_to_alloc_flags in mm/page_alloc.c).
    """
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    # Under a finite limit some later allocation would fail, in the middle of I/O. With none at all
    # only CAP_IPC_LOCK lets the calls below succeed, and to that no limit applies.
    resource.setrlimit(
        resource.RLIMIT_MEMLOCK, (most if most == resource.RLIM_INFINITY else 0, most)
    )
    for flags in (MCL_CURRENT, MCL_FUTURE | MCL_ONFAULT):
        if _libc().mlockall(flags) < 0:
            number = ctypes.get_errno()
            raise OSError(
                number,
                f"memory cannot be locked: {os.strerror(number)}; --lock-memory needs CAP_IPC_LOCK"
                " or RLIMIT_MEMLOCK unlimited",
            )
    try:
        os.sched_setscheduler(
            0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR))
        )
    except OSError as error:
        raise OSError(
            error.errno,
            f"no realtime priority: {error.strerror}; --lock-memory needs CAP_SYS_NICE"
            " or RLIMIT_RTPRIO of 1",
        ) from error


def give_back_heap() -> None:
    """Give the system what malloc keeps of memory that was freed: glibc does so only at the top."""
    with contextlib.suppress(AttributeError):  # another libc
        _libc().malloc_trim(0)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
