"""Planners that trace each kind of network once in a session of tests: it takes seconds."""

from __future__ import annotations

from typing import Any

from rlcm_fast.backbones.loading import SHIPPED
from rlcm_fast.planner.architecture import load_architecture
from rlcm_fast.planner.seconds import Planner
from rlcm_fast.planner.workload import Workload

SHAPES = str(SHIPPED["shapes/lcm"])

_TRACED: dict[str, dict[tuple[Any, ...], Any]] = {}


def planner_of(model: str, work: Workload, reward_bytes: int = 0) -> Planner:
    """What is traced does not depend on the workload."""
    planner = Planner(load_architecture(model), work, reward_bytes)
    planner._profiles = _TRACED.setdefault(model, {})
    return planner
