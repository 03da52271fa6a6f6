"""The plain policy gradient: DDPO_SF of arXiv 2305.13301 (equation 4), REINFORCE with a baseline.

    gradient = mean over transitions of A d log_prob,       A clamped to [-advantage_clip, advantage_clip]

Unbiased only for images of the present weights, so it has one update a rollout. There it is PPO without a clip.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlcm_fast.algorithms.base import Algorithm


@dataclass(frozen=True)
class Reinforce(Algorithm):
    """Advantages as they are, but for outliers."""

    advantage_clip: float = 10.0

    def weights(self, advantages: Tensor) -> Tensor:
        return advantages.clamp(-self.advantage_clip, self.advantage_clip)
