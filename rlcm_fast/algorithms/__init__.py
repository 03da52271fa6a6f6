"""Algorithms: `losses` has all of them on one page, `advantages` turns rewards into advantages."""

from __future__ import annotations

from rlcm_fast.algorithms.advantages import Advantages, TaskAdvantages, build_advantages
from rlcm_fast.algorithms.losses import PPO, Algorithm, Outputs, build_algorithm

__all__ = ["PPO", "Advantages", "Algorithm", "Outputs", "TaskAdvantages", "build_advantages", "build_algorithm"]
