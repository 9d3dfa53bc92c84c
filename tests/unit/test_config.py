"""disks.yaml: what it means, disks made at run time, and what is written back."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from reactor.config import ConfigError, dump, load, parse_disk
from reactor.errors import UsageError
from reactor.spec import Address, DiskSpec
from tests.unit.config_schemas import CORES, SCHEMAS
from tests.unit.conftest import Load, Problems


def test_every_key_reaches_its_field(config: Load, tmp_path: Path) -> None:
    (spec,) = config("""
        disks:
          vm1:
            backend: file
            path: vm1.img
            size: 1.5GiB
            direct: true
            device: /dev/nbd7
            listen: [unix:/run/vm1.sock, "tcp:[::1]:10809", systemd:vm1]
            core: 2
            readonly: on
            block_size: 4KiB
            connections: 2
            timeout: 30s
            dead_timeout: 0
            attach: netlink
        """)
    assert spec == DiskSpec(
        "vm1",
        "file",
        {"path": str(tmp_path / "vm1.img"), "size": 3 << 29, "direct": True},
        device="/dev/nbd7",
        listen=(
            Address("unix", "/run/vm1.sock"),
            Address("tcp", "::1", 10809),
            Address("systemd", "vm1"),
        ),
        core=2,
        readonly=True,
        block_size=4096,
        connections=2,
        timeout=30,
        dead_timeout=0,
        attach="netlink",
    )


def test_keys_that_are_not_given_have_their_defaults(config: Load) -> None:
    assert config("""
        disks:
          ram0: {backend: malloc, size: 1MiB}
        """) == (DiskSpec("ram0", "malloc", {"size": 1 << 20}),)


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "disks:\n", "disks: {}", "---\n", "null"])
def test_a_file_without_disks_is_fine(config: Load, text: str) -> None:
    assert config(text) == ()


def test_the_backend_null_needs_no_quotes(config: Load) -> None:
    (spec,) = config("disks: {n: {backend: null, size: 512}}")
    assert spec.backend == "null"


def test_words_that_yaml_takes_for_something_else_are_names(config: Load) -> None:
    specs = config("""
        disks:
          on: {backend: malloc, size: 512}
          1: {backend: malloc, size: 512}
          2024-01-01: {backend: malloc, size: 512}
          null: {backend: delay, base: 1}
        """)
    assert [spec.name for spec in specs] == ["on", "1", "2024-01-01", "null"]
    assert specs[3].options == {"base": "1"}


def test_defaults_hold_for_disks_that_do_not_say_otherwise(config: Load) -> None:
    one, two = config("""
        defaults: {backend: malloc, size: 1MiB, dead_timeout: 5, device: auto}
        disks:
          one:
          two: {size: 2MiB, dead_timeout: 6}
        """)
    assert one == DiskSpec("one", "malloc", {"size": 1 << 20}, device="auto", dead_timeout=5)
    assert two == DiskSpec("two", "malloc", {"size": 2 << 20}, device="auto", dead_timeout=6)


def test_a_default_of_one_backend_does_not_touch_the_others(config: Load) -> None:
    ram, vm = config("""
        defaults: {direct: true, read: 2ms}
        disks:
          ram: {backend: malloc, size: 1MiB}
          vm: {backend: file, path: /x}
        """)
    assert ram.options == {"size": 1 << 20}
    assert vm.options == {"path": "/x", "direct": True}


def test_an_alias_is_the_value_it_names(config: Load) -> None:
    one, two = config("""
        disks:
          one: &memory {backend: malloc, size: 1MiB}
          two: *memory
        """)
    assert one.options == two.options == {"size": 1 << 20}


def test_times_become_seconds(config: Load) -> None:
    specs = config("""
        disks:
          a: {backend: malloc, size: 512}
          b: {backend: delay, base: a, read: 2ms}
        """)
    assert specs[1].options == {"base": "a", "read": 0.002}


def test_relative_paths_start_at_the_directory_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "disks.yaml").write_text("disks: {vm: {backend: file, path: a/vm.img}}")
    monkeypatch.chdir(tmp_path)
    (spec,) = load(Path("etc/disks.yaml"), SCHEMAS, CORES)
    assert spec.options["path"] == str(tmp_path / "etc/a/vm.img")


def test_disks_may_share_a_listener_on_one_core(config: Load) -> None:
    specs = config("""
        defaults: {backend: malloc, size: 512, listen: tcp:127.0.0.1:10809}
        disks:
          a: {core: 1}
          b: {core: 1}
          c:
        """)
    assert len({spec.listen for spec in specs}) == 1


def test_several_disks_may_ask_for_any_device(config: Load) -> None:
    assert len(config("disks: {a: &a {backend: malloc, size: 512, device: auto}, b: *a}")) == 2


# --- the file as a whole ---


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a, b]", "1: expected the keys disks and defaults, found a list"),
        ("word", '1: expected the keys disks and defaults, found "word"'),
        ("true", "1: expected the keys disks and defaults, found the boolean true"),
        ("disks: [a]", "1: disks: expected disks by their names, found a list"),
        ("disks: {a: malloc}", '1: disks.a: expected the keys of a disk, found "malloc"'),
        ("defaults: 5", '1: defaults: expected keys of disks, found "5"'),
        ("disks: {[a]: {}}", "1: disks: a key must be a word"),
    ],
)
def test_a_part_of_the_wrong_type(problems: Problems, text: str, problem: str) -> None:
    assert problems(text)[0] == problem


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        load(tmp_path / "no.yaml", SCHEMAS, CORES)
    assert str(raised.value) == (
        f"config {tmp_path}/no.yaml cannot be read: No such file or directory"
    )


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        load(tmp_path, SCHEMAS, CORES)
    assert str(raised.value) == f"config {tmp_path} cannot be read: Is a directory"


# --- a disk made at run time ---


def test_a_disk_from_words() -> None:
    spec = parse_disk(
        "r", {"backend": "malloc", "size": "1MiB", "readonly": "true"}, SCHEMAS, CORES
    )
    assert spec == DiskSpec("r", "malloc", {"size": 1 << 20}, readonly=True)


def test_a_disk_from_json() -> None:
    keys = {
        "backend": "malloc",
        "size": 1048576,
        "readonly": False,
        "core": 1,
        "listen": ["unix:/a"],
        "timeout": 2.0,
    }
    assert parse_disk("r", keys, SCHEMAS, CORES) == DiskSpec(
        "r", "malloc", {"size": 1 << 20}, core=1, listen=(Address("unix", "/a"),), timeout=2
    )


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"backend": "malloc", "size": 0}, "disks.r.size: must be more than 0"),
        (
            {"backend": "malloc", "size": 512, "sise": 1},
            'disks.r.sise: unknown key "sise"; did you mean "size"?',
        ),
        ({"backend": "malloc", "size": None}, "disks.r.size: expected a size, found nothing"),
        ({"backend": "malloc", "size": {}}, "disks.r.size: expected a size, found a mapping"),
        (
            {"backend": "malloc", "size": float("inf")},
            'disks.r.size: "inf" is not a size; write bytes, or a number with KiB, MiB, GiB or TiB',
        ),
        (
            {"backend": "malloc", "size": 512, "core": 1.5},
            'disks.r.core: expected a whole number, found "1.5"',
        ),
        ({}, "disks.r.backend: missing; there are broken, delay, file, malloc, null"),
    ],
)
def test_a_wrong_disk_at_run_time_is_told_without_a_line(
    keys: dict[str, object], problem: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_disk("r", keys, SCHEMAS, CORES)
    assert raised.value.problems == (problem,)


def test_a_wrong_name_at_run_time() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_disk("a/b\n", {"backend": "malloc", "size": 512}, SCHEMAS, CORES)
    assert raised.value.problems == (
        'disks."a/b\\u000a": "a/b\\u000a" is not a disk\'s name: it has letters, digits and . _ -,'
        " and does not begin with a dot",
    )


# --- written back ---


def test_a_dump_is_what_a_person_would_write() -> None:
    specs = [
        DiskSpec("on", "malloc", {"size": 1 << 30}, device="/dev/nbd0"),
        DiskSpec(
            "vm",
            "file",
            {"path": "/srv/v m.img", "direct": True, "size": (1 << 30) + 512},
            listen=(Address("unix", "/a"), Address("tcp", "::1", 10809)),
            timeout=0,
        ),
    ]
    assert dump(specs) == dedent("""\
        disks:
          'on':
            backend: malloc
            size: 1GiB
            device: /dev/nbd0
          vm:
            backend: file
            direct: true
            path: /srv/v m.img
            size: 1073742336
            listen:
            - unix:/a
            - tcp:[::1]:10809
            timeout: 0
        """)
