"""The protocols of rewards, and the checks of what rewards return.

A reward scores images one by one (scope "image") or a group of images together (scope "set", arXiv 2401.12244). The
service (service.py) calls it from worker threads, on one micro-batch of decoded images after another. It checks what
the reward returns with `check_scores` or `check_descriptions` and hands the scores to the rollout. groups.py turns the
descriptions that a set reward gives of single images into scores.
"""

# B images of a micro-batch, F numbers that describe one image, G groups of k images

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rlcm_fast.faults import Diverged, Fault
from rlcm_fast.trajectory import Prompt

_LONGEST = 300  # characters of what a reward's exception says


@runtime_checkable
class Reward(Protocol):
    """A score per image; higher is better.

    Worker threads call the reward without gradients. Several threads call it at once unless rollout.reward_workers is
    1, so a reward that keeps state needs a lock or that setting. A run is repeatable only if the scores depend on the
    arguments alone.
    """

    scope: str  # "image": scores each image alone

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores images (B, 3, H, W) float32 in [0, 1], which it must not change, with one prompt each.

        Returns (B,) float32, finite.
        """
        ...


@runtime_checkable
class SetReward(Protocol):
    """A score per group of images; higher is better.

    The two halves let the reward look at every image once, while the next images are sampled and in any micro-batches.
    Groups are valued afterwards, from the descriptions of their images.
    """

    scope: str  # "set"

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The numbers that `value` needs of each image: (B, F) float32, finite, always with the same F.

        It is called like Reward.__call__.
        """
        ...

    def value(self, described: Tensor) -> Tensor:
        """The value of each group, (G,) float32, finite.

        described (G, k, F) float32 holds the images of each group, with any k >= 1; their order must not matter.
        """
        ...


@runtime_checkable
class AsksPeople(Protocol):
    """A reward that may need a person for its scores, so it is not tried on random images when a run starts."""

    asks_people: bool


class ScoreError(ValueError):
    """A problem with what a reward returned, and the index of the image; callers turn it into a RewardError."""

    def __init__(self, problem: str, index: int = 0) -> None:
        super().__init__(problem)
        self.index = index


class ImagesFailed(Exception):
    """A reward raises this if it scored some images of a micro-batch and failed for others.

    With `on_failure: skip` the run goes on without the images that failed; with `stop` it ends. Without this class a
    reward can only fail for the whole micro-batch, and it is then called again for each image alone.
    """

    def __init__(self, scores: Tensor | None, problems: Mapping[int, str]) -> None:
        """Says what failed.

        scores      what the call would have returned, with any values for the images that failed; None if all failed
        problems    the problem of each image that failed, by its index in the micro-batch
        """
        super().__init__("; ".join(f"image {index}: {problem}" for index, problem in problems.items()))
        self.scores = scores
        self.problems = {index: one_line(problem) for index, problem in problems.items()}


class RewardError(Fault):
    """A reward failed, or returned something other than scores; the message names reward, prompt and iteration."""

    problem = ""  # what happened and the way out, without the names


def reward_error(reward_name: str, prompt: Prompt, iteration: int, problem: str) -> RewardError:
    """The error of a reward in one line; `problem` names the way out."""
    error = RewardError(f"reward {reward_name!r}, prompt {prompt.text!r}, iteration {iteration}: {problem}")
    error.problem = problem
    return error


def diverged(prompt: Prompt, iteration: int, index: int) -> Diverged:
    """The fault of a model that draws images which are not finite, in one line."""
    return Diverged(
        f"prompt {prompt.text!r}, iteration {iteration}: image {index} of its micro-batch is not finite: the model has "
        "diverged; lower optimizer.lr"
    )


def one_line(problem: object) -> str:
    """The text of `problem` without line breaks, at most _LONGEST characters."""
    text = " ".join(str(problem).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def expect(value: object, shape: tuple[int | None, ...], meaning: str) -> Tensor:
    """Returns `value` itself if it is a float32 tensor of `shape`; raises a ScoreError otherwise.

    None in `shape` means any size from 1 on; `meaning` explains the shape in the error.
    """
    sizes = ", ".join("F" if size is None else str(size) for size in shape)
    wanted = f"({sizes},)" if len(shape) == 1 else f"({sizes})"
    if not isinstance(value, Tensor):
        raise ScoreError(f"returned {type(value).__name__}; return a float32 tensor of shape {wanted}")
    fits = value.ndim == len(shape) and all(
        size == got or (size is None and got > 0) for size, got in zip(shape, value.shape, strict=True)
    )
    if not fits or value.dtype != torch.float32:
        got = f"{value.dtype} of shape {tuple(value.shape)}"
        raise ScoreError(f"returned {got}; return torch.float32 of shape {wanted}, {meaning}")
    return value


def check_scores(reward_name: str, values: object, prompts: Sequence[Prompt], iteration: int) -> Tensor:
    """Returns `values` itself if it is finite float32 of shape (len(prompts),); raises a RewardError otherwise."""
    try:
        scores = expect(values, (len(prompts),), "one score per image")
        first = first_not_finite(scores)
        if first is not None:
            problem = f"returned {scores[first].item()} for image {first} of its micro-batch; scores must be finite"
            raise ScoreError(problem, first)
    except ScoreError as error:
        raise reward_error(reward_name, prompts[error.index], iteration, str(error)) from error
    return scores


def check_descriptions(reward_name: str, described: object, prompts: Sequence[Prompt], iteration: int) -> Tensor:
    """Returns `described` itself if it is finite float32 of shape (len(prompts), F); raises a RewardError otherwise."""
    try:
        rows = expect(described, (len(prompts), None), "a row per image")
        first = first_not_finite(rows)
        if first is not None:
            raise ScoreError(f"returned a number that is not finite for image {first} of its micro-batch", first)
    except ScoreError as error:
        raise reward_error(reward_name, prompts[error.index], iteration, f"describe() {error}") from error
    return rows


def first_not_finite(values: Tensor) -> int | None:
    """The index of the first row of values (B, ...) that holds a NaN or an infinity; None if there is none."""
    offending = (~torch.isfinite(values)).reshape(len(values), -1).any(dim=1).nonzero()
    return int(offending[0]) if len(offending) else None
