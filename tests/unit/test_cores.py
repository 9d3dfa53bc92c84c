"""Lists of cores."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reactor.cores import TEXT_MAX, format_cores, parse_cores

EIGHT = range(8)
PRESENT = os.sysconf("SC_NPROCESSORS_CONF")
MACHINE = f"0-{PRESENT - 1}" if PRESENT > 1 else "0"


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("0", (0,)),
        ("0-3", (0, 1, 2, 3)),
        ("0,2,4-7", (0, 2, 4, 5, 6, 7)),
        ("0, 2", (0, 2)),
        ("3,1,2", (1, 2, 3)),
        ("2-2", (2,)),
        ("0x0f", (0, 1, 2, 3)),
        ("0X81", (0, 7)),
        ("all", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("1,1,0-2,1", (0, 1, 2)),
    ],
)
def test_a_list_gives_each_core_once_and_in_order(text: str, cores: tuple[int, ...]) -> None:
    assert parse_cores(text, EIGHT) == cores


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("3-1", "the range 3-1 runs backwards; write 1-3"),
        ("0x0", "0x0 lists no core"),
        ("", '"" is not a list of cores; write 0-3, 0,2,4-7, 0x0f or all'),
        ("0,,1", '"0,,1" is not a list of cores; write 0-3, 0,2,4-7, 0x0f or all'),
        ("-1", '"-1" is not a list of cores; write 0-3, 0,2,4-7, 0x0f or all'),
        ("0-", '"0-" is not a list of cores; write 0-3, 0,2,4-7, 0x0f or all'),
        ("0x", '"0x" is not a list of cores; write 0-3, 0,2,4-7, 0x0f or all'),
        ("two", '"two" is not a list of cores; write 0-3, 0,2,4-7, 0x0f or all'),
        ("٣", '"٣" is not a list of cores; write 0-3, 0,2,4-7, 0x0f or all'),
        ("0x" + "f" * TEXT_MAX, f"a list of cores is not longer than {TEXT_MAX} characters"),
    ],
)
def test_a_wrong_list_says_what_is_wrong(text: str, problem: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - compared as a whole
        parse_cores(text, EIGHT)
    assert str(raised.value) == problem


@pytest.mark.parametrize("text", ["999999", "0-999999999", "0,999999", "0x" + "f" * 4000])
def test_a_core_that_is_not_there_does_not_exist(text: str) -> None:
    missing = 999999 if text.endswith("999999") and "-" not in text else PRESENT
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - compared as a whole
        parse_cores(text, range(PRESENT))
    assert str(raised.value) == f"core {missing} does not exist (this machine has {MACHINE})"


def test_a_core_that_the_process_may_not_run_on_is_not_allowed() -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - compared as a whole
        parse_cores("0", usable=[2, 3, 4, 6])
    message = "core 0 is not allowed for this process (it may run on 2-4,6)"
    assert str(raised.value) == message


def test_the_default_is_what_the_kernel_allows() -> None:
    allowed = os.sched_getaffinity(0)
    one = min(allowed)
    os.sched_setaffinity(0, {one})
    try:
        assert parse_cores("all") == (one,)
    finally:
        os.sched_setaffinity(0, allowed)


@given(st.sets(st.integers(0, 200), min_size=1))
def test_shown_cores_read_back(cores: set[int]) -> None:
    assert parse_cores(format_cores(cores), range(201)) == tuple(sorted(cores))


@given(st.sets(st.integers(0, 200), min_size=1))
def test_a_mask_is_the_same_list(cores: set[int]) -> None:
    mask = hex(sum(1 << core for core in cores))
    assert parse_cores(mask, range(201)) == tuple(sorted(cores))


@given(st.text(max_size=40))
def test_any_text_gives_cores_or_a_clear_error(text: str) -> None:
    try:
        cores = parse_cores(text, EIGHT)
    except ValueError as error:
        assert str(error).isprintable()  # noqa: PT017
    else:
        assert set(cores) <= set(EIGHT)
