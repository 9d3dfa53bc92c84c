"""Devices that may be in use, and what is said when that cannot be known."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any

from reactor.control.obstacles import LOOK_SECONDS, Uses, obstacle_to_removal

DISKS = 200


class Platform:
    """Devices that answer with an errno, or have so many claims."""

    def __init__(self, answer: int | list[str]) -> None:
        self.answer = answer
        self.asked: list[tuple[str, float]] = []

    def claims(self, device: str, seconds: float) -> list[str]:
        self.asked.append((device, seconds))
        if isinstance(self.answer, int):
            raise OSError(self.answer, os.strerror(self.answer))
        return self.answer


def why_not(platform: Any, *, number: int = 0, uses: Uses | None = None) -> str:
    disk: Any = SimpleNamespace(
        path=f"/dev/nbd{number}", state="online", spec=SimpleNamespace(name="x")
    )
    return obstacle_to_removal(uses or Uses(platform), disk)


def test_what_is_in_use_stays() -> None:
    assert why_not(Platform([])) == ""
    why = why_not(Platform(["somebody"]))
    assert "/dev/nbd0 is in use by somebody" in why
    assert "end that use, then reload" in why


def test_what_cannot_be_known_is_nobodys_use() -> None:
    for number in (errno.ETIMEDOUT, errno.ENOMEM):
        why = why_not(Platform(number))
        assert "it cannot be known whether /dev/nbd0 is in use" in why
        assert os.strerror(number) in why
        assert why.endswith("reload again")


def test_devices_that_do_not_answer_are_asked_once_and_awaited_little() -> None:
    platform: Any = Platform(errno.ETIMEDOUT)
    uses = Uses(platform)
    for _ in range(2):
        for number in range(DISKS):
            assert why_not(platform, number=number, uses=uses)
    assert len(platform.asked) == DISKS
    assert sum(seconds for _, seconds in platform.asked) <= 2 * LOOK_SECONDS


def test_the_others_are_awaited_as_ever() -> None:
    platform: Any = Platform([])
    uses = Uses(platform)
    for number in range(DISKS):
        why_not(platform, number=number, uses=uses)
    assert {seconds for _, seconds in platform.asked} == {LOOK_SECONDS}
