"""Algorithms: one file each over `base`, by name in `build_algorithm`; `advantages` turns rewards into advantages."""

from __future__ import annotations

from rlcm_fast.algorithms.advantages import Advantages, TaskAdvantages, build_advantages
from rlcm_fast.algorithms.base import Algorithm
from rlcm_fast.algorithms.dpok import DPOK
from rlcm_fast.algorithms.grpo import GRPO
from rlcm_fast.algorithms.ppo import PPO
from rlcm_fast.algorithms.rebel import Rebel
from rlcm_fast.algorithms.reinforce import Reinforce
from rlcm_fast.algorithms.rwr import RewardWeightedRegression
from rlcm_fast.config import AlgorithmConfig, UpdateConfig

__all__ = ["PPO", "Advantages", "Algorithm", "TaskAdvantages", "build_advantages", "build_algorithm"]


def build_algorithm(config: AlgorithmConfig, update: UpdateConfig) -> Algorithm:
    """The algorithm of `config.name`."""
    clipped = {"ppo": PPO, "grpo": GRPO, "dpok": DPOK}
    if config.name in clipped:
        return clipped[config.name](update.clip_range, update.advantage_clip)
    if config.name == "rebel":
        return Rebel(config.eta, update.advantage_clip)
    if config.name == "rwr":
        return RewardWeightedRegression(config.temperature, update.advantage_clip)
    assert config.name == "reinforce", config.name
    return Reinforce(update.advantage_clip)
