"""Build the policy that the config names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlcm_fast.config import PolicyConfig
from rlcm_fast.policies.base import GaussianPolicy, Network
from rlcm_fast.policies.consistency import ConsistencyPolicy
from rlcm_fast.policies.diffusion import DiffusionPolicy
from rlcm_fast.policies.schedules import consistency_schedule, ddim_schedule


def build_policy(config: PolicyConfig, network: Network, scheduler_config: Mapping[str, Any]) -> GaussianPolicy:
    """Build the policy of `config.kind` around a network, with the noise schedule of its folder.

    Raises:
        ValueError: the model is of another kind, or an affine Gaussian step cannot express its scheduler.
    """
    # Make the table of steps that `config.kind` and `config.last_step` name.
    is_sampled = config.last_step == "sampled"
    last_step = "deterministic" if is_sampled else config.last_step
    if config.kind == "consistency":
        _check_is_consistency_model(network.config, scheduler_config)
        policy_class, schedule = ConsistencyPolicy, consistency_schedule(scheduler_config, config.num_steps, last_step)
    else:
        schedule = ddim_schedule(scheduler_config, config.num_steps, config.eta, last_step)
        policy_class = DiffusionPolicy
    schedule = schedule.with_sampled_image(config.last_sigma) if is_sampled else schedule

    # Put the policy around the network.
    return policy_class(network, schedule, config.guidance_scale)


def _check_is_consistency_model(unet_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]) -> None:
    """Refuse a model without a guidance embedding, unless it has an LCMScheduler, as one with an LCM-LoRA has."""
    if unet_config.get("time_cond_proj_dim") is None and "original_inference_steps" not in scheduler_config:
        raise ValueError(
            "policy.kind=consistency, but the model is not a latent consistency model: its UNet has"
            " time_cond_proj_dim=None (no guidance embedding), and its scheduler is not an LCMScheduler;"
            " use policy.kind=ddim, or make it a latent consistency model with an LCM-LoRA (model.lora)"
        )
