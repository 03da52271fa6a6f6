"""Build the policy that the config names, or that the model's folder says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlcm_fast.config import PolicyConfig
from rlcm_fast.policies.base import GaussianPolicy, Network
from rlcm_fast.policies.consistency import ConsistencyPolicy
from rlcm_fast.policies.diffusion import DiffusionPolicy
from rlcm_fast.policies.few_step_schedules import euler_ancestral_schedule, tcd_schedule
from rlcm_fast.policies.schedules import Schedule, consistency_schedule, ddim_schedule

_OF_SCHEDULER = {
    "LCMScheduler": "consistency",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",  # of Stable Diffusion's folders; DDIM is its one-step form
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler_ancestral",
    "TCDScheduler": "tcd",
}


def build_policy(config: PolicyConfig, network: Network, scheduler_config: Mapping[str, Any]) -> GaussianPolicy:
    """Build the policy of `config.kind` around a network, with the noise schedule of its folder.

    Raises:
        ValueError: the model is of another kind, or an affine Gaussian step cannot express its scheduler.
    """
    schedule = build_schedule(config, network.config, scheduler_config)
    if schedule.kind == "consistency":
        return ConsistencyPolicy(network, schedule, config.guidance_scale)
    return DiffusionPolicy(network, schedule, config.guidance_scale)


def build_schedule(
    config: PolicyConfig, unet_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]
) -> Schedule:
    """Build the table of the steps of a policy; raises ValueError as `build_policy` does."""
    kind = resolve_kind(config, unet_config, scheduler_config)
    is_sampled = config.last_step == "sampled"
    schedule = _schedule(config, kind, scheduler_config, "deterministic" if is_sampled else config.last_step)
    return schedule.with_sampled_image(config.last_sigma) if is_sampled else schedule


def resolve_kind(config: PolicyConfig, unet_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]) -> str:
    """Returns policy.kind, or for "auto" what the model is: by its guidance embedding, else by its scheduler.

    A scheduler of an unknown class that was made for distilled models (original_inference_steps) means consistency.

    Raises:
        ValueError: the model is no consistency model, or the scheduler does not say what it is.
    """
    embeds_guidance = unet_config.get("time_cond_proj_dim") is not None
    is_distilled = "original_inference_steps" in scheduler_config
    name = scheduler_config.get("_class_name")
    if config.kind == "auto" and not embeds_guidance and name in _OF_SCHEDULER:
        return _OF_SCHEDULER[name]
    if config.kind == "auto" and not (embeds_guidance or is_distilled):
        raise ValueError(
            f"policy.kind=auto does not know the model's scheduler, {name}: if it is a multistep or a second-order"
            " solver, as DPM++ 2M, its step depends on earlier outputs and is no policy; use policy.kind=ddim, which"
            " samples with its noise levels, or the kind that the model was distilled for"
        )
    if config.kind == "consistency" and not (embeds_guidance or is_distilled):
        raise ValueError(
            "policy.kind=consistency, but the model is not a latent consistency model: its UNet has"
            " time_cond_proj_dim=None (no guidance embedding), and its scheduler is not an LCMScheduler;"
            " use policy.kind=ddim, or make it a latent consistency model with an LCM-LoRA (model.lora)"
        )
    return "consistency" if config.kind == "auto" else config.kind


def _schedule(config: PolicyConfig, kind: str, scheduler_config: Mapping[str, Any], last_step: str) -> Schedule:
    """Table of the steps that `kind` and the config name; the last one is deterministic or renoise."""
    num_steps, eta, timesteps = config.num_steps, config.eta, config.timesteps
    if kind == "consistency":
        return consistency_schedule(scheduler_config, num_steps, last_step, timesteps)
    if kind == "euler_ancestral":
        return euler_ancestral_schedule(scheduler_config, num_steps, last_step, timesteps)
    if kind == "tcd":
        return tcd_schedule(scheduler_config, num_steps, eta, last_step, timesteps)
    return ddim_schedule(scheduler_config, num_steps, eta, last_step, timesteps)
