"""Reward-weighted regression (Peters & Schaal, ICML 2007): imitate one's own samples, the better ones more.

    loss = -mean over transitions of w log_prob,      w = A exp(a / temperature) / sum over the A samples of exp(...)

with a the advantages, clamped as PPO's. The baseline of DDPO (arXiv 2305.13301, section 4.1) and of large-scale RL
(arXiv 2401.12244). Departure: there the denoising loss of the finished image stands in the place of the log-prob, as
a bound of log p(x_0); here the sampled chain is imitated, whose log-prob is exact.

Weights are never negative, so bad samples are imitated too, only less: it improves slowly, and may not diverge.
"""

# A samples of all processes

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlcm_fast.algorithms.base import Algorithm


@dataclass(frozen=True)
class RewardWeightedRegression(Algorithm):
    """temperature: of advantages; the lower, the more only the best count."""

    temperature: float = 1.0
    advantage_clip: float = 10.0

    def weights(self, advantages: Tensor) -> Tensor:
        clamped = advantages.clamp(-self.advantage_clip, self.advantage_clip)
        return len(advantages) * (clamped / self.temperature).softmax(dim=0)
