"""What a client is told about a disk."""

from __future__ import annotations

from dataclasses import dataclass

from reactor.protocol.wire import MAX_PAYLOAD, NBD_FLAG_READ_ONLY


@dataclass(slots=True)
class Export:
    """A disk as the protocol shows it. Sizes in bytes; `size` follows a resize."""

    name: str
    description: str
    size: int
    block_size: int  # minimum: offsets and lengths are multiples of it
    flags: int  # NBD_FLAG_* of the transmission phase
    preferred_block_size: int = 4096
    maximum_payload: int = MAX_PAYLOAD

    @property
    def readonly(self) -> bool:
        """Whether writes are refused."""
        return bool(self.flags & NBD_FLAG_READ_ONLY)
