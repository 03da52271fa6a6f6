"""Does a run fit on a GPU, and how long does an iteration take?

Planner(architecture, workload) -> memory, seconds, largest micro-batches          [what would fit: remedies.py]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from rlcm_fast.planner.architecture import Architecture
from rlcm_fast.planner.estimate import FROZEN_DTYPE, GIB, Memory, Profiles, Strategy, estimate_memory, measure
from rlcm_fast.planner.gpus import Gpu
from rlcm_fast.planner.tracing import Flops
from rlcm_fast.planner.workload import Workload


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
        trained = work.samples * work.num_trained  # transitions of a pass
        update = unet.training_flops * (trained * work.num_passes * strategy.rows_per_sample)
        pairs = work.pairs_per_update * work.num_updates
        update += unet.training_flops * pairs
        encoded = profiles.vae.encoder.flops * pairs
        once_a_rollout = strategy.has_reference + work.recomputes_log_probs
        update += unet.forward_flops * (once_a_rollout * trained * strategy.rows_per_sample)
        is_bf16 = strategy.dtype != "fp32"
        # weights, master copy and moments are read and written, gradients are read
        moved = 2 * (memory.weights + memory.master + memory.moments) + memory.gradients
        return Seconds(
            sampling=_seconds(unet.forward_flops * (rows * work.num_steps), gpu, is_bf16),
            decoding=_seconds(profiles.vae.decoder.flops * work.samples, gpu, torch.bfloat16 == FROZEN_DTYPE),
            update=_seconds(update, gpu, is_bf16) + _seconds(encoded, gpu, torch.bfloat16 == FROZEN_DTYPE),
            step=work.num_updates * gpu.seconds_to_move(moved),
        )

    def largest_micro_batch(self, strategy: Strategy, gpu: Gpu) -> int:
        """The largest update.micro_batch_size that divides an update and fits; 0 if none does."""
        sizes = _divisors(self.workload.transitions_per_update)
        return self._largest(sizes, strategy, "micro_batch_size", ("update", "step"), gpu)

    def largest_pretraining_micro_batch(self, strategy: Strategy, gpu: Gpu) -> int:
        """The largest pretraining.micro_batch_size that divides the pairs of an update and fits; 0 if none does."""
        sizes, stages = _divisors(self.workload.pairs_per_update), ("encoding", "update")
        return self._largest(sizes, strategy, "pretraining_micro_batch_size", stages, gpu)

    def largest_rollout_micro_batch(self, strategy: Strategy, gpu: Gpu) -> int:
        """The largest rollout.micro_batch_size of use whose sampling and decoding fit; 0 if none does."""
        sizes = range(1, self.workload.samples_at_once + 1)
        return self._largest(sizes, strategy, "rollout_micro_batch_size", ("sampling", "decoding"), gpu)

    def _largest(self, sizes: Iterable[int], strategy: Strategy, field: str, stages: tuple[str, str], gpu: Gpu) -> int:
        limit = gpu.memory_gib * GIB

        def peak(size: int) -> int:
            of_stage = self.memory(replace(strategy, **{field: size})).stages
            return max(of_stage[stage] for stage in stages)

        return max((size for size in sizes if peak(size) <= limit), default=0)

    def least(self, strategy: Strategy) -> int:
        """Bytes without activations, which alone need tracing anew; of any profile with the same trained weights."""
        same = (strategy.lora_rank, strategy.image_size)
        traced = (profiles for (_, _, *key), profiles in self._profiles.items() if tuple(key) == same)
        profiles = next(traced, None) or self.profiles(strategy)
        memory = estimate_memory(strategy, profiles, self.workload, self._reward_bytes)
        return memory.always + memory.gradients + max(memory.bucket, memory.step_temporaries)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _seconds(flops: Flops, gpu: Gpu, is_bf16: bool) -> float:
    return gpu.seconds(flops.convolutions, flops.others, is_bf16)
