"""Sizes and times as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reactor.units import SIZE_MAX, format_exact_size, format_size, parse_seconds, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("007", 7),
        ("512B", 512),
        ("4KiB", 4096),
        ("4k", 4096),
        ("4K", 4096),
        ("64MiB", 64 << 20),
        ("64M", 64 << 20),
        ("1GiB", 1 << 30),
        ("1gib", 1 << 30),
        ("1 GiB", 1 << 30),
        ("1G", 1 << 30),
        ("2TiB", 2 << 40),
        ("2T", 2 << 40),
        ("1.5GiB", 3 << 29),
        ("0.5k", 512),
        ("9223372036854775807", SIZE_MAX),
        ("8388607TiB", 8388607 << 40),
    ],
)
def test_sizes_are_bytes_or_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "1GB",
            '"1GB" is not a size; write bytes, or a number with KiB, MiB, GiB or TiB',
        ),
        ("-1", "-1 is negative; a size is not"),
        ("-1GiB", "-1GiB is negative; a size is not"),
        ("0.3k", "0.3k is not a whole number of bytes"),
        ("1.5", "1.5 is not a whole number of bytes"),
        (
            "9223372036854775808",
            "9223372036854775808 is more than the largest size, 9223372036854775807 bytes",
        ),
        (
            "8388608TiB",
            "8388608TiB is more than the largest size, 9223372036854775807 bytes",
        ),
    ],
)
def test_a_wrong_size_says_what_is_wrong(text: str, problem: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - compared as a whole
        parse_size(text)
    assert str(raised.value) == problem


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "GiB", "1  GiB", "1GiB ", "1_000", "1e3", "0x10", "1,5G", "1.", ".5k", "+1"),
        *("1PiB", "inf", "nan", "1\n", "9" * 5000, "0." + "1" * 5000, "1GiBx", "٣"),
    ],
)
def test_other_spellings_of_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_foreign_text_is_cut_and_escaped_in_messages() -> None:
    with pytest.raises(ValueError, match="is not a size") as raised:
        parse_size("\x1b[2J\n" + "x" * 1000)
    assert str(raised.value).startswith('"\\u001b[2J\\u000axxx')
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (512, "512B"),
        (1023, "1023B"),
        (1024, "1KiB"),
        (1536, "1.5KiB"),
        ((1 << 20) - 1, "1MiB"),
        (1 << 30, "1GiB"),
        ((1 << 30) + 1, "1GiB"),
        (1288490189, "1.2GiB"),
        (5 << 50, "5120TiB"),
    ],
)
def test_sizes_are_shown_in_the_largest_unit_with_two_decimals(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (512, "512"), (1024, "1KiB"), (3 << 29, "1536MiB"), (5 << 50, "5120TiB")],
)
def test_exact_sizes_are_whole_numbers_of_the_largest_unit(size: int, text: str) -> None:
    assert format_exact_size(size) == text


@given(st.integers(0, SIZE_MAX), st.integers(0, 62))
def test_exact_sizes_read_back(number: int, zeroes: int) -> None:
    size = number >> zeroes << zeroes
    assert parse_size(format_exact_size(size)) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("1", 1.0),
        ("1s", 1.0),
        ("2ms", 0.002),
        ("2 ms", 0.002),
        ("500us", 0.0005),
        ("1.5", 1.5),
        ("0.7ms", 0.0007),
        ("1e-06", 1e-06),
        ("1.0e-06", 1e-06),
        ("604800", 604800.0),
    ],
)
def test_times_are_seconds_or_their_parts(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("soon", '"soon" is not a time; write seconds, or a number with ms or us'),
        ("1h", '"1h" is not a time; write seconds, or a number with ms or us'),
        ("-2ms", "-2ms is negative; a time is not"),
        ("604801", "604801 is more than the longest time, 604800 s (7 days)"),
        ("1e999", "1e999 is more than the longest time, 604800 s (7 days)"),
    ],
)
def test_a_wrong_time_says_what_is_wrong(text: str, problem: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - compared as a whole
        parse_seconds(text)
    assert str(raised.value) == problem


@pytest.mark.parametrize("text", ["", "ms", "nan", "inf", "1e9999999999", "1:30", "9" * 5000])
def test_other_spellings_of_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        parse_seconds(text)
