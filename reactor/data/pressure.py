"""A worker under memory pressure: the host may be writing its pages to this worker's disks."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

from reactor.errors import reason
from reactor.log import logger

PR_SET_IO_FLUSHER: Final = 57  # include/uapi/linux/prctl.h, Linux 5.6
OOM_SCORE_ADJ: Final = -900  # -1000 would hide a leak for ever

log = logger(__name__)


def prepare() -> None:
    """Keep the kernel from freeing memory through our own disks, and from killing us for it.

    For this thread and those that it makes. Needs CAP_SYS_RESOURCE; without it, goes on without.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) < 0:
        log.debug("PR_SET_IO_FLUSHER: %s", os.strerror(ctypes.get_errno()))
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
    except OSError as error:
        log.debug("oom_score_adj: %s", reason(error))
