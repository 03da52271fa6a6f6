"""Rewards: one file each, found by name; `base` has the protocol, `service` runs them beside the sampling.

A name is one of BUILT_IN or "package.module:Class" of the user's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from rlcm_fast.config import RewardConfig
from rlcm_fast.plugins import load_class
from rlcm_fast.rewards.base import Reward, RewardError, check
from rlcm_fast.rewards.service import Rewards, RewardService

__all__ = ["BUILT_IN", "Reward", "RewardError", "RewardService", "Rewards", "build_reward", "build_rewards", "check"]

BUILT_IN = {
    "jpeg_compressibility": "rlcm_fast.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "rlcm_fast.rewards.jpeg:JpegIncompressibility",
    "shapes_alignment": "rlcm_fast.shapes.reward:ShapesAlignment",
    "shapes_alignment_graded": "rlcm_fast.shapes.graded:ShapesAlignmentGraded",
}


def build_reward(name: str, arguments: Mapping[str, Any]) -> Reward:
    """The reward `name` (a key of BUILT_IN or "package.module:Class") made with its own `arguments`."""
    try:
        factory = load_class(name, BUILT_IN)
    except ValueError as error:
        raise ValueError(f"rewards: {error}") from error
    signature = inspect.signature(factory)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = ", ".join(str(parameter) for parameter in signature.parameters.values()) or "no arguments"
        raise ValueError(f"rewards: name={name} arguments={dict(arguments)}: {error}; it takes {takes}") from error
    try:
        reward = factory(**arguments)
    except ValueError as error:
        raise ValueError(f"rewards: name={name} arguments={dict(arguments)}: {error}") from error
    if not isinstance(reward, Reward):
        raise ValueError(
            f"rewards: name={name} made a {type(reward).__name__}, which is no reward; give it an attribute"
            ' scope = "image" and a method __call__(images, prompts) that returns one float32 score per image'
        )
    if reward.scope != "image":
        raise ValueError(f'rewards: name={name} has scope={reward.scope!r}; only scope = "image" is supported')
    return reward


def build_rewards(configs: Sequence[RewardConfig]) -> dict[str, tuple[Reward, float]]:
    """Each reward with its weight, by name."""
    return {config.name: (build_reward(config.name, config.arguments), config.weight) for config in configs}
