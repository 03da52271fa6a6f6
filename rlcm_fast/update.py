"""The optimizer steps on a rollout: shuffled transitions, micro-batches that mix steps, exact accumulation.

    for each pass:  shuffle the B * K transitions over samples AND steps, cut them into `num_updates` equal parts
    for each part:  micro-batches -> log_prob -> clipped loss (+ kl_weight * KL to the start model) -> backward; step

Every micro-batch has the same size, so the mean of their mean losses is the mean over the update: K micro-batches give
the gradient of one.
"""

# N transitions of this process, B samples

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.algorithms.ppo import PPO
from rlcm_fast.config import UpdateConfig
from rlcm_fast.kernels import functional
from rlcm_fast.kernels.functional import RatioStats
from rlcm_fast.memory.engine import Engine
from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.trajectory import Trajectory, Transitions


@dataclass(frozen=True)
class UpdateMetrics:
    """Over all micro-batches of an iteration on this process; tensors are 0-d, so reading them is the only sync."""

    ratio_mean: Tensor
    ratio_max_deviation: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    loss: Tensor
    kl_to_start: Tensor  # 0 where update.kl_weight is 0
    grad_norm: float  # of the last update, before clipping, over all processes
    seconds: float

    def metrics(self, advantages: Tensor) -> dict[str, float]:
        """Means over all processes, and the largest deviation of any; advantages (B,) are this process's."""
        means = {
            "advantage/abs_mean": advantages.abs().mean().to(self.loss.device),
            "ratio/mean": self.ratio_mean,
            "clip_fraction": self.clip_fraction,
            "approx_kl": self.approx_kl,
            "loss": self.loss,
            "kl_to_start": self.kl_to_start,
        }
        averaged = parallel.all_gather(torch.stack(list(means.values()))[None]).mean(dim=0).tolist()
        deviation = parallel.all_gather(self.ratio_max_deviation[None]).max().item()
        return {
            **dict(zip(means, averaged, strict=True)),
            "ratio/max_deviation": deviation,
            "grad_norm": self.grad_norm,
        }


def update(
    policy: GaussianPolicy,
    algorithm: PPO,
    trajectory: Trajectory,
    advantages: Tensor,
    engine: Engine,
    config: UpdateConfig,
    generator: torch.Generator,
    reference: GaussianPolicy | None = None,
    before_first_step: Callable[[], None] = lambda: None,
) -> UpdateMetrics:
    """Trains on all transitions `num_passes` times; advantages (B,), reference: the frozen start policy, for the KL.

    `before_first_step` is called before every micro-batch of the first update, where stopping loses nothing.
    """
    start = time.perf_counter()
    is_on_policy = config.num_passes * config.num_updates == 1
    records: list[tuple[RatioStats, Tensor, Tensor]] = []
    grad_norm = 0.0
    num_steps_taken = 0
    for _ in range(config.num_passes):
        order = torch.randperm(trajectory.num_transitions, generator=generator)
        for rows in order.split(config.micro_batch_size):
            if num_steps_taken == 0:
                before_first_step()
            transitions = trajectory.transitions(rows)
            m = policy.network_output(transitions.x_t, transitions.step, transitions.conditioning)
            loss, stats = _policy_loss(policy, algorithm, transitions, m, advantages, is_on_policy)
            kl = _kl_to(reference, policy, transitions, m) if reference else m.new_zeros(())
            engine.backward(loss + config.kl_weight * kl if reference else loss)
            records.append((stats, loss.detach(), kl.detach()))
            norm = engine.step()
            if norm is not None:
                grad_norm, num_steps_taken = norm, num_steps_taken + 1
    assert num_steps_taken == config.num_passes * config.num_updates
    return _summary(records, grad_norm, time.perf_counter() - start)


@torch.no_grad()
def ratio_noise(policy: GaussianPolicy, trajectory: Trajectory, micro_batch_size: int, generator: torch.Generator):
    """Largest |ratio - 1| of one shuffled micro-batch under unchanged weights: what rounding alone does to ratios."""
    rows = torch.randperm(trajectory.num_transitions, generator=generator)[:micro_batch_size]
    transitions = trajectory.transitions(rows)
    return torch.expm1(policy.log_prob(transitions) - transitions.log_prob_old).abs().max().item()


def _policy_loss(
    policy: GaussianPolicy,
    algorithm: PPO,
    transitions: Transitions,
    m: Tensor,
    advantages: Tensor,
    is_on_policy: bool,
) -> tuple[Tensor, RatioStats]:
    """With one update a rollout the old policy is the present one: its log-prob is the new one's, detached (exact)."""
    coef = policy.coefficients(transitions.step)
    old = None if is_on_policy else transitions.log_prob_old
    return algorithm.loss_of_output(transitions.x_t, m, transitions.x_s, coef, old, advantages[transitions.sample])


def _kl_to(reference: GaussianPolicy, policy: GaussianPolicy, transitions: Transitions, m: Tensor) -> Tensor:
    """Mean closed-form KL () to the reference: equal sigmas leave a squared difference of means."""
    with torch.no_grad():
        m_ref = reference.network_output(transitions.x_t, transitions.step, transitions.conditioning)
    return functional.gaussian_kl(m, m_ref, policy.coefficients(transitions.step)).mean()


def _summary(records: list[tuple[RatioStats, Tensor, Tensor]], grad_norm: float, seconds: float) -> UpdateMetrics:
    stats = [record[0] for record in records]
    return UpdateMetrics(
        ratio_mean=torch.stack([s.ratio_mean for s in stats]).mean(),
        ratio_max_deviation=torch.stack([s.ratio_max_deviation for s in stats]).max(),
        clip_fraction=torch.stack([s.clip_fraction for s in stats]).mean(),
        approx_kl=torch.stack([s.approx_kl for s in stats]).mean(),
        loss=torch.stack([record[1] for record in records]).mean(),
        kl_to_start=torch.stack([record[2] for record in records]).mean(),
        grad_norm=grad_norm,
        seconds=seconds,
    )
