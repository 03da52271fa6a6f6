"""The weight of the KL term: fixed by update.kl_weight, or found by the guard from above (guard.action: raise_kl).

The guard begins with a weight that changes little, lowers it until the pictures come near the end of a band, and holds
them there: a PI controller of log w. Let e be the excess of the worst measure in half-widths of its band: 0 at the
band's end, -1, the start model's value, at least, and 2 at most. After each measurement

    m <- (m + e) / 2          one measurement is noisy; m = -1 at first
    b <- b 2^(r (m + 1/10))   b = 1/4 at first; r = 1/5, and half of that, but at least 1/12, when m rises above 0
    w = b 2^(max(m, 0) / 2)   never below update.kl_weight

Pictures follow a lower weight late, after tens of updates, and a higher one at once. So b moves slowly, and what is
lost for the moment is met by the second factor, which goes when the pictures are back.

The first weight needs no unit. To first order, a step of the sampler moves away from the start model by R^2 / 2 w^2
nats, R^2 being the share of the advantages' variance that is linear in the step's noise: at most 8 nats for w = 1/4,
whatever the size of the latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIRST, LEAST, MOST = 0.25, 1e-4, 100.0
FIRST_RATE, LEAST_RATE = 1 / 5, 1 / 12
AIM = -0.1  # where b comes to rest
_OLD_FIRST = 0.01  # what a checkpoint from before there was a base goes on with at least
_STATE = ("value", "divergence", "base", "mean", "rate")


@dataclass
class KlWeight:
    """The present weight, and the divergence that the last rollout's updates measured."""

    least: float  # update.kl_weight
    is_measured: bool = False  # whether anyone wants `divergence`, which costs a pass of the start model
    is_moved: bool = False  # by a guard
    value: float = -1.0  # w; below `least` until it is set
    divergence: float | None = None  # mean over all processes; None before the first update
    base: float = FIRST  # b
    mean: float = -1.0  # m
    rate: float = FIRST_RATE  # r

    def __post_init__(self) -> None:
        self.value = max(self.value, self.least, self.base if self.is_moved else 0.0)

    @property
    def is_needed(self) -> bool:
        """Tells whether an update must run the start model."""
        return self.value > 0 or self.is_measured

    def follow(self, excess: float) -> None:
        """Moves the weight; excess, in half-widths, is how far the worst measure lies outside, negative if inside."""
        before, self.mean = self.mean, (self.mean + min(2.0, max(-1.0, excess))) / 2
        if self.mean > 0 >= before:
            self.rate = max(LEAST_RATE, self.rate / 2)
        self.base = min(MOST, max(LEAST, self.base * 2 ** (self.rate * (self.mean - AIM))))
        self.value = min(MOST, max(self.least, self.base * 2 ** (max(self.mean, 0.0) / 2)))

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues with a saved weight, but not below update.kl_weight, which may have changed.

        If no guard moves the weight any more, it is update.kl_weight again.
        """
        old = {"base": max(_OLD_FIRST, state["value"])}
        for name in _STATE:
            setattr(self, name, {**old, **state}.get(name, getattr(self, name)))
        self.value = max(self.least, self.value) if self.is_moved else self.least
