"""From the config's words to a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from rlcm_fast.config import PolicyConfig
from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.policies.consistency import ConsistencyPolicy
from rlcm_fast.policies.diffusion import DiffusionPolicy
from rlcm_fast.policies.schedules import consistency_schedule, ddim_schedule


def build_policy(
    config: PolicyConfig,
    unet: Callable[..., Any],
    unet_config: Mapping[str, Any],
    scheduler_config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> GaussianPolicy:
    """The policy of `config.kind` around `unet` (a module or its engine), on the noise schedule of its folder.

    Raises:
        ValueError: the model is not of that kind, or its scheduler does what no affine Gaussian step does.
    """
    if config.kind == "consistency":
        schedule = consistency_schedule(scheduler_config, config.num_steps, config.last_step)
        return ConsistencyPolicy(unet, schedule, config.guidance_scale, unet_config, dtype, device)
    schedule = ddim_schedule(scheduler_config, config.num_steps, config.eta, config.last_step)
    return DiffusionPolicy(unet, schedule, config.guidance_scale, unet_config, dtype, device)
