"""Bytes of a training process by what they are for, and the peak of each stage; nothing is run and nothing loaded.

    Config -> Strategy;   Strategy, Profiles, Workload -> Memory

    stage      what is there at its peak, besides weights, master copy, moments, frozen parts, trajectory, overhead
    sampling   one UNet pass without gradients          update   gradients, activations, DeepSpeed's bucket
    decoding   one pass of the VAE's decoder, cuDNN's too   step   gradients and the optimizer's temporaries
    encoding   the text encoders; they and the VAE are there at their own stage only where `moves_idle`
    encoding images   one pass of the VAE's encoder on real images, within an update: its gradients and bucket are there

As DeepSpeed 0.19 does it: from ZeRO 1 on there is a flat float32 master copy, of float32 weights too; its step holds
the gradients flat and in float32 beside it; and a gradient bucket of fixed size is there during backward passes.
An upper bound where an update has one micro-batch only: its gradients grow while activations are freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from rlcm_fast.config import Config, to_dict
from rlcm_fast.planner.architecture import Architecture
from rlcm_fast.planner.tracing import NetworkProfile, Recompute, Setup, VaeProfile, profile_unet, profile_vae
from rlcm_fast.planner.workload import Workload

Device = Literal["cuda", "cpu"]
GIB = 2**30
OVERHEAD_BYTES = int(1.2 * GIB)
"""CUDA's context, 0.75 GiB on an H200, and the allocator's fragments, which are a guess."""
WORKSPACE_SHARE = 0.6
"""Of a VAE pass on a GPU, beside its tensors: 0.59 and 0.60 as SD1.5's and SDXL's decode in float32 on an H200."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default reduce_bucket_size and stage3_max_live_parameters / 2, which the engine leaves as they are."""
FROZEN_DTYPE = torch.float32
"""Of VAE and text encoders, as backbones/pipeline.py loads them."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "pure_bf16": torch.bfloat16}

_BLOCK = 256  # elements of an 8-bit state with one float32 scale
_LEAST_8BIT = 4096  # elements of a tensor; smaller ones have float32 states
_CODEBOOKS = {"bnb_adamw_8bit": 2 * 256 * 4, "bnb_paged_adamw_8bit": 2 * 256 * 4}  # one pair for an optimizer


@dataclass(frozen=True)
class Strategy:
    """What memory depends on; names and values are the config's."""

    dtype: Literal["fp32", "bf16", "pure_bf16"] = "fp32"
    optimizer: Literal["adamw", "adam", "bnb_adamw_8bit", "bnb_paged_adamw_8bit", "adamw_8bit"] = "adamw"
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: bool = False  # master copy and moments on the CPU
    optimizer_in_backward: bool = False  # each gradient is used and freed at once
    recompute: Recompute = "none"
    micro_batch_size: int = 64
    rollout_micro_batch_size: int = 64
    decode_batch_size: int = 0  # 0: as many as were sampled
    lora_rank: int = 0  # 0: all weights
    moves_idle: bool = False  # VAE and text encoders are on the GPU only while they work
    ema: Literal["off", "gpu", "cpu"] = "off"
    reference: Literal["off", "copy", "offload"] = "off"  # the start model, for the KL term
    pretraining_micro_batch_size: int = 0  # of real pairs, without guidance; 0: none
    rows_per_sample: int = 1  # of the network's batch; 2 under classifier-free guidance
    image_size: int | None = None  # pixels; None: the model's own

    @property
    def has_reference(self) -> bool:
        return self.reference != "off"


SETTINGS = {
    "engine.dtype": "dtype",
    "optimizer.name": "optimizer",
    "engine.zero_stage": "zero_stage",
    "engine.offload_optimizer": "offload_optimizer",
    "engine.optimizer_in_backward": "optimizer_in_backward",
    "engine.recompute": "recompute",
    "engine.offload_idle": "moves_idle",
    "update.micro_batch_size": "micro_batch_size",
    "rollout.micro_batch_size": "rollout_micro_batch_size",
    "rollout.decode_batch_size": "decode_batch_size",
    "lora.rank": "lora_rank",
}
"""Config field -> Strategy field, where both have the same values."""


def strategy_of(config: Config, image_size: int | None = None, embeds_guidance: bool = True) -> Strategy:
    """The memory side of a config; embeds_guidance: of the model, so that a consistency policy has one row a sample."""
    values = to_dict(config)
    found: dict[str, Any] = {}
    for setting, name in SETTINGS.items():
        section, _, field = setting.partition(".")
        found[name] = values[section][field]
    is_guided = config.policy.guidance_scale != 1 and (config.policy.kind == "ddim" or not embeds_guidance)
    reference = config.update.kl_reference if config.update.kl_weight > 0 else "off"
    pretraining = config.pretraining.micro_batch_size if config.pretraining.weight > 0 else 0
    if config.ema.decay > 0:
        found["ema"] = {"model": "gpu", "cpu": "cpu"}[config.ema.device]
    found |= {"reference": reference, "pretraining_micro_batch_size": pretraining}
    found |= {"rows_per_sample": 2 if is_guided else 1, "image_size": image_size}
    return replace(Strategy(), **found)


@dataclass(frozen=True)
class Profiles:
    """What tracing a model found."""

    unet: NetworkProfile
    vae: VaeProfile
    text_numel: int
    latent_bytes: int  # of one float32 state


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: int
    gradients: int
    master: int
    moments: int
    vae: int
    text_encoders: int
    reference: int
    ema: int
    rewards: int
    trajectory: int
    bucket: int
    activations: int
    sampling: int
    decoding: int
    encoding_images: int
    step_temporaries: int
    overhead: int
    moves_idle: bool

    @property
    def always(self) -> int:
        resident = 0 if self.moves_idle else self.vae + self.text_encoders
        return resident + sum(
            (self.weights, self.master, self.moments, self.reference, self.ema, self.rewards, self.trajectory,
             self.overhead)
        )  # fmt: skip

    @property
    def stages(self) -> dict[str, int]:
        """Peak of each stage."""
        return {
            "encoding": self.always + (self.text_encoders if self.moves_idle else 0),
            "sampling": self.always + self.sampling,
            "decoding": self.always + self.decoding + (self.vae if self.moves_idle else 0),
            "update": self.always + self.gradients + self.bucket + self.activations,
            "step": self.always + self.gradients + self.step_temporaries,
            **({"encoding images": self.real_images} if self.encoding_images else {}),
        }

    @property
    def real_images(self) -> int:
        """Peak of an update before its loss on real images: captions and images are encoded one after the other."""
        vae, text_encoders = (self.vae, self.text_encoders) if self.moves_idle else (0, 0)
        return self.always + self.gradients + self.bucket + max(self.encoding_images + vae, text_encoders)

    @property
    def peak(self) -> int:
        return max(self.stages.values())

    def parts(self) -> dict[str, int]:
        """By name, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "moves_idle"}


def measure(architecture: Architecture, strategy: Strategy, device: Device = "cuda") -> Profiles:
    """Traces what the strategy needs of the model; seconds, and no memory."""
    dtype, image_size = DTYPES[strategy.dtype], strategy.image_size or architecture.image_size
    setup = Setup(dtype, strategy.recompute, strategy.lora_rank, image_size, device)
    return Profiles(
        profile_unet(architecture, setup, strategy.micro_batch_size * strategy.rows_per_sample),
        profile_vae(architecture, image_size, FROZEN_DTYPE),
        sum(p.numel() for encoder in architecture.build_text_encoders() for p in encoder.parameters()),
        architecture.unet["in_channels"] * (image_size // architecture.pixels_per_latent) ** 2 * 4,
    )


def estimate_memory(
    strategy: Strategy, profiles: Profiles, workload: Workload, reward_bytes: int = 0, device: Device = "cuda"
) -> Memory:
    """Of one process and GPU, or on a CPU, which is there to be compared with real runs."""
    unet, processes = profiles.unet, workload.num_processes
    itemsize = DTYPES[strategy.dtype].itemsize
    trained = sum(unet.trainable)
    training = replace(strategy, dtype="fp32") if strategy.lora_rank > 0 else strategy  # adapters are float32
    master, moments = _optimizer_bytes(training, unet.trainable, processes)
    gradients = _gradient_bytes(training, unet.trainable, processes)
    rows = max(strategy.micro_batch_size * strategy.rows_per_sample, strategy.pretraining_micro_batch_size)
    activations = unet.training_peak(rows)
    sampled = min(strategy.rollout_micro_batch_size, workload.samples_at_once)
    images = min(strategy.decode_batch_size or sampled, sampled)
    pairs = strategy.pretraining_micro_batch_size
    encoded = min(strategy.decode_batch_size or pairs, pairs)
    with_workspace = 1.0 if device == "cpu" else 1 + WORKSPACE_SHARE
    return Memory(
        weights=_weight_bytes(strategy, trained, unet.frozen, processes),
        gradients=gradients,
        master=0 if strategy.offload_optimizer else master,
        moments=0 if strategy.offload_optimizer else moments,
        vae=profiles.vae.numel * FROZEN_DTYPE.itemsize,
        text_encoders=profiles.text_numel * FROZEN_DTYPE.itemsize,
        reference=(trained + unet.frozen) * itemsize if strategy.reference == "copy" and strategy.lora_rank == 0 else 0,
        ema=trained * 4 if strategy.ema == "gpu" else 0,
        rewards=reward_bytes,
        trajectory=_trajectory_states(strategy, workload) * profiles.latent_bytes,
        bucket=BUCKET_ELEMENTS * DTYPES[training.dtype].itemsize if strategy.zero_stage >= 1 else 0,
        activations=round(activations),
        sampling=round(unet.sampling_peak(sampled * strategy.rows_per_sample)),
        decoding=round(with_workspace * profiles.vae.decoder.peak(images)),
        encoding_images=round(with_workspace * profiles.vae.encoder.peak(encoded)) if pairs else 0,
        step_temporaries=_step_bytes(training, unet.trainable, processes, gradients, device),
        overhead=OVERHEAD_BYTES,
        moves_idle=strategy.moves_idle,
    )


def _trajectory_states(strategy: Strategy, workload: Workload) -> int:
    """Latents that are kept from the rollout to the end of the updates, the start model's outputs among them."""
    states = workload.samples_at_once * (workload.num_actions + 1)
    return states + (workload.samples_at_once * workload.num_trained if strategy.has_reference else 0)


def moment_bytes(optimizer: str, sizes: Sequence[int], itemsize: int) -> int:
    """The optimizer's state for tensors of so many elements, whose dtype has `itemsize` bytes."""
    if optimizer in ("adamw", "adam"):
        return 2 * itemsize * sum(sizes)
    quantized = sum(2 * (size + 4 * -(-size // _BLOCK)) for size in sizes if size >= _LEAST_8BIT)
    small = sum(2 * 4 * size for size in sizes if size < _LEAST_8BIT)
    return quantized + small + (_CODEBOOKS.get(optimizer, 0) if quantized else 0)


def _has_master(strategy: Strategy) -> bool:
    return strategy.zero_stage >= 1 and strategy.dtype != "pure_bf16"


def _partition(strategy: Strategy, sizes: Sequence[int], processes: int) -> list[int]:
    """The tensors that this process' optimizer sees: all, or its share of one flat tensor."""
    return list(sizes) if strategy.zero_stage == 0 else [-(-sum(sizes) // processes)]


def _optimizer_bytes(strategy: Strategy, sizes: Sequence[int], processes: int) -> tuple[int, int]:
    """(master copy, moments)"""
    own = _partition(strategy, sizes, processes)
    itemsize = 4 if _has_master(strategy) else DTYPES[strategy.dtype].itemsize
    return (4 * sum(own) if _has_master(strategy) else 0), moment_bytes(strategy.optimizer, own, itemsize)


def _gradient_bytes(strategy: Strategy, sizes: Sequence[int], processes: int) -> int:
    itemsize = DTYPES[strategy.dtype].itemsize
    if strategy.optimizer_in_backward:
        return max(sizes) * itemsize
    return -(-sum(sizes) // (processes if strategy.zero_stage >= 2 else 1)) * itemsize


def _weight_bytes(strategy: Strategy, trained: int, frozen: int, processes: int) -> int:
    """At stage 3 the own share, and what DeepSpeed keeps gathered: up to a billion elements."""
    itemsize = DTYPES[strategy.dtype].itemsize
    everything = trained + frozen
    wider = trained * (4 - itemsize) if strategy.lora_rank > 0 else 0  # adapters are float32
    if strategy.zero_stage < 3 or processes == 1:
        return everything * itemsize + wider
    return (-(-everything // processes) + min(everything, 2 * BUCKET_ELEMENTS)) * itemsize + wider


def _step_bytes(strategy: Strategy, sizes: Sequence[int], processes: int, gradients: int, device: Device) -> int:
    """Above weights, gradients, master copy and moments.

    On a GPU torch's Adam takes the root of all second moments at once. Several processes at stage 0 exchange gradients
    in flat copies, when activations are gone.
    """
    if strategy.offload_optimizer:
        return 0
    own = _partition(strategy, sizes, processes)
    is_torch = strategy.optimizer in ("adamw", "adam")
    itemsize = 4 if _has_master(strategy) else DTYPES[strategy.dtype].itemsize
    temporaries = (max(own) if device == "cpu" else sum(own)) * itemsize if is_torch else 0
    if not _has_master(strategy):
        is_copied = processes > 1 and strategy.dtype == "fp32" and not strategy.optimizer_in_backward
        return max(temporaries, min(sum(own), BUCKET_ELEMENTS) * itemsize if is_copied else 0)
    flat = sum(own) * DTYPES[strategy.dtype].itemsize
    cast = 0 if strategy.dtype == "fp32" else sum(own) * 4
    stepping = sum(own) * 4 + temporaries - gradients  # gradients are freed when they are flat
    return max(flat + cast, stepping)
