"""Ranges of numbers, written beside their fields: `lr: Annotated[float, positive("1e-4", bounds.LEARNING_RATE)]`.

Every range ends somewhere, by its interval or by a bound with its reason (bounds.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any

import rlcm_fast.config.bounds as bounds
from rlcm_fast.config.bounds import Bound
from rlcm_fast.config.marks import OrWord, marks_of


@dataclass(frozen=True)
class Range:
    """An interval; `remedy` ends the message about a number outside: "... is out of range; give {remedy}".

    A number that is only beyond `bound` gets the bound's reason instead.
    """

    low: float
    high: float
    includes_low: bool
    includes_high: bool
    remedy: str
    bound: Bound | None = None

    @property
    def shown(self) -> str:
        """The remedy with the bound, for --help and docs/config.md."""
        return self.remedy if self.bound is None else f"{self.remedy}; at most {self.bound}"

    def allows(self, value: float) -> bool:
        """Tells whether the value lies in the interval; NaN and infinity never do."""
        above = self.low <= value if self.includes_low else self.low < value
        below = value <= self.high if self.includes_high else value < self.high
        return above and below and math.isfinite(value) and not self.is_beyond(value)

    def is_beyond(self, value: float) -> bool:
        """Tells whether the value is a number above the bound."""
        return self.bound is not None and math.isfinite(value) and value > self.bound.most

    def problem(self, value: float) -> str:
        """Says what is wrong with a value that is not allowed, and the way out."""
        if self.is_beyond(value) and self.bound is not None:
            return f"is out of range; give at most {self.bound}: {self.bound.reason}"
        return f"is out of range; give {self.remedy}"


def within(interval: str, remedy: str, bound: Bound | None = None) -> Range:
    """Returns the range written as "(0, 1]"; a round bracket excludes its end."""
    low, high = interval[1:-1].split(",")
    return Range(float(low), float(high), interval[0] == "[", interval[-1] == "]", remedy, bound)


def at_least(low: int, bound: Bound, remedy: str = "") -> Range:
    return within(f"[{low}, inf)", remedy or f"{low} or more", bound)


def positive(example: str, bound: Bound) -> Range:
    return within("(0, inf)", f"a positive number, as {example}", bound)


Images = Annotated[int, at_least(1, bounds.IMAGES)]
Batch = Annotated[int, at_least(1, bounds.BATCH)]
BatchOrZero = Annotated[int, at_least(0, bounds.BATCH)]
BatchOrAuto = Annotated[int, at_least(1, bounds.BATCH, "1 or more, or auto"), OrWord("auto")]
BatchOrZeroOrAuto = Annotated[int, at_least(0, bounds.BATCH, "0 or more, or auto"), OrWord("auto")]
Updates = Annotated[int, at_least(1, bounds.UPDATES)]
UpdatesOrZero = Annotated[int, at_least(0, bounds.UPDATES)]
Workers = Annotated[int, at_least(1, bounds.WORKERS)]
WorkersOrZero = Annotated[int, at_least(0, bounds.WORKERS)]
Count = Annotated[int, at_least(1, bounds.COUNT)]
Seed = Annotated[int, at_least(0, bounds.SEED)]
FactorOrZero = Annotated[float, at_least(0, bounds.FACTOR, "0 (off) or more")]


def check_ranges(section: Any) -> None:
    """Raises ValueError "field=value is out of range; give ..." for the first number of a dataclass that is outside.

    It searches sections and lists of dataclasses too; the range of a list, or of lists in it, holds for each number.
    """
    for name, value, allowed in _numbers(section, ""):
        if not allowed.allows(value):
            raise ValueError(f"{name}={value} {allowed.problem(value)}")


def _numbers(section: Any, prefix: str) -> Iterator[tuple[str, float, Range]]:
    """Yields (dotted name, value, range) of every number that has a range."""
    ranges = marks_of(type(section), Range)
    for item in fields(section):
        for place, part in _parts(prefix + item.name, getattr(section, item.name)):
            allowed = ranges.get(item.name)
            if is_dataclass(part):
                yield from _numbers(part, f"{place}.")
            elif allowed is not None and part is not None and not isinstance(part, str):
                yield place, part, allowed


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of each part of a list, and of the lists in it; the value itself if it is no list."""
    if not isinstance(value, list | tuple):
        yield name, value
        return
    for index, part in enumerate(value):
        yield from _parts(f"{name}[{index}]", part)
