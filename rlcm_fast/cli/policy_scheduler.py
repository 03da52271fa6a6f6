"""A policy's steps under the interface of diffusers' schedulers, so that stock pipelines draw what was trained.

Stock schedulers cannot do so for every run: DDIM's and Euler ancestral's take no named timesteps, TCD's and DDIM's
share of noise is an argument of a call, and Euler's has no noise. The table of a policy (rlcm_fast.policies) has all of
it: x_s = A x_t + B m + sigma z. The noise is drawn as diffusers draws it, step by step with the generators of the call,
so a consistency model's images are those of its LCMScheduler up to rounding.
"""

# B images, S steps, C H W latent

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from rlcm_fast.config import PolicyConfig
from rlcm_fast.policies import Schedule, build_schedule


class PolicyScheduler:
    """Takes the place of a pipeline's scheduler; the last step makes the image without noise, as in evaluations."""

    order = 1

    def __init__(self, policy: PolicyConfig, unet_config: Mapping[str, Any], scheduler: Any) -> None:
        """scheduler: the pipeline's own, whose noise levels are used."""
        self.config = scheduler.config
        self._scheduler_config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        self.schedule: Schedule = self._build(policy, unet_config)
        self.timesteps = self.schedule.timesteps  # (S,)
        self._policy, self._unet_config = policy, unet_config
        self._step = 0

    @property
    def init_noise_sigma(self) -> float:
        return self.schedule.start_scale

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        """Takes the policy's timesteps if there are as many as steps, else spaces them as its kind does."""
        timesteps = self._policy.timesteps if len(self._policy.timesteps) == num_inference_steps else []
        policy = replace(self._policy, num_steps=num_inference_steps, timesteps=timesteps)
        self.schedule = self._build(policy, self._unet_config).to(device or "cpu")
        self.timesteps = self.schedule.timesteps
        self._step = 0

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """Returns the state, which is what the network sees."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Returns the next state and, for pipelines of consistency models, the image's latent after the last step."""
        a, b, sigma = self.schedule.coefficients[self._step].unbind()
        x_s = a * sample.float() + b * model_output.float()
        if self._step < self.schedule.num_actions:
            shape, device = model_output.shape, model_output.device
            x_s = x_s + sigma * randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        self._step += 1
        x_s = x_s.to(sample.dtype)
        return x_s, x_s

    def _build(self, policy: PolicyConfig, unet_config: Mapping[str, Any]) -> Schedule:
        return build_schedule(replace(policy, last_step="deterministic"), unet_config, self._scheduler_config)
