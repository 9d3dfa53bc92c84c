"""A file that must be there: it is neither created nor, cut short, filled up."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from backends.fileopen import open_file

MIB = 1 << 20


def problem(path: Path, least: int, **options: object) -> OSError:
    with pytest.raises(OSError, match="mount or restore it") as caught:
        open_file({"path": str(path), **options}, block_size=None, readonly=False, least=least)
    assert caught.value.filename == str(path)
    return caught.value


def test_a_file_that_is_gone_is_not_created(tmp_path: Path) -> None:
    error = problem(tmp_path / "image", MIB, size=MIB)
    assert error.errno == errno.ENOENT
    assert (error.strerror or "").startswith("is gone, and had at least 1048576")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{}, {"size": MIB}, {"size": 4 * MIB}])
@pytest.mark.parametrize("size", [0, MIB, 2 * MIB - 512])
def test_a_file_that_was_cut_short_is_not_filled_up(
    tmp_path: Path, size: int, options: dict[str, int]
) -> None:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, size)
    error = problem(image, 2 * MIB, **options)
    assert error.errno == errno.EINVAL
    assert (error.strerror or "").startswith(f"has only {size} bytes, and had at least 2097152")
    assert image.stat().st_size == size


@pytest.mark.parametrize("least", [0, 1, MIB])
def test_a_file_that_has_what_it_had_may_grow(tmp_path: Path, least: int) -> None:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, MIB)
    options = {"path": str(image), "size": 2 * MIB}
    opened = open_file(options, block_size=None, readonly=False, least=least)
    opened.close()
    assert opened.size == image.stat().st_size == 2 * MIB


def test_a_device_that_is_not_there_is_not_made_of_a_file(tmp_path: Path) -> None:
    name = f"no-{os.getpid()}"
    (tmp_path / "link").symlink_to("/dev")
    for path in (Path("/dev", name), tmp_path / "link" / name):
        options = {"path": str(path), "size": MIB}
        with pytest.raises(OSError, match="no such device") as caught:
            open_file(options, block_size=None, readonly=False)
        assert caught.value.errno == errno.ENOENT
        assert not path.exists()
