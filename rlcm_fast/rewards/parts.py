"""Hands a reward its images a few at a time, for a reward that has no batch size of its own.

The results come in the order of the images. An image that fails (ImagesFailed) does not keep others from their scores.
"""

# B images, F numbers that describe one image

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlcm_fast.rewards.base import ImagesFailed, Reward, ScoreError, SetReward, expect
from rlcm_fast.rewards.models import OnModels
from rlcm_fast.trajectory import Prompt


class InParts(OnModels):
    """An image reward that gets at most `batch_size` images at once."""

    scope = "image"

    def __init__(self, reward: Reward, batch_size: int) -> None:
        self.reward = reward
        self._batch_size = batch_size

    @property
    def used(self) -> dict[str, Any]:
        """What the reward computes on; see OnModels."""
        return self.reward.used if isinstance(self.reward, OnModels) else {}

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) of images (B, 3, H, W)."""
        return _in_parts(self.reward, images, prompts, self._batch_size, (None,))


class SetInParts(OnModels):
    """A set reward that describes at most `batch_size` images at once."""

    scope = "set"

    def __init__(self, reward: SetReward, batch_size: int) -> None:
        self.reward = reward
        self._batch_size = batch_size

    @property
    def used(self) -> dict[str, Any]:
        """What the reward computes on; see OnModels."""
        return self.reward.used if isinstance(self.reward, OnModels) else {}

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The descriptions (B, F) of images (B, 3, H, W)."""
        return _in_parts(self.reward.describe, images, prompts, self._batch_size, (None, None))

    def value(self, described: Tensor) -> Tensor:
        """The values (G,) of groups described (G, k, F)."""
        return self.reward.value(described)


def in_parts(reward: Reward | SetReward, batch_size: int) -> Reward | SetReward:
    """The reward, called with at most `batch_size` images at once; 0: the reward itself."""
    if not batch_size:
        return reward
    if reward.scope == "set":
        assert isinstance(reward, SetReward)
        return SetInParts(reward, batch_size)
    assert isinstance(reward, Reward)
    return InParts(reward, batch_size)


def inner(reward: Reward | SetReward) -> Reward | SetReward:
    """The reward that `in_parts` was given."""
    return reward.reward if isinstance(reward, InParts | SetInParts) else reward


def _in_parts(
    score: Callable[[Tensor, Sequence[Prompt]], Tensor],
    images: Tensor,
    prompts: Sequence[Prompt],
    batch_size: int,
    shape: tuple[None, ...],
) -> Tensor:
    """The rows of all parts; raises ScoreError for what is no tensor, ImagesFailed if any image failed."""
    rows: list[Tensor | None] = []
    problems: dict[int, str] = {}
    for first in range(0, len(images), batch_size):
        part = slice(first, first + batch_size)
        try:
            returned: Tensor | None = score(images[part], prompts[part])
        except ImagesFailed as failed:
            size = len(prompts[part])
            places = {index: first + index if index in range(size) else -1 for index in failed.problems}
            problems |= {places[index]: problem for index, problem in failed.problems.items()}
            returned = failed.scores
        rows.append(_checked(returned, len(prompts[part]), first, shape))
    there = [row for row in rows if row is not None]
    if not problems:
        return torch.cat(there)
    raise ImagesFailed(_filled(rows, there, len(prompts), batch_size), problems)


def _checked(returned: Tensor | None, num_images: int, first: int, shape: tuple[None, ...]) -> Tensor | None:
    """`returned` itself if it is a row per image or None."""
    if returned is None:
        return None
    try:
        return expect(returned, (num_images, *shape[1:]), "a row per image")
    except ScoreError as error:
        raise ScoreError(str(error), first + error.index) from error


def _filled(rows: Sequence[Tensor | None], there: Sequence[Tensor], num_images: int, batch_size: int) -> Tensor | None:
    """The rows of all images, 0 where a whole part failed; None if all did."""
    if not there:
        return None
    filled = there[0].new_zeros(num_images, *there[0].shape[1:])
    for part, row in zip(filled.split(batch_size), rows, strict=True):
        if row is not None:
            part.copy_(row)
    return filled
