"""Planners that trace each kind of network once in a session of tests: it takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlcm_fast.backbones.loading import SHIPPED
from rlcm_fast.planner.architecture import Size, load_architecture
from rlcm_fast.planner.estimate import NO_REWARDS
from rlcm_fast.planner.seconds import Planner
from rlcm_fast.planner.workload import Workload
from rlcm_fast.rewards import RewardLoad

SHAPES = str(SHIPPED["shapes/lcm"])

_TRACED: dict[str, dict[tuple[Any, ...], Any]] = {}


def planner_of(model: str, work: Workload, rewards: RewardLoad = NO_REWARDS, sizes: Sequence[Size] = ()) -> Planner:
    """What is traced does not depend on the workload."""
    planner = Planner(load_architecture(model), work, rewards, sizes)
    planner._profiles = _TRACED.setdefault(model, {})
    return planner
