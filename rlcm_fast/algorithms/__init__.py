"""Algorithms: `PPO` turns log-probs and advantages into a loss, `advantages` turns rewards into advantages."""

from __future__ import annotations

from rlcm_fast.algorithms.advantages import Advantages, build_advantages
from rlcm_fast.algorithms.ppo import PPO

__all__ = ["PPO", "Advantages", "build_advantages"]
