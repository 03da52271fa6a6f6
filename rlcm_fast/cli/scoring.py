"""Runs a reward as training does, for the commands that check or use one: through the service of worker threads."""

# B images

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlcm_fast.rewards import Reward, RewardService, Workers
from rlcm_fast.trajectory import Prompt


def device_of(name: str | None) -> torch.device:
    """The device called `name`, or the default: the GPU if there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def raw_scores(name: str, reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The checked scores (B,) of images (B, 3, H, W) on the CPU, or a set reward's descriptions (B, F).

    Raises RewardError, a Fault, if the reward fails or returns something else.
    """
    return raw_scores_at_once(name, reward, [(images, prompts)])[0]


def raw_scores_at_once(name: str, reward: Reward, batches: Sequence[tuple[Tensor, Sequence[Prompt]]]) -> list[Tensor]:
    """The `raw_scores` of each batch, with a worker thread for each, so that all run at once."""
    workers = Workers(len(batches))
    service = RewardService({name: (reward, 1.0)}, workers)
    try:
        for images, prompts in batches:
            service.submit(images, prompts)
        joined = service.raw_scores(iteration=0).by_name[name]
    finally:
        workers.shutdown()
    return list(joined.split([len(images) for images, _ in batches]))
