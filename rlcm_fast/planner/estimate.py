"""Estimates the bytes of a training process by purpose, and the peak of each stage; it runs and loads nothing.

    Config -> Strategy;   Strategy, Profiles, Workload -> Memory      [which adds them up by stage: memory.py]

The estimate follows DeepSpeed 0.19. From ZeRO 1 on there is a flat float32 master copy, even of float32 weights. The
step holds the gradients beside it, flat and in float32. Backward passes use a gradient bucket of fixed size.
bfloat16 gradients of several micro-batches add up in float32 (engine/zero.py), and are sent as bfloat16 copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from rlcm_fast.config import Config, to_dict
from rlcm_fast.planner.architecture import Architecture, Size, sides
from rlcm_fast.planner.memory import Memory
from rlcm_fast.planner.optimizer_states import moment_bytes
from rlcm_fast.planner.replay import Copied, Graphed
from rlcm_fast.planner.tracing import NetworkProfile, Recompute, Setup, VaeProfile, profile_unet, profile_vae
from rlcm_fast.planner.workload import Workload
from rlcm_fast.rewards import RewardLoad

Device = Literal["cuda", "cpu"]
GIB = 2**30
NO_REWARDS = RewardLoad()
OVERHEAD_BYTES = int(1.2 * GIB)
"""CUDA's context (0.75 GiB on an H200) and the allocator's fragments, which are a guess."""
WORKSPACE_SHARE = 0.6
"""Workspace of a VAE pass on a GPU, as a share of its tensors: 0.59 (SD1.5) and 0.60 (SDXL), float32 on an H200."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's defaults for reduce_bucket_size and stage3_max_live_parameters / 2; the engine keeps both."""
FROZEN_DTYPE = torch.float32
"""Dtype in which backbones/pipeline.py loads the VAE and the text encoders, and which the VAE's encoder keeps."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "pure_bf16": torch.bfloat16}


@dataclass(frozen=True)
class Strategy:
    """The settings that memory depends on, with the names and values of the config."""

    dtype: Literal["fp32", "bf16", "pure_bf16"] = "fp32"
    optimizer: Literal["adamw", "adam", "bnb_adamw_8bit", "bnb_paged_adamw_8bit", "adamw_8bit"] = "adamw"
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: bool = False  # master copy and moments are on the CPU
    optimizer_in_backward: bool = False  # each gradient is used and freed at once
    recompute: Recompute = "none"
    micro_batch_size: int = 64
    rollout_micro_batch_size: int = 64
    decode_batch_size: int = 0  # 0: as many as the rollout samples at once
    lora_rank: int = 0  # 0: all weights
    moves_idle: bool | Literal["auto"] = False  # VAE and text encoders are on the GPU only while they work; auto counts
    ema: Literal["off", "gpu", "cpu"] = "off"
    start_model: Literal["off", "copy", "offload"] = "off"  # for the KL term
    real_image_micro_batch_size: int = 0  # pairs of the loss on real images, without guidance; 0: no such loss
    rows_per_sample: int = 1  # rows of the network's batch; 2 under classifier-free guidance
    image_size: Size | None = None  # pixels; None: the model's default
    text_chunks: int = 1  # chunks of a text's encoding
    compile: Literal["auto", "off", "regional", "whole"] = "off"  # auto counts as off
    graphs: Literal["off", "auto", "on"] = "off"
    vae_dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # of the decoder; auto may end with float32
    sums_in_float32: bool = False  # gradients of bfloat16 weights; estimate_memory finds it out from the workload

    @property
    def has_start_model(self) -> bool:
        return self.start_model != "off"

    @property
    def decodes_in_half(self) -> bool:
        """Whether the decoder is in half precision for sure."""
        return self.vae_dtype in ("fp16", "bf16")

    @property
    def copies_start_model(self) -> bool:
        """Whether the start model has a copy of the weights; under adapters it uses the trained model's."""
        return self.start_model == "copy" and self.lora_rank == 0


SETTINGS = {
    "engine.dtype": "dtype",
    "optimizer.name": "optimizer",
    "engine.zero_stage": "zero_stage",
    "engine.offload_optimizer": "offload_optimizer",
    "engine.optimizer_in_backward": "optimizer_in_backward",
    "engine.recompute": "recompute",
    "engine.offload_idle": "moves_idle",
    "engine.compile": "compile",
    "engine.graphs": "graphs",
    "model.vae_dtype": "vae_dtype",
    "update.micro_batch_size": "micro_batch_size",
    "rollout.micro_batch_size": "rollout_micro_batch_size",
    "rollout.decode_batch_size": "decode_batch_size",
    "lora.rank": "lora_rank",
}
"""Config field -> Strategy field, for fields whose values are the same in both."""


def strategy_of(config: Config, image_size: Size | None = None, embeds_guidance: bool = True) -> Strategy:
    """Picks what memory depends on out of a config.

    embeds_guidance: the model has an input for the guidance scale, so a consistency policy needs one row per sample.
    """
    values = to_dict(config)
    found: dict[str, Any] = {}
    for setting, name in SETTINGS.items():
        section, _, field = setting.partition(".")
        found[name] = values[section][field]
    takes_guidance = embeds_guidance and config.policy.kind in ("auto", "consistency")
    is_guided = config.policy.guidance_scale != 1 and not takes_guidance
    start_model = config.update.kl_reference if config.has_start_model else "off"
    pairs = config.pretraining.micro_batch_size if config.pretraining.weight > 0 else 0
    if config.ema.decay > 0:
        found["ema"] = {"model": "gpu", "cpu": "cpu"}[config.ema.device]
    found |= {"start_model": start_model, "real_image_micro_batch_size": pairs}
    found |= {"rows_per_sample": 2 if is_guided else 1, "image_size": image_size}
    found["text_chunks"] = config.prompts.encoded_chunks
    return replace(Strategy(), **found)


@dataclass(frozen=True)
class Profiles:
    """What tracing finds out about a model."""

    unet: NetworkProfile
    vae: VaeProfile
    text_numel: int  # weights of all text encoders
    latent_bytes: int  # one float32 latent
    text_bytes: int  # one text's encoding, as the network gets it


def measure(architecture: Architecture, strategy: Strategy, device: Device = "cuda") -> Profiles:
    """Traces the model's networks as the strategy runs them; takes seconds, and no memory."""
    dtype, image_size = DTYPES[strategy.dtype], strategy.image_size or architecture.image_size
    setup = Setup(dtype, strategy.recompute, strategy.lora_rank, image_size, device, strategy.text_chunks)
    height, width = (side // architecture.pixels_per_latent for side in sides(image_size))
    return Profiles(
        profile_unet(architecture, setup, strategy.micro_batch_size * strategy.rows_per_sample),
        profile_vae(architecture, image_size, FROZEN_DTYPE),
        sum(p.numel() for encoder in architecture.build_text_encoders() for p in encoder.parameters()),
        architecture.unet["in_channels"] * height * width * 4,
        architecture.num_tokens * strategy.text_chunks * architecture.unet["cross_attention_dim"] * dtype.itemsize,
    )


def estimate_memory(
    strategy: Strategy,
    profiles: Profiles,
    workload: Workload,
    rewards: RewardLoad = NO_REWARDS,
    device: Device = "cuda",
) -> Memory:
    """Estimates the memory of one process and its GPU; device="cpu" is for comparison with real runs.

    rewards: what reward models take of each GPU.
    """
    # Trained weights, their gradients and the optimizer; adapters are float32.
    unet, processes = profiles.unet, workload.num_processes
    itemsize = DTYPES[strategy.dtype].itemsize
    trained = sum(unet.trainable)
    training = replace(strategy, dtype="fp32") if strategy.lora_rank > 0 else strategy
    training = replace(training, sums_in_float32=_sums_in_float32(training, workload))
    master, moments = _optimizer_bytes(training, unet.trainable, processes)
    gradients = _gradient_bytes(training, unet.trainable, processes)

    # Passes of the networks, on as many rows or images as the largest micro-batch has.
    rows = max(strategy.micro_batch_size * strategy.rows_per_sample, strategy.real_image_micro_batch_size)
    activations = unet.training_peak(rows)
    sampled = min(strategy.rollout_micro_batch_size, workload.samples_at_once)
    images = min(strategy.decode_batch_size or sampled, sampled)
    pairs = strategy.real_image_micro_batch_size
    encoded = min(strategy.decode_batch_size or pairs, pairs)
    with_workspace = 1.0 if device == "cpu" else 1 + WORKSPACE_SHARE
    decoder_share = 0.5 if strategy.decodes_in_half else 1.0  # of the bytes in float32, in which it was traced
    has_encoder = device == "cpu" or pairs > 0  # a GPU's run leaves it on the CPU, unless it trains on real images

    # What graphs copy.
    trajectory = _trajectory_states(strategy, workload) * profiles.latent_bytes
    sizes = sampled, images, strategy.micro_batch_size, workload.num_actions
    copied = Copied(*sizes, profiles.latent_bytes, profiles.text_bytes, strategy.has_start_model)
    graphed = Graphed.of(strategy, workload.num_image_sizes)
    return Memory(
        weights=_weight_bytes(strategy, trained, unet.frozen, processes),
        gradients=gradients,
        master=0 if strategy.offload_optimizer else master,
        moments=0 if strategy.offload_optimizer else moments,
        vae=_vae_bytes(profiles.vae, decoder_share, has_encoder),
        text_encoders=profiles.text_numel * FROZEN_DTYPE.itemsize,
        start_model=(trained + unet.frozen) * itemsize if strategy.copies_start_model else 0,
        ema=trained * 4 if strategy.ema == "gpu" else 0,
        rewards=rewards.always,
        offloaded_rewards=rewards.offloaded,
        trajectory=trajectory,
        bucket=_bucket_bytes(training, trained),
        second_gradients=_second_gradients(training, trained, workload, graphed),
        graph_copies=graphed.copies(copied),
        activations=round(activations),
        sampling=round(unet.sampling_peak(sampled * strategy.rows_per_sample)),
        decoding=round(with_workspace * decoder_share * profiles.vae.decoder.peak(images)),
        encoding_images=round(with_workspace * profiles.vae.encoder.peak(encoded)) if pairs else 0,
        step_temporaries=_step_bytes(training, unet.trainable, processes, gradients, device),
        overhead=OVERHEAD_BYTES,
        moves_idle=bool(strategy.moves_idle),
        graphed=graphed,
    )


def _vae_bytes(vae: VaeProfile, decoder_share: float, has_encoder: bool) -> int:
    encoder = vae.encoder.numel if has_encoder else 0
    return round((decoder_share * vae.decoder.numel + encoder) * FROZEN_DTYPE.itemsize)


def _trajectory_states(strategy: Strategy, workload: Workload) -> int:
    """Number of latents kept from the rollout to the end of the updates, the start model's outputs among them."""
    states = workload.samples_at_once * (workload.num_actions + 1)
    return states + (workload.samples_at_once * workload.num_trained if strategy.has_start_model else 0)


def _has_master(strategy: Strategy) -> bool:
    return strategy.zero_stage >= 1 and strategy.dtype != "pure_bf16"


def _partition(strategy: Strategy, sizes: Sequence[int], processes: int) -> list[int]:
    """Sizes of the tensors that this process's optimizer gets: all of them, or its share of one flat tensor."""
    return list(sizes) if strategy.zero_stage == 0 else [-(-sum(sizes) // processes)]


def _optimizer_bytes(strategy: Strategy, sizes: Sequence[int], processes: int) -> tuple[int, int]:
    """Bytes of the master copy and of the moments, in this order."""
    partition = _partition(strategy, sizes, processes)
    itemsize = 4 if _has_master(strategy) else DTYPES[strategy.dtype].itemsize
    master = 4 * sum(partition) if _has_master(strategy) else 0
    return master, moment_bytes(strategy.optimizer, partition, itemsize)


def _sums_in_float32(training: Strategy, workload: Workload) -> bool:
    """Whether gradients of bfloat16 weights are float32: under ZeRO, if an update has several micro-batches."""
    is_several = _num_micro_batches(training, workload) > 1
    return training.dtype == "bf16" and training.zero_stage >= 1 and is_several


def _num_micro_batches(strategy: Strategy, workload: Workload) -> int:
    """Number of backward passes of an update on each process."""
    passes = max(-(-workload.transitions_per_update // strategy.micro_batch_size), workload.num_image_sizes)
    pairs = strategy.real_image_micro_batch_size
    return passes + (max(1, -(-workload.pairs_per_update // pairs)) if pairs > 0 else 0)


def _second_gradients(training: Strategy, trained: int, workload: Workload, graphed: Graphed) -> int:
    """Bytes of the gradients that a backward pass returns all at once, if they do not become the sums themselves.

    They do in an update of one micro-batch, unless the sums are there before or are shares of several processes.
    """
    has_sums = _num_micro_batches(training, workload) > 1 or graphed.updates
    is_shared = training.zero_stage >= 2 and workload.num_processes > 1
    return trained * DTYPES[training.dtype].itemsize if training.compile == "whole" and (has_sums or is_shared) else 0


def _bucket_bytes(strategy: Strategy, trained: int) -> int:
    """Bytes of DeepSpeed's gradient bucket, and of the bfloat16 copy that is sent where sums are float32.

    The bucket has the dtype of what fills it: at stage 1 the sums, at stages 2 and 3 a micro-batch's gradients.
    """
    if strategy.zero_stage == 0:
        return 0
    bucket = BUCKET_ELEMENTS * _gradient_itemsize(strategy, is_bucket=True)
    return bucket + (min(trained, BUCKET_ELEMENTS) * 2 if strategy.sums_in_float32 else 0)


def _gradient_itemsize(strategy: Strategy, is_bucket: bool = False) -> int:
    is_float32 = strategy.sums_in_float32 and (strategy.zero_stage == 1 or not is_bucket)
    return 4 if is_float32 else DTYPES[strategy.dtype].itemsize


def _gradient_bytes(strategy: Strategy, sizes: Sequence[int], processes: int) -> int:
    itemsize = _gradient_itemsize(strategy)
    if strategy.optimizer_in_backward:
        return max(sizes) * itemsize
    return -(-sum(sizes) // (processes if strategy.zero_stage >= 2 else 1)) * itemsize


def _weight_bytes(strategy: Strategy, trained: int, frozen: int, processes: int) -> int:
    """Bytes of the network's weights; at stage 3 a share, and up to 1e9 elements that DeepSpeed keeps gathered."""
    itemsize = DTYPES[strategy.dtype].itemsize
    everything = trained + frozen
    wider = trained * (4 - itemsize) if strategy.lora_rank > 0 else 0  # adapters are float32
    if strategy.zero_stage < 3 or processes == 1:
        return everything * itemsize + wider
    return (-(-everything // processes) + min(everything, 2 * BUCKET_ELEMENTS)) * itemsize + wider


def _step_bytes(strategy: Strategy, sizes: Sequence[int], processes: int, gradients: int, device: Device) -> int:
    """Bytes that a step takes besides weights, gradients, master copy and moments.

    On a GPU torch's Adam takes the root of all second moments at once. At stage 0 several processes exchange gradients
    in flat copies, after activations are freed.
    """
    if strategy.offload_optimizer:
        return 0
    partition = _partition(strategy, sizes, processes)
    is_torch = strategy.optimizer in ("adamw", "adam")
    itemsize = 4 if _has_master(strategy) else DTYPES[strategy.dtype].itemsize
    temporaries = (max(partition) if device == "cpu" else sum(partition)) * itemsize if is_torch else 0

    # Without a master copy, at stage 0 or with pure_bf16: temporaries, or the flat copies of the exchange.
    if not _has_master(strategy):
        is_copied = processes > 1 and strategy.dtype == "fp32" and not strategy.optimizer_in_backward
        return max(temporaries, min(sum(partition), BUCKET_ELEMENTS) * itemsize if is_copied else 0)

    # Float32 sums: stage 1 fills a flat share of them from its bucket; stage 3 keeps them beside their flat copy.
    if strategy.sums_in_float32:
        flat = sum(partition) * 4
        stepping = temporaries + (flat if strategy.zero_stage == 3 else flat - gradients)
        return max(_bucket_bytes(strategy, sum(sizes)) + flat if strategy.zero_stage == 1 else 0, stepping)

    # With a master copy: flat gradients are cast to float32, or the step runs beside them.
    flat = sum(partition) * DTYPES[strategy.dtype].itemsize
    cast = 0 if strategy.dtype == "fp32" else sum(partition) * 4
    stepping = sum(partition) * 4 + temporaries - gradients  # gradients are freed once they are flat
    return max(flat + cast, stepping)
