"""What became of each image of a call: a score, or the reason why there is none.

A reward that may fail for single images collects one outcome an image and ends with `scores_of`. So one bad image never
spoils what was computed of its neighbours, and no failure becomes a score.
"""

# B images of a call

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlcm_fast.rewards.base import ImagesFailed, one_line


@dataclass(frozen=True)
class Failed:
    """An image has no score; `problem` is one line that says why."""

    problem: str


Outcome = float | Failed


def outcome_of(score: Callable[[], float]) -> Outcome:
    """Returns the score, or Failed with the exception's text; an interrupt or exit passes through."""
    try:
        return score()
    except ValueError as error:  # of ours: its text says all
        return Failed(one_line(error))
    except Exception as error:  # noqa: BLE001 - whatever a model, a codec or a network raises fails this image only
        return Failed(f"{type(error).__name__}: {one_line(error)}")


def scores_of(outcomes: Sequence[Outcome]) -> Tensor:
    """Returns the scores (B,) float32; raises ImagesFailed if there is none for one of the images."""
    problems = {index: outcome.problem for index, outcome in enumerate(outcomes) if isinstance(outcome, Failed)}
    numbers = [math.nan if isinstance(outcome, Failed) else outcome for outcome in outcomes]
    scores = torch.tensor(numbers, dtype=torch.float32)
    if problems:
        raise ImagesFailed(scores if len(problems) < len(outcomes) else None, problems)
    return scores
