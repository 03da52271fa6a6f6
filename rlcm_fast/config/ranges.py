"""Ranges of numbers, written beside their fields: `lr: Annotated[float, positive("1e-4")] = 1e-4`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any

from rlcm_fast.config.marks import OrWord, marks_of


@dataclass(frozen=True)
class Range:
    """An interval; `remedy` ends the message about a number outside: "... is out of range; give {remedy}"."""

    low: float
    high: float
    includes_low: bool
    includes_high: bool
    remedy: str

    def allows(self, value: float) -> bool:
        """Tells whether the value lies in the interval; NaN and infinity never do."""
        above = self.low <= value if self.includes_low else self.low < value
        below = value <= self.high if self.includes_high else value < self.high
        return above and below and math.isfinite(value)


def within(interval: str, remedy: str) -> Range:
    """Returns the range written as "(0, 1]"; a round bracket excludes its end."""
    low, high = interval[1:-1].split(",")
    return Range(float(low), float(high), interval[0] == "[", interval[-1] == "]", remedy)


def at_least(low: int, remedy: str = "") -> Range:
    return within(f"[{low}, inf)", remedy or f"{low} or more")


def positive(example: str) -> Range:
    return within("(0, inf)", f"a positive number, as {example}")


PositiveInt = Annotated[int, at_least(1)]
NonNegativeInt = Annotated[int, at_least(0)]
PositiveOrAuto = Annotated[int, at_least(1, "1 or more, or auto"), OrWord("auto")]
NonNegativeOrAuto = Annotated[int, at_least(0, "0 or more, or auto"), OrWord("auto")]
ZeroIsOff = Annotated[float, at_least(0, "0 (off) or more")]


def check_ranges(section: Any) -> None:
    """Raises ValueError "field=value is out of range; give ..." for the first number of a dataclass that is outside.

    It searches sections and lists of dataclasses too; the range of a list or tuple holds for each of its numbers.
    """
    for name, value, allowed in _numbers(section, ""):
        if not allowed.allows(value):
            raise ValueError(f"{name}={value} is out of range; give {allowed.remedy}")


def _numbers(section: Any, prefix: str) -> Iterator[tuple[str, float, Range]]:
    """Yields (dotted name, value, range) of every number that has a range."""
    ranges = marks_of(type(section), Range)
    for item in fields(section):
        name, value, allowed = prefix + item.name, getattr(section, item.name), ranges.get(item.name)
        parts = {f"{name}[{index}]": part for index, part in enumerate(value)} if _is_list(value) else {name: value}
        for place, part in parts.items():
            if is_dataclass(part):
                yield from _numbers(part, f"{place}.")
            elif allowed is not None and part is not None and not isinstance(part, str):
                yield place, part, allowed


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
