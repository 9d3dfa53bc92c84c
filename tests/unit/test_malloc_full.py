"""Memory disks when /dev/shm is full: an error for the client, and never a killed process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FULL = """
import errno, os
from backends.malloc import BACKEND
from reactor.loop import Reactor
from tests.unit.pumping import Pump
from tests.unit.test_malloc import Access, serving

def take_the_rest():
    with open("/dev/shm/other", "wb", buffering=0) as other:
        try:
            while True:
                other.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC


reactor = Reactor("poll")
disk = BACKEND.create(
    "disk", {"size": 64 << 20}, instance="full", reactor=reactor, block_size=512, readonly=False,
    shared=False,
)
with serving(disk) as pump:
    access = Access(pump)
    """


def in_full_memory(body: str) -> None:
    """Run `body` in a process whose /dev/shm has 8 MiB for a disk of 64 MiB."""
    script = FULL + textwrap.indent(textwrap.dedent(body), "    ").strip()
    done = subprocess.run(
        [
            *("unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])),
            *("sh", "-c", 'mount -t tmpfs -o size=8m none /dev/shm && exec "$@"', "sh"),
            *(sys.executable, "-c", script),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"


def test_a_full_memory_is_told_to_the_client_and_reads_go_on() -> None:
    in_full_memory(
        """
        results = [access.write(i << 20, b"x" * (1 << 20)) for i in range(64)]
        assert set(results) == {0, errno.ENOSPC}, results
        kept = [i for i, error in enumerate(results) if not error]
        for i in range(64):
            expected = b"x" * (1 << 20) if i in kept else bytes(1 << 20)
            assert access.read(i << 20, 1 << 20) == expected
        assert not any(access.read(32 << 20, 16 << 20))
        assert access.write(kept[0] << 20, b"y" * (1 << 20)) == 0
        assert access.write(0, b"z" * (32 << 20)) == errno.ENOSPC
        """
    )


def test_memory_that_others_took_is_told_to_the_client() -> None:
    in_full_memory(
        """
        assert access.write(0, b"x" * (2 << 20)) == 0
        take_the_rest()
        assert access.write(0, b"y" * (2 << 20)) == 0, "this memory is the disk's"
        assert access.write(8 << 20, b"y" * 4096) == errno.ENOSPC
        assert access.zero(8 << 20, 4096, 2) == errno.ENOSPC
        assert access.zero(8 << 20, 8 << 20) == 0
        assert not any(access.read(0x800000, 4096))
        os.unlink("/dev/shm/other")
        assert access.write(4 << 20, b"y" * 4096) == 0
        """
    )


def test_trimming_a_full_memory_makes_room_again() -> None:
    in_full_memory(
        """
        assert access.write(0, b"x" * (7 << 20)) == 0
        assert access.write(16 << 20, b"y" * (2 << 20)) == errno.ENOSPC
        assert access.trim(0, 4 << 20) == 0
        assert access.write(16 << 20, b"y" * (2 << 20)) == 0
        assert access.read(16 << 20, 2 << 20) == b"y" * (2 << 20)
        """
    )


def test_what_was_trimmed_and_taken_by_others_is_an_error_and_not_a_crash() -> None:
    in_full_memory(
        """
        assert access.write(0, b"x" * (4 << 20)) == 0
        assert access.trim(0, 4 << 20) == 0
        take_the_rest()
        assert not any(access.read(0, 4 << 20))
        assert access.write(0, b"y" * 4096) == errno.ENOSPC
        assert not any(access.read(0, 4096))
        """
    )


def test_what_is_left_of_a_trimmed_chunk_is_overwritten_in_a_full_memory() -> None:
    in_full_memory(
        """
        assert access.write(0, b"x" * (4 << 20)) == 0
        for i in range(64):
            assert access.trim(i << 16, 4096) == 0
        take_the_rest()
        for i in range(64):
            assert access.write((i << 16) + 4096, b"y" * 4096) == 0
            assert access.write((i << 16) + 8192 + 512, b"y" * 512) == 0
            assert access.write(i << 16, b"z" * 4096) == errno.ENOSPC
            expected = bytes(4096) + b"y" * 4096 + b"x" * 512 + b"y" * 512 + b"x" * 3072
            assert access.read(i << 16, 12288) == expected
        """
    )


def test_a_disk_larger_than_the_memory_is_found_again_when_it_is_full() -> None:
    in_full_memory(
        """
        for i in range(64):
            access.write(i << 20, b"x" * (1 << 20))
        disk.close()
        disk = BACKEND.create(
            "disk", {"size": 64 << 20}, instance="full", reactor=reactor, block_size=512,
            readonly=False, shared=False,
        )
        with serving(disk) as again:
            access = Access(again)
            data = access.read(0, 32 << 20)
            assert data.count(b"x") >= 7 << 20
            take_the_rest()
            assert access.write(40 << 20, b"y" * 512) == errno.ENOSPC
            assert access.write(0, b"y" * 512) == 0
        """
    )


def test_what_one_worker_trimmed_and_others_took_is_an_error_at_the_other_worker() -> None:
    in_full_memory(
        """
        disk.close()
        disk, other = (
            BACKEND.create(
                "disk", {"size": 64 << 20}, instance="full", reactor=reactor, block_size=512,
                readonly=False, shared=True,
            )
            for _ in range(2)
        )
        with serving(disk) as one, serving(other) as two:
            one, two = Access(one), Access(two)
            assert two.write(0, b"x" * (4 << 20)) == 0
            assert one.write(0, b"y" * 4096) == 0
            assert one.trim(0, 4 << 20) == 0
            take_the_rest()
            assert not any(two.read(0, 4 << 20))
            assert two.write(0, b"y" * 4096) == errno.ENOSPC
            assert one.write(1 << 20, b"y" * 4096) == errno.ENOSPC
            os.unlink("/dev/shm/other")
            assert two.write(0, b"z" * 4096) == 0
            assert one.read(0, 4096) == b"z" * 4096
        """
    )
