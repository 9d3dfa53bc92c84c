"""NBD constants, wire structs and the errno map, in the names of the NBD specification.

Source: doc/proto.md of NetworkBlockDevice/nbd. All integers are big endian.
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import Final

# --- handshake (fixed newstyle) ---
NBD_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
NBD_OPTS_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
NBD_REP_MAGIC: Final = 0x0003E889045565A9

NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_C_NO_ZEROES: Final = 1 << 1

NBD_OPT_EXPORT_NAME: Final = 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_LIST: Final = 3
NBD_OPT_STARTTLS: Final = 5
NBD_OPT_INFO: Final = 6
NBD_OPT_GO: Final = 7
NBD_OPT_STRUCTURED_REPLY: Final = 8

NBD_REP_ACK: Final = 1
NBD_REP_SERVER: Final = 2
NBD_REP_INFO: Final = 3
NBD_REP_FLAG_ERROR: Final = 1 << 31
NBD_REP_ERR_UNSUP: Final = 0x80000001
NBD_REP_ERR_POLICY: Final = 0x80000002
NBD_REP_ERR_INVALID: Final = 0x80000003
NBD_REP_ERR_UNKNOWN: Final = 0x80000006
NBD_REP_ERR_SHUTDOWN: Final = 0x80000007
NBD_REP_ERR_BLOCK_SIZE_REQD: Final = 0x80000008
NBD_REP_ERR_TOO_BIG: Final = 0x80000009

NBD_INFO_EXPORT: Final = 0
NBD_INFO_NAME: Final = 1
NBD_INFO_DESCRIPTION: Final = 2
NBD_INFO_BLOCK_SIZE: Final = 3

NBD_MAX_STRING: Final = 4096  # bytes of UTF-8 in a name or description

SERVER_GREETING: Final = Struct(">QQH")  # NBDMAGIC, IHAVEOPT, handshake flags
CLIENT_FLAGS: Final = Struct(">I")
OPTION_HEADER: Final = Struct(">QII")  # IHAVEOPT, option, data length
OPTION_REPLY: Final = Struct(">QIII")  # reply magic, option, reply type, data length
EXPORT_NAME_REPLY: Final = Struct(">QH")  # size, transmission flags (then 124 zeroes)
STRING_LENGTH: Final = Struct(">I")
INFO_TYPE: Final = Struct(">H")
INFO_EXPORT: Final = Struct(">HQH")  # NBD_INFO_EXPORT, size, transmission flags
INFO_BLOCK_SIZE: Final = Struct(">HIII")  # NBD_INFO_BLOCK_SIZE, minimum, preferred, maximum payload

# --- transmission flags (the kernel's NBD_FLAG_* use the same bits) ---
NBD_FLAG_HAS_FLAGS: Final = 1 << 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_FUA: Final = 1 << 3
NBD_FLAG_ROTATIONAL: Final = 1 << 4
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_FLAG_CAN_MULTI_CONN: Final = 1 << 8
NBD_FLAG_SEND_CACHE: Final = 1 << 10
NBD_FLAG_SEND_FAST_ZERO: Final = 1 << 11

# --- transmission ---
NBD_REQUEST_MAGIC: Final = 0x25609513
NBD_SIMPLE_REPLY_MAGIC: Final = 0x67446698

NBD_CMD_READ: Final = 0
NBD_CMD_WRITE: Final = 1
NBD_CMD_DISC: Final = 2
NBD_CMD_FLUSH: Final = 3
NBD_CMD_TRIM: Final = 4
NBD_CMD_CACHE: Final = 5
NBD_CMD_WRITE_ZEROES: Final = 6

NBD_CMD_FLAG_FUA: Final = 1 << 0
NBD_CMD_FLAG_NO_HOLE: Final = 1 << 1
NBD_CMD_FLAG_FAST_ZERO: Final = 1 << 4

REQUEST: Final = Struct(">IHHQQI")  # magic, command flags, command, cookie, offset, length
SIMPLE_REPLY: Final = Struct(">IIQ")  # magic, error, cookie

# The same, for requests without flags and replies without an error: taken as bytes, the cookie is
# never a number and the rest is one comparison, or one addition.
PLAIN_REQUEST: Final = Struct(">8s8sQI")  # PLAIN_READ or PLAIN_WRITE, cookie, offset, length
PLAIN_READ: Final = REQUEST.pack(NBD_REQUEST_MAGIC, 0, NBD_CMD_READ, 0, 0, 0)[:8]
PLAIN_WRITE: Final = REQUEST.pack(NBD_REQUEST_MAGIC, 0, NBD_CMD_WRITE, 0, 0, 0)[:8]
PLAIN_REPLY: Final = SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, 0, 0)[:8]  # then the cookie

MAX_PAYLOAD: Final = 32 << 20  # bytes; the size every client may use without negotiating

# The errors that the protocol knows; everything else is mapped onto them.
NBD_ERRORS: Final = {
    errno.EPERM: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EOVERFLOW: 75,
    errno.EOPNOTSUPP: 95,
    errno.ESHUTDOWN: 108,
    errno.EACCES: 1,
    errno.EROFS: 1,
    errno.EDQUOT: 28,
    errno.EFBIG: 28,
}


def nbd_error(number: int | None) -> int:
    """Return the protocol's error for the system errno `number`; unknown ones are EIO."""
    return NBD_ERRORS.get(number or 0, 5)
