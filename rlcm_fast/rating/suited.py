"""Suits the config of another run to a person: what `rlcm-fast rate` changes, each change with its reason.

A person who rates instead of a config's rewards also replaces what belonged to them: how they were combined, what an
image was compared with, and how many images a round has, with the micro-batches that divide it. Images that are one
update old need a loss with a ratio, and room for it in the clip. What the user gives on the command line comes after
these changes and has the last word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

from rlcm_fast.config import Config, RewardConfig
from rlcm_fast.config.algorithm_checks import lag_problem
from rlcm_fast.config.batches import AUTO

_NUM_PROMPTS, _IMAGES_PER_PROMPT = 4, 4  # as defaults.yaml has them
_IMAGES_OF_A_ROUND = range(8, 33)
_IMAGES_OF_A_PROMPT = range(2, 10)  # the page has keys for nine
_NARROW, _WIDE = 0.01, 0.05  # of the ratio, which one update must be able to move; ratio/max_deviation says how far


@dataclass(frozen=True)
class Change:
    """A field of the config and what it becomes."""

    field: str  # dotted
    value: str | int | float
    reason: str

    @property
    def option(self) -> str:
        """The option of the command line."""
        return f"--{self.field}={self.value}"

    def said(self, before: Config, after: Config) -> str | None:
        """Returns the change in a line; None if the config says so already, or the command says something else."""
        old, new = _value(before, self.field), _value(after, self.field)
        if new != self.value or old == new:
            return None
        shown = "''" if new == "" else new
        return f"{self.field}={shown} instead of {old}: {self.reason}"


def changes(config: Config, replaces: bool) -> list[Change]:
    """Returns what suits a config to a person, who `replaces` its rewards or is one of them."""
    return [*(_of_rewards(config) if replaces else ()), *_of_lag(config)]


def _of_rewards(config: Config) -> Iterator[Change]:
    """Yields what the config's rewards would leave behind."""
    yield Change("rewards_combine", "sum", "you are the only reward")
    if any(config.checkpoint.best.endswith(f"eval/{reward.key}/mean") for reward in _not_watched(config)):
        yield Change("checkpoint.best", "", "that reward is measured no more")
        yield Change("checkpoint.export", "last", "no checkpoint is the best without checkpoint.best")
    if config.advantages.kind not in ("group", "leave_one_out"):
        yield Change("advantages.kind", "group", "your ranks compare the images of one prompt")
    prompts = config.prompts
    num_images, of_prompt = prompts.num_prompts * prompts.images_per_prompt, prompts.images_per_prompt
    if num_images in _IMAGES_OF_A_ROUND and of_prompt in _IMAGES_OF_A_PROMPT:
        return
    reason = f"you rate 8 to 32 images a round and 2 to 9 of a prompt, not {num_images} and {of_prompt}"
    yield Change("prompts.num_prompts", _NUM_PROMPTS, reason)
    yield Change("prompts.images_per_prompt", _IMAGES_PER_PROMPT, reason)
    yield Change("rollout.micro_batch_size", AUTO, "it must divide the images of a round")
    yield Change("update.micro_batch_size", AUTO, "it must divide the transitions of a round")


def _not_watched(config: Config) -> list[RewardConfig]:
    """Returns the rewards that the evaluation measures only because they are trained on."""
    watched = {reward.key for reward in config.evaluation.rewards}
    return [reward for reward in config.rewards if reward.key not in watched]


def _of_lag(config: Config) -> Iterator[Change]:
    """Yields what images need that are one update old."""
    if config.update.rollout_lag == 0:
        return
    if lag_problem(config):
        recomputes = config.update.old_log_probs == "recompute"
        needs = "update.old_log_probs=recompute" if recomputes else f"algorithm.name={config.algorithm.name}"
        yield Change("update.rollout_lag", 0, f"{needs} needs images of the present weights, so you wait for them")
    elif config.update.clip_range < _NARROW:
        yield Change("update.clip_range", _WIDE, "images are one update old (update.rollout_lag=1)")


def said(changed: Sequence[Change], before: Config, after: Config) -> list[str]:
    """Returns the lines of the changes that count."""
    lines = [change.said(before, after) for change in changed]
    return [line for line in lines if line is not None]


def _value(config: Config, field: str) -> object:
    return reduce(getattr, field.split("."), config)
