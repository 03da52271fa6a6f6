"""The sections of the configuration that say what is optimised: rewards, and tasks that have their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import rlcm_fast.config.bounds as bounds
from rlcm_fast.config.files import Source
from rlcm_fast.config.ranges import BatchOrZero, at_least, within

_NUMBERS = "a number from -1,000,000 to 1,000,000: float32 has 7 digits"


@dataclass(frozen=True)
class RewardConfig:
    """One reward."""

    name: str
    """A name in `rlcm_fast.rewards.BUILT_IN` (jpeg_compressibility, shapes_alignment, ...), or package.module:Class."""
    weight: Annotated[float, within("[-1e6, 1e6]", _NUMBERS)] = 1.0
    """Factor of the reward in the total reward, or of its advantages (rewards_combine)."""
    arguments: dict = field(default_factory=dict)
    """Keyword arguments of the class."""
    group_size: Annotated[int, at_least(0, bounds.IMAGES, "0 (all images) or more")] = 0
    """Neighbouring images that a set reward scores as one group; 0: all images of a task on a process."""
    credit: Literal["group", "leave_one_out"] = "group"
    """What an image gets of its group's value: all of it, or the value minus the value without this image."""
    on_failure: Literal["stop", "skip"] = "stop"
    """What an exception of the reward does: stop the run, or leave out the image that it fails for."""
    device: str = "same"
    """The place of its models: same (the process's GPU), cpu, cuda:N, or the URL of an `rlcm-fast reward-server`."""
    dtype: Literal["", "fp32", "bf16", "fp16"] = ""
    """Dtype of its models' weights; empty takes the reward's default."""
    batch_size: BatchOrZero = 0
    """Images that it gets at once; 0 leaves it to the reward, which gets whole micro-batches."""
    offload: bool = False
    """Keep its models in the CPU's memory while the UNet trains; they are on the GPU in rollouts and evaluations."""
    label: str = ""
    """What metrics call it, if one class is named twice with other arguments; empty takes its name."""
    threshold: Annotated[float | None, within("[-1e6, 1e6]", _NUMBERS)] = None
    """rewards_combine=lexicographic: the rewards after this one count for an image where its score is this or more."""

    @property
    def key(self) -> str:
        """What it is called in metrics, messages and checkpoints."""
        return self.label or self.name


@dataclass(frozen=True)
class TaskConfig:
    """One of several tasks that are trained together."""

    name: str
    """Name of the task in metrics and checkpoints."""
    source: Source
    """Prompts of the task, like prompts.source."""
    rewards: list[RewardConfig]
    """Rewards of the task, like the section rewards."""
    share: Annotated[float, within("(0, inf)", "a positive number, or drop the task", bounds.FACTOR)] = 1.0
    """Share of the iteration's images, relative to the shares of the other tasks."""
    images_per_prompt: Annotated[int, at_least(0, bounds.IMAGES)] = 0
    """Images of each prompt of the task in an iteration; 0 takes prompts.images_per_prompt."""
    advantages: Literal["", "prompt", "batch", "group", "leave_one_out"] = ""
    """Kind of its advantages, with separate statistics; empty takes advantages.kind."""
    evaluation: Source = ""
    """Prompts for its evaluation; empty takes evaluation.prompts."""
    rewards_combine: Literal["", "sum", "normalised", "lexicographic"] = ""
    """How its rewards become one; empty takes the run's rewards_combine."""
