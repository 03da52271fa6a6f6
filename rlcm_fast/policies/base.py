"""The base of all policies: sampling and log-probabilities of affine Gaussian steps around a network output.

    x_s = A_t x_t + B_t m + sigma_t z,      log p(x_s | x_t) = MEAN over C, H, W

It connects the schedules (tables), the kernels (arithmetic) and the stages (rollout, update). Policies differ from each
other only in how they make a network output m (`network_output`).

The ratio is one before the first update because nothing differs between rollout and training. Both cast the same
stored float32 state to the dtype of the network. The rollout computes the log-probability from the ROUNDED next state,
not from the noise, with the arithmetic of training. Only the network itself may differ, because its result may depend
on the shape of its batch: a float32 difference of 1e-7 moves the log-ratio by about 1e-7 B / sigma. Tests hold it below
1e-6 for consistency and for DDIM with eta = 1; with eta = .1, sigma is ten times smaller.
"""

# B samples, S steps, K actions, N transitions, L tokens, E embedding, P pooled embedding, C H W latent

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlcm_fast.kernels import functional
from rlcm_fast.policies.noise import DrawnNoise, Noise
from rlcm_fast.policies.schedules import Schedule
from rlcm_fast.trajectory import Conditioning, Trajectory, Transitions


@dataclass(frozen=True)
class Network:
    """A network, and what a policy must know of it."""

    unet: Callable[..., Any]  # the module or its engine, called like UNet2DConditionModel.forward
    config: Mapping[str, Any]  # in_channels, sample_size, time_cond_proj_dim
    dtype: torch.dtype = torch.float32  # of the parameters
    device: torch.device | str = "cpu"  # of the parameters; a policy keeps the tables of its schedule there too

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of a latent."""
        size = self.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return self.config["in_channels"], height, width


class TextInputs(NamedTuple):
    """Text encodings of N rows, as the network expects them."""

    embeds: Tensor  # (N, L, E)
    pooled: Tensor | None  # (N, P), SDXL only
    time_ids: Tensor | None  # (1, 6), SDXL only

    @classmethod
    def of(cls, conditioning: Conditioning) -> TextInputs:
        """Gather the encoding of each sample."""
        return cls(conditioning.embeds, conditioning.pooled, conditioning.time_ids)


Denoise = Callable[[Tensor, Noise, Conditioning], tuple[Tensor, Tensor, Tensor]]
"""GaussianPolicy.denoise, or what runs it by a graph."""


class GaussianPolicy(ABC):
    """A network and the schedule by which it is sampled."""

    def __init__(self, network: Network, schedule: Schedule, guidance_scale: float) -> None:
        self.unet = network.unet
        self.schedule = schedule.to(network.device)
        self.guidance_scale = guidance_scale
        self.dtype = network.dtype
        self.device = torch.device(network.device)
        self.latent_shape = network.latent_shape

    @property
    def num_steps(self) -> int:
        return self.schedule.num_steps

    @property
    def num_actions(self) -> int:
        return self.schedule.num_actions

    @abstractmethod
    def network_output(self, x_t: Tensor, step: Tensor, conditioning: Conditioning) -> Tensor:
        """Network output m (N, C, H, W) float32 after guidance, from one call; x_t (N, C, H, W), step (N,) int64.

        Rows may be at different steps.
        """

    @abstractmethod
    def unguided_output(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Network output m (N, C, H, W) float32 without guidance, from one call; t (N,) int64 in [0, T).

        t are training timesteps.
        """

    @property
    def needs_negative(self) -> bool:
        """Whether guidance needs an unconditional half, and so negative_embeds in the conditioning."""
        return self.guidance_scale != 1.0

    def _guided(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Guided output m_u + w (m_c - m_u), both halves in one forward pass; w = 1 has no unconditional half."""
        text = TextInputs.of(conditioning)
        if not self.needs_negative:
            return self._forward(x_t, t, text)
        if conditioning.negative_embeds is None:
            raise ValueError(
                f"policy.guidance_scale={self.guidance_scale} needs Conditioning.negative_embeds, the encoding of the"
                " empty prompt; pass it, or use policy.guidance_scale=1"
            )
        embeds, pooled, time_ids = text
        embeds = torch.cat([conditioning.negative_embeds.expand_as(embeds), embeds])
        if pooled is not None and conditioning.negative_pooled is not None:
            pooled = torch.cat([conditioning.negative_pooled.expand_as(pooled), pooled])
        both = self._forward(x_t.repeat(2, 1, 1, 1), t.repeat(2), TextInputs(embeds, pooled, time_ids))
        m_u, m_c = both.chunk(2)
        return m_u + self.guidance_scale * (m_c - m_u)

    def _forward(self, x_t: Tensor, t: Tensor, text: TextInputs, timestep_cond: Tensor | None = None) -> Tensor:
        """Call the network on N rows at training timesteps t (N,); timestep_cond (N, W); returns float32."""
        # Collect the inputs that only some networks have: the guidance embedding, and the additions of SDXL.
        keywords: dict[str, Any] = {} if timestep_cond is None else {"timestep_cond": timestep_cond}
        if text.pooled is not None and text.time_ids is not None:
            added = {"text_embeds": text.pooled.to(self.dtype), "time_ids": text.time_ids.expand(len(x_t), -1)}
            keywords["added_cond_kwargs"] = added

        # Call the network in its dtype.
        embeds = text.embeds.to(self.dtype)
        output = self.unet(x_t.to(self.dtype), t, encoder_hidden_states=embeds, return_dict=False, **keywords)
        return output[0].float()

    def coefficients(self, step: Tensor) -> Tensor:
        """Coefficients A, B, sigma (N, 3) float32 of each step (N,)."""
        return self.schedule.coefficients[step]

    def log_prob(self, transitions: Transitions) -> Tensor:
        """Log-probability (N,) float32 of each transition, mean over C, H, W, with its gradient into the network."""
        self.schedule.require_actions()
        m = self.network_output(transitions.x_t, transitions.step, transitions.conditioning)
        return functional.gaussian_log_prob(transitions.x_t, m, transitions.x_s, self.coefficients(transitions.step))

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        noise: Noise | torch.Generator,
        explores: bool = True,
        denoise: Denoise | None = None,
    ) -> tuple[Trajectory, Tensor]:
        """Draw a trajectory, and x_0 (B, C, H, W) float32, the latents of its images (not divided by a scaling factor).

        A generator draws the first states and then one noise tensor per action, as the pipelines of diffusers do, so
        the same seed gives the same image; on another device it draws there, and the numbers are copied. If the last
        action draws the image (Schedule.image_is_action), x_0 is what it drew; without `explores` x_0 is its mean.
        denoise: replaces the policy's own, with the same result.
        """
        # Draw all random numbers, or take the seeds of those that the steps draw.
        shape = (len(conditioning.index), *self.latent_shape_of(conditioning))
        if isinstance(noise, torch.Generator):
            noise = DrawnNoise.draw(shape, self.num_actions, noise, self.device)
        x_t = noise.first_states(self.schedule.start_scale, shape)

        # Denoise, choose the image and bundle the trajectory.
        states, log_probs, x_0 = (denoise or self.denoise)(x_t, noise, conditioning)
        if self.schedule.image_is_action and explores:
            x_0 = states[:, -1]
        return Trajectory(states, log_probs, conditioning), x_0

    def denoise(self, x_t: Tensor, noise: Noise, conditioning: Conditioning) -> tuple[Tensor, Tensor, Tensor]:
        """Run all steps from x_t (B, C, H, W) with the noise of the K actions.

        Returns states (B, K + 1, C, H, W), log-probs (B, K) and the mean of the image (B, C, H, W). All random numbers
        come from `noise`, and it waits for nothing, so it can be recorded as a graph.
        """
        states, log_probs, x_0 = [x_t], [], x_t
        for k in range(self.num_steps):  # actions take noise, other steps go to their mean
            step = torch.full((len(x_t),), k, device=x_t.device)
            m = self.network_output(x_t, step, conditioning)
            if k == self.num_steps - 1:
                x_0 = functional.gaussian_mean(x_t, m, self.schedule.image_coefficients.expand(len(x_t), 3))
            if k < self.num_actions:
                x_t, log_prob = noise.act(k, x_t, m, self.coefficients(step))
                states.append(x_t)
                log_probs.append(log_prob)
            else:
                x_t = functional.gaussian_mean(x_t, m, self.coefficients(step))
        actions = torch.stack(log_probs, dim=1) if log_probs else x_t.new_zeros(len(x_t), 0)
        return torch.stack(states, dim=1), actions, x_0

    def latent_shape_of(self, conditioning: Conditioning) -> tuple[int, int, int]:
        """Shape (C, H, W) of the latents of a batch, whose images may have another size than the network's config."""
        channels, *of_network = self.latent_shape
        height, width = conditioning.latent_size or of_network
        return channels, height, width
