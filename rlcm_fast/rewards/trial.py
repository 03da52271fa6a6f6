"""Tries the rewards of a run on two random images when it starts, so that a wrong one costs no minute of loading.

    before the model loads    every reward that needs no models of the pack: a class or a function of yours, above all
    after it has loaded       rewards on models of the pack
    never                     a reward that asks people (AsksPeople); `http`, whose server says whether it is well

The images have the size of the run's and the first prompts of its task, whose metadata a reward may need; of prompts
that only a function knows, none are at hand, and nothing is tried. A set reward values the two as one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlcm_fast.rewards.asked import PersonReward
from rlcm_fast.rewards.base import AsksPeople, Reward, RewardError
from rlcm_fast.rewards.failures import Skipping
from rlcm_fast.rewards.groups import GroupReward
from rlcm_fast.rewards.models import OnModels
from rlcm_fast.rewards.parts import inner
from rlcm_fast.rewards.remote import RemoteReward
from rlcm_fast.rewards.service import RewardService
from rlcm_fast.rewards.workers import Workers
from rlcm_fast.trajectory import Prompt

_NUM_IMAGES = 2


def asks_others(reward: Reward) -> bool:
    """Tells whether people or a server give the scores of a reward, so that it is not asked without need."""
    plain = _plain(reward)
    return (
        isinstance(reward, PersonReward) or _asks_people(plain) or (isinstance(plain, OnModels) and plain.asks_server)
    )


def _asks_people(plain: object) -> bool:
    return isinstance(plain, AsksPeople) and plain.asks_people


def _plain(reward: Reward) -> object:
    """Returns the reward that was built, without its groups and its parts."""
    return inner(reward.reward if isinstance(reward, GroupReward) else reward)


@dataclass(frozen=True)
class Trial:
    """A reward of a run, and what it is tried with."""

    field: str  # of the config, with the reward's name, for the message
    name: str
    reward: Reward
    prompts: Sequence[Prompt]  # the first of its task
    may_fail: bool = False  # on_failure=skip: an exception is its right, a wrong shape is not

    @property
    def is_on_models(self) -> bool:
        """Tells whether the reward computes on models of the pack, or on those of a server."""
        return isinstance(_plain(self.reward), OnModels)

    def run(self, size: tuple[int, int], device: torch.device | str, timeout: float) -> None:
        """Calls the reward; raises ValueError if it fails or returns something else than scores."""
        plain = _plain(self.reward)
        if isinstance(plain, RemoteReward) or _asks_people(plain) or not self.prompts:
            return
        images = torch.rand(_NUM_IMAGES, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
        prompts = [self.prompts[index % len(self.prompts)] for index in range(_NUM_IMAGES)]
        grouped = self.reward
        reward = GroupReward(self.name, grouped.reward) if isinstance(grouped, GroupReward) else grouped
        workers = Workers(1, timeout)
        skipping = Skipping(frozenset({self.name} if self.may_fail else ()), 1.0, _NUM_IMAGES)
        service = RewardService({self.name: (reward, 1.0)}, workers, skipping)
        try:
            service.submit(images, prompts)
            service.gather(iteration=0)
        except RewardError as error:
            where = f"{self.field}={self.name}, tried on two random images"
            raise ValueError(f"{where}: it {error.problem}") from error
        finally:
            workers.shutdown()
