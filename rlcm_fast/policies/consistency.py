"""The consistency policy: multistep sampling of a latent consistency model as a Gaussian policy (RLCM, 2404.03673).

Guidance is an input of the network: the embedding of w - 1, with which the network was distilled. So a step is one
forward pass without an unconditional half. A UNet that lacks this input (a base model with an LCM-LoRA fused into it)
is guided like a diffusion model: m = m_u + w (m_c - m_u), with both halves in one forward pass, as
StableDiffusionPipeline does with an LCMScheduler. With w = 1 there is no unconditional half, and a step costs half.
"""

# N rows, C H W latent, W width of the guidance embedding

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlcm_fast.policies.base import GaussianPolicy, Network, TextInputs
from rlcm_fast.policies.schedules import Schedule
from rlcm_fast.trajectory import Conditioning


class ConsistencyPolicy(GaussianPolicy):
    """Policy for schedules of `consistency_schedule`; `guidance_scale` w is that of diffusers (1 means no guidance)."""

    def __init__(self, network: Network, schedule: Schedule, guidance_scale: float) -> None:
        super().__init__(network, schedule, guidance_scale)
        width = network.config.get("time_cond_proj_dim")
        self._timestep_cond, self._no_guidance = (
            None if width is None else guidance_embedding(scale, width).to(self.device, self.dtype)  # (1, W)
            for scale in (guidance_scale, 1.0)
        )

    @property
    def needs_negative(self) -> bool:
        return self._timestep_cond is None and super().needs_negative

    def network_output(self, x_t: Tensor, step: Tensor, conditioning: Conditioning) -> Tensor:
        t = self.schedule.timesteps[step]
        if self._timestep_cond is None:
            return self._guided(x_t, t, conditioning)
        return self._embedded_output(x_t, t, conditioning, self._timestep_cond)

    def unguided_output(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self._embedded_output(x_t, t, conditioning, self._no_guidance)

    def _embedded_output(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance: Tensor | None) -> Tensor:
        """Call the network with an embedding of the guidance (1, W), or None if it has no such input."""
        rows = None if guidance is None else guidance.expand(len(x_t), -1)
        return self._forward(x_t, t, TextInputs.of(conditioning), rows)


def guidance_embedding(guidance_scale: float, width: int) -> Tensor:
    """Embedding (1, width) float32 of w: sine and cosine of 1000 (w - 1) at geometric frequencies 1 .. 1e-4.

    An odd width is padded with a zero.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * (-math.log(10000.0) / (half - 1)))
    angles = torch.tensor([[(guidance_scale - 1.0) * 1000.0]]) * frequencies
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
