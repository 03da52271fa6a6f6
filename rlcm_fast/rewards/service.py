"""Scores micro-batches in worker threads while the next ones are sampled.

    rollout:  submit(images, prompts) after each decoded micro-batch ... gather(iteration) once, at the end

The scores come back in the order of submission whatever order the work finishes in, so a run does not depend on the
number of workers. What the rollout still had to wait for is reported: seconds on which overlap was not possible. A set
reward's images are described in the workers, and grouped and valued in gather, so micro-batches may cut a group.

On a GPU the workers' copies queue behind the sampling kernels that are already launched; the encoding itself then runs
beside the next micro-batch, and only the last micro-batch is waited for.
"""

# B images of a micro-batch, or of all of them after gather, F numbers that describe one, G groups

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rlcm_fast.rewards.base import AnswerError, Reward, RewardError, check, check_description, first_not_finite
from rlcm_fast.rewards.groups import GroupReward, side_by_side
from rlcm_fast.trajectory import Prompt


@dataclass(frozen=True)
class Rewards:
    """The scores of all images submitted since the last gather, in order, on the CPU."""

    by_name: dict[str, Tensor]  # each (B,) float32, what an image gets, without its weight
    values: dict[str, Tensor]  # the same, but of a set reward the value of the image's group, whatever its credit
    total: Tensor  # (B,) float32, the sum of weight * score
    wait_seconds: float  # how long gather() was blocked


@dataclass(frozen=True)
class _Batch:
    prompts: tuple[Prompt, ...]
    answers: dict[str, Future[object]]  # by reward name; a future, not yet checked


class RewardService:
    """Runs rewards over submitted images in the background; `shutdown` ends its threads."""

    def __init__(
        self, rewards: Mapping[str, tuple[Reward, float]], num_workers: int, beside: RewardService | None = None
    ) -> None:
        """rewards: by name, each with its weight in the total; num_workers: threads, at least 1.

        beside: another service, whose threads it shares in the place of new ones; `shutdown` of either ends them.
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
        answers = {
            name: self._executor.submit(_answer, reward, images, prompts) for name, (reward, _) in self._rewards.items()
        }
        self._batches.append(_Batch(prompts, answers))

    def gather(self, iteration: int) -> Rewards:
        """Wait for all submitted since the last call; the first failure, in submission order, is a RewardError."""
        start = time.perf_counter()
        prompts = [prompt for batch in self._batches for prompt in batch.prompts]
        answers = self.answers(iteration)
        wait_seconds = time.perf_counter() - start
        values, by_name = {}, {}
        for name, (reward, _) in self._rewards.items():
            values[name], by_name[name] = _score(name, reward, answers[name], prompts, iteration)
        weighted = [weight * by_name[name] for name, (_, weight) in self._rewards.items()]
        return Rewards(by_name, values, torch.stack(weighted).sum(dim=0), wait_seconds)

    def answers(self, iteration: int) -> dict[str, Tensor]:
        """As gather, without groups: by name (B,) float32 scores, of a set reward the (B, F) float32 descriptions."""
        batches, self._batches = self._batches, []
        if not batches:
            raise ValueError("gather() without a submit() before it has nothing to wait for; submit images first")
        try:
            checked = [{name: self._result(name, batch, iteration) for name in self._rewards} for batch in batches]
        except BaseException:
            for future in (future for batch in batches for future in batch.answers.values()):
                future.cancel()
            raise
        for name in self._rewards:
            _check_widths(name, [answers[name] for answers in checked], batches, iteration)
        return {name: torch.cat([answers[name] for answers in checked]) for name in self._rewards}

    def shutdown(self) -> None:
        """Drop what has not started, wait for what has, end the threads."""
        self._batches = []
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _result(self, name: str, batch: _Batch, iteration: int) -> Tensor:
        """The checked answer of one reward on one batch: scores (B,) or descriptions (B, F)."""
        with _named(name, batch.prompts, iteration):
            answer = batch.answers[name].result()
        return check_answer(name, self._rewards[name][0], answer, batch.prompts, iteration)


def ask(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> object:
    """What a reward says of images: scores, or a set reward's descriptions; `check_answer` checks it."""
    return reward.reward.describe(images, prompts) if isinstance(reward, GroupReward) else reward(images, prompts)


def check_answer(name: str, reward: Reward, answer: object, prompts: Sequence[Prompt], iteration: int) -> Tensor:
    """`answer` itself when it is scores (B,), or a set reward's descriptions (B, F); else a RewardError."""
    checked = check_description if isinstance(reward, GroupReward) else check
    return checked(name, answer, prompts, iteration)


def evaluate(name: str, reward: Reward, answers: Tensor, prompts: Sequence[Prompt], iteration: int) -> Tensor:
    """The scores (B,) float32 of all images, of a set reward the values (G,) of its groups, whatever their credit.

    answers: `RewardService.answers`, or `ask`, of the images, in the order of `prompts`. The repeats of a prompt count
    as neighbours wherever they stand, so that groups are made as in a rollout.
    """
    if not isinstance(reward, GroupReward):
        return answers
    order = side_by_side(prompts)
    groups = reward.groups(len(order))
    with _named(name, [prompts[place] for place in order], iteration):
        return reward.values(answers[order], groups)


def _score(
    name: str, reward: Reward, answers: Tensor, prompts: Sequence[Prompt], iteration: int
) -> tuple[Tensor, Tensor]:
    """The value and the credit of each of the B images, the same for a reward of single images."""
    if not isinstance(reward, GroupReward):
        return answers, answers
    groups = reward.groups(len(prompts))
    with _named(name, prompts, iteration):
        return reward.score(answers, groups)


@contextmanager
def _named(name: str, prompts: Sequence[Prompt], iteration: int) -> Iterator[None]:
    """Makes whatever a user's reward raises a RewardError."""
    try:
        yield
    except AnswerError as error:
        raise RewardError(name, prompts[error.index], iteration, str(error)) from error
    except Exception as error:
        raise RewardError(name, prompts[0], iteration, f"raised {type(error).__name__}: {error}") from error


def _answer(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> object:
    """In a worker: the reward's answer as it is, tensors moved to the CPU so that the caller waits for no copy."""
    if images.is_cuda:  # a new thread starts on device 0, whatever the rank's device is
        torch.cuda.set_device(images.device)
    with torch.no_grad():
        # A NaN image has a JPEG size like any other: a reward would hide it. A sum needs no mask of all pixels.
        broken = first_not_finite(images.flatten(1).sum(dim=1))
        if broken is not None:
            problem = f"image {broken} of its micro-batch is not finite: the model has diverged; lower optimizer.lr"
            raise AnswerError(problem, broken)
        answer = ask(reward, images, prompts)
    return answer.detach().cpu() if isinstance(answer, Tensor) else answer


def _check_widths(name: str, answers: Sequence[Tensor], batches: Sequence[_Batch], iteration: int) -> None:
    """Descriptions have the same F in every micro-batch."""
    for answer, batch in zip(answers, batches, strict=True):
        if answer.shape[1:] != answers[0].shape[1:]:
            problem = (
                f"describe() returned {answer.shape[1]} numbers an image and {answers[0].shape[1]} before; return the "
                "same number always"
            )
            raise RewardError(name, batch.prompts[0], iteration, problem)
