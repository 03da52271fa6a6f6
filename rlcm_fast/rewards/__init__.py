"""Rewards, one file each, found by name; `base` holds the protocols, `service` runs rewards beside the sampling.

A name is one of BUILT_IN, or "package.module:Class" for a reward of yours; it may also be a function that is marked
with `rlcm_fast.plug_in` and scores images (functions.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import getattr_static
from types import FunctionType
from typing import Any, Literal

from torch import nn

from rlcm_fast import plugins
from rlcm_fast.config import RewardConfig
from rlcm_fast.frozen import FrozenNetwork
from rlcm_fast.given import check_is_given
from rlcm_fast.plugins import build, check_accepts, load_class
from rlcm_fast.rewards.asked import AskingReward, PersonReward, RunPlace
from rlcm_fast.rewards.base import ImagesFailed, Reward, RewardError, SetReward, check_scores
from rlcm_fast.rewards.diversity import EMBEDDINGS
from rlcm_fast.rewards.failures import Skipping
from rlcm_fast.rewards.functions import FunctionReward
from rlcm_fast.rewards.groups import GroupReward
from rlcm_fast.rewards.memory import Held, RewardLoad, gpu_networks
from rlcm_fast.rewards.models import OnModels, check_files
from rlcm_fast.rewards.offload import Movable, Offloading, networks_used
from rlcm_fast.rewards.parity import CLASSIFIERS
from rlcm_fast.rewards.parts import in_parts, inner
from rlcm_fast.rewards.placement import placed
from rlcm_fast.rewards.service import (
    RawScores,
    Rewards,
    RewardService,
    SubmittedBatch,
    check_raw_scores,
    evaluate,
    joined,
    score,
)
from rlcm_fast.rewards.trial import Trial
from rlcm_fast.rewards.workers import Call, DecodedImages, Workers

__all__ = [
    "BUILT_IN",
    "AskingReward",
    "Call",
    "DecodedImages",
    "GroupReward",
    "ImagesFailed",
    "Movable",
    "Offloading",
    "PersonReward",
    "RawScores",
    "Reward",
    "RewardBuilder",
    "RewardError",
    "RewardLoad",
    "RewardService",
    "Rewards",
    "RunPlace",
    "SetReward",
    "Skipping",
    "SubmittedBatch",
    "Trial",
    "Workers",
    "build_reward",
    "build_rewards",
    "check_groups",
    "check_name",
    "check_protocol",
    "check_raw_scores",
    "check_reward",
    "check_scores",
    "check_unimported",
    "evaluate",
    "gpu_bytes",
    "gpu_load",
    "grouped",
    "inner",
    "joined",
    "make_placed",
    "make_reward",
    "place",
    "score",
    "used",
]

_CALLED_WITH = ("images", "prompts")

BUILT_IN = {
    "jpeg_compressibility": "rlcm_fast.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "rlcm_fast.rewards.jpeg:JpegIncompressibility",
    "distribution_parity": "rlcm_fast.rewards.parity:DistributionParity",
    "diversity": "rlcm_fast.rewards.diversity:Diversity",
    "aesthetic": "rlcm_fast.rewards.aesthetic:Aesthetic",
    "aesthetic_v2_5": "rlcm_fast.rewards.aesthetic:AestheticV25",
    "clip_score": "rlcm_fast.rewards.clip_score:ClipScore",
    "pickscore": "rlcm_fast.rewards.pickscore:PickScore",
    "hps_v2": "rlcm_fast.rewards.hps:HpsV2",
    "hps_v2_0": "rlcm_fast.rewards.hps:HpsV20",
    "image_reward": "rlcm_fast.rewards.image_reward:ImageReward",
    "object_detection": "rlcm_fast.rewards.object_detection:ObjectDetection",
    "geneval": "rlcm_fast.rewards.geneval:GenEval",
    "shapes_alignment": "rlcm_fast.shapes.reward:ShapesAlignment",
    "shapes_alignment_graded": "rlcm_fast.shapes.graded:ShapesAlignmentGraded",
    "ocr": "rlcm_fast.rewards.ocr:Ocr",
    "safety": "rlcm_fast.rewards.safety:Safety",
    "vlm_judge": "rlcm_fast.rewards.vlm_judge:VlmJudge",
    "vlm_alignment": "rlcm_fast.rewards.vlm_alignment:VlmAlignment",
    "http": "rlcm_fast.rewards.remote:RemoteReward",
    "human": "rlcm_fast.rating.reward:HumanRating",
    "ratings": "rlcm_fast.rating.learned:Ratings",
}

ARGUMENTS_THAT_NAME = {"classifier": CLASSIFIERS, "embedding": EMBEDDINGS}
"""Arguments of built-in rewards that may name a class of yours, and the names that are built in for them."""


def check_name(name: str, field: str) -> None:
    """Raise a ValueError that names `field` unless `name` is one of BUILT_IN or a class that exists."""
    check_is_given(name, field, {})
    load_class(name, BUILT_IN, field)


def check_reward(
    config: RewardConfig, field: str, must_run: bool = False, given: Mapping[str, Any] | None = None
) -> list[str]:
    """Check the name, and, if the reward `must_run`, that the files of its models are there.

    given: rewards of a Python program, by name. Returns what has to be downloaded, in words. Raises a ValueError that
    begins with `field`. No weights load. If the reward need not run, nothing of yours is imported.
    """
    if check_is_given(config.name, f"{field}.name", given or {}):
        _check_given(config, field)
        return []
    if not must_run and check_unimported(config, field):
        return []
    check_name(config.name, f"{field}.name")
    there = place(config, field)
    _check_signatures(there, f"{field}.name={config.name}")
    if not must_run:
        return []
    try:
        return check_files(load_class(there.name, BUILT_IN, field), there.arguments)
    except ValueError as error:
        raise ValueError(f"{field}.name={config.name}: {error}") from error


def _check_signatures(config: RewardConfig, where: str) -> None:
    """Refuses arguments that the constructor does not accept, and a class that cannot be called as rewards are."""
    factory = load_class(config.name, BUILT_IN)
    check_accepts(factory, f"{where} arguments={config.arguments}", keywords=config.arguments)
    if not isinstance(factory, type):
        return
    is_set = getattr_static(factory, "scope", "image") == "set"
    methods = {"describe": _CALLED_WITH, "value": ("described",)} if is_set else {"__call__": _CALLED_WITH}
    for name, positional in methods.items():
        method = getattr_static(factory, name, None)
        if isinstance(method, FunctionType):
            check_accepts(method, f"{where} {name}", ("self", *positional))


def check_unimported(config: RewardConfig, field: str) -> list[str]:
    """Checks the names of Python in a reward, and imports no module of yours: for a dry run.

    Returns what a run would import, each as "MODULE of FILE".
    """
    # Check the reward's own name.
    check_is_given(config.name, f"{field}.name", {})
    if config.name not in BUILT_IN:
        imported = plugins.check_unimported(config.name, BUILT_IN, f"{field}.name")
        return [imported] if imported else []

    # Check what its arguments name.
    found = []
    for name, aliases in ARGUMENTS_THAT_NAME.items():
        value = config.arguments.get(name)
        if isinstance(value, str) and value not in aliases:
            found.append(plugins.check_unimported(value, aliases, f"{field}.arguments.{name}"))
    return [imported for imported in found if imported]


def _check_given(config: RewardConfig, field: str) -> None:
    """Refuses a place for a reward of a Python program, whose models are where the program put them."""
    for name, value, default in (("device", config.device, "same"), ("dtype", config.dtype, "")):
        if value != default:
            raise ValueError(
                f"{field}.{name}={value} of {config.name}: its models are where your program put them; leave it out"
            )


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


def place(config: RewardConfig, field: str = "rewards") -> RewardConfig:
    """The reward with device, dtype and batch_size in its arguments, or as `http`; see placement.py."""
    return placed(config, BUILT_IN, field)


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
