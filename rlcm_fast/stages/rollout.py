"""Samples a batch of trajectories, decodes them and has them rewarded; no gradients.

    prompts -> conditioning -> [sample -> decode -> submit to the reward workers] per micro-batch -> gather

Rewards are computed in worker threads while the next micro-batch is sampled; what is still waited for is measured.
"""

# B samples of this process

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.config import RolloutConfig
from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.rewards import Rewards
from rlcm_fast.tasks import TaskRewards
from rlcm_fast.trajectory import Conditioning, Prompt, Trajectory


@dataclass(frozen=True)
class Rollout:
    """One batch: what was done, what it earned, how long it took."""

    trajectory: Trajectory
    rewards: dict[str, Rewards]  # by task, in the order of the samples
    seconds: float  # sampling, decoding and waiting together

    @property
    def total(self) -> Tensor:
        """The reward of each sample (B,) float32, on the CPU: the sum of weight * score."""
        return torch.cat([rewards.total for rewards in self.rewards.values()])

    @property
    def wait_seconds(self) -> float:
        return sum(rewards.wait_seconds for rewards in self.rewards.values())

    def metrics(self, has_tasks: bool) -> dict[str, float]:
        """Mean and deviation over all processes, of what each reward measures and of the weighted sum of credits.

        Keys are reward/NAME/mean, with `has_tasks` reward/TASK/NAME/mean.
        """
        metrics: dict[str, float] = {}
        for task, rewards in self.rewards.items():
            prefix = f"reward/{task}" if has_tasks else "reward"
            for name, values in {**rewards.values, "total": rewards.total}.items():
                everyone = parallel.all_gather(values).double()
                metrics[f"{prefix}/{name}/mean"] = everyone.mean().item()
                metrics[f"{prefix}/{name}/std"] = everyone.std(correction=0).item()
        return metrics


def rollout(
    policy: GaussianPolicy,
    prompts: Sequence[Prompt],
    encode: Callable[[Sequence[Prompt]], Conditioning],
    decode: Callable[[Tensor], Tensor],
    rewards: TaskRewards,
    generator: torch.Generator,
    config: RolloutConfig,
    iteration: int,
    between_micro_batches: Callable[[], None] = lambda: None,
) -> Rollout:
    """One trajectory for each of the B prompts, in their order."""
    start = time.perf_counter()
    conditioning = encode(prompts)
    parts = []
    shared = policy.noise(len(conditioning.prompt_embeds), generator) if config.shared_noise else None
    for rows in torch.arange(len(prompts)).split(config.micro_batch_size):
        between_micro_batches()
        own = conditioning.take(rows.to(conditioning.index.device))
        trajectory, x_0 = policy.sample(own, generator, None if shared is None else shared[own.index])
        rewards.submit(decode(x_0), [prompts[row] for row in rows.tolist()])
        parts.append(trajectory)
    trajectory = Trajectory.cat(parts)
    scores = rewards.gather(iteration)
    return Rollout(trajectory, scores, time.perf_counter() - start)
