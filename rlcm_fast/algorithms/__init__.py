"""Algorithms: `losses` has all of them on one page, `advantages` turns rewards into advantages,
`combining` several rewards into one."""

from __future__ import annotations

from rlcm_fast.algorithms.advantages import Advantages, build_advantages
from rlcm_fast.algorithms.combining import Combined, Scores, TaskAdvantages, Weighted, build_combined
from rlcm_fast.algorithms.losses import PPO, Algorithm, Outputs, build_algorithm

__all__ = [
    "PPO",
    "Advantages",
    "Algorithm",
    "Combined",
    "Outputs",
    "Scores",
    "TaskAdvantages",
    "Weighted",
    "build_advantages",
    "build_algorithm",
    "build_combined",
]
