"""Warns of a reward that gives all images of an iteration the same score: it makes no image better than another.

A score that is the same by chance, as 0 of a rare find, is so in one iteration; the warning waits for a second one with
the same value. Images without a score do not count, nor do the scores of a person, who may let all images tie.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.config import RewardConfig
from rlcm_fast.config.resolved import ResolvedRun
from rlcm_fast.given import PREFIX
from rlcm_fast.rewards import Rewards
from rlcm_fast.run_folder.tracking import say


class ConstantRewards:
    """Watches the scores of a run; each reward is warned of once."""

    def __init__(self, run: ResolvedRun | None = None) -> None:
        """run: names the tasks, and the rewards behind their labels; None takes labels for names."""
        self._has_tasks = run is not None and run.has_tasks
        self._configs = {
            f"{task.name}/{reward.key}" if self._has_tasks else reward.key: reward
            for task in (run.tasks if run else ())
            for reward in task.rewards
        }
        self._values: dict[str, float] = {}  # of rewards that were constant in the last iteration
        self._warned: set[str] = set()

    def look(self, rewards: Mapping[str, Rewards], iteration: int, left_out: Collection[tuple[str, str]] = ()) -> None:
        """Looks at the scores of a rollout, by task; every rank must call this, with the same rewards.

        left_out: (task, reward) of those that a person gives.
        """
        named = {
            f"{task}/{name}" if self._has_tasks or len(rewards) > 1 else name: scores
            for task, of_task in rewards.items()
            for name, scores in of_task.by_name.items()
            if (task, name) not in left_out
        }
        if not named:
            return
        ranges = parallel.all_gather(torch.stack([_range(scores) for scores in named.values()])[None])  # (ranks, N, 2)
        lowest, highest = -ranges[..., 0].amax(dim=0), ranges[..., 1].amax(dim=0)
        for name, low, high in zip(named, lowest.tolist(), highest.tolist(), strict=True):
            self._judge(name, low, high, iteration)

    def _judge(self, name: str, low: float, high: float, iteration: int) -> None:
        before = self._values.pop(name, None)
        if low != high:
            return
        self._values[name] = low
        if before == low and name not in self._warned:
            self._warned.add(name)
            config = self._configs.get(name) or RewardConfig(name.rpartition("/")[2])
            say(
                f"the reward {name} is {low:.6g} for every image of iterations {iteration} and {iteration + 1}: it "
                f"gives no advantage and teaches nothing; look at the images, {_check(config)}or drop it"
            )


def _check(config: RewardConfig) -> str:
    """Returns the advice to check the reward; nothing for an object of a Python program, which has no name there."""
    if config.name.startswith(PREFIX):
        return ""
    arguments = f" --arguments '{json.dumps(config.arguments)}'" if config.arguments else ""
    return f"try rlcm-fast check-reward {config.name}{arguments}, "


def _range(scores: Tensor) -> Tensor:
    """Returns (-lowest, highest) of the scores (B,) that are there, as (2,) float32; minus infinities without any."""
    known = scores[~scores.isnan()].float()
    if len(known) == 0:
        return torch.full((2,), -torch.inf)
    return torch.stack([-known.amin(), known.amax()])
