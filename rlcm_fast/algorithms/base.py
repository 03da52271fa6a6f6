"""What every algorithm is: from advantages to a signal for each transition, and from signals to a loss.

    weights = algorithm.weights(advantages)                   of all processes, once a rollout
    signals = algorithm.signals(weights, change, K)           of an update's transitions, before its first backward pass
    loss    = algorithm.loss_of_output(..., signals)          of a micro-batch

As it stands here, the loss is a weighted log-likelihood with the gradient

    d loss = -mean over transitions of signal * d log_prob

with signals that are constants to autograd. An algorithm is a file that says what its signals are, or, as PPO, what
its loss is. The KL divergence to the start model (update.kl_weight) is added by the update, whatever the algorithm.
"""

# A samples of all processes, N transitions of an update or of a micro-batch, K actions

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from rlcm_fast.kernels import functional
from rlcm_fast.kernels.functional import RatioStats


class Algorithm:
    """The weighted log-likelihood of the actions; its subclasses say the rest."""

    is_of_pairs: ClassVar[bool] = False
    """Whether an update takes all actions of two neighbouring samples together, and signals need `change`."""
    clips: ClassVar[bool] = False
    """Whether a ratio beyond update.clip_range changes the loss."""

    def weights(self, advantages: Tensor) -> Tensor:
        """advantages (A,) float32 -> what each sample's actions are worth (A,)."""
        return advantages

    def signals(self, weights: Tensor, change: Tensor | None, num_actions: int) -> Tensor:
        """weights (N,), one a transition -> signals (N,).

        change (N,), of an algorithm of pairs only: how much each log-prob has grown since the rollout, None for not at
        all. Then transitions lie in the order of samples, pairs side by side, and each sample's K actions in theirs.
        """
        return weights

    def loss(self, log_prob: Tensor, log_prob_old: Tensor | None, signals: Tensor) -> tuple[Tensor, RatioStats]:
        """All (N,) float32 -> the loss () with its gradient in log_prob, and the ratio's statistics.

        The value is -mean(signals): of the loss itself only the gradient is of use.
        """
        return functional.clipped_ratio_loss(log_prob, None, signals, 1.0, math.inf)

    def loss_of_output(
        self, x_t: Tensor, m: Tensor, x_s: Tensor, coef: Tensor, log_prob_old: Tensor | None, signals: Tensor
    ) -> tuple[Tensor, RatioStats]:
        """`loss` of the log-probs of x_s (N, C, H, W), given a network's output m and coef (N, 3): A, B, sigma."""
        return functional.policy_loss(x_t, m, x_s, coef, None, signals, 1.0, math.inf)
