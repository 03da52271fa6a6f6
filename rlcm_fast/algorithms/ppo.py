"""The clipped policy gradient that RLCM trains with.

    loss = mean over transitions of max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range))
    rho  = exp(log_prob - log_prob_old),       A clamped to [-advantage_clip, advantage_clip]

PPO's clipped surrogate (arXiv 1707.06347, equation 7) with one advantage per image for each of its actions, as DDPO_IS
(arXiv 2305.13301) and RLCM (arXiv 2404.03673) use it: no value network, no entropy bonus.
The log-probs are means over C, H, W, so 1e-4 of clip range is 1e-4 * C * H * W on the true log-ratio.
"""

# N transitions of a micro-batch

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlcm_fast.algorithms.base import Algorithm
from rlcm_fast.kernels import functional
from rlcm_fast.kernels.functional import RatioStats


@dataclass(frozen=True)
class PPO(Algorithm):
    """The loss of a micro-batch, given how far a ratio may move and how large an advantage may be."""

    clip_range: float = 1e-4
    advantage_clip: float = 10.0
    clips: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in [("clip_range", self.clip_range), ("advantage_clip", self.advantage_clip)]:
            if not value > 0:
                raise ValueError(f"update.{name}={value} must be above 0")

    def weights(self, advantages: Tensor) -> Tensor:
        return advantages.clamp(-self.advantage_clip, self.advantage_clip)

    def loss(self, log_prob: Tensor, log_prob_old: Tensor | None, signals: Tensor) -> tuple[Tensor, RatioStats]:
        """All (N,) float32 -> the mean loss (), differentiable in log_prob, and the ratio's statistics; signals are A.

        log_prob_old None: the old policy is the present one; the ratio is exactly 1 and its gradient that of log_prob.
        """
        return functional.clipped_ratio_loss(log_prob, log_prob_old, signals, self.clip_range, math.inf)

    def loss_of_output(
        self, x_t: Tensor, m: Tensor, x_s: Tensor, coef: Tensor, log_prob_old: Tensor | None, signals: Tensor
    ) -> tuple[Tensor, RatioStats]:
        """`loss` of the log-probs of x_s (N, C, H, W), given a network's output m and coef (N, 3): A, B, sigma."""
        arguments = (coef, log_prob_old, signals, self.clip_range, math.inf)
        return functional.policy_loss(x_t, m, x_s, *arguments)
