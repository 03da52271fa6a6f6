"""What a run is given in Python beside its config: rewards, prompts, and who decides when it is enough.

`fine_tune` (api.py) and `DDPOTrainer` (compat/) fill it in; a run of the command line is given nothing. The config
names such an object as python:NAME, so that config.yaml, metrics and checkpoints tell where it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "python:"


def _never(iteration: int, metrics: Mapping[str, Any]) -> bool:
    return False


@dataclass(frozen=True)
class Given:
    """The objects of a Python program that a run uses."""

    rewards: Mapping[str, Any] = field(default_factory=dict)
    """Rewards that follow the project's protocol, by their names in the config."""
    prompts: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    """Functions that return the next Prompt, by their names in prompts.source."""
    is_enough: Callable[[int, Mapping[str, Any]], bool] = _never
    """Receives a finished iteration and its metrics; True ends the run early, with a checkpoint and an export."""
    is_hosted: bool = False
    """The process belongs to another program, as a notebook: a second Ctrl-C must not end it."""


NOTHING = Given()


def check_is_given(name: str, field: str, given: Mapping[str, Any]) -> bool:
    """Tells whether `name` is an object of a Python program; raises ValueError if it is one that is not here."""
    if name.startswith(PREFIX) and name not in given:
        raise ValueError(
            f"{field}={name} was given to the run in Python and cannot be imported; go on with the run there, by "
            "rlcm_fast.fine_tune with resume='latest', or put it into a module and name it as package.module:Class"
        )
    return name in given
