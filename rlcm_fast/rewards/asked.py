"""Rewards that a person gives: the run shows the images of a round and waits for the answer.

    describe    in a worker thread: keeps an image and returns its number, wherever micro-batches end
    ask         once a round is drawn: shows its images
    is_answered, scores
                the rollout waits for the first, and takes the second

Nobody can be asked in an evaluation at once, so it only hands over its images (`compare`), and has no score.
`rlcm_fast.rating` has the reward that ships, `human`.
"""

# N images of a round

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rlcm_fast.rewards.base import SetReward
from rlcm_fast.rewards.groups import GroupReward
from rlcm_fast.trajectory import Prompt

_LOOK_EVERY = 0.05  # seconds


@dataclass(frozen=True)
class RunPlace:
    """What such a reward knows of its run."""

    run_dir: Path
    num_iterations: int


@runtime_checkable
class AskingReward(SetReward, Protocol):
    """A set reward whose scores a person gives; its methods are called from the main thread, `describe` from others.

    Its `describe` keeps images (B, 3, H, W) and returns their numbers (B, 1) float32; nobody calls its `value`.
    """

    def readiness(self) -> str:
        """Tells in a few words where it would ask; raises ValueError for what stands in the way. Asks nobody."""
        ...

    def begin(self, place: RunPlace) -> None:
        """Gets ready to ask; is called once, before the model loads. Raises ValueError for a wrong setting."""
        ...

    def ask(self, numbers: Tensor, prompts: Sequence[Prompt], iteration: int) -> None:
        """Shows the images of these numbers (N,), a round."""
        ...

    def is_answered(self, numbers: Tensor) -> bool:
        """Tells whether the scores of a round are there."""
        ...

    def scores(self, numbers: Tensor) -> Tensor:
        """Returns the scores (N,) float32 of an answered round; NaN for an image that was left out."""
        ...

    def compare(self, numbers: Tensor, prompts: Sequence[Prompt], iteration: int) -> None:
        """Receives the held-out images of an evaluation; is not waited for."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Returns what the answers so far say beyond scores; the keys begin with `rating/`."""
        ...

    def finish(self, may_stop: Callable[[], None]) -> None:
        """Waits for what is still asked after the last iteration, if somebody is there; may_stop may raise."""
        ...

    def close(self) -> None:
        """Stops asking, at the end of the run."""
        ...


@dataclass
class PersonReward(GroupReward):
    """A reward that a person gives, with the methods of a set reward."""

    @property
    def asking(self) -> AskingReward:
        """The reward itself."""
        assert isinstance(self.reward, AskingReward)
        return self.reward

    @property
    def gives_all_the_same(self) -> bool:
        return False

    def groups(self, num_images: int) -> Tensor:
        """One group (1, N): the person's groups are the images of a prompt, however many."""
        return torch.arange(num_images)[None]

    def wait(self, described: Tensor, may_stop: Callable[[], None]) -> float:
        """Waits for the answers about described (N, 1), images that were shown; returns the seconds."""
        began = time.monotonic()
        while not self.asking.is_answered(described[:, 0]):
            may_stop()
            time.sleep(_LOOK_EVERY)
        return time.monotonic() - began

    def values_and_credits(self, described: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of described (N, 1), twice."""
        scores = self.asking.scores(described[:, 0])
        return scores, scores
