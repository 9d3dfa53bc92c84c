"""A memory disk in a few lines of Python: an example of a backend in a package of its own."""

from __future__ import annotations

from typing import Any

from backends.api import Backend, Buffer, Channel, Disk, SimpleChannel
from reactor.loop import Reactor
from reactor.spec import Key


class PythonDisk(Disk):
    """A bytearray."""

    can_fua = True

    def __init__(self, name: str, size: int, block_size: int, *, readonly: bool) -> None:
        super().__init__(name, size, block_size, readonly=readonly)
        self.data = memoryview(bytearray(size))

    def channel(self, reactor: Reactor) -> Channel:
        return PythonChannel(self)


class PythonChannel(SimpleChannel):
    """Reads and writes it."""

    disk: PythonDisk

    def read(self, offset: int, length: int) -> Buffer:
        return self.disk.data[offset : offset + length]

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        self.disk.data[offset : offset + len(data)] = data


class PythonBackend(Backend):
    """Makes disks that live as long as their worker."""

    name = "python"
    product_name = "Python disk"
    keys = (Key("size", "size", required=True),)
    disk = PythonDisk

    @classmethod
    def create(cls, name: str, options: Any, *, block_size: int | None, **rest: Any) -> Disk:
        return PythonDisk(name, options["size"], block_size or 512, readonly=rest["readonly"])
