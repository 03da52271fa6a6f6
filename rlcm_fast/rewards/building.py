"""Builds rewards from their configs: each at its place, in parts, with its groups, and equal ones once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from rlcm_fast.config import RewardConfig
from rlcm_fast.frozen import FrozenNetwork
from rlcm_fast.given import check_is_given
from rlcm_fast.plugins import build, load_class
from rlcm_fast.rewards.asked import AskingReward, PersonReward
from rlcm_fast.rewards.base import Reward, SetReward
from rlcm_fast.rewards.functions import FunctionReward
from rlcm_fast.rewards.groups import GroupReward
from rlcm_fast.rewards.names import BUILT_IN, place
from rlcm_fast.rewards.offload import Movable, Offloading, networks_used
from rlcm_fast.rewards.parts import in_parts, inner


def build_reward(
    name: str,
    arguments: Mapping[str, Any],
    group_size: int = 0,
    credit: Literal["group", "leave_one_out"] = "group",
) -> Reward:
    """Make the reward with `make_reward` and group it with `grouped`."""
    return grouped(name, make_reward(name, arguments), group_size, credit)


def make_reward(name: str, arguments: Mapping[str, Any], field: str = "rewards") -> Reward | SetReward:
    """The reward `name`, a key of BUILT_IN or "package.module:Class", made with `arguments`.

    Errors begin with `field`, the config field that sets the reward.
    """
    try:
        found = load_class(name, BUILT_IN)
        is_class = isinstance(found, type)
        reward = build(name, arguments, BUILT_IN) if is_class else FunctionReward(found, arguments, name)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    return check_protocol(name, reward, field)


def check_protocol(name: str, reward: Any, field: str) -> Reward | SetReward:
    """Returns the reward, if it follows one of the two protocols; errors begin with `field`."""
    is_set = isinstance(reward, SetReward) and reward.scope == "set"
    if not is_set and not (isinstance(reward, Reward) and reward.scope == "image"):
        raise ValueError(
            f"{field}: name={name} made a {type(reward).__name__}, which is no reward; give it an attribute"
            ' scope = "image" and a method __call__(images, prompts) that returns one float32 score per image, or'
            ' scope = "set" and the methods describe(images, prompts) and value(described)'
        )
    return reward


def grouped(
    name: str,
    reward: Reward | SetReward,
    group_size: int,
    credit: Literal["group", "leave_one_out"],
    field: str = "rewards",
) -> Reward:
    """Wrap a set reward as a GroupReward with `group_size` and `credit`; return an image reward itself.

    Raises ValueError if `group_size` or `credit` is set for an image reward, which would ignore it.
    """
    # Only a set reward has groups.
    if isinstance(reward, AskingReward):
        return _of_person(name, reward, group_size, credit, field)
    if reward.scope == "set":
        assert isinstance(reward, SetReward)
        return GroupReward(name, reward, group_size, credit)
    assert isinstance(reward, Reward)
    if group_size or credit != "group":
        given = f"group_size={group_size}" if group_size else f"credit={credit}"
        raise ValueError(
            f"{field}: name={name} {given} has no use, because this reward scores each image on its own; leave it out, "
            "or name a set reward"
        )
    return reward


def _of_person(
    name: str, reward: AskingReward, group_size: int, credit: Literal["group", "leave_one_out"], field: str
) -> PersonReward:
    if group_size or credit != "group":
        given = f"group_size={group_size}" if group_size else f"credit={credit}"
        raise ValueError(
            f"{field}: name={name} {given} has no use: a person ranks the images of a prompt; leave it out"
        )
    return PersonReward(name, reward)


def check_groups(rewards: Mapping[str, Reward], num_images: int) -> None:
    """Raises ValueError if a set reward's groups do not divide `num_images`."""
    for reward in rewards.values():
        if isinstance(reward, GroupReward):
            reward.groups(num_images)


def make_placed(config: RewardConfig, field: str = "rewards") -> Reward | SetReward:
    """The reward at its place, without groups; errors begin with `field`."""
    there = place(config, field)
    return in_parts(make_reward(there.name, there.arguments, field), there.batch_size)


class RewardBuilder:
    """Builds the rewards of a run; equal ones once, so that they share a model, and knows whose models move."""

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        """given: rewards of a Python program, by name; they are there already."""
        self._given = given or {}
        self._built: dict[str, Reward | SetReward] = {}
        self._moved: dict[int, Movable] = {}  # by the id of the network or reward, which is kept

    def build(self, config: RewardConfig, field: str) -> Reward:
        """The reward of `config`, at its place, with its groups; errors begin with `field`."""
        where = (config.device, config.dtype, config.batch_size, config.offload)
        key = repr((config.name, config.arguments, where))
        if key not in self._built:
            with networks_used() as networks:
                self._built[key] = self._make(config, field)
            if config.offload:
                self._offload(config, self._built[key], networks, field)
        return grouped(config.name, self._built[key], config.group_size, config.credit, field)

    def _make(self, config: RewardConfig, field: str) -> Reward | SetReward:
        if check_is_given(config.name, f"{field}.name", self._given):
            return in_parts(check_protocol(config.name, self._given[config.name], field), config.batch_size)
        return make_placed(config, field)

    def offloading(self) -> Offloading:
        """The models of all rewards with `offload`; moves them off the GPU."""
        return Offloading(self._moved.values())

    def _offload(
        self, config: RewardConfig, reward: Reward | SetReward, networks: Sequence[nn.Module], field: str
    ) -> None:
        own = inner(reward)
        if isinstance(own, Movable):
            self._moved[id(own)] = own
            return
        if not networks:
            way_out = "leave it out" if config.name in BUILT_IN else "give it the methods to_device() and to_cpu()"
            raise ValueError(f"{field}.offload=true of {config.name}, which has no model that could move: {way_out}")
        for network in networks:
            self._moved.setdefault(id(network), FrozenNetwork(network))


def build_rewards(configs: Sequence[RewardConfig]) -> dict[str, tuple[Reward, float]]:
    """The rewards of `configs`, each with its weight, by name."""
    built = {}
    for index, config in enumerate(configs):
        field = f"rewards[{index}]"
        reward = grouped(config.name, make_placed(config, field), config.group_size, config.credit, field)
        built[config.key] = (reward, config.weight)
    return built
