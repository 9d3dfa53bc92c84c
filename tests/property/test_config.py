"""disks.yaml: what is dumped loads back, and any file gives disks or clear lines."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from reactor.config import dump, load, parse_disk
from reactor.errors import UsageError
from reactor.spec import Address, DiskSpec
from reactor.units import SECONDS_MAX, SIZE_MAX
from tests.unit.config_schemas import CORES, SCHEMAS

NAMES = st.from_regex(r"\A[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}\Z")
# Every size that is right for the largest block size is right for the others.
SIZES = st.integers(1, SIZE_MAX >> 16).map(lambda blocks: blocks << 16)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
PATHS = TEXT.map(lambda text: str(Path("/", text.lstrip("/"))))
ADDRESSES = st.one_of(
    st.from_regex(r"\A/[!-~]{1,90}\Z").map(lambda path: Address("unix", path)),
    st.from_regex(r"\A[a-z0-9.-]{1,30}\Z").map(lambda name: Address("systemd", name)),
    st.builds(
        Address,
        st.just("tcp"),
        st.sampled_from(["127.0.0.1", "::1", "localhost", "fe80::1%eth0"]),
        st.integers(1, 65535),
    ),
)
BACKENDS = st.one_of(
    st.tuples(st.just("malloc"), st.fixed_dictionaries({"size": SIZES})),
    st.tuples(st.just("null"), st.fixed_dictionaries({}, optional={"size": SIZES, "label": TEXT})),
    st.tuples(
        st.just("file"),
        st.fixed_dictionaries(
            {"path": PATHS, "size": SIZES}, optional={"direct": st.just(value=False)}
        ),
    ),
    st.tuples(
        st.just("delay"),
        st.fixed_dictionaries(
            {"base": st.just("base")}, optional={"read": st.floats(0, SECONDS_MAX)}
        ),
    ),
)


@st.composite
def disks(draw: Callable[..., object]) -> tuple[DiskSpec, ...]:
    """Return disks that have no conflicts, with the one that others may be based on."""
    specs = [DiskSpec("base", "malloc", {"size": 512})]
    names = draw(st.sets(NAMES.filter(lambda name: name != "base"), max_size=5))
    assert isinstance(names, set)
    for index, name in enumerate(sorted(names)):
        backend, options = draw(BACKENDS)  # type: ignore[misc]
        common = draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "device": st.sampled_from(["auto", f"/dev/nbd{index}"]),
                    "listen": st.lists(ADDRESSES, unique=True, max_size=3).map(tuple),
                    "core": st.just(1),
                    "readonly": st.booleans(),
                    "block_size": st.sampled_from([512, 1024, 2048, 4096]),
                    "connections": st.integers(1, 16 if backend in ("malloc", "file") else 1),
                    "timeout": st.integers(0, int(SECONDS_MAX)),
                    "dead_timeout": st.integers(0, int(SECONDS_MAX)),
                    "attach": st.sampled_from(["auto", "netlink", "ioctl"]),
                },
            )
        )
        assert isinstance(common, dict)
        if "path" in options:
            options = {**options, "path": f"{options['path']}{index}"}
        specs.append(DiskSpec(name, backend, options, **common))
    return tuple(specs)


def load_bytes(data: bytes) -> tuple[DiskSpec, ...]:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        return load(Path(file.name), SCHEMAS, CORES)


@given(disks())
def test_what_is_dumped_loads_back(specs: tuple[DiskSpec, ...]) -> None:
    assert load_bytes(dump(specs).encode()) == specs


@given(disks())
def test_a_disk_that_crossed_the_bus_is_dumped_alike(specs: tuple[DiskSpec, ...]) -> None:
    crossed = [DiskSpec.from_message(spec.to_message()) for spec in specs]
    assert dump(crossed) == dump(specs)


WORDS = st.sampled_from(
    ["disks", "defaults", "backend", "malloc", "null", "size", "1GiB", "listen", "a", "core", "1"]
)
PIECES = st.one_of(WORDS, st.sampled_from([*":{}[],&*!|>-?#\"'%@\n ", ": ", "\n  ", "<<", "---"]))


def check_any_file(data: bytes) -> None:
    try:
        load_bytes(data)
    except UsageError as error:
        for line in str(error).split("\n"):
            assert line.isprintable()
            assert line.strip()


@given(st.binary(max_size=200))
def test_any_bytes_give_disks_or_clear_lines(data: bytes) -> None:
    check_any_file(data)


@given(st.text(max_size=200))
def test_any_text_gives_disks_or_clear_lines(text: str) -> None:
    check_any_file(text.encode(errors="surrogatepass"))


@given(st.lists(PIECES, max_size=60).map("".join))
def test_any_broken_yaml_gives_disks_or_clear_lines(text: str) -> None:
    check_any_file(text.encode())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=5,
)


@given(st.text(max_size=10), st.dictionaries(WORDS | st.text(max_size=10), VALUES, max_size=6))
def test_any_json_gives_a_disk_or_clear_lines(name: str, keys: dict[str, object]) -> None:
    try:
        parse_disk(name, keys, SCHEMAS, CORES)
    except UsageError as error:
        assert all(line.isprintable() for line in str(error).split("\n"))  # noqa: PT017
