"""Finds settings that make a config fit on a GPU, and that train.py accepts together with the rest of the config.

Remedies(planner, config, image_size, gpu).cheaper() -> config fields and their new values
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlcm_fast.config import Config
from rlcm_fast.config.checks import validate
from rlcm_fast.planner.architecture import Size
from rlcm_fast.planner.estimate import GIB, Strategy, strategy_of
from rlcm_fast.planner.gpus import Gpu
from rlcm_fast.planner.seconds import Planner

Settings = dict[str, Any]  # config field -> value

_IN_BACKWARD: Settings = {"engine.optimizer_in_backward": True}
_OFFLOAD: Settings = {
    "engine.offload_optimizer": True,
    "engine.zero_stage": 1,
    "engine.dtype": "bf16",
    "engine.channels_last": False,
    "engine.optimizer_in_backward": False,
    "optimizer.name": "adamw",
}
LADDER: tuple[Settings, ...] = (  # the cheapest first; each is added to those before it that helped
    {"rollout.decode_batch_size": 4},
    {"engine.offload_idle": True},
    {"update.kl_reference": "offload"},
    {"engine.graphs": "off"},
    {"engine.compile": "regional"},
    {"engine.recompute": "selective"},
    {"engine.dtype": "bf16", "engine.zero_stage": 1, "engine.channels_last": False},
    {"engine.recompute": "block"},
    {"optimizer.name": "adamw_8bit"},
    {"engine.dtype": "pure_bf16", "optimizer.name": "adamw_8bit", "engine.zero_stage": 0},
    _IN_BACKWARD,
    _OFFLOAD,
    {"update.kl_weight": 0.0, "guard.action": "off"},  # a guard that may raise the weight needs the start model, too
)
_RECOMPUTE = ("none", "selective", "block")


def with_settings(config: Config, settings: Settings) -> Config:
    """Returns the config with these fields of its sections changed."""
    for setting, value in settings.items():
        section, _, field = setting.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config


@dataclass(frozen=True)
class Remedies:
    """Searches for one config and one GPU; the planner has the config's workload."""

    planner: Planner
    config: Config
    image_size: Size | None  # pixels; None: the model's default
    gpu: Gpu

    def cheaper(self) -> Settings | None:
        """Returns the first settings of LADDER that make the config fit; None if none do.

        It adds steps until the config fits and then drops those that were not needed, so few strategies need tracing.
        """
        found = self._climb({}, LADDER)
        if found is None:  # an optimizer in the backward pass forbids smaller micro-batches, which may help as well
            without = [step for step in LADDER if step is not _IN_BACKWARD]
            found = self._climb({"engine.optimizer_in_backward": False}, without)
        return found

    def _climb(self, first: Settings, ladder: Sequence[Settings]) -> Settings | None:
        steps = [first]
        for step in ({}, *ladder):
            if step and not self._may_help(_merged(steps), step):
                continue
            steps.append(step)
            if self._fitting(_merged(steps)) is not None:
                return self._shortest(steps)
        return None

    def _shortest(self, steps: list[Settings]) -> Settings | None:
        for step in list(steps):
            rest = [other for other in steps if other is not step]
            if self._fitting(_merged(rest)) is not None:
                steps = rest
        settings = _merged(steps)
        for field in list(settings):
            rest = {other: value for other, value in settings.items() if other != field}
            if self._fitting(rest) is not None:
                settings = rest
        return self._fitting(settings)

    def _may_help(self, settings: Settings, step: Settings) -> bool:
        """Whether a step is accepted, changes something, and needs no more memory in what is known without tracing."""
        if not self._accepts(settings | step):
            return False
        before, after = self._strategy(settings), self._strategy(settings | step)
        is_back = _RECOMPUTE.index(after.recompute) < _RECOMPUTE.index(before.recompute)
        least = self.planner.least
        return after != before and not is_back and least(after) <= least(before)

    def _fitting(self, settings: Settings) -> Settings | None:
        """Adds the micro-batches that must be smaller to the settings; None if they do not fit or are refused."""
        if not self._accepts(settings):
            return None
        micro_batches = self._micro_batches_that_fit(self._strategy(settings))
        if micro_batches is None or not self._accepts(settings | micro_batches):
            return None
        # Sized one by one they may not fit together: with several micro-batches an update sums in float32.
        found = settings | micro_batches
        return found if self.planner.fits(self._strategy(found), self.gpu) else None

    def _micro_batches_that_fit(self, strategy: Strategy) -> Settings | None:
        """Returns the sizes that must be smaller, each as large as fits; None if no size fits."""
        # Give up early if no micro-batch can be small enough.
        planner, gpu = self.planner, self.gpu
        if planner.least(strategy) > gpu.memory_gib * GIB:
            return None

        # Size each kind of micro-batch beside the smallest of the other kind: an update holds the larger of the two.
        pairs = strategy.real_image_micro_batch_size
        update = planner.largest_micro_batch(replace(strategy, real_image_micro_batch_size=min(pairs, 1)), gpu)
        rollout = planner.largest_rollout_micro_batch(strategy, gpu)
        found: Settings = {}
        if pairs > 0:
            fitting = planner.largest_real_image_micro_batch(replace(strategy, micro_batch_size=1), gpu)
            if fitting < pairs:
                found["pretraining.micro_batch_size"] = fitting

        # Report what differs from the config.
        if min(update, rollout, *found.values()) == 0:
            return None
        if update < strategy.micro_batch_size:
            found["update.micro_batch_size"] = update
        if rollout < min(strategy.rollout_micro_batch_size, planner.workload.samples_at_once):
            found["rollout.micro_batch_size"] = rollout
        return found

    def _accepts(self, settings: Settings) -> bool:
        """Whether train.py accepts the config with these settings."""
        try:
            validate(with_settings(self.config, settings), self.planner.workload.num_processes)
        except ValueError:
            return False
        return True

    def _strategy(self, settings: Settings) -> Strategy:
        embeds_guidance = self.planner.architecture.embeds_guidance
        return strategy_of(with_settings(self.config, settings), self.image_size, embeds_guidance)


def _merged(steps: Sequence[Settings]) -> Settings:
    return {field: value for step in steps for field, value in step.items()}
