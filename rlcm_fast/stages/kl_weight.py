"""The weight of the KL term: fixed by update.kl_weight, or moved by the guard (guard.action: raise_kl).

    outside a band by e half-widths    w <- max(w, floor) * 2^min(e, 2), unless the weights are on their way back:
                                       the divergence from the start model, or e, has fallen by a tenth
    well inside all bands              w <- max(floor, 0.8 w)
    between                            w stays
    outside anew                       floor <- max(FIRST, 2 floor): a weight that was too low is not tried again

It moves once per measurement. The pictures answer to a weight only some updates later, and the divergence answers at
once and without noise: so it decides whether a weight is already high enough. The floor begins at update.kl_weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIRST, MOST = 0.01, 100.0
_MOST_DOUBLINGS = 2.0
_FALL = 0.8
_ON_THE_WAY_BACK = 0.9  # of the value before
_MOST_EXCESS = 1e6  # JSON has no infinity


@dataclass
class KlWeight:
    """The present weight, and the divergence that the last rollout's updates measured."""

    least: float  # update.kl_weight
    is_measured: bool = False  # whether anyone wants `divergence`, which costs a pass of the start model
    value: float = -1.0  # below `least` until it is set
    divergence: float | None = None  # mean over all processes; None before the first update
    floor: float = 0.0  # what the weight does not fall below
    excess: float = 0.0  # at the last measurement
    divergence_before: float | None = None  # at the last measurement

    def __post_init__(self) -> None:
        self.value, self.floor = max(self.value, self.least), max(self.floor, self.least)

    @property
    def is_needed(self) -> bool:
        """Tells whether an update must run the start model."""
        return self.value > 0 or self.is_measured

    def follow(self, excess: float, well_inside: float) -> None:
        """Moves the weight; excess, in half-widths, is how far the worst measure lies outside, negative if inside.

        well_inside: the excess below which the weight falls.
        """
        if excess > 0 >= self.excess:
            self.floor = max(FIRST, 2 * self.floor)
        if excess > 0 and not self._is_on_the_way_back(excess):
            self.value = min(MOST, max(self.value, self.floor) * 2 ** min(excess, _MOST_DOUBLINGS))
        elif excess < well_inside:
            self.value = max(self.floor, _FALL * self.value)
        self.excess, self.divergence_before = min(excess, _MOST_EXCESS), self.divergence

    def _is_on_the_way_back(self, excess: float) -> bool:
        """Tells whether the pictures get better, or will, because the weights come closer to the start model's."""
        if self.excess <= 0:
            return False
        now, before = self.divergence, self.divergence_before
        is_closer = now is not None and before is not None and now < _ON_THE_WAY_BACK * before
        return is_closer or excess < _ON_THE_WAY_BACK * self.excess

    def state_dict(self) -> dict[str, Any]:
        names = ("value", "divergence", "floor", "excess", "divergence_before")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues with a saved weight, but not below update.kl_weight, which may have changed."""
        self.value, self.floor = (max(self.least, state[name]) for name in ("value", "floor"))
        self.divergence, self.divergence_before = state["divergence"], state["divergence_before"]
        self.excess = state["excess"]
