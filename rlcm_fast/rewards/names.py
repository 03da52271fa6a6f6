"""The names of rewards, and what is checked of a reward before it is built: name, place, signatures, models' files.

A name is one of BUILT_IN, or "package.module:Class" for a reward of yours; it may also be a function that is marked
with `rlcm_fast.plug_in` and scores images (functions.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import getattr_static
from types import FunctionType
from typing import Any

from rlcm_fast import plugins
from rlcm_fast.config import RewardConfig
from rlcm_fast.given import check_is_given
from rlcm_fast.plugins import check_accepts, check_types, load_class
from rlcm_fast.rewards.diversity import EMBEDDINGS
from rlcm_fast.rewards.models import check_files
from rlcm_fast.rewards.parity import CLASSIFIERS
from rlcm_fast.rewards.placement import placed

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
    if config.name in BUILT_IN:
        check_types(factory, where, config.arguments)
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


def place(config: RewardConfig, field: str = "rewards") -> RewardConfig:
    """The reward with device, dtype and batch_size in its arguments, or as `http`; see placement.py."""
    return placed(config, BUILT_IN, field)
