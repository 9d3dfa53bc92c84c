"""Files that are not what a config should be: a clear line each, in bounded time and memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from reactor.config import ConfigError, load
from reactor.config.document import FILE_MAX, NODES_MAX
from reactor.errors import UsageError
from tests.unit.config_schemas import CORES, SCHEMAS


def first_problem(path: Path, data: bytes | str) -> str:
    path = path / "disks.yaml"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ConfigError) as raised:
        load(path, SCHEMAS, CORES)
    assert len(raised.value.problems) <= 101
    assert all(line.isprintable() for line in raised.value.problems)
    return raised.value.problems[0].removeprefix(f"{path}:")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"disks:\n  \xff\xfe: {}", "2: the byte 0xff is not UTF-8 text"),
        (bytes(range(256)), "2: the byte 0x80 is not UTF-8 text"),
        (b"\x7fELF\x02\x01\x01\x00", "1: the character U+007F is not allowed"),
        (b"disks:\n  a: \x00", "2: the character U+0000 is not allowed"),
        (b"disks:\n  a: \x1b[2J", "2: the character U+001B is not allowed"),
        ("disks:\n\ta: {}", "2: a tab cannot indent YAML; use spaces"),
        ("disks:\n  a:\n\t\tsize: 1", "3: a tab cannot indent YAML; use spaces"),
        ("disks: {}\n---\ndisks: {}", "2: a second YAML document begins; only one is read"),
        ("disks: {a: *b}", "1: found undefined alias 'b'"),
        (
            "disks:\n  a: {size: 1",
            "2: not YAML: expected ',' or '}', but got '<stream end>' while parsing a flow mapping",
        ),
        (
            "disks: a: b",
            "1: not YAML: mapping values are not allowed here",
        ),
        (
            "disks:\n  a: {}\n b: {}",
            "3: not YAML: expected <block end>, but found '<block mapping start>'"
            " while parsing a block mapping",
        ),
        (
            "disks: !!python/object/apply:os.system ['id']",
            '1: the tag "!!python/object/apply:os.system" is not allowed',
        ),
        ("disks:\n  a: !!binary aGk=", '2: the tag "!!binary" is not allowed'),
        ("disks: !disk {}", '1: the tag "!disk" is not allowed'),
        (
            "defaults: &d {size: 1}\ndisks:\n  a:\n    <<: *d",
            "4: merge keys (<<) are not supported; use defaults",
        ),
        ("[" * 1000, "1: nested more than 16 levels deep"),
        ("[" * 500_000, "1: nested more than 16 levels deep"),
        ("- " * 1000, "1: nested more than 16 levels deep"),
        ("{a: " * 1000, "1: nested more than 16 levels deep"),
        ("\n".join(" " * i + "a:" for i in range(1000)), "16: nested more than 16 levels deep"),
        ("[" + "a," * NODES_MAX + "]", f"1: more than {NODES_MAX} keys and values"),
        ("&a [*a]", "1: expected the keys disks and defaults, found a list"),
        ("disks: &a {a: *a}", '1: disks.a.a: unknown key "a"; there are base, read, backend'),
    ],
)
def test_a_file_that_cannot_be_read_as_a_config(
    tmp_path: Path, data: bytes | str, problem: str
) -> None:
    assert first_problem(tmp_path, data).startswith(problem)


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "disks.yaml").write_bytes(b"\xef\xbb\xbfdisks: {}\r\n")
    assert load(tmp_path / "disks.yaml", SCHEMAS, CORES) == ()


def test_a_billion_laughs_are_not_expanded(tmp_path: Path) -> None:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    lines.append("disks: *a11")
    assert first_problem(tmp_path, "\n".join(lines)).startswith("1: a0: unknown key")


def test_a_wide_alias_in_many_disks_is_not_expanded(tmp_path: Path) -> None:
    addresses = ", ".join(["unix:/a"] * 20_000)
    disks = "\n".join(f"  d{i}: {{backend: malloc, size: 512, listen: *l}}" for i in range(5000))
    text = f"defaults:\n  listen: &l [{addresses}]\ndisks:\n{disks}"
    problem = first_problem(tmp_path, text)
    assert problem == "2: defaults.listen: 20000 addresses; a disk has at most 16"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param("\n".join(f"k{i}: 1" for i in range(20_000)), id="unknown sections"),
        pytest.param(
            "disks: {a: {" + ",".join(f"k{i}: 1" for i in range(20_000)) + "}}", id="unknown keys"
        ),
        pytest.param(
            "disks:\n" + "\n".join(f"  d{i}: {{backend: delay, base: x{i}}}" for i in range(5_000)),
            id="missing bases",
        ),
        pytest.param(
            "disks:\n" + "\n".join(f"  d{i}: {{backend: delay, base: d{i}}}" for i in range(5_000)),
            id="cycles of bases",
        ),
        pytest.param("k" * (FILE_MAX - 4) + ": 1", id="a long key"),
        pytest.param("disks: {a: {backend: " + "m" * (FILE_MAX - 100) + "}}", id="a long value"),
        pytest.param("a: 1\n" * 20_000, id="a repeated key"),
        pytest.param("disks:\n" + "  a:\n" * 20_000, id="a repeated disk"),
    ],
)
def test_a_huge_wrong_file_is_answered(tmp_path: Path, data: str) -> None:
    assert first_problem(tmp_path, data)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "disks.yaml"
    path.write_bytes(b"#" * (FILE_MAX + 1))
    with pytest.raises(UsageError) as raised:
        load(path, SCHEMAS, CORES)
    assert str(raised.value) == f"config {path} is larger than 1MiB"


def test_a_file_without_end(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        load(Path("/dev/zero"), SCHEMAS, CORES)
    assert str(raised.value) == "config /dev/zero is larger than 1MiB"


def test_so_many_problems_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "disks.yaml"
    path.write_text("\n".join(f"k{i}: 1" for i in range(1000)))
    with pytest.raises(ConfigError) as raised:
        load(path, SCHEMAS, CORES)
    assert len(raised.value.problems) == 101
    assert raised.value.problems[-1] == "only the first 100 problems are shown"
