"""Scores micro-batches in worker threads while the next ones are sampled.

    rollout:  submit(images, prompts) after each decoded micro-batch ... gather(iteration) once, at the end

The scores come back in the order of submission whatever order the work finishes in, so a run does not depend on the
number of workers. What the rollout still had to wait for is reported: seconds on which overlap was not possible.

On a GPU the workers' copies queue behind the sampling kernels that are already launched; the encoding itself then runs
beside the next micro-batch, and only the last micro-batch is waited for.
"""

# B images of a micro-batch, or of all of them after gather

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from rlcm_fast.rewards.base import Reward, RewardError, check, first_not_finite
from rlcm_fast.trajectory import Prompt


@dataclass(frozen=True)
class Rewards:
    """The scores of all images submitted since the last gather, in order, on the CPU."""

    by_name: dict[str, Tensor]  # each (B,) float32, without its weight
    total: Tensor  # (B,) float32, the sum of weight * score
    wait_seconds: float  # how long gather() was blocked


@dataclass(frozen=True)
class _Batch:
    prompts: tuple[Prompt, ...]
    scores: dict[str, Future[object]]  # by reward name; a future, not yet checked


class RewardService:
    """Runs rewards over submitted images in the background; `shutdown` ends its threads."""

    def __init__(self, rewards: Mapping[str, tuple[Reward, float]], num_workers: int) -> None:
        """rewards: by name, each with its weight in the total; num_workers: threads, at least 1."""
        if not rewards:
            raise ValueError("rewards=[] leaves nothing to learn from; name at least one reward")
        if num_workers < 1:
            raise ValueError(f"rollout.reward_workers={num_workers} must be at least 1")
        self._rewards = dict(rewards)
        self._executor = ThreadPoolExecutor(num_workers, thread_name_prefix="reward")
        self._batches: list[_Batch] = []

    def submit(self, images: Tensor, prompts: Sequence[Prompt]) -> None:
        """Start scoring images (B, 3, H, W) float32 in [0, 1], one prompt each; leave them unchanged until gather."""
        if len(prompts) != len(images) or not prompts:
            raise ValueError(
                f"prompts={len(prompts)} for {len(images)} images; give one prompt per image, at least one"
            )
        prompts = tuple(prompts)
        scores = {
            name: self._executor.submit(_score, reward, images, prompts) for name, (reward, _) in self._rewards.items()
        }
        self._batches.append(_Batch(prompts, scores))

    def gather(self, iteration: int) -> Rewards:
        """Wait for all submitted since the last call; the first failure, in submission order, is a RewardError."""
        batches, self._batches = self._batches, []
        if not batches:
            raise ValueError("gather() without a submit() before it has nothing to wait for; submit images first")
        start = time.perf_counter()
        try:
            checked = [{name: _result(name, batch, iteration) for name in self._rewards} for batch in batches]
        except BaseException:
            for future in (future for batch in batches for future in batch.scores.values()):
                future.cancel()
            raise
        wait_seconds = time.perf_counter() - start
        by_name = {name: torch.cat([scores[name] for scores in checked]) for name in self._rewards}
        weighted = [weight * by_name[name] for name, (_, weight) in self._rewards.items()]
        return Rewards(by_name, torch.stack(weighted).sum(dim=0), wait_seconds)

    def shutdown(self) -> None:
        """Drop what has not started, wait for what has, end the threads."""
        self._batches = []
        self._executor.shutdown(wait=True, cancel_futures=True)


class _BrokenImageError(ValueError):
    """An image is not finite: the fault of the model, not of the reward."""

    def __init__(self, index: int) -> None:
        super().__init__(f"image {index} of its micro-batch is not finite: the model has diverged; lower optimizer.lr")
        self.index = index


def _score(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> object:
    """In a worker: the reward's answer as it is, tensors moved to the CPU so that the caller waits for no copy."""
    if images.is_cuda:  # a new thread starts on device 0, whatever the rank's device is
        torch.cuda.set_device(images.device)
    with torch.no_grad():
        # A NaN image has a JPEG size like any other: a reward would hide it. A sum needs no mask of all pixels.
        broken = first_not_finite(images.flatten(1).sum(dim=1))
        if broken is not None:
            raise _BrokenImageError(broken)
        values = reward(images, prompts)
    return values.detach().cpu() if isinstance(values, Tensor) else values


def _result(name: str, batch: _Batch, iteration: int) -> Tensor:
    """The checked scores (B,) of one reward on one batch."""
    try:
        values = batch.scores[name].result()
    except _BrokenImageError as error:
        raise RewardError(name, batch.prompts[error.index], iteration, str(error)) from error
    except Exception as error:  # whatever a user's reward raises
        problem = f"raised {type(error).__name__}: {error}"
        raise RewardError(name, batch.prompts[0], iteration, problem) from error
    return check(name, values, batch.prompts, iteration)
