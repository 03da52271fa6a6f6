"""Rewards run beside the sampling: `seconds/reward_wait` stays under 5 % of an iteration.

An iteration is a rollout and an update that takes as long: the share of a run whose update is slower is smaller. Both
tests are slow, because they measure seconds: run them on a machine that does nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import torch
from tiny_policies import TinyNetwork, images_of, policy_of, prompts
from torch import Tensor, nn

from rlcm_fast.config import RolloutConfig
from rlcm_fast.parallel import Turn
from rlcm_fast.policies import Noise
from rlcm_fast.rewards import Reward
from rlcm_fast.rewards.task_rewards import TaskRewards
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.stages.rollout import Collector, Rollout
from rlcm_fast.trajectory import Conditioning, Prompt, Trajectory

Work = Callable[[], object]
MICRO_BATCHES = 20
LIMIT = 0.05


class Slowly(TextToImage):
    """Draws images, but takes longer: sleeps, or computes, before each micro-batch."""

    def __init__(self, images: TextToImage, work: Work) -> None:
        super().__init__(images.policy, images.backbone)
        self.work = work

    def explore(self, conditioning: Conditioning, noise: Noise) -> tuple[Trajectory, Tensor]:
        self.work()
        return super().explore(conditioning, noise)


class Working:
    """A reward that takes its time."""

    scope = "image"

    def __init__(self, work: Work) -> None:
        self.work = work
        self.seconds = 0.0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        began = time.perf_counter()
        self.work()
        self.seconds += time.perf_counter() - began
        return images.mean(dim=(1, 2, 3))


def rollout_of(sampling: Work, reward: Reward) -> Rollout:
    config = RolloutConfig(micro_batch_size=2, reward_workers=1)
    service = TaskRewards({"one": {"r": (reward, 1.0)}}, config, lambda prompt: "one")
    images = Slowly(images_of(policy_of(TinyNetwork())), sampling)
    try:
        return Collector(images, service, config).rollout(prompts(2 * MICRO_BATCHES), Turn(0))
    finally:
        service.shutdown()


def shares_of(sampling: Work, scoring: Work) -> list[tuple[float, float]]:
    """The share of an iteration that waits for the reward, and what it would be without overlap.

    At most three rollouts, until one waits less than LIMIT: others may use the cores.
    """
    shares: list[tuple[float, float]] = []
    while len(shares) < 3 and (not shares or shares[-1][0] >= LIMIT):
        reward = Working(scoring)
        batch = rollout_of(sampling, reward)
        drawing = batch.seconds - batch.wait_seconds  # an update takes as long
        waited = batch.wait_seconds / (batch.seconds + drawing)
        shares.append((waited, reward.seconds / (2 * drawing + reward.seconds)))
    return shares


@pytest.mark.slow
def test_a_reward_of_half_the_rollouts_time_is_waited_for_less_than_5_percent_of_an_iteration():
    """Without overlap it would be a fifth: 20 ms of an iteration of 40 + 20 + 40 for each micro-batch."""
    shares = shares_of(lambda: time.sleep(0.04), lambda: time.sleep(0.02))
    assert min(waited for waited, _ in shares) < LIMIT, shares
    assert max(without_overlap for _, without_overlap in shares) > 3 * LIMIT, shares


@pytest.mark.slow
def test_a_network_of_half_the_rollouts_time_is_waited_for_less_than_5_percent_of_an_iteration():
    """Both compute on the CPU, a core each."""
    network, pixels = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False), torch.rand(1, 32, 128, 128)

    def passes(count: int) -> None:
        for _ in range(count):
            network(pixels)

    shares = shares_of(lambda: passes(10), lambda: passes(5))
    assert min(waited for waited, _ in shares) < LIMIT, shares
    assert max(without_overlap for _, without_overlap in shares) > 2 * LIMIT, shares
