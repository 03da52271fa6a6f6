"""The section `guard`: what tells that a reward is being hacked, and what the run does about it.

The names that `guard.watch` knows, apart from held-out rewards, stand here with the least width of their bands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import rlcm_fast.config.bounds as bounds
from rlcm_fast.config.ranges import FactorOrZero, UpdatesOrZero, at_least, positive

ALL, HELD_OUT, KL = "all", "held_out", "kl_to_start"
DISTANCE, ACROSS, WITHIN = "distance_to_start", "diversity_across", "diversity_within"
STATISTICS = ("colour_entropy", "edge_density", "saturation", "flat_area", "jpeg_kb")
"""What image_statistics.py measures, in its order."""

EXTRA = (ALL, HELD_OUT, *STATISTICS, ACROSS, WITHIN, DISTANCE, KL)
"""What guard.watch and guard.acts_on know beside the names of held-out rewards."""

OTHER_KEYS = ("outside", "kl_weight", "stopped")
"""What metrics call guard/NAME beside the measures."""

FLOORS = {**dict.fromkeys(STATISTICS, 0.4), ACROSS: 0.5, WITHIN: 0.5, DISTANCE: 1.5}
"""Least half-width of a band relative to the start model's value; the distance is in units of the start's diversity."""


@dataclass(frozen=True)
class GuardConfig:
    """What tells that a reward is being hacked, by images of the evaluation."""

    action: Literal["off", "warn", "raise_kl", "stop"] = "off"
    """Outside a band: warn says so, raise_kl also moves the KL term's weight, high at first, stop ends the run."""
    watch: list[str] = field(default_factory=lambda: [ALL])
    """held_out (rewards that are evaluated, not trained), image statistics, diversity, kl_to_start; all of these."""
    acts_on: list[str] = field(default_factory=lambda: [HELD_OUT])
    """Which of them raise the KL weight or stop the run; the others only warn."""
    every: UpdatesOrZero = 0
    """Iterations between measurements; 0: with each evaluation."""
    z: Annotated[float, positive("3", bounds.FACTOR)] = 3.0
    """Half-width of a band in standard errors of the start model's mean."""
    floor: Annotated[float, at_least(0, bounds.FACTOR, "a share of the start model's value, as 0.05")] = 0.05
    """Least half-width of a held-out reward's band, relative to the start model's mean."""
    floors: dict = field(default_factory=dict)
    """Other least half-widths by name, as {colour_entropy: 0.5}; docs/guards.md has the defaults."""
    max_kl: FactorOrZero = 0.0
    """Upper end of the band of kl_to_start, in nats per latent number; 0: it is shown without a band."""
    embedding: str = "thumbnails"
    """Embedding of distances and diversity: thumbnails (no model), clip, dinov2 or package.module:Class."""

    @property
    def is_on(self) -> bool:
        return self.action != "off"

    @property
    def raises_kl(self) -> bool:
        return self.action == "raise_kl"
