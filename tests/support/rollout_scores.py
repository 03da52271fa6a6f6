"""Scores images as a rollout does."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlcm_fast.rewards import Reward, Rewards, RewardService, Skipping, Workers
from rlcm_fast.trajectory import Prompt


def rollout_scores(name: str, reward: Reward, images: Tensor, prompts: Sequence[Prompt], skips: float = 0.0) -> Rewards:
    """The scores of iteration 3, in micro-batches of two; raises RewardError.

    skips: the share of images that the reward may fail for.
    """
    workers = Workers(2)
    skipping = Skipping(frozenset([name]), skips, len(images)) if skips else None
    service = RewardService({name: (reward, 1.0)}, workers, skipping)
    try:
        for start in range(0, len(images), 2):
            service.submit(images[start : start + 2], prompts[start : start + 2])
        return service.gather(iteration=3)
    finally:
        workers.shutdown()
