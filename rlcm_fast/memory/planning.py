"""Does a run fit on a GPU, how long does an iteration take, and what would be cheaper?

Planner(architecture, workload) -> memory, seconds, largest micro-batch, cheaper settings
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args, get_type_hints

import torch

from rlcm_fast.config import Config
from rlcm_fast.memory.architecture import Architecture
from rlcm_fast.memory.estimate import (
    FROZEN_DTYPE,
    GIB,
    SETTINGS,
    Memory,
    Profiles,
    Strategy,
    Workload,
    estimate_memory,
    measure,
)
from rlcm_fast.memory.gpus import Gpu
from rlcm_fast.memory.tracing import Flops

Settings = dict[str, Any]  # config field -> value

LADDER: tuple[Settings, ...] = (  # from what costs least; each on top of those before it that helped
    {"rollout.decode_batch_size": 4},
    {"engine.offload_idle": True},
    {"engine.recompute": "selective"},
    {"engine.dtype": "bf16", "engine.zero_stage": 1},
    {"engine.recompute": "block"},
    {"optimizer.name": "adamw_8bit"},
    {"engine.dtype": "pure_bf16", "optimizer.name": "adamw_8bit", "engine.zero_stage": 0},
    {"engine.optimizer_in_backward": True},
    {"engine.offload_optimizer": True},
    {"update.kl_weight": 0.0},
)


@dataclass(frozen=True)
class Seconds:
    """Of an iteration, by stage; rewards, text encoding and communication are not in it."""

    sampling: float
    decoding: float
    update: float
    step: float

    @property
    def iteration(self) -> float:
        return sum(asdict(self).values())


class Planner:
    """Answers for one model and one iteration; traces each kind of network once."""

    def __init__(self, architecture: Architecture, workload: Workload, reward_bytes: int = 0) -> None:
        self.architecture = architecture
        self.workload = workload
        self._reward_bytes = reward_bytes
        self._profiles: dict[tuple[Any, ...], Profiles] = {}

    def profiles(self, strategy: Strategy) -> Profiles:
        """Traced at the first call for strategies that run the network alike."""
        key = (strategy.dtype.removeprefix("pure_"), strategy.recompute, strategy.lora_rank, strategy.image_size)
        if key not in self._profiles:
            self._profiles[key] = measure(self.architecture, strategy)
        return self._profiles[key]

    def memory(self, strategy: Strategy) -> Memory:
        return estimate_memory(strategy, self.profiles(strategy), self.workload, self._reward_bytes)

    def fits(self, strategy: Strategy, gpu: Gpu) -> bool:
        return self.memory(strategy).peak <= gpu.memory_gib * GIB

    def seconds(self, strategy: Strategy, gpu: Gpu) -> Seconds:
        """At the assumed utilisation of the GPU."""
        profiles, work, memory = self.profiles(strategy), self.workload, self.memory(strategy)
        rows, unet = work.samples * strategy.rows_per_sample, profiles.unet
        of_transition = unet.training_flops + unet.forward_flops * (1 if strategy.has_reference else 0)
        is_bf16 = strategy.dtype != "fp32"
        # weights, master copy and moments are read and written, gradients are read
        moved = 2 * (memory.weights + memory.master + memory.moments) + memory.gradients
        return Seconds(
            sampling=_seconds(unet.forward_flops * (rows * work.num_steps), gpu, is_bf16),
            decoding=_seconds(profiles.decoder.flops * work.samples, gpu, torch.bfloat16 == FROZEN_DTYPE),
            update=_seconds(of_transition * (rows * work.num_actions * work.num_passes), gpu, is_bf16),
            step=work.num_updates * gpu.seconds_to_move(moved),
        )

    def largest_micro_batch(self, strategy: Strategy, gpu: Gpu) -> int:
        """The largest update.micro_batch_size that divides an update and fits; 0 if none does."""
        transitions = self.workload.transitions_per_update
        sizes = [n for n in range(1, transitions + 1) if transitions % n == 0]
        return self._largest(sizes, strategy, "micro_batch_size", ("update", "step"), gpu)

    def largest_rollout_micro_batch(self, strategy: Strategy, gpu: Gpu) -> int:
        """The largest rollout.micro_batch_size of use whose sampling and decoding fit; 0 if none does."""
        sizes = range(1, self.workload.samples + 1)
        return self._largest(sizes, strategy, "rollout_micro_batch_size", ("sampling", "decoding"), gpu)

    def _largest(self, sizes: Iterable[int], strategy: Strategy, field: str, stages: tuple[str, str], gpu: Gpu) -> int:
        limit = gpu.memory_gib * GIB

        def peak(size: int) -> int:
            of_stage = self.memory(replace(strategy, **{field: size})).stages
            return max(of_stage[stage] for stage in stages)

        return max((size for size in sizes if peak(size) <= limit), default=0)

    def cheaper(self, strategy: Strategy, gpu: Gpu) -> Settings | None:
        """Config fields to change so that it fits, the first that suffice of LADDER; None if nothing does.

        Adds steps until it fits and then takes out what was not needed, so that few strategies need tracing.
        """
        steps: list[Settings] = []
        for step in ({}, *(step for step in LADDER if all(_is_settable(*item) for item in step.items()))):
            before = changed(strategy, *steps)
            if step and not self._may_help(before, changed(before, step)):
                continue
            steps.append(step)
            if self._micro_batches_that_fit(changed(strategy, *steps), gpu) is not None:
                return self._shortest(strategy, steps, gpu)
        return None

    def _shortest(self, strategy: Strategy, steps: list[Settings], gpu: Gpu) -> Settings:
        for step in [step for step in steps if step]:
            rest = [other for other in steps if other is not step]
            if self._micro_batches_that_fit(changed(strategy, *rest), gpu) is not None:
                steps = rest
        micro_batches = self._micro_batches_that_fit(changed(strategy, *steps), gpu) or {}
        return {field: value for step in (*steps, micro_batches) for field, value in step.items()}

    def _may_help(self, before: Strategy, after: Strategy) -> bool:
        """Without tracing: it changes something, and to no more memory in what is known without."""
        is_back = _RECOMPUTE.index(after.recompute) < _RECOMPUTE.index(before.recompute)
        return after != before and not is_back and self._least(after) <= self._least(before)

    def _least(self, strategy: Strategy) -> int:
        """Bytes without activations, which alone need tracing anew; of any profile of this model."""
        profiles = next(iter(self._profiles.values()))
        memory = estimate_memory(strategy, profiles, self.workload, self._reward_bytes)
        return memory.always + memory.gradients + max(memory.bucket, memory.step_temporaries)

    def _micro_batches_that_fit(self, strategy: Strategy, gpu: Gpu) -> Settings | None:
        """What has to be smaller than it is, largest first choice; None if no size fits."""
        if self._least(strategy) > gpu.memory_gib * GIB:
            return None
        update, rollout = self.largest_micro_batch(strategy, gpu), self.largest_rollout_micro_batch(strategy, gpu)
        if min(update, rollout) == 0:
            return None
        found: Settings = {}
        if update < strategy.micro_batch_size:
            found["update.micro_batch_size"] = update
        if rollout < min(strategy.rollout_micro_batch_size, self.workload.samples):
            found["rollout.micro_batch_size"] = rollout
        return found


def _seconds(flops: Flops, gpu: Gpu, is_bf16: bool) -> float:
    return gpu.seconds(flops.convolutions, flops.others, is_bf16)


_RECOMPUTE = ("none", "selective", "block")


def changed(strategy: Strategy, *steps: Settings) -> Strategy:
    """The strategy with config fields set."""
    for settings in steps:
        values = {SETTINGS[field]: value for field, value in settings.items() if field in SETTINGS}
        if "update.kl_weight" in settings:
            values["has_reference"] = settings["update.kl_weight"] > 0
        strategy = replace(strategy, **values)
    return strategy


def _is_settable(setting: str, value: Any) -> bool:
    """Whether the config has this field, and the field this value."""
    section, _, field = setting.partition(".")
    hints = get_type_hints(get_type_hints(Config)[section])
    return field in hints and (not get_args(hints[field]) or value in get_args(hints[field]))
