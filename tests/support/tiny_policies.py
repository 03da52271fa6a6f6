"""A policy around a network of 300 weights, for tests of what happens around the network."""

# N rows, C H W latent

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlcm_fast.config import EngineConfig, OptimizerConfig
from rlcm_fast.engine.base import Engine, UpdatePlan
from rlcm_fast.engine.direct import DirectEngine
from rlcm_fast.engine.zero import ZeroEngine
from rlcm_fast.policies import GaussianPolicy, Network
from rlcm_fast.policies.consistency import ConsistencyPolicy
from rlcm_fast.policies.schedules import consistency_schedule
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.trajectory import Conditioning, Prompt, Trajectory

TEXTS = ("a", "b", "c", "d")
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}
UNET_CONFIG = {"in_channels": 4, "sample_size": 8, "time_cond_proj_dim": 16}


class TinyNetwork(nn.Module):
    """Called as UNet2DConditionModel is; the output depends on the state, the step, the text and the guidance."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.of_state = nn.Conv2d(4, 4, 3, padding=1)
        self.of_text = nn.Linear(6, 4)
        self.of_guidance = nn.Linear(16, 4)

    def forward(
        self, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        shift = self.of_text(encoder_hidden_states.mean(dim=1)) + self.of_guidance(timestep_cond)
        return ((self.of_state(x_t) + shift[:, :, None, None]) * (0.5 + t[:, None, None, None].to(x_t.dtype) / 1000),)


def policy_of(network: Any, num_steps: int = 3, dtype: torch.dtype = torch.float32) -> GaussianPolicy:
    """num_steps - 1 actions a sample; `network` is a module or its engine."""
    return ConsistencyPolicy(Network(network, UNET_CONFIG, dtype), consistency_schedule(SCHEDULER, num_steps), 4.0)


def engine_of(
    network: nn.Module, num_micro_batches: int, stage: int = 0, dtype: Any = "fp32", **settings: Any
) -> Engine:
    """settings: max_grad_norm (0: off), num_updates, seed, fields of OptimizerConfig; in_backward, offload,
    channels_last of EngineConfig.
    """
    max_grad_norm, num_updates = settings.pop("max_grad_norm", 0.0), settings.pop("num_updates", 10)
    in_backward, offload = settings.pop("in_backward", False), settings.pop("offload", False)
    seed, channels_last = settings.pop("seed", 0), settings.pop("channels_last", False)
    engine = EngineConfig(stage, dtype, optimizer_in_backward=in_backward, offload_optimizer=offload,
                          channels_last=channels_last)  # type: ignore[arg-type]  # fmt: skip
    optimizer = replace(OptimizerConfig(lr=1e-2), **settings)
    kind = DirectEngine if dtype == "pure_bf16" or in_backward else ZeroEngine
    return kind(network, engine, optimizer, UpdatePlan(num_micro_batches, num_updates, max_grad_norm), seed)


def encode(prompts: Sequence[Prompt]) -> Conditioning:
    table = torch.randn(len(TEXTS), 5, 6, generator=torch.Generator().manual_seed(1))
    return Conditioning(table, torch.tensor([TEXTS.index(prompt.text) for prompt in prompts]))


def prompts(num_samples: int) -> list[Prompt]:
    return [Prompt(TEXTS[i % len(TEXTS)]) for i in range(num_samples)]


def decode(latents: Tensor) -> Tensor:
    """(B, 4, 8, 8) -> (B, 3, 8, 8) in [0, 1]"""
    return latents[:, :3].sigmoid()


class TinyBackbone:
    """What a stage asks of a pipeline; `log` notes the calls, `decoded` what was decoded."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.decoded: list[Tensor] = []

    def encode(self, prompts: Sequence[Prompt], with_negative: bool) -> Conditioning:
        self.log.append("encode")
        return encode(prompts)

    def decoding(self) -> AbstractContextManager[None]:
        return nullcontext()

    def decode(self, latents: Tensor) -> Tensor:
        self.log.append("decode")
        self.decoded.append(latents)
        return decode(latents)


def images_of(policy: GaussianPolicy, backbone: TinyBackbone | None = None) -> TextToImage:
    return TextToImage(policy, backbone or TinyBackbone())  # type: ignore[arg-type]


def trajectory_of(policy: GaussianPolicy, num_samples: int, seed: int = 3) -> Trajectory:
    return policy.sample(encode(prompts(num_samples)), torch.Generator().manual_seed(seed))[0]
