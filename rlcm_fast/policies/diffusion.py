"""The diffusion policy: sampling by DDIM(eta), Euler ancestral or TCD as a Gaussian policy (DDPO, 2305.13301).

Sampling and training both use classifier-free guidance, m = m_u + w (m_c - m_u), with both halves in one forward pass.
With w = 1 there is no unconditional half.
"""

# N rows, C H W latent

from __future__ import annotations

from torch import Tensor

from rlcm_fast.policies.base import GaussianPolicy, Network, TextInputs
from rlcm_fast.policies.schedules import Schedule
from rlcm_fast.trajectory import Conditioning


class DiffusionPolicy(GaussianPolicy):
    """Policy for all schedules but the consistency ones; guidance needs negative_embeds in the conditioning."""

    def __init__(self, network: Network, schedule: Schedule, guidance_scale: float) -> None:
        super().__init__(network, schedule, guidance_scale)
        if network.config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                f"policy.kind={schedule.kind}, but the model is a latent consistency model: its UNet has"
                f" time_cond_proj_dim={network.config['time_cond_proj_dim']}; use policy.kind=consistency"
            )
        if guidance_scale < 1.0:
            raise ValueError(f"policy.guidance_scale={guidance_scale} is below 1; use 1 (no guidance), usually 3 to 8")

    def network_output(self, x_t: Tensor, step: Tensor, conditioning: Conditioning) -> Tensor:
        return self._guided(x_t, self.schedule.timesteps[step], conditioning)

    def unguided_output(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self._forward(x_t, t, TextInputs.of(conditioning))
