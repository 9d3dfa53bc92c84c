"""Standard streams that were closed before the program began."""

from __future__ import annotations

import os
import sys


def open_missing() -> None:
    """Open /dev/null for descriptors 0 to 2 that are closed.

    Else the next file that is opened gets such a number, and our own messages are written to it.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is fd
            os.set_inheritable(fd, True)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
