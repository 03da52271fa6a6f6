"""Samples a batch of trajectories, decodes them to images and scores these; no gradients.

    prompts -> conditioning -> [sample -> decode -> submit to the reward workers] per micro-batch -> gather

Worker threads compute the rewards while the next micro-batch is sampled. The time that is left to wait is measured.
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
    """A batch of images: their prompts, trajectories and rewards, and the seconds that they took."""

    prompts: Sequence[Prompt]  # len B
    trajectory: Trajectory
    rewards: dict[str, Rewards]  # by task, in the order of the samples
    seconds: float  # sampling, decoding and waiting for rewards

    @property
    def total(self) -> Tensor:
        """The reward of each sample, (B,) float32 on the CPU: the sum of weight * score."""
        return torch.cat([rewards.total for rewards in self.rewards.values()])

    def gathered(self) -> tuple[Tensor, list[Prompt]]:
        """Returns `total` (A,) and the prompts of all A samples of all processes; every rank must call this."""
        return parallel.all_gather(self.total), parallel.all_gather_list(list(self.prompts))

    @property
    def wait_seconds(self) -> float:
        return sum(rewards.wait_seconds for rewards in self.rewards.values())

    def metrics(self, has_tasks: bool) -> dict[str, float]:
        """Returns the mean and standard deviation of each reward and of the weighted sum, over all processes.

        Keys are reward/NAME/mean; with `has_tasks` they are reward/TASK/NAME/mean.
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
    """Makes rollouts; holds what stays the same from one rollout to the next."""

    images: TextToImage
    rewards: TaskRewards
    config: RolloutConfig

    def rollout(self, prompts: Sequence[Prompt], turn: Turn, may_stop: Callable[[], None] = lambda: None) -> Rollout:
        """Draws and scores one image for each of the B prompts, in their order.

        may_stop: is called before every micro-batch; stopping there loses nothing.
        """
        began = time.perf_counter()
        generator = turn.generator(Stream.ROLLOUT)
        conditioning = self.images.encode(prompts)
        first_states = None  # (D, C, H, W), one for each distinct prompt
        if self.config.shared_noise:
            first_states = self.images.policy.noise(len(conditioning.prompt_embeds), generator)

        # Sample and decode micro-batch by micro-batch; the reward workers score meanwhile.
        parts = []
        for rows in torch.arange(len(prompts)).split(self.config.micro_batch_size):
            may_stop()
            texts = conditioning.take(rows.to(conditioning.index.device))
            start = None if first_states is None else first_states[texts.index]
            trajectory, x_0 = self.images.explore(texts, generator, start)
            self.rewards.submit(self.images.decode(x_0), [prompts[row] for row in rows.tolist()])
            parts.append(trajectory)

        # Join the micro-batches and wait for the rewards that are still missing.
        trajectory = Trajectory.cat(parts)
        rewards = self.rewards.gather(turn.iteration)
        return Rollout(prompts, trajectory, rewards, time.perf_counter() - began)
