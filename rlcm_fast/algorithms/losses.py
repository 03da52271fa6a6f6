"""All algorithms on one page: from advantages to a signal for each transition, and from signals to a loss.

    sample_weights = algorithm.sample_weights(advantages)     once per rollout, over all processes
    signals = algorithm.signals(weights, change, K)           once per update, before its first backward pass
    loss    = algorithm.loss_of_output(transitions, outputs, ...)   once per micro-batch

    reinforce   DDPO_SF, arXiv 2305.13301, equation 4       -A log_prob
    ppo         RLCM, arXiv 2404.03673; DDPO_IS             max(-A rho, -A clip(rho, 1 +- clip_range))
    grpo        arXiv 2402.03300                            ppo on advantages within the images of one prompt
    dpok        arXiv 2305.16381, equation 9                ppo + beta KL to the start model
    rwr         Peters & Schaal, ICML 2007                  -w log_prob, w a softmax of the advantages
    rebel       arXiv 2404.16767, equation 5                ((1 / eta) (d - d') - (r - r'))^2 of two images

rho = exp(log_prob - log_prob_old). Log-probs are means over C, H, W, so a clip range of 1e-4 is 1e-4 C H W on the true
log-ratio. There is no value network and no entropy bonus. Whatever the algorithm, the update adds the KL divergence to
the start model (update.kl_weight).

An image without an advantage (NaN: its reward failed, on_failure: skip) has no signal, and means are over the images
that have one. Rebel leaves out the pair of such an image. The KL divergence, which needs no reward, counts every image.
"""

# A samples of all processes, P pairs of them, N transitions of an update or of a micro-batch, K actions, C H W latent

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlcm_fast.config import AlgorithmConfig, UpdateConfig
from rlcm_fast.kernels import functional
from rlcm_fast.kernels.functional import RatioStats
from rlcm_fast.trajectory import Transitions


@dataclass(frozen=True)
class Outputs:
    """What the network gives for the transitions of a micro-batch."""

    m: Tensor  # (N, C, H, W)
    coef: Tensor  # (N, 3) = A, B, sigma
    share: float = 1.0  # what the loss will be multiplied by before its backward pass; a kernel may do so at once


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """The weighted log-likelihood of the actions; subclasses define sample weights, signals or the loss.

        d loss = -mean over transitions of signal * d log_prob

    where signals are constants to autograd. Advantages are clamped to [-advantage_clip, advantage_clip].
    """

    advantage_clip: float = 10.0

    samples_together: ClassVar[int] = 1
    """How many neighbouring samples an update takes together, with all actions; 1: it mixes transitions freely."""
    clips: ClassVar[bool] = False
    """Whether the loss changes if a ratio leaves update.clip_range."""

    def __post_init__(self) -> None:
        if not self.advantage_clip > 0:
            raise ValueError(f"update.advantage_clip={self.advantage_clip} must be above 0")

    def sample_weights(self, advantages: Tensor) -> Tensor:
        """Returns the weight of each sample's actions (A,) for advantages (A,) float32 of all processes, NaN if none.

        If some samples have no advantage, the others weigh so much more that a mean over all is a mean over these.
        """
        clamped = self._clamped(advantages)
        has_one = ~clamped.isnan()
        if has_one.all():
            return clamped
        return clamped.nan_to_num(nan=0.0) * (len(clamped) / has_one.sum().clamp(min=1))

    def _clamped(self, advantages: Tensor) -> Tensor:
        return advantages.clamp(-self.advantage_clip, self.advantage_clip)

    def signals(self, weights: Tensor, change: Callable[[], Tensor], num_actions: int) -> Tensor:
        """Returns the signals (N,) of transitions whose samples have the weights (N,).

        change() returns how much each log-prob (N,) has grown since the rollout. It may run the network, so only
        algorithms that need it call it. If samples_together is above 1, samples that belong together lie side by side,
        and the K actions of each sample lie in order.
        """
        return weights

    def loss(self, log_prob: Tensor, log_prob_old: Tensor | None, signals: Tensor) -> tuple[Tensor, RatioStats]:
        """Returns the loss (), differentiable in log_prob, and the ratio's statistics; arguments are (N,) float32.

        If log_prob_old is None, the old policy is the present one and the ratio is exactly 1. Without a clip the value
        of the loss is -mean(signals), and only its gradient is of use.
        """
        return functional.clipped_ratio_loss(log_prob, None, signals, 1.0, math.inf)

    def loss_of_output(
        self, transitions: Transitions, outputs: Outputs, log_prob_old: Tensor | None, signals: Tensor
    ) -> tuple[Tensor, RatioStats]:
        """Returns `loss` of the transitions' log-probs, not multiplied by the share."""
        return _policy_loss(transitions, outputs, None, signals, 1.0)


@dataclass(frozen=True, kw_only=True)
class Reinforce(Algorithm):
    """The plain policy gradient: DDPO_SF of arXiv 2305.13301 (equation 4), REINFORCE with a baseline.

        gradient = mean over transitions of A d log_prob,       A clamped to [-advantage_clip, advantage_clip]

    It is unbiased only for images of the present weights, so it allows one update per rollout: PPO without a clip.
    """


@dataclass(frozen=True, kw_only=True)
class PPO(Algorithm):
    """The clipped policy gradient that RLCM trains with: PPO's surrogate (arXiv 1707.06347, equation 7).

        loss = mean over transitions of max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range))

    with one advantage per image for each of its actions, as DDPO_IS (arXiv 2305.13301) and RLCM (arXiv 2404.03673).
    """

    clip_range: float = 1e-4
    clips: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clip_range > 0:
            raise ValueError(f"update.clip_range={self.clip_range} must be above 0")

    def loss(self, log_prob: Tensor, log_prob_old: Tensor | None, signals: Tensor) -> tuple[Tensor, RatioStats]:
        return functional.clipped_ratio_loss(log_prob, log_prob_old, signals, self.clip_range, math.inf)

    def loss_of_output(
        self, transitions: Transitions, outputs: Outputs, log_prob_old: Tensor | None, signals: Tensor
    ) -> tuple[Tensor, RatioStats]:
        return _policy_loss(transitions, outputs, log_prob_old, signals, self.clip_range)


@dataclass(frozen=True, kw_only=True)
class GRPO(PPO):
    """GRPO (arXiv 2402.03300): PPO's clipped loss on advantages within the images of one prompt.

        A = (r - mean_g) / std,         mean_g over the images of the prompt in this batch

    So it needs `advantages.kind: group` (with `advantages.scale: group` for the paper's own std_g) or `leave_one_out`;
    the checks of the config see to that. Departures: the KL term is the Gaussian step's closed form
    (update.kl_weight), where GRPO estimates it from samples; std is the batch's unless asked otherwise, since the
    paper's blows up a group of nearly equal rewards (arXiv 2503.20783).
    """


@dataclass(frozen=True, kw_only=True)
class DPOK(PPO):
    """DPOK (arXiv 2305.16381, equation 9): the policy gradient with a KL divergence to the start model at every step.

        loss = alpha * (PPO's clipped loss) + beta * mean over transitions of KL( p(x_s | x_t) || p_start(x_s | x_t) )

    The steps have equal sigmas, so the KL is a squared difference of means over 2 sigma^2, in closed form and not
    sampled. Only beta / alpha matters to Adam: it is update.kl_weight, and the checks of the config see to it that it
    is above 0. The paper's is .01 / 10, so 1e-3 here: log-prob and KL are both sums over C, H, W there and both means
    here, and the factor between sum and mean cancels.
    """


@dataclass(frozen=True, kw_only=True)
class RewardWeightedRegression(Algorithm):
    """Reward-weighted regression (Peters & Schaal, ICML 2007): imitates its samples, better samples more.

        loss = -mean over transitions of w log_prob,    w = A exp(a / temperature) / sum over the A samples of exp(...)

    where a are the clamped advantages. It is the baseline of DDPO (arXiv 2305.13301, section 4.1) and of large-scale RL
    (arXiv 2401.12244). Departure: they replace the log-prob by the denoising loss of the finished image, a bound of
    log p(x_0); here the algorithm imitates the sampled chain, whose log-prob is exact.

    Weights are never negative, so it imitates bad samples too, only less. It improves slowly and stays stable. At a low
    temperature only the best samples count.
    """

    temperature: float = 1.0

    def sample_weights(self, advantages: Tensor) -> Tensor:
        clamped = self._clamped(advantages)
        if clamped.isnan().all():
            return torch.zeros_like(clamped)
        scaled = (clamped / self.temperature).masked_fill(clamped.isnan(), -math.inf)  # their weights are 0
        return len(advantages) * scaled.softmax(dim=0)


@dataclass(frozen=True, kw_only=True)
class Rebel(Algorithm):
    """REBEL (arXiv 2404.16767, equation 5): the change of log-probs regresses the difference of rewards of two images.

        residual = (1 / eta) [d(y) - d(y')] - [r(y) - r(y')],    d = sum over the K actions of log_prob - log_prob_old
        loss     = mean over pairs of residual^2

    y and y' are neighbouring images of one prompt. Two passes need the memory of one pass. The first computes all
    log-probs without gradients. They give every action of y the same d loss / d log_prob = 2 residual / (P eta), and
    the actions of y' minus that. The second pass trains on micro-batches with these values as signals. The first update
    of a rollout needs no first pass, because nothing has changed yet.

    Departures:
     1. log_prob is the mean over C, H, W, not the sum, so eta here is the paper's eta over C H W: nats per dimension
        for one unit of advantage. A small eta moves the policy less.
     2. r is the advantage. The mean of the prompt, group or batch cancels in the difference; the scale stays, and makes
        one eta fit rewards of any unit.
     3. The RLCM authors' code sums log-probs over the batch instead of over steps, which is right only for one pair.
    """

    eta: float = 1.0
    samples_together: ClassVar[int] = 2

    def sample_weights(self, advantages: Tensor) -> Tensor:
        """Returns the clamped advantages (A,); NaN for both images of a pair of which one has none."""
        pairs = self._clamped(advantages).reshape(-1, 2)
        return pairs.masked_fill(pairs.isnan().any(dim=1, keepdim=True), math.nan).flatten()

    def signals(self, weights: Tensor, change: Callable[[], Tensor], num_actions: int) -> Tensor:
        of_samples = change().reshape(-1, num_actions)  # (2 P, K)
        rewards = weights.reshape(-1, num_actions)[:, 0]  # (2 P,)
        is_there = ~rewards.isnan()  # the same for both images of a pair
        gradient = torch.zeros_like(rewards)
        if is_there.any():
            changes = of_samples[is_there]
            found = functional.rebel_residual(changes, torch.zeros_like(changes), rewards[is_there], self.eta)
            gradient[is_there] = found[1]
        return -len(weights) * gradient.repeat_interleave(num_actions)


def _policy_loss(
    transitions: Transitions, outputs: Outputs, log_prob_old: Tensor | None, signals: Tensor, clip_range: float
) -> tuple[Tensor, RatioStats]:
    states = (transitions.x_t, outputs.m, transitions.x_s, outputs.coef)
    return functional.policy_loss(*states, log_prob_old, signals, clip_range, math.inf, factor=outputs.share)


def build_algorithm(config: AlgorithmConfig, update: UpdateConfig) -> Algorithm:
    """Builds the algorithm that `config.name` names."""
    clipped = {"ppo": PPO, "grpo": GRPO, "dpok": DPOK}
    if config.name in clipped:
        return clipped[config.name](advantage_clip=update.advantage_clip, clip_range=update.clip_range)
    if config.name == "rebel":
        return Rebel(advantage_clip=update.advantage_clip, eta=config.eta)
    if config.name == "rwr":
        return RewardWeightedRegression(advantage_clip=update.advantage_clip, temperature=config.temperature)
    assert config.name == "reinforce", config.name
    return Reinforce(advantage_clip=update.advantage_clip)
