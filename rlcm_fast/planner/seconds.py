"""Answers whether a run fits on a GPU and how long an iteration takes.

Planner(architecture, workload) -> memory, seconds, largest micro-batches         [settings that fit: remedies.py]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

from rlcm_fast.planner.architecture import Architecture, Size
from rlcm_fast.planner.efficiency import ASSUMED_SHARE, CALL_SECONDS, UNET_SHARE, VAE_SHARE
from rlcm_fast.planner.estimate import (
    GIB,
    NO_REWARDS,
    Memory,
    Profiles,
    Strategy,
    estimate_memory,
    measure,
)
from rlcm_fast.planner.gpus import Gpu
from rlcm_fast.planner.tracing import Flops
from rlcm_fast.planner.workload import Workload
from rlcm_fast.rewards import RewardLoad


@dataclass(frozen=True)
class Seconds:
    """Seconds of an iteration, by stage; rewards, text encoding and communication are left out."""

    sampling: float
    decoding: float
    update: float
    step: float

    @property
    def iteration(self) -> float:
        return sum(asdict(self).values())


class Planner:
    """Plans iterations of one model; traces each kind of network once."""

    def __init__(
        self,
        architecture: Architecture,
        workload: Workload,
        rewards: RewardLoad = NO_REWARDS,
        sizes: Sequence[Size] = (),
    ) -> None:
        """sizes: the pixels of a run's images if they have several sizes; the strategy has the largest."""
        self.architecture = architecture
        self.sizes = sizes
        self.workload = workload
        self.rewards = rewards
        self._profiles: dict[tuple[Any, ...], Profiles] = {}

    def profiles(self, strategy: Strategy) -> Profiles:
        """Traces the model, once for all strategies that run the network alike."""
        key = (strategy.dtype.removeprefix("pure_"), strategy.recompute, *_shape(strategy))
        if key not in self._profiles:
            self._profiles[key] = measure(self.architecture, strategy)
        return self._profiles[key]

    def memory(self, strategy: Strategy) -> Memory:
        return estimate_memory(strategy, self.profiles(strategy), self.workload, self.rewards)

    def fits(self, strategy: Strategy, gpu: Gpu) -> bool:
        return self.memory(strategy).peak <= gpu.memory_gib * GIB

    def seconds(self, strategy: Strategy, gpu: Gpu) -> Seconds:
        """Seconds by what an H200 reached (efficiency.py); the mean over several image sizes."""
        of_sizes = [self._seconds(replace(strategy, image_size=size), gpu) for size in self.sizes]
        if not of_sizes:
            return self._seconds(strategy, gpu)
        stages = zip(*map(astuple, of_sizes), strict=True)
        return Seconds(*(sum(of_stage) / len(of_sizes) for of_stage in stages))

    def _seconds(self, strategy: Strategy, gpu: Gpu) -> Seconds:
        """Seconds with images of one size."""
        # Count rows of the network: transitions are trained, pairs of the loss on real images encoded and trained.
        profiles, work, memory = self.profiles(strategy), self.workload, self.memory(strategy)
        unet, vae = profiles.unet, profiles.vae
        trained = work.samples * work.num_trained * strategy.rows_per_sample  # in a pass over the rollout
        pairs = work.pairs_per_update * work.num_updates
        once_a_rollout = strategy.has_start_model + work.recomputes_log_probs

        # Sum up what takes their time. A step reads and writes weights, master copy and moments, and reads gradients.
        sampled = min(strategy.rollout_micro_batch_size, work.samples_at_once) * strategy.rows_per_sample
        in_update = strategy.micro_batch_size * strategy.rows_per_sample
        forward = _Passes(unet.forward_flops, unet.forward_calls, gpu, strategy.dtype != "fp32")
        training = _Passes(unet.training_flops, unet.training_calls, gpu, strategy.dtype != "fp32")
        update = training.seconds(trained * work.num_passes, in_update)
        update += training.seconds(pairs, strategy.real_image_micro_batch_size)
        update += forward.seconds(once_a_rollout * trained, in_update)
        moved = 2 * (memory.weights + memory.master + memory.moments) + memory.gradients
        return Seconds(
            sampling=forward.seconds(work.samples * strategy.rows_per_sample * work.num_steps, sampled),
            decoding=_vae_seconds(vae.decoder.flops * work.samples, gpu, self.decodes_in_half(strategy)),
            update=update + _vae_seconds(vae.encoder.flops * pairs, gpu, False),
            step=work.num_updates * gpu.seconds_to_move(moved),
        )

    def decodes_in_half(self, strategy: Strategy) -> bool:
        """Tells whether images are decoded in half precision: surely, or by vae_dtype=auto if the VAE stands it."""
        return strategy.decodes_in_half or self.tries_half(strategy)

    def tries_half(self, strategy: Strategy) -> bool:
        """Tells whether a run on a GPU tries float16 with its first images; bytes are planned for float32 then."""
        return strategy.vae_dtype == "auto" and not self.architecture.vae_overflows

    def reward_seconds(self, gpu: Gpu) -> float:
        """Seconds that the built-in rewards on the GPU compute, beside the sampling and with it; an upper bound.

        Each image counts with its own prompt, and with the rewards of all tasks.
        """
        load, images = self.rewards, self.workload.samples
        flops = load.fp32_gflops * 1e9 * images, load.half_gflops * 1e9 * images
        return (gpu.seconds(0, flops[0], False) + gpu.seconds(0, flops[1], True)) / ASSUMED_SHARE

    def largest_micro_batch(self, strategy: Strategy, gpu: Gpu) -> int:
        """The largest update.micro_batch_size that divides an update and fits; 0 if none does."""
        sizes = _divisors(self.workload.transitions_per_update)
        return self._largest(sizes, strategy, "micro_batch_size", ("update", "step"), gpu)

    def largest_real_image_micro_batch(self, strategy: Strategy, gpu: Gpu) -> int:
        """The largest pretraining.micro_batch_size that divides the pairs of an update and fits; 0 if none does."""
        sizes, stages = _divisors(self.workload.pairs_per_update), ("encoding", "update")
        return self._largest(sizes, strategy, "real_image_micro_batch_size", stages, gpu)

    def largest_rollout_micro_batch(self, strategy: Strategy, gpu: Gpu) -> int:
        """The largest useful rollout.micro_batch_size whose sampling and decoding fit; 0 if none does."""
        sizes = range(1, self.workload.samples_at_once + 1)
        return self._largest(sizes, strategy, "rollout_micro_batch_size", ("sampling", "decoding"), gpu)

    def _largest(self, sizes: Iterable[int], strategy: Strategy, field: str, stages: tuple[str, str], gpu: Gpu) -> int:
        limit = gpu.memory_gib * GIB

        def peak(size: int) -> int:
            of_stage = self.memory(replace(strategy, **{field: size})).stages
            return max(of_stage[stage] for stage in stages)

        return max((size for size in sizes if peak(size) <= limit), default=0)

    def least(self, strategy: Strategy) -> int:
        """Bytes without activations; any profile with the same trained weights will do, so it seldom needs tracing."""
        same = _shape(strategy)
        traced = (profiles for (_, _, *key), profiles in self._profiles.items() if tuple(key) == same)
        profiles = next(traced, None) or self.profiles(strategy)
        memory = estimate_memory(strategy, profiles, self.workload, self.rewards)
        return memory.always + memory.gradients + max(memory.bucket, memory.step_temporaries)


def _shape(strategy: Strategy) -> tuple[Any, ...]:
    """Returns what the shapes of a pass depend on, beside its rows."""
    return strategy.lora_rank, strategy.image_size, strategy.text_chunks


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@dataclass(frozen=True)
class _Passes:
    """Passes of the UNet in micro-batches of one size."""

    flops: Flops  # of a row
    calls: int  # of a pass
    gpu: Gpu
    is_bf16: bool

    def seconds(self, rows: int, micro_batch_size: int) -> float:
        """Seconds of all rows."""
        if rows == 0:
            return 0.0
        all_flops = self.flops * rows
        at_rate = self.gpu.seconds(all_flops.convolutions, all_flops.others, self.is_bf16)
        return rows / micro_batch_size * self.calls * CALL_SECONDS + at_rate / UNET_SHARE


def _vae_seconds(flops: Flops, gpu: Gpu, is_half: bool) -> float:
    return gpu.seconds(flops.convolutions, flops.others, is_half) / VAE_SHARE
