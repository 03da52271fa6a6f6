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
from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.rewards.service import Rewards, RewardService
from rlcm_fast.trajectory import Conditioning, Prompt, Trajectory


@dataclass(frozen=True)
class Rollout:
    """One batch: what was done, what it earned, how long it took."""

    trajectory: Trajectory
    rewards: Rewards
    seconds: float  # sampling, decoding and waiting together

    def metrics(self) -> dict[str, float]:
        """Mean and deviation over all processes, of what each reward measures and of the weighted sum of credits."""
        metrics: dict[str, float] = {}
        for name, values in {**self.rewards.values, "total": self.rewards.total}.items():
            everyone = parallel.all_gather(values).double()
            metrics[f"reward/{name}/mean"] = everyone.mean().item()
            metrics[f"reward/{name}/std"] = everyone.std(correction=0).item()
        return metrics


def rollout(
    policy: GaussianPolicy,
    prompts: Sequence[Prompt],
    encode: Callable[[Sequence[Prompt]], Conditioning],
    decode: Callable[[Tensor], Tensor],
    rewards: RewardService,
    generator: torch.Generator,
    micro_batch_size: int,
    iteration: int,
    between_micro_batches: Callable[[], None] = lambda: None,
) -> Rollout:
    """One trajectory for each of the B prompts, in their order."""
    start = time.perf_counter()
    conditioning = encode(prompts)
    parts = []
    for rows in torch.arange(len(prompts)).split(micro_batch_size):
        between_micro_batches()
        trajectory, x_0 = policy.sample(conditioning.take(rows.to(conditioning.index.device)), generator)
        rewards.submit(decode(x_0), [prompts[row] for row in rows.tolist()])
        parts.append(trajectory)
    trajectory = Trajectory.cat(parts)
    scores = rewards.gather(iteration)
    return Rollout(trajectory, scores, time.perf_counter() - start)
