"""Counts how often a person preferred the tuned model's image to the start model's; a tie is half a win.

The rate of n pairs is (wins + ties / 2) / n. Its standard error is the report's: that of a model no better than the
start, so 8 wins of 8 have one, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rlcm_fast.rating.records import Rating
from rlcm_fast.report.measures import error_of_win_rate


@dataclass(frozen=True)
class WinRate:
    """The comparisons of one evaluation."""

    round: int
    wins: int
    ties: int
    losses: int

    @property
    def compared(self) -> int:
        """The number of pairs."""
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> float:
        """The share of wins, in [0, 1]."""
        return (self.wins + self.ties / 2) / self.compared

    @property
    def standard_error(self) -> float:
        """The standard error of the rate, as the report and the live view have it."""
        return error_of_win_rate(self.compared)

    @property
    def sentence(self) -> str:
        """What the person said, in a line."""
        return (
            f"after {self.round} iterations you preferred the tuned model in {self.rate:.0%} of {self.compared} pairs "
            f"(standard error {self.standard_error:.0%}); 50% is no change"
        )

    @property
    def shown(self) -> dict[str, Any]:
        """What the page shows, as JSON."""
        return {"round": self.round, "wins": self.wins, "ties": self.ties, "losses": self.losses, "rate": self.rate}


def win_rates(ratings: Iterable[Rating]) -> list[WinRate]:
    """Returns the win rates of all evaluations with answers, by round."""
    by_round: dict[int, list[int]] = {}
    for rating in ratings:
        if rating.kind == "comparison" and rating.ranks is not None:
            tuned, start = rating.ranks
            by_round.setdefault(rating.round, [0, 0, 0])[0 if tuned < start else 2 if tuned > start else 1] += 1
    return [WinRate(number, *by_round[number]) for number in sorted(by_round)]
