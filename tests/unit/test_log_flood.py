"""What floods the log is counted instead."""

from __future__ import annotations

import logging

from reactor.log import ALIKE_MAX, _Flood


class Clock:
    """Time that moves only when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def line(message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("test", logging.INFO, "", 0, message, arguments, None)


def test_lines_of_one_kind_are_written_up_to_a_bound_and_then_counted() -> None:
    clock = Clock()
    flood = _Flood(clock)
    written = [flood.admits(line("client %d", number)) for number in range(ALIKE_MAX + 7)]
    assert sum(written) == ALIKE_MAX
    assert all(written[:ALIKE_MAX])
    assert flood.admits(line("another kind"))
    assert flood.end_second() == []
    clock.now = 1.0
    assert flood.end_second() == ["not logged: 7 more lines like: client %d"]
    assert flood.admits(line("client %d", 0))


def test_nothing_is_said_where_nothing_was_left_out() -> None:
    clock = Clock()
    flood = _Flood(clock)
    assert flood.admits(line("client %d", 0))
    clock.now = 1.0
    assert flood.end_second() == []
