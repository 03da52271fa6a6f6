"""What a reward is, and how its answers are checked.

A reward scores images; nothing else is asked of it. The service (service.py) calls it from worker threads on one
micro-batch of decoded images after another, checks the answer with `check`, and hands the scores to the rollout.
"""

# B images of a micro-batch

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

    scope: str  # "image": each image scored on its own; "set" (a score of a group of images) is not built yet

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """images (B, 3, H, W) float32 in [0, 1], not to be changed; one prompt each -> (B,) float32, finite."""
        ...


class RewardError(RuntimeError):
    """A reward failed, or answered with what is no score; the message names reward, prompt and iteration."""

    def __init__(self, reward_name: str, prompt: Prompt, iteration: int, problem: str) -> None:
        super().__init__(f"reward {reward_name!r}, prompt {prompt.text!r}, iteration {iteration}: {problem}")


def check(reward_name: str, values: object, prompts: Sequence[Prompt], iteration: int) -> Tensor:
    """`values` itself when it is a (B,) float32 tensor of finite numbers, B = len(prompts); else a RewardError."""
    if not isinstance(values, Tensor):
        problem = f"returned {type(values).__name__}; return a float32 tensor of shape ({len(prompts)},)"
        raise RewardError(reward_name, prompts[0], iteration, problem)
    if tuple(values.shape) != (len(prompts),) or values.dtype != torch.float32:
        got = f"{values.dtype} of shape {tuple(values.shape)}"
        problem = f"returned {got}; return torch.float32 of shape ({len(prompts)},), one score per image"
        raise RewardError(reward_name, prompts[0], iteration, problem)
    first = first_not_finite(values)
    if first is not None:
        problem = f"returned {values[first].item()} for image {first} of its micro-batch; scores must be finite"
        raise RewardError(reward_name, prompts[first], iteration, problem)
    return values


def first_not_finite(values: Tensor) -> int | None:
    """The index of the first NaN or infinity of values (B,), or None."""
    offending = (~torch.isfinite(values)).nonzero()
    return int(offending[0]) if len(offending) else None
