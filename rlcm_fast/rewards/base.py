"""What a reward is, and how its answers are checked.

A reward scores images one by one (scope "image") or a group of them together (scope "set", arXiv 2401.12244). The
service (service.py) calls it from worker threads on one micro-batch of decoded images after another, checks the
answers with `check` and `check_description`, and hands the scores to the rollout. What a set reward says of single
images becomes scores in groups.py.
"""

# B images of a micro-batch, F numbers that describe one, G groups of k images

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rlcm_fast.trajectory import Prompt


@runtime_checkable
class Reward(Protocol):
    """A score per image, higher is better.

    Called from a worker thread, without gradients, and from several at once unless rollout.reward_workers is 1: a
    reward that keeps state needs a lock or that setting. For a run to be repeatable the scores must depend on the
    arguments alone.
    """

    scope: str  # "image": each image scored on its own

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """images (B, 3, H, W) float32 in [0, 1], not to be changed; one prompt each -> (B,) float32, finite."""
        ...


@runtime_checkable
class SetReward(Protocol):
    """A score per group of images, higher is better, in two halves: so every image is looked at once, while the next
    are sampled, whatever the micro-batches, and groups are valued from what was seen.
    """

    scope: str  # "set"

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As Reward.__call__, but what `value` needs of each image: (B, F) float32, finite, always the same F."""
        ...

    def value(self, described: Tensor) -> Tensor:
        """described (G, k, F) float32, the images of each group, any k >= 1 -> (G,) float32, finite; any order of k."""
        ...


class AnswerError(ValueError):
    """What is wrong with an answer, and at which image; whoever knows reward and iteration makes it a RewardError."""

    def __init__(self, problem: str, index: int = 0) -> None:
        super().__init__(problem)
        self.index = index


class RewardError(RuntimeError):
    """A reward failed, or answered with what is no score; the message names reward, prompt and iteration."""

    def __init__(self, reward_name: str, prompt: Prompt, iteration: int, problem: str) -> None:
        super().__init__(f"reward {reward_name!r}, prompt {prompt.text!r}, iteration {iteration}: {problem}")


def expect(answer: object, shape: tuple[int | None, ...], meaning: str) -> Tensor:
    """`answer` itself when it is float32 of `shape`, where None stands for any size from 1 on; else an AnswerError."""
    sizes = ", ".join("F" if size is None else str(size) for size in shape)
    wanted = f"({sizes},)" if len(shape) == 1 else f"({sizes})"
    if not isinstance(answer, Tensor):
        raise AnswerError(f"returned {type(answer).__name__}; return a float32 tensor of shape {wanted}")
    fits = answer.ndim == len(shape) and all(
        size == got or (size is None and got > 0) for size, got in zip(shape, answer.shape, strict=True)
    )
    if not fits or answer.dtype != torch.float32:
        got = f"{answer.dtype} of shape {tuple(answer.shape)}"
        raise AnswerError(f"returned {got}; return torch.float32 of shape {wanted}, {meaning}")
    return answer


def check(reward_name: str, values: object, prompts: Sequence[Prompt], iteration: int) -> Tensor:
    """`values` itself when it is a (B,) float32 tensor of finite numbers, B = len(prompts); else a RewardError."""
    try:
        scores = expect(values, (len(prompts),), "one score per image")
        first = first_not_finite(scores)
        if first is not None:
            problem = f"returned {scores[first].item()} for image {first} of its micro-batch; scores must be finite"
            raise AnswerError(problem, first)
    except AnswerError as error:
        raise RewardError(reward_name, prompts[error.index], iteration, str(error)) from error
    return scores


def check_description(reward_name: str, described: object, prompts: Sequence[Prompt], iteration: int) -> Tensor:
    """`described` itself when it is a (B, F) float32 tensor of finite numbers; else a RewardError."""
    try:
        rows = expect(described, (len(prompts), None), "a row per image")
        first = first_not_finite(rows)
        if first is not None:
            raise AnswerError(f"returned a number that is not finite for image {first} of its micro-batch", first)
    except AnswerError as error:
        raise RewardError(reward_name, prompts[error.index], iteration, f"describe() {error}") from error
    return rows


def first_not_finite(values: Tensor) -> int | None:
    """The index of the first row of values (B, ...) with a NaN or an infinity, or None."""
    offending = (~torch.isfinite(values)).reshape(len(values), -1).any(dim=1).nonzero()
    return int(offending[0]) if len(offending) else None
