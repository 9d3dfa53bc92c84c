"""disks.yaml: the exact problem, line and key of everything that can be wrong."""

from __future__ import annotations

import pytest

from tests.unit.conftest import Load, Problems

# --- what is wrong with a key ---


def test_every_problem_is_told_in_the_order_of_the_file(problems: Problems) -> None:
    assert problems("""
        disk: {}
        defaults:
          sise: 1GiB
        disks:
          a:
            backend: malloc
            size: 0
            core: 9
          b:
            backend: mallok
            device: sda
        """) == [
        '1: disk: unknown key "disk"; did you mean "disks"?',
        '3: defaults.sise: unknown key "sise"; did you mean "size"?',
        "7: disks.a.size: must be more than 0",
        "8: disks.a.core: core 9 is not one of the service's, 0-2",
        '10: disks.b.backend: unknown backend "mallok"; did you mean "malloc"?'
        " there are broken, delay, file, malloc, null",
        '11: disks.b.device: "sda" is not a device; write /dev/nbdN or auto',
    ]


def test_an_unknown_key_suggests_the_nearest(problems: Problems) -> None:
    assert problems("""
        disks:
          ram0:
            backend: null
            sise: 1GiB
        """) == ['4: disks.ram0.sise: unknown key "sise"; did you mean "size"?']


def test_an_unknown_key_like_no_other_lists_them_all(problems: Problems) -> None:
    assert problems("disks: {a: {backend: malloc, size: 512, zzz: 1}}") == [
        '1: disks.a.zzz: unknown key "zzz"; there are size, backend, device, listen, core,'
        " readonly, block_size, connections, timeout, dead_timeout, attach"
    ]


def test_a_key_of_another_backend_is_unknown(problems: Problems) -> None:
    assert problems("disks: {a: {backend: malloc, size: 512, direct: true}}") == [
        '1: disks.a.direct: unknown key "direct"; there are size, backend, device, listen, core,'
        " readonly, block_size, connections, timeout, dead_timeout, attach"
    ]


def test_a_missing_backend(problems: Problems) -> None:
    assert problems("disks:\n  a:\n    device: auto") == [
        "2: disks.a.backend: missing; there are broken, delay, file, malloc, null"
    ]


def test_a_backend_without_near_names(problems: Problems) -> None:
    assert problems("disks: {a: {backend: zfs}}") == [
        '1: disks.a.backend: unknown backend "zfs"; there are broken, delay, file, malloc, null'
    ]


def test_the_keys_of_a_backend_that_is_not_known_are_not_judged(problems: Problems) -> None:
    assert problems("disks: {a: {backend: zfs, pool: tank, core: 9x}}") == [
        '1: disks.a.core: expected a whole number, found "9x"',
        '1: disks.a.backend: unknown backend "zfs"; there are broken, delay, file, malloc, null',
    ]


def test_a_misspelt_backend_key_is_unknown_and_the_backend_missing(problems: Problems) -> None:
    assert problems("disks: {a: {bakend: malloc}}") == [
        '1: disks.a.bakend: unknown key "bakend"; did you mean "backend"?',
        "1: disks.a.backend: missing; there are broken, delay, file, malloc, null",
    ]


def test_a_backend_that_cannot_be_loaded(problems: Problems) -> None:
    assert problems("disks: {a: {backend: broken}}") == [
        "1: disks.a.backend: backend broken cannot be loaded: no module named 'rados'"
    ]


def test_a_missing_key_of_the_backend(problems: Problems) -> None:
    assert problems("disks:\n  a:\n    backend: malloc") == [
        "2: disks.a.size: missing; the backend malloc needs it"
    ]


def test_a_wrong_default_is_told_once_and_where_it_stands(problems: Problems) -> None:
    assert problems("""
        defaults:
          size: big
        disks:
          a: {backend: malloc}
          b: {backend: malloc}
        """) == [
        '2: defaults.size: "big" is not a size; write bytes, or a number with KiB, MiB, GiB or TiB'
    ]


def test_a_wrong_default_is_told_though_no_disk_takes_it(problems: Problems) -> None:
    assert problems("defaults: {attach: usb}") == [
        '1: defaults.attach: unknown way "usb"; there are auto, netlink, ioctl'
    ]


BIGGEST = "9223372036854775807"


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("size", "0", "must be more than 0"),
        ("size", "1000", "1000 is not a multiple of the block size, 512"),
        ("size", "-1", "-1 is negative; a size is not"),
        (
            "size",
            "8EiB",
            '"8EiB" is not a size; write bytes, or a number with KiB, MiB, GiB or TiB',
        ),
        (
            "size",
            "9E9T",
            '"9E9T" is not a size; write bytes, or a number with KiB, MiB, GiB or TiB',
        ),
        ("size", "8388608T", f"8388608T is more than the largest size, {BIGGEST} bytes"),
        ("size", "[1]", "expected a size, found a list"),
        ("size", "{a: 1}", "expected a size, found a mapping"),
        ("size", "", "expected a size, found nothing"),
        ("size", "''", "expected a size, found nothing"),
        ("size", "~", "expected a size, found nothing"),
        (
            "size",
            "true",
            "expected a size, found the boolean true; put it in quotes if it is meant",
        ),
        ("backend", "[malloc]", "expected a backend, found a list"),
        ("device", "/dev/nbd", '"/dev/nbd" is not a device; write /dev/nbdN or auto'),
        ("device", "/dev/nbd0p1", '"/dev/nbd0p1" is not a device; write /dev/nbdN or auto'),
        ("device", "/dev/nbd01", '"/dev/nbd01" is not a device; write /dev/nbdN or auto'),
        ("device", "/dev/nbd1048576", '"/dev/nbd1048576" is not a device; write /dev/nbdN or auto'),
        ("device", "/dev/sda", '"/dev/sda" is not a device; write /dev/nbdN or auto'),
        ("device", "", "expected a device, found nothing"),
        (
            "listen",
            "localhost:10809",
            '"localhost:10809": expected unix:PATH, tcp:HOST:PORT or systemd:NAME',
        ),
        (
            "listen",
            "tcp:127.0.0.1:0",
            '"tcp:127.0.0.1:0": expected tcp:HOST:PORT with a port from 1 to 65535',
        ),
        ("listen", "unix:a.sock", '"unix:a.sock": the path must be absolute'),
        (
            "listen",
            "unix:/" + "x" * 107,
            f'"unix:/{"x" * 74}…": the path is longer than 107 bytes',
        ),
        ("listen", "[unix:/a, unix:/a]", "unix:/a is given twice"),
        (
            "listen",
            "[[unix:/a]]",
            "expected an address or a list of addresses, found a list",
        ),
        ("listen", "[1" + ", 1" * 16 + "]", "17 addresses; a disk has at most 16"),
        (
            "listen",
            '"unix:/a\\nb"',
            '"unix:/a\\u000ab": an address has only printable characters',
        ),
        ("core", "one", 'expected a whole number, found "one"'),
        ("core", "3", "core 3 is not one of the service's, 0-2"),
        ("core", "-1", "-1 is not a core; they are numbered from 0"),
        ("core", "1.0", 'expected a whole number, found "1.0"'),
        ("readonly", "maybe", 'expected true or false, found "maybe"'),
        ("readonly", "1", 'expected true or false, found "1"'),
        ("readonly", "", "expected true or false, found nothing"),
        ("block_size", "513", "513 is not a power of two from 512 to 65536"),
        ("block_size", "0", "0 is not a power of two from 512 to 65536"),
        ("block_size", "256", "256 is not a power of two from 512 to 65536"),
        ("block_size", "128k", "131072 is not a power of two from 512 to 65536"),
        ("connections", "0", "0 is out of range; it goes from 1 to 16"),
        ("connections", "17", "17 is out of range; it goes from 1 to 16"),
        ("connections", "many", 'expected a whole number, found "many"'),
        ("timeout", "-1", "-1 is negative; a time is not"),
        (
            "timeout",
            "500ms",
            "0.5 s is not a whole number of seconds, as the kernel needs",
        ),
        (
            "timeout",
            "604801",
            "604801 is more than the longest time, 604800 s (7 days)",
        ),
        (
            "dead_timeout",
            "1h",
            '"1h" is not a time; write seconds, or a number with ms or us',
        ),
        (
            "dead_timeout",
            "1.5",
            "1.5 s is not a whole number of seconds, as the kernel needs",
        ),
        ("attach", "netlnk", 'unknown way "netlnk"; did you mean "netlink"?'),
        (
            "attach",
            "yes",
            "expected a way to attach, found the boolean true; put it in quotes if it is meant",
        ),
    ],
)
def test_a_wrong_value(problems: Problems, key: str, value: str, problem: str) -> None:
    given = {"backend": "malloc", "size": "1MiB", key: value}
    lines = [f"    {name}: {text}" for name, text in given.items()]
    line = 3 + list(given).index(key)
    assert problems("\n".join(["disks:", "  a:", *lines])) == [f"{line}: disks.a.{key}: {problem}"]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("path", "", "expected a path, found nothing"),
        (
            "path",
            "true",
            "expected a path, found the boolean true; put it in quotes if it is meant",
        ),
        ("path", '"a\\0b"', "expected a path of at most 4095 bytes without NUL"),
        ("path", "x" * 4096, "expected a path of at most 4095 bytes without NUL"),
        ("path", '"\\ud800"', '"\\ud800" is not Unicode text'),
        ("direct", "2", 'expected true or false, found "2"'),
    ],
)
def test_a_wrong_value_of_a_backend(problems: Problems, key: str, value: str, problem: str) -> None:
    given = {"path": "/x", key: value}
    lines = [f"    {name}: {text}" for name, text in given.items()]
    line = 4 + list(given).index(key)
    text = "\n".join(["disks:", "  a:", "    backend: file", *lines])
    assert problems(text) == [f"{line}: disks.a.{key}: {problem}"]


@pytest.mark.parametrize(
    ("read", "problem"),
    [
        ("soon", '"soon" is not a time; write seconds, or a number with ms or us'),
        ("-2ms", "-2ms is negative; a time is not"),
    ],
)
def test_a_wrong_time_of_a_backend(problems: Problems, read: str, problem: str) -> None:
    text = "disks: {a: {backend: malloc, size: 512}, b: {backend: delay, base: a, read: %s}}"
    assert problems(text % read) == [f"1: disks.b.read: {problem}"]


# --- what does not go together within a disk ---


def test_a_size_that_is_no_multiple_of_the_block_size(problems: Problems) -> None:
    assert problems("disks: {a: {backend: malloc, size: 512, block_size: 4096}}") == [
        "1: disks.a.size: 512 is not a multiple of the block size, 4096"
    ]


def test_a_block_size_that_no_device_takes(problems: Problems, config: Load) -> None:
    text = "disks: {a: {backend: malloc, size: 1MiB, block_size: 8192%s}}"
    assert config(text % "")[0].block_size == 8192
    assert problems(text % ", device: auto") == [
        "1: disks.a.block_size: 8192 is too large for a device, at most it takes 4096"
    ]


def test_connections_to_a_backend_that_serves_one(problems: Problems) -> None:
    assert problems("disks: {a: {backend: null, connections: 2}}") == [
        "1: disks.a.connections: the backend null serves only one"
    ]


def test_a_problem_that_the_backend_finds_is_told_at_its_key(problems: Problems) -> None:
    assert problems("disks:\n  a:\n    backend: file\n    path: /srv/folder") == [
        "4: disks.a.path: is a directory"
    ]


def test_a_problem_that_the_backend_finds_in_a_default_is_told_there(problems: Problems) -> None:
    assert problems("""
        defaults: {block_size: 512}
        disks:
          a: {backend: file, path: /x, direct: true}
        """) == ["1: defaults.block_size: 512 is too small for direct"]


def test_a_problem_of_a_key_that_is_absent_is_told_at_the_disk(problems: Problems) -> None:
    assert problems("disks:\n  a:\n    backend: file\n    path: new") == [
        "2: disks.a.size: a new file needs a size"
    ]


def test_the_backend_is_not_asked_about_wrong_values(problems: Problems) -> None:
    assert problems("disks: {a: {backend: file, path: /srv/folder, direct: x}}") == [
        '1: disks.a.direct: expected true or false, found "x"'
    ]


# --- names ---


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "_", "-", "0", "x" * 128])
def test_good_names(config: Load, name: str) -> None:
    assert config(f"disks: {{{name!r}: {{backend: malloc, size: 512}}}}")[0].name == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a/b", "a/b"), (".a", ".a"), ("..", ".."), ("a b", "a b"), ("ä", "ä"), ("\\n", '"\\u000a"')],
)
def test_bad_names(problems: Problems, name: str, shown: str) -> None:
    quoted = shown if shown.startswith('"') else f'"{shown}"'
    assert problems(f'disks: {{"{name}": {{backend: malloc, size: 512}}}}') == [
        f"1: disks.{shown}: {quoted} is not a disk's name: it has letters, digits and . _ -,"
        " and does not begin with a dot"
    ]


def test_an_empty_name(problems: Problems) -> None:
    assert problems('disks: {"": {backend: malloc, size: 512}}') == [
        "1: disks.: expected a disk's name, found nothing"
    ]


def test_a_long_name(problems: Problems) -> None:
    name = "x" * 129
    assert problems(f"disks: {{{name}: {{backend: malloc, size: 512}}}}") == [
        f'1: disks."{"x" * 80}…": a disk\'s name is not longer than 128 characters'
    ]


# --- what does not go together between disks ---


def test_a_disk_given_twice(problems: Problems) -> None:
    assert problems("""
        disks:
          a: {backend: malloc, size: 512}
          b: {backend: malloc, size: 512}
          a: {backend: malloc, size: 512}
        """) == ["4: disks.a: given twice; first on line 2"]


def test_a_key_given_twice(problems: Problems) -> None:
    assert problems("disks:\n  a:\n    backend: malloc\n    size: 512\n    size: 1024") == [
        "5: disks.a.size: given twice; first on line 4"
    ]


def test_a_section_given_twice(problems: Problems) -> None:
    assert problems("disks: {}\ndefaults: {}\ndisks: {}") == [
        "3: disks: given twice; first on line 1"
    ]


def test_a_device_given_twice(problems: Problems) -> None:
    assert problems("""
        disks:
          a: {backend: malloc, size: 512, device: /dev/nbd0}
          b: {backend: malloc, size: 512, device: /dev/nbd1}
          c: {backend: malloc, size: 512, device: /dev/nbd0}
        """) == ["4: disks.c.device: /dev/nbd0 is also the device of disk a (line 2)"]


def test_a_device_given_twice_is_told_beside_other_problems(problems: Problems) -> None:
    assert problems("""
        disks:
          a: {backend: malloc, size: 0, device: /dev/nbd0}
          b: {backend: malloc, size: 0, device: /dev/nbd0}
        """) == [
        "2: disks.a.size: must be more than 0",
        "3: disks.b.size: must be more than 0",
        "3: disks.b.device: /dev/nbd0 is also the device of disk a (line 2)",
    ]


def test_storage_given_twice(problems: Problems) -> None:
    assert problems("""
        disks:
          a: {backend: file, path: /srv/a}
          b: {backend: file, path: /srv/b/../a, readonly: true}
          c: {backend: file, path: /srv/c, readonly: true}
          d: {backend: file, path: /srv/c, readonly: true}
        """) == [
        "3: disks.b.path: /srv/a is also the path of disk a (line 2), and not readonly in both"
    ]


def test_a_missing_base(problems: Problems) -> None:
    assert problems(
        "disks: {vm1: {backend: malloc, size: 512}, b: {backend: delay, base: vm2}}"
    ) == ['1: disks.b.base: unknown disk "vm2"; did you mean "vm1"?']


def test_a_base_that_is_wrong_itself_is_not_missing(problems: Problems) -> None:
    assert problems("disks: {a: {backend: malloc, size: 0}, b: {backend: delay, base: a}}") == [
        "1: disks.a.size: must be more than 0"
    ]


def test_a_disk_that_is_its_own_base(problems: Problems) -> None:
    assert problems("disks:\n  a: {backend: delay, base: a}") == [
        "2: disks.a.base: a cycle of bases: a -> a"
    ]


def test_each_cycle_of_bases_is_told_once(problems: Problems) -> None:
    assert problems("""
        disks:
          x: {backend: delay, base: a}
          a: {backend: delay, base: b}
          b: {backend: delay, base: c}
          c: {backend: delay, base: a}
          d: {backend: delay, base: e}
          e: {backend: delay, base: d}
        """) == [
        "3: disks.a.base: a cycle of bases: a -> b -> c -> a",
        "6: disks.d.base: a cycle of bases: d -> e -> d",
    ]


def test_a_chain_of_bases_may_be_long(config: Load) -> None:
    lines = [f"  d{i}: {{backend: delay, base: d{i + 1}}}" for i in range(3000)]
    text = "\n".join(["disks:", *lines, "  d3000: {backend: malloc, size: 512}"])
    assert len(config(text)) == 3001


@pytest.mark.parametrize("address", ["tcp:127.0.0.1:10809", "unix:/run/a", "systemd:a"])
def test_disks_that_share_a_listener_on_two_cores(problems: Problems, address: str) -> None:
    assert problems(f"""
        defaults: {{backend: malloc, size: 512, listen: "{address}"}}
        disks:
          a: {{core: 0}}
          b: {{core: 1}}
        """) == [
        "4: disks.b.core: one worker must own this disk and disk a (line 3) with core 0:"
        " they share an address or a base"
    ]


def test_disks_that_share_a_core_through_a_third(problems: Problems) -> None:
    assert problems("""
        defaults: {backend: malloc, size: 512}
        disks:
          a: {core: 0, listen: "unix:/a"}
          b: {core: 1, listen: "unix:/b"}
          c: {listen: ["unix:/a", "unix:/b"]}
        """) == [
        "4: disks.b.core: one worker must own this disk and disk a (line 3) with core 0:"
        " they share an address or a base"
    ]


def test_a_disk_on_another_core_than_its_base(problems: Problems) -> None:
    assert problems("""
        disks:
          a: {backend: malloc, size: 512, core: 0}
          b: {backend: delay, base: a, core: 2}
        """) == [
        "3: disks.b.core: one worker must own this disk and disk a (line 2) with core 0:"
        " they share an address or a base"
    ]
