"""A reward's test of itself: a value that is known beforehand, which shows that its model is the right one.

`rlcm-fast doctor` prints it beside the expected value. It needs no picture from a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class SelfTest:
    """A value that a reward found, and the one that it should have found."""

    what: str  # what was looked at, in words
    found: float
    expected: float
    tolerance: float

    @property
    def has_passed(self) -> bool:
        return abs(self.found - self.expected) <= self.tolerance


@runtime_checkable
class TestsItself(Protocol):
    """A reward that can test itself."""

    def self_test(self) -> SelfTest | None:
        """Looks at something whose value is known; None if you named files of which nothing is known."""
        ...
