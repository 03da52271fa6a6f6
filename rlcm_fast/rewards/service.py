"""Scores micro-batches in worker threads while the next micro-batches are sampled.

    rollout:  submit(images, prompts) after each decoded micro-batch ... gather(iteration) once, at the end

The scores come back in the order of submission, whatever order the work finishes in, so a run does not depend on the
number of workers. `Rewards.wait_seconds` reports the seconds that the rollout still had to wait without any overlap.
Workers describe the images of a set reward; gather groups the descriptions and values the groups. So the border of a
micro-batch may lie inside a group.

On a GPU, the workers' copies queue behind the sampling kernels that are already launched. The scoring itself then runs
beside the next micro-batch, and the rollout waits only for the last micro-batch.
"""

# B images of a micro-batch, or of all micro-batches after gather, F numbers that describe one image, G groups

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rlcm_fast.rewards.base import (
    Reward,
    RewardError,
    ScoreError,
    check_descriptions,
    check_scores,
    first_not_finite,
)
from rlcm_fast.rewards.groups import GroupReward, side_by_side
from rlcm_fast.trajectory import Prompt


@dataclass(frozen=True)
class Rewards:
    """The scores of all images submitted since the last gather, in order, on the CPU."""

    by_name: dict[str, Tensor]  # each (B,) float32, the score or credit of an image, without the reward's weight
    values: dict[str, Tensor]  # the same, but for a set reward the value of the image's group, whatever its credit
    total: Tensor  # (B,) float32, the sum of weight * score
    wait_seconds: float  # how long gather() was blocked


@dataclass(frozen=True)
class _Batch:
    prompts: tuple[Prompt, ...]
    raw_scores: dict[str, Future[object]]  # by reward name, not yet checked


class RewardService:
    """Runs rewards over submitted images in the background; `shutdown` ends its threads."""

    def __init__(
        self, rewards: Mapping[str, tuple[Reward, float]], num_workers: int, beside: RewardService | None = None
    ) -> None:
        """Start `num_workers` threads, at least 1; `rewards` maps each name to a reward and its weight in the total.

        If you give another service as `beside`, both share its threads, and `shutdown` of either ends them.
        """
        if not rewards:
            raise ValueError("rewards=[] leaves nothing to learn from; name at least one reward")
        if num_workers < 1:
            raise ValueError(f"rollout.reward_workers={num_workers} must be at least 1")
        self._rewards = dict(rewards)
        self._executor = beside._executor if beside else ThreadPoolExecutor(num_workers, thread_name_prefix="reward")
        self._batches: list[_Batch] = []

    def submit(self, images: Tensor, prompts: Sequence[Prompt]) -> None:
        """Start scoring images (B, 3, H, W) float32 in [0, 1], one prompt each; leave them unchanged until gather."""
        if len(prompts) != len(images) or not prompts:
            raise ValueError(
                f"prompts={len(prompts)} for {len(images)} images; give one prompt per image, at least one"
            )
        prompts = tuple(prompts)
        raw_scores = {
            name: self._executor.submit(_score_in_worker, reward, images, prompts)
            for name, (reward, _) in self._rewards.items()
        }
        self._batches.append(_Batch(prompts, raw_scores))

    def gather(self, iteration: int) -> Rewards:
        """Wait for the scores of all images submitted since the last call.

        Raises RewardError for the first failure in the order of submission.
        """
        # Wait for the workers.
        start = time.perf_counter()
        prompts = [prompt for batch in self._batches for prompt in batch.prompts]
        raw_scores = self.raw_scores(iteration)
        wait_seconds = time.perf_counter() - start

        # Value the groups of set rewards and sum up all rewards.
        values, by_name = {}, {}
        for name, (reward, _) in self._rewards.items():
            values[name], by_name[name] = _values_and_credits(name, reward, raw_scores[name], prompts, iteration)
        weighted = [weight * by_name[name] for name, (_, weight) in self._rewards.items()]
        return Rewards(by_name, values, torch.stack(weighted).sum(dim=0), wait_seconds)

    def raw_scores(self, iteration: int) -> dict[str, Tensor]:
        """Wait as `gather` does, but make no groups.

        Returns, by name, scores (B,) float32, and for a set reward descriptions (B, F) float32.
        """
        batches, self._batches = self._batches, []
        if not batches:
            raise ValueError("gather() without a submit() before it has nothing to wait for; submit images first")

        # Check the micro-batches in the order of submission; after a failure, nobody needs the rest.
        try:
            checked = [{name: self._result(name, batch, iteration) for name in self._rewards} for batch in batches]
        except BaseException:
            for batch in batches:
                for future in batch.raw_scores.values():
                    future.cancel()
            raise

        # Join them, reward by reward.
        joined: dict[str, Tensor] = {}
        for name in self._rewards:
            parts = [raw_scores[name] for raw_scores in checked]
            _check_widths(name, parts, batches, iteration)
            joined[name] = torch.cat(parts)
        return joined

    def shutdown(self) -> None:
        """Drop the work that has not started, wait for the work that has, and end the threads."""
        self._batches = []
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _result(self, name: str, batch: _Batch, iteration: int) -> Tensor:
        """The checked raw scores of one reward on one batch: scores (B,) or descriptions (B, F)."""
        with _named(name, batch.prompts, iteration):
            raw_scores = batch.raw_scores[name].result()
        return check_raw_scores(name, self._rewards[name][0], raw_scores, batch.prompts, iteration)


def score(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> object:
    """The raw scores of images: scores, or the descriptions of a set reward; `check_raw_scores` checks them."""
    return reward.reward.describe(images, prompts) if isinstance(reward, GroupReward) else reward(images, prompts)


def scored(name: str, reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Returns the checked raw scores of images (B, 3, H, W), without a service; raises RewardError."""
    with _named(name, prompts, 0):
        raw_scores = score(reward, images, prompts)
    return check_raw_scores(name, reward, raw_scores, prompts, 0)


def check_raw_scores(
    name: str, reward: Reward, raw_scores: object, prompts: Sequence[Prompt], iteration: int
) -> Tensor:
    """Return `raw_scores` itself if it is scores (B,), or descriptions (B, F) of a set reward; else RewardError."""
    check = check_descriptions if isinstance(reward, GroupReward) else check_scores
    return check(name, raw_scores, prompts, iteration)


def evaluate(name: str, reward: Reward, raw_scores: Tensor, prompts: Sequence[Prompt], iteration: int) -> Tensor:
    """The scores (B,) float32 of all images, or for a set reward the values (G,) of its groups, whatever their credit.

    raw_scores come from `RewardService.raw_scores` or `score`, in the order of `prompts`. Equal prompts count as
    neighbours wherever they lie, so the groups are those of a rollout.
    """
    if not isinstance(reward, GroupReward):
        return raw_scores
    order = side_by_side(prompts)
    groups = reward.groups(len(order))
    with _named(name, [prompts[position] for position in order], iteration):
        return reward.values(raw_scores[order], groups)


def _values_and_credits(
    name: str, reward: Reward, raw_scores: Tensor, prompts: Sequence[Prompt], iteration: int
) -> tuple[Tensor, Tensor]:
    """The value and the credit of each of the B images; both are the score for a reward of single images."""
    if not isinstance(reward, GroupReward):
        return raw_scores, raw_scores
    groups = reward.groups(len(prompts))
    with _named(name, prompts, iteration):
        return reward.values_and_credits(raw_scores, groups)


@contextmanager
def _named(name: str, prompts: Sequence[Prompt], iteration: int) -> Iterator[None]:
    """Turn every exception of a user's reward into a RewardError."""
    try:
        yield
    except ScoreError as error:
        raise RewardError(name, prompts[error.index], iteration, str(error)) from error
    except Exception as error:
        raise RewardError(name, prompts[0], iteration, f"raised {type(error).__name__}: {error}") from error


def _score_in_worker(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> object:
    """The raw scores, unchecked; tensors move to the CPU here, so that the caller waits for no copy."""
    if images.is_cuda:  # a new thread starts on device 0, even if the rank uses another device
        torch.cuda.set_device(images.device)
    with torch.no_grad():
        # A NaN image has a JPEG size like any other, so a reward would hide it. A sum needs no mask of all pixels.
        broken = first_not_finite(images.flatten(1).sum(dim=1))
        if broken is not None:
            problem = f"image {broken} of its micro-batch is not finite: the model has diverged; lower optimizer.lr"
            raise ScoreError(problem, broken)
        raw_scores = score(reward, images, prompts)
    return raw_scores.detach().cpu() if isinstance(raw_scores, Tensor) else raw_scores


def _check_widths(name: str, descriptions: Sequence[Tensor], batches: Sequence[_Batch], iteration: int) -> None:
    """Raise a RewardError unless the descriptions (B, F) of all micro-batches have the same F."""
    for rows, batch in zip(descriptions, batches, strict=True):
        if rows.shape[1:] != descriptions[0].shape[1:]:
            problem = (
                f"describe() returned {rows.shape[1]} numbers per image and {descriptions[0].shape[1]} before; return "
                "the same number always"
            )
            raise RewardError(name, batch.prompts[0], iteration, problem)
