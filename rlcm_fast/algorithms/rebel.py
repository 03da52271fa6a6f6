"""REBEL (arXiv 2404.16767, equation 5): the change of log-probs regresses the difference of rewards of two images.

    residual = (1 / eta) [d(y) - d(y')] - [r(y) - r(y')],    d = sum over the K actions of log_prob - log_prob_old
    loss     = mean over pairs of residual^2

y and y' are neighbouring images of one prompt. Two passes need the memory of one: all log-probs without gradients,
from which every action of y has the same d loss / d log_prob = 2 residual / (P eta), and of y' minus that; then
micro-batches with these as signals. In the first update of a rollout nothing has changed: there is no first pass.

Departures:
 1. log_prob is the mean over C, H, W, not the sum, so eta here is theirs over C H W.
 2. r is the advantage. Of statistics of the prompt, the group or the batch only the scale is left in a difference; it
    makes one eta serve rewards of any unit.
 3. The RLCM authors' code sums log-probs over the batch instead of over steps (right for a batch of one only).
"""

# P pairs, N = 2 P K transitions of an update

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlcm_fast.algorithms.base import Algorithm
from rlcm_fast.kernels import functional


@dataclass(frozen=True)
class Rebel(Algorithm):
    """eta: nats per dimension for one unit of advantage; small ones move the policy less."""

    eta: float = 1.0
    advantage_clip: float = 10.0
    is_of_pairs: ClassVar[bool] = True

    def weights(self, advantages: Tensor) -> Tensor:
        return advantages.clamp(-self.advantage_clip, self.advantage_clip)

    def signals(self, weights: Tensor, change: Tensor | None, num_actions: int) -> Tensor:
        change = torch.zeros_like(weights) if change is None else change
        of_samples = change.reshape(-1, num_actions)  # (2 P, K)
        rewards = weights.reshape(-1, num_actions)[:, 0]  # (2 P,)
        _, gradient = functional.rebel_residual(of_samples, torch.zeros_like(of_samples), rewards, self.eta)
        return -len(weights) * gradient.repeat_interleave(num_actions)
