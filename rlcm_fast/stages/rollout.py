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
from rlcm_fast.parallel import Stream, Turn
from rlcm_fast.rewards import Rewards
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.tasks import TaskRewards
from rlcm_fast.trajectory import Prompt, Trajectory


@dataclass(frozen=True)
class Rollout:
    """One batch: what was asked for, what was done, what it earned, how long it took."""

    prompts: Sequence[Prompt]  # len B
    trajectory: Trajectory
    rewards: dict[str, Rewards]  # by task, in the order of the samples
    seconds: float  # sampling, decoding and waiting together

    @property
    def total(self) -> Tensor:
        """The reward of each sample (B,) float32, on the CPU: the sum of weight * score."""
        return torch.cat([rewards.total for rewards in self.rewards.values()])

    def gathered(self) -> tuple[Tensor, list[Prompt]]:
        """`total` (A,) and the prompts (A) of all A samples of all processes, in rank order; every rank must ask."""
        return parallel.all_gather(self.total), parallel.all_gather_list(list(self.prompts))

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
                gathered = parallel.all_gather(values).double()
                metrics[f"{prefix}/{name}/mean"] = gathered.mean().item()
                metrics[f"{prefix}/{name}/std"] = gathered.std(correction=0).item()
        return metrics

    def timings(self) -> dict[str, float]:
        return {"seconds/rollout": self.seconds, "seconds/reward_wait": self.wait_seconds}


@dataclass
class Collector:
    """Makes rollouts; holds what stays the same from one to the next."""

    images: TextToImage
    rewards: TaskRewards
    config: RolloutConfig

    def rollout(self, prompts: Sequence[Prompt], turn: Turn, may_stop: Callable[[], None] = lambda: None) -> Rollout:
        """One trajectory for each of the B prompts, in their order.

        may_stop: called before every micro-batch, where stopping loses nothing.
        """
        start = time.perf_counter()
        generator = turn.generator(Stream.ROLLOUT)
        conditioning = self.images.encode(prompts)
        shared = None  # (D, C, H, W), a first state for each distinct prompt
        if self.config.shared_noise:
            shared = self.images.policy.noise(len(conditioning.prompt_embeds), generator)

        # Sample and decode micro-batch by micro-batch; rewards are computed meanwhile.
        parts = []
        for rows in torch.arange(len(prompts)).split(self.config.micro_batch_size):
            may_stop()
            own = conditioning.take(rows.to(conditioning.index.device))
            first_states = None if shared is None else shared[own.index]
            trajectory, x_0 = self.images.explore(own, generator, first_states)
            self.rewards.submit(self.images.decode(x_0), [prompts[row] for row in rows.tolist()])
            parts.append(trajectory)

        # Wait for the rewards that are still being computed.
        trajectory = Trajectory.cat(parts)
        rewards = self.rewards.gather(turn.iteration)
        return Rollout(prompts, trajectory, rewards, time.perf_counter() - start)
