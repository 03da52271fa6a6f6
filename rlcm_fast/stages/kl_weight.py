"""The weight of the KL term: fixed by update.kl_weight, or found by a guard (guard.action: raise_kl).

Pictures answer to a weight late, measures of them are noisy, and what they have lost comes back only near the start
model. The divergence D from it answers within a few updates, almost without noise. So the weight holds D where the
measures have been seen to be good, and they let it grow from there: an inner loop as PPO's adaptive KL term (arXiv
1909.08593, section 2.2), and an outer one that finds its target T. Let w be the weight, and e the excess of the worst
measure in half-widths of its band: 0 at the band's end, at least -1, the start model's value; it counts as at most 2.

    first measurement       T = D / (1 + max(e, 0))^2,  b = 0.05,  m = 0
    later measurements      m <- (m + e) / 2,  T <- T 1.2^-m                  m, because one measurement is noisy
    after every rollout     b <- b (D / T)^0.1,  w = b (1 + max(m, 0)) D / T          both factors within 1/2 to 2

Pictures go on changing at the same D, so outside of the band D is led below T at once, until they are back.

Before the first measurement there is no target and w is update.kl_weight, which w never falls below. An e above 0 does
not count while D comes down to T: it is above 1.2 T, and less than at the last measurement. T grows to 1.2 D at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIRST, LEAST, MOST = 0.05, 1e-4, 100.0  # b at first, and the limits of b and w
_DRIFT, _MOST_RATIO = 0.1, 2.0
_MOST_EXCESS = 2.0
_STEP = 1.2
_NEAR = 1.2  # D is at T if it is within this factor
_FALLS = 0.95  # of D at the last measurement
_STATE = ("value", "divergence", "measured", "target", "base", "margin")


@dataclass
class KlWeight:
    """The present weight, and the divergence that the last rollout's updates measured."""

    least: float  # update.kl_weight
    is_measured: bool = False  # whether anyone wants `divergence`, which costs a pass of the start model
    value: float = -1.0  # w; below `least` until it is set
    divergence: float | None = None  # D, mean over all processes; None before the first update
    target: float | None = None  # T; None before the first measurement
    base: float = FIRST  # b
    margin: float = 0.0  # m
    measured: float = 0.0  # D at the last measurement

    def __post_init__(self) -> None:
        self.value = max(self.value, self.least)

    @property
    def is_needed(self) -> bool:
        """Tells whether an update must run the start model."""
        return self.value > 0 or self.is_measured

    @property
    def told(self) -> str:
        """What it does, as part of a line."""
        if self.target is None:
            return "update.kl_weight waits for the first update"
        return (
            f"update.kl_weight {self.value:.3g} brings the divergence from {self.divergence:.3g} to {self.target:.3g}"
        )

    def hold(self, divergence: float) -> None:
        """Notes what the updates on a rollout measured, and moves the weight if there is a target."""
        if not math.isfinite(divergence):  # of updates that were skipped
            return
        self.divergence = divergence
        if self.target is not None:
            ratio = divergence / self.target
            self.base = min(MOST, max(LEAST, self.base * _bounded(ratio) ** _DRIFT))
            factor = _bounded(ratio * (1 + max(0.0, self.margin)))
            self.value = min(MOST, max(self.least, self.base * factor))

    def aim(self, excess: float) -> None:
        """Moves the target after a measurement with this excess; the first one that follows an update sets it."""
        if not self.divergence:
            return
        excess, divergence = min(_MOST_EXCESS, max(-1.0, excess)), self.divergence
        before, self.measured = self.measured, divergence
        if self.target is None:
            self.target = divergence / (1 + max(0.0, excess)) ** 2
            self.hold(divergence)
            return
        if excess > 0 and divergence > _NEAR * self.target and divergence < _FALLS * before:
            return
        self.margin = (self.margin + excess) / 2
        wanted = self.target * _STEP**-self.margin
        self.target = min(wanted, max(self.target, _NEAR * divergence))

    def let_go(self) -> None:
        """Goes back to update.kl_weight, for a run whose guard no longer moves the weight."""
        self.value, self.target = self.least, None

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues with a saved state; update.kl_weight may have changed.

        A checkpoint from before there were targets has a weight alone: it goes on from there, with its divergence as
        the target.
        """
        if "target" not in state:
            has_risen = state["value"] > self.least and state["divergence"]
            target = state["divergence"] if has_risen else None
            state = {**state, "target": target, "base": max(LEAST, state["value"])}
        for name in _STATE:
            setattr(self, name, state.get(name, getattr(self, name)))
        self.value = max(self.least, self.value)


def _bounded(ratio: float) -> float:
    return min(_MOST_RATIO, max(1 / _MOST_RATIO, ratio))
