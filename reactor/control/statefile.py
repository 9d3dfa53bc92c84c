"""The saved state on disk: replaced as a whole, or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Make `data` the content of `path`, durably; raises OSError and leaves what was there.

    Only if the directory itself cannot be written to the medium `data` is there all the same.
    """
    new = path.with_name(path.name + ".new")
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(new, flags, 0o600)
        with open(fd, "wb") as file:  # noqa: PTH123 (a descriptor)
            file.write(data)
            file.flush()
            os.fsync(fd)
        new.replace(path)
        os.fsync(directory)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    finally:
        os.close(directory)
