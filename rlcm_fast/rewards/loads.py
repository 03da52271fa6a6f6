"""What the rewards of a config take of a GPU, and what they computed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlcm_fast.config import RewardConfig
from rlcm_fast.plugins import load_class
from rlcm_fast.rewards.base import Reward
from rlcm_fast.rewards.groups import GroupReward
from rlcm_fast.rewards.memory import Held, RewardLoad, gpu_networks
from rlcm_fast.rewards.models import OnModels
from rlcm_fast.rewards.names import BUILT_IN, place


def used(rewards: Mapping[str, tuple[Reward, float]]) -> dict[str, Any]:
    """What each reward on models computes on, by the reward's name, as JSON: models, revisions, hashes of files."""
    plain = {
        name: reward.reward if isinstance(reward, GroupReward) else reward for name, (reward, _) in rewards.items()
    }
    return {name: reward.used for name, reward in plain.items() if isinstance(reward, OnModels) and reward.used}


def gpu_load(
    trained: Sequence[RewardConfig], watched: Sequence[RewardConfig] = (), num_processes: int = 1
) -> RewardLoad:
    """What the built-in rewards take of the GPU that has most of them, of `num_processes`; nothing for yours.

    watched: rewards that only evaluations use; they cost an iteration no time.
    """
    scoring = _networks(trained, num_processes)
    return RewardLoad.of(_networks([*trained, *watched], num_processes).values(), scoring.values())


def gpu_bytes(configs: Sequence[RewardConfig]) -> int:
    """The memory that the weights of built-in rewards take of each process's GPU, in bytes; 0 for yours."""
    return gpu_load(configs).total


def _networks(configs: Sequence[RewardConfig], num_processes: int) -> dict[tuple[str, ...], Held]:
    """The networks of built-in rewards; one that rewards share is offloaded if one of them asks for it."""
    networks: dict[tuple[str, ...], Held] = {}
    for config in configs:
        if config.name not in BUILT_IN:
            continue
        there = place(config)
        for key, network in gpu_networks(load_class(there.name, BUILT_IN), there.arguments, num_processes).items():
            is_offloaded = config.offload or (key in networks and networks[key].is_offloaded)
            networks[key] = replace(network, is_offloaded=is_offloaded)
    return networks
