"""Turns the fields device, dtype and batch_size of a reward into what its class understands.

    a URL                           the reward `http` there, which asks for the reward by its name
    device, dtype                   arguments of the class, or of the part of it that computes on models
    batch_size                      the same; a class without this argument gets its images in parts (parts.py)

A class that cannot be placed is refused with one line: a reward without a model of ours, or yours without the argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlcm_fast.config import RewardConfig
from rlcm_fast.config.reward_checks import check_place, is_url
from rlcm_fast.plugins import load_class
from rlcm_fast.rewards.models import OnModels


@dataclass(frozen=True)
class _Subject:
    """The reward that is placed, for errors."""

    field: str
    name: str
    is_built_in: bool

    def mistake(self, name: str, value: object, problem: str) -> ValueError:
        return ValueError(f"{self.field}.{name}={value} of {self.name}: {problem}")

    def check_left(self, name: str, value: object, runs_models: bool) -> None:
        """Raises ValueError for a wish that its class does not accept, unless it is fulfilled all the same."""
        if name == "batch_size":
            return
        if not self.is_built_in:
            raise self.mistake(name, value, f"its __init__ has no argument {name}; give it one, or leave {name} out")
        if runs_models:
            raise self.mistake(name, value, f"its models have one {name} only; leave it out")
        if (name, value) != ("device", "cpu"):  # where it runs anyway
            raise self.mistake(name, value, f"it runs no model here; leave {name} out")


def placed(config: RewardConfig, aliases: Mapping[str, str], field: str) -> RewardConfig:
    """The reward with its place in its name and arguments: device "same", dtype "".

    batch_size stays set only if the class has no such argument. aliases: built-in names. Raises ValueError that begins
    with `field`.
    """
    check_place(field, config)
    if is_url(config.device):
        return _served(config)
    wishes = {"device": config.device, "dtype": config.dtype, "batch_size": config.batch_size}
    wishes = {name: value for name, value in wishes.items() if value not in ("same", "", 0)}
    if not wishes:
        return config
    factory = load_class(config.name, aliases, f"{field}.name")
    arguments, left = _with(factory, config.arguments, wishes, _Subject(field, config.name, config.name in aliases))
    return replace(config, arguments=arguments, device="same", dtype="", batch_size=left.get("batch_size", 0))


def _served(config: RewardConfig) -> RewardConfig:
    """The reward `http` that asks the server for this one."""
    arguments: dict[str, Any] = {"url": config.device, "reward": config.name, **config.arguments}
    if config.batch_size:
        arguments["images_per_call"] = config.batch_size
    return replace(config, name="http", arguments=arguments, device="same", batch_size=0)


def _with(
    factory: Any, arguments: Mapping[str, Any], wishes: Mapping[str, Any], subject: _Subject
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `factory` with those wishes that it accepts, and the others; raises ValueError."""
    # A part computes on models: the arguments are those of the part.
    part = _part(factory, arguments)
    if part is not None:
        name, of_part = part
        changed, left = _with(of_part, arguments.get(name) or {}, wishes, subject)
        return ({**arguments, name: changed} if changed else dict(arguments)), left

    # Give the class what it accepts.
    accepted = _accepted(factory)
    left = {name: value for name, value in wishes.items() if name not in accepted}
    given = {name: value for name, value in wishes.items() if name in accepted}
    for name, value in left.items():
        subject.check_left(name, value, runs_models=bool({"device", "dtype"} & accepted))
    for name, value in given.items():
        if name in arguments:
            raise subject.mistake(name, value, f"beside {name}={arguments[name]} in its arguments; drop one")
    return {**arguments, **given}, left


def _part(factory: Any, arguments: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The argument of `factory` that holds the arguments of its part on models, and the part's class."""
    if not (isinstance(factory, type) and issubclass(factory, OnModels)):
        return None
    return factory.part(arguments)


def _accepted(factory: Any) -> set[str]:
    """Which of device, dtype and batch_size `factory` accepts."""
    parameters = inspect.signature(factory).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name for name in ("device", "dtype", "batch_size") if takes_any or name in parameters}
