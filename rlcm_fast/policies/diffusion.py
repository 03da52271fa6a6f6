"""The diffusion policy: DDIM(eta) sampling of a diffusion model as a Gaussian policy (DDPO, 2305.13301; 2401.12244).

Classifier-free guidance m = m_u + w (m_c - m_u), in sampling and in training, both halves in one forward pass; with
w = 1 there is no unconditional half.
"""

# N rows, L tokens, E embedding, C H W latent

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.policies.schedules import Schedule
from rlcm_fast.trajectory import Conditioning


class DiffusionPolicy(GaussianPolicy):
    """Use with `ddim_schedule`; guidance needs the conditioning's negative_embeds."""

    def __init__(
        self,
        unet: Callable[..., Any],
        schedule: Schedule,
        guidance_scale: float,
        unet_config: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(unet, schedule, guidance_scale, unet_config, dtype, device)
        if unet_config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                f"policy.kind=ddim, but the model's UNet has time_cond_proj_dim={unet_config['time_cond_proj_dim']}: it"
                " is a latent consistency model; use policy.kind=consistency"
            )
        if guidance_scale < 1.0:
            raise ValueError(f"policy.guidance_scale={guidance_scale} is below 1; 1 is no guidance, usual are 3 to 8")

    def network_output(self, x_t: Tensor, step: Tensor, conditioning: Conditioning) -> Tensor:
        x, timesteps, embeds = x_t.to(self.dtype), self.schedule.timesteps[step], conditioning.embeds.to(self.dtype)
        if self.guidance_scale == 1.0:
            return self._forward(x, timesteps, embeds)
        if conditioning.negative_embeds is None:
            raise ValueError(
                f"policy.guidance_scale={self.guidance_scale} needs Conditioning.negative_embeds, the encoding of the"
                " empty prompt; give it, or use policy.guidance_scale=1"
            )
        negative = conditioning.negative_embeds.to(self.dtype).expand_as(embeds)
        both = self._forward(x.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([negative, embeds]))
        m_u, m_c = both.chunk(2)
        return m_u + self.guidance_scale * (m_c - m_u)

    def _forward(self, x: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        return self.unet(x, timesteps, encoder_hidden_states=embeds, return_dict=False)[0].float()
