"""Real clients on the sockets: libnbd's tools, qemu's, fio."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import fio_verify, nbdsh, run
from tests.running import RunningService

Start = Callable[..., RunningService]
MIB = 1 << 20


@pytest.fixture
def running(service: Start, tmp_path: Path) -> RunningService:
    sockets = tmp_path
    return service(f"""
disks:
  ram: {{backend: malloc, size: 32MiB, listen: ['unix:{sockets}/ram.sock', 'tcp:127.0.0.1:20809']}}
  img: {{backend: file, path: {tmp_path}/img, size: 32MiB, listen: 'unix:{sockets}/img.sock'}}
  aio: {{backend: file, path: {tmp_path}/aio, size: 32MiB, direct: true,
         listen: 'unix:{sockets}/aio.sock'}}
  nil: {{backend: 'null', size: 32MiB, listen: 'unix:{sockets}/nil.sock'}}
  fix: {{backend: file, path: {tmp_path}/img2, size: 1MiB, readonly: false,
         listen: ['unix:{sockets}/both.sock']}}
  two: {{backend: malloc, size: 1MiB, block_size: 4096, listen: ['unix:{sockets}/both.sock']}}
""")


def uri(tmp_path: Path, name: str, export: str = "") -> str:
    return f"nbd+unix:///{export or name}?socket={tmp_path}/{name}.sock"


DISKS = pytest.mark.parametrize("name", ["ram", "img", "aio"])


def test_nbdinfo_shows_what_the_disk_can_do(running: RunningService, tmp_path: Path) -> None:
    export = json.loads(run("nbdinfo", "--json", uri(tmp_path, "ram")))["exports"][0]
    assert export["export-size"] == 32 * MIB
    assert export["export-name"] == "ram"
    can = {key for key, value in export.items() if key.startswith(("can_", "is_")) and value}
    assert {"can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"} <= can
    assert "is_read_only" not in can


def test_nbdinfo_lists_every_export_of_a_shared_listener(
    running: RunningService, tmp_path: Path
) -> None:
    listed = json.loads(
        run("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={tmp_path}/both.sock")
    )
    assert {export["export-name"] for export in listed["exports"]} == {"fix", "two"}


def test_the_only_disk_of_a_listener_is_its_default_export(
    running: RunningService, tmp_path: Path
) -> None:
    size = run("nbdinfo", "--size", f"nbd+unix:///?socket={tmp_path}/ram.sock")
    assert int(size) == 32 * MIB
    assert int(run("nbdinfo", "--size", "nbd://127.0.0.1:20809")) == 32 * MIB


@DISKS
def test_nbdcopy_brings_back_what_it_took(
    running: RunningService, tmp_path: Path, name: str
) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(os.urandom(5 * MIB) + bytes(20 * MIB) + os.urandom(7 * MIB))
    run("nbdcopy", str(source), uri(tmp_path, name))
    run("nbdcopy", "--flush", uri(tmp_path, name), str(back))
    assert back.read_bytes() == source.read_bytes()


@DISKS
def test_qemu_img_converts_and_compares(running: RunningService, tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(MIB) + os.urandom(8 * MIB) + bytes(23 * MIB))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri(tmp_path, name))
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), uri(tmp_path, name))


@DISKS
def test_fio_verifies_over_the_socket(running: RunningService, tmp_path: Path, name: str) -> None:
    fio_verify("nbd", "16M", ioengine="nbd", uri=uri(tmp_path, name))


@DISKS
def test_nbdsh_reads_writes_trims_and_zeroes(
    running: RunningService, tmp_path: Path, name: str
) -> None:
    script = """
h.pwrite(b'x' * 65536, 4096, nbd.CMD_FLAG_FUA)
assert h.pread(65536, 4096) == b'x' * 65536
h.zero(4096, 8192)
assert h.pread(12288, 4096) == b'x' * 4096 + bytes(4096) + b'x' * 4096
h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE)
h.trim(4096, 4096)
h.cache(4096, 4096)
h.flush()
h.set_strict_mode(0)
for bad, error in ((lambda: h.pread(512, 32 << 20), 'EINVAL'),
                   (lambda: h.pwrite(b'y' * 512, 32 << 20), 'ENOSPC'),
                   (lambda: h.pread(512, (1 << 63)), 'EINVAL'),
                   (lambda: h.pread(511, 1), 'EINVAL'),
                   (lambda: h.flush(nbd.CMD_FLAG_DF), 'EINVAL')):
    try:
        bad()
    except nbd.Error as e:
        assert e.errnum == getattr(__import__('errno'), error), (e, error)
    else:
        raise AssertionError(error)
assert h.pread(4096, 65536 + 0) == b'x' * 4096
"""
    nbdsh(uri(tmp_path, name), script)


def test_a_read_of_the_null_disk_is_zeroes(running: RunningService, tmp_path: Path) -> None:
    nbdsh(uri(tmp_path, "nil"), "assert h.pread(8192, 0) == bytes(8192)")


def test_a_read_only_disk_refuses_writes(service: Start, tmp_path: Path) -> None:
    (tmp_path / "ro.img").write_bytes(b"r" * MIB)
    service(f"""
disks:
  ro: {{backend: file, path: {tmp_path}/ro.img, readonly: true, listen: 'unix:{tmp_path}/ro.sock'}}
""")
    script = """
import errno
assert h.is_read_only()
h.set_strict_mode(0)
for bad in (lambda: h.pwrite(b'y' * 512, 0), lambda: h.trim(512, 0), lambda: h.zero(512, 0)):
    try:
        bad()
    except nbd.Error as e:
        assert e.errnum == errno.EPERM, e
    else:
        raise AssertionError()
assert h.pread(512, 0) == b'r' * 512
"""
    nbdsh(uri(tmp_path, "ro"), script)
