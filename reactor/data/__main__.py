"""A worker's start: its program is loaded, or it says that there is too little for that now."""

import os
import sys

# No more is imported here than the interpreter has: it may be too much.
SHORTAGE = 4  # exit status: of something that there may be later
#: How the dynamic loader, and Python, say so without an errno.
SIGNS = (
    "allocate memory",
    "failed to map segment",
    "cannot map zero-fill",
    "cannot change memory protections",
    "Too many open files",
    "without exception set",  # SystemError: C code that did not even have memory for the error
    "without setting an exception",
)


def _shortage(error: BaseException | None) -> str:
    """Return what tells of a shortage, of `error` or what led to it; nothing if nothing does."""
    if error is None:
        return ""
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS):
        return " ".join(str(error).split()) or "Cannot allocate memory"
    return _shortage(error.__cause__) or _shortage(error.__context__)


stderr, sys.stderr = sys.stderr, None  # hashlib would report each hash that is not loaded
try:
    from reactor.data.boot import main
except (MemoryError, ImportError, OSError, SystemError) as error:
    why = _shortage(error)
    if not why:
        raise
    os.write(2, f"a worker cannot be loaded: {why}\n".encode())
    os._exit(SHORTAGE)  # SystemExit may get lost on its way for want of memory
finally:
    sys.stderr = stderr

sys.exit(main())
