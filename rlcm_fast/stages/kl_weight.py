"""The weight of the KL term: fixed by update.kl_weight, or found by a guard (guard.action: raise_kl).

Pictures answer to a weight late, and measures of them are noisy. The divergence D from the start model answers within a
few updates, almost without noise. So there are two loops: an inner one as PPO's adaptive KL term (arXiv 1909.08593,
section 2.2), and an outer one that finds its target T. Let w be the weight, and e the excess of the worst measure in
half-widths of its band: 0 at the band's end, -1 at the start model's value or better.

    at the first alarm      T = D / max(2, 1 + e)           what a measure lost is about proportional to D
                            b = 0.05
    after every rollout     b <- b (D / T)^0.1,  w = b D / T              with D / T within 1/2 to 2
    at every measurement    e > 0, and D has come down to T         T <- T / sqrt(1 + e)
                            e < -0.5, and D has come up to T        T <- 1.1 T; 1.03 T beyond 0.8 of the T last cut
                            otherwise                               T stays

Before the first alarm there is no target and w is update.kl_weight, which w never falls below. After it e is the mean
of the last two measurements, because little more than 0 may be noise; an e above 1 counts at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIRST, LEAST, MOST = 0.05, 1e-4, 100.0  # b at the first alarm, and the limits of b and w
_DRIFT, _MOST_RATIO = 0.1, 2.0
_WELL_INSIDE, _MOST_EXCESS = -0.5, 8.0
_GROWTH, _SLOW_GROWTH, _FAST_UNTIL = 1.1, 1.03, 0.8
_NEAR = 1.2  # D is at T if it is within this factor
_STATE = ("value", "divergence", "target", "cut_at", "base", "excess")


@dataclass
class KlWeight:
    """The present weight, and the divergence that the last rollout's updates measured."""

    least: float  # update.kl_weight
    is_measured: bool = False  # whether anyone wants `divergence`, which costs a pass of the start model
    value: float = -1.0  # w; below `least` until it is set
    divergence: float | None = None  # D, mean over all processes; None before the first update
    target: float | None = None  # T; None before the first alarm
    cut_at: float = 0.0  # the T that was last cut, at first D
    base: float = FIRST  # b
    excess: float = 0.0  # e of the last measurement alone

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
            ratio = min(_MOST_RATIO, max(1 / _MOST_RATIO, divergence / self.target))
            self.base = min(MOST, max(LEAST, self.base * ratio**_DRIFT))
            self.value = min(MOST, max(self.least, self.base * ratio))

    def aim(self, excess: float, is_alarm: bool) -> None:
        """Moves the target after a measurement with this excess; is_alarm: it is large enough to begin with."""
        if not self.divergence:
            return
        before, self.excess = self.excess, min(_MOST_EXCESS, max(-1.0, excess))
        if self.target is None:
            if is_alarm:
                self.cut_at, self.target = self.divergence, self.divergence / max(2.0, 1 + self.excess)
                self.hold(self.divergence)
            return
        settled = self.excess if self.excess > 1 else (self.excess + before) / 2
        ratio = self.divergence / self.target
        if settled > 0 and ratio < _NEAR:
            self.cut_at, self.target = self.target, self.target / math.sqrt(1 + settled)
        elif settled < _WELL_INSIDE and ratio > 1 / _NEAR:
            self.target *= _GROWTH if self.target < _FAST_UNTIL * self.cut_at else _SLOW_GROWTH

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
            state = {**state, "target": target, "cut_at": target or 0.0, "base": max(LEAST, state["value"])}
        for name in _STATE:
            setattr(self, name, state[name])
        self.value = max(self.least, self.value)
