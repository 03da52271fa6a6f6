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
    is_sampled = config.last_step == "sampled"
    last_step = "deterministic" if is_sampled else config.last_step
    if config.kind == "consistency":
        _check_is_consistency_model(unet_config, scheduler_config)
        policy_class, schedule = ConsistencyPolicy, consistency_schedule(scheduler_config, config.num_steps, last_step)
    else:
        schedule = ddim_schedule(scheduler_config, config.num_steps, config.eta, last_step)
        policy_class = DiffusionPolicy
    schedule = schedule.with_sampled_image(config.last_sigma) if is_sampled else schedule
    return policy_class(unet, schedule, config.guidance_scale, unet_config, dtype, device)


def _check_is_consistency_model(unet_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]) -> None:
    """It has a guidance embedding or, as a model with an LCM-LoRA has not, the config of an LCMScheduler."""
    if unet_config.get("time_cond_proj_dim") is None and "original_inference_steps" not in scheduler_config:
        raise ValueError(
            "policy.kind=consistency, but the model's UNet has time_cond_proj_dim=None (no guidance embedding) and its"
            " scheduler is no LCMScheduler: it is no latent consistency model; use policy.kind=ddim, or make it one by"
            " an LCM-LoRA (model.lora)"
        )
