"""Whole images of the few-step samplers against diffusers' stock pipeline with the scheduler of that name; ratios."""

# B samples

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
)
from torch import Tensor

from rlcm_fast.config import PolicyConfig
from rlcm_fast.kernels import functional
from rlcm_fast.policies import DiffusionPolicy, GaussianPolicy, Network, build_policy
from rlcm_fast.stages.selection import step_weights
from rlcm_fast.trajectory import Conditioning

# StableDiffusionPipeline sets steps_offset to 1 whatever the folder says.
BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
TRAILING: dict[str, Any] = {**BETAS, "timestep_spacing": "trailing"}
ZERO_SNR: dict[str, Any] = {**TRAILING, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
DMD2 = [999, 749, 499, 249]
PROMPTS = ["a red circle", "a blue square", "a red circle"]
MAX_IMAGE_DIFFERENCE = 5e-6  # on [0, 1]; measured on a CPU: at most 5.1e-7, guidance of 5 makes it 1.8e-6
DIFFUSION_PIPELINE: Any = StableDiffusionPipeline  # its annotations name an enumeration
BuildUNet = Callable[[int | None], Any]

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
# scheduler of the folder, settings of the policy, arguments of the pipeline
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "turbo, 1 step": (EulerAncestralDiscreteScheduler(**TRAILING), {"num_steps": 1}, {}),
    "turbo, 4 steps": (EulerAncestralDiscreteScheduler(**TRAILING), {"num_steps": 4}, {}),
    "turbo, guided": (EulerAncestralDiscreteScheduler(**TRAILING), {"num_steps": 3, "guidance_scale": 5.0}, {}),
    "euler ancestral, leading": (EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="leading"), {}, {}),
    "euler ancestral, linspace": (EulerAncestralDiscreteScheduler(**BETAS), {"num_steps": 3}, {}),
    "euler ancestral, v": (
        EulerAncestralDiscreteScheduler(**TRAILING, prediction_type="v_prediction"), {"num_steps": 6}, {}
    ),
    "euler of one step": (EulerDiscreteScheduler(**TRAILING), {"num_steps": 1}, {}),
    "tcd": (TCDScheduler(**BETAS), {"eta": 0.3}, {"eta": 0.3}),
    "tcd, all noise": (TCDScheduler(**BETAS), {"eta": 1.0, "num_steps": 8}, {"eta": 1.0}),
    "tcd, guided": (TCDScheduler(**BETAS), {"eta": 0.7, "guidance_scale": 3.0}, {"eta": 0.7}),
    "tcd, 1 step": (TCDScheduler(**BETAS), {"num_steps": 1}, {"eta": 1.0}),
    "dmd2": (LCMScheduler(**BETAS), {"timesteps": DMD2}, {"timesteps": DMD2}),
    "dmd2, 1 step": (LCMScheduler(**BETAS), {"timesteps": [399]}, {"timesteps": [399]}),
    "tcd, named": (TCDScheduler(**BETAS), {"timesteps": DMD2, "eta": 0.3}, {"timesteps": DMD2, "eta": 0.3}),
    "zero snr": (DDIMScheduler(**ZERO_SNR, clip_sample=False), {"num_steps": 5, "eta": 0.5}, {"eta": 0.5}),
    "zero snr, guided": (
        DDIMScheduler(**ZERO_SNR, clip_sample=False),
        {"num_steps": 4, "eta": 0.9, "guidance_scale": 5.0},
        {"eta": 0.9},
    ),
}  # fmt: skip


def policy_of(build: BuildUNet, scheduler: Any, **config: Any) -> GaussianPolicy:
    unet = build(None)
    stored = {**scheduler.config, "_class_name": type(scheduler).__name__}
    return build_policy(PolicyConfig(**{"guidance_scale": 1.0, **config}), Network(unet, unet.config), stored)


def images(pipeline: Any, x_0: Tensor) -> Tensor:
    with torch.no_grad():
        decoded = pipeline.vae.decode(x_0 / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    return (decoded / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("case", CASES)
def test_sampling_gives_the_stock_pipelines_images(
    build_unet: BuildUNet, pipeline_parts: dict[str, Any], case: str
) -> None:
    scheduler, config, arguments = CASES[case]
    policy = policy_of(build_unet, scheduler, **config)  # the kind is what the scheduler says
    pipeline = DIFFUSION_PIPELINE(unet=policy.unet, scheduler=scheduler, **pipeline_parts)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPTS,
        guidance_scale=policy.guidance_scale,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
        **{"num_inference_steps": policy.num_steps, **arguments},
    ).images
    with torch.no_grad():
        embeds, negative = pipeline.encode_prompt(PROMPTS, torch.device("cpu"), 1, True)
    conditioning = Conditioning(embeds, torch.arange(3), negative[:1])
    _, x_0 = policy.sample(conditioning, torch.Generator().manual_seed(7))
    difference = (images(pipeline, x_0) - expected).abs().max().item()
    assert expected.std() > 0.01, "a flat picture would prove nothing"
    assert difference < MAX_IMAGE_DIFFERENCE, f"maximum difference {difference:.1e}"


def conditioning() -> Conditioning:
    table = torch.randn(4, 8, 24, generator=torch.Generator().manual_seed(3))
    return Conditioning(table[:3], torch.arange(16) % 3, table[3:])


TRAINED: dict[str, tuple[Any, dict[str, Any]]] = {
    "euler_ancestral": (EulerAncestralDiscreteScheduler(**TRAILING), {"num_steps": 4}),
    "euler_ancestral, linspace": (EulerAncestralDiscreteScheduler(**BETAS), {"num_steps": 3}),
    "tcd": (TCDScheduler(**BETAS), {"eta": 0.3}),
    "dmd2": (LCMScheduler(**BETAS), {"timesteps": DMD2}),
    "ddim, named": (DDIMScheduler(**BETAS, clip_sample=False), {"timesteps": DMD2}),
    "zero snr": (DDIMScheduler(**ZERO_SNR, clip_sample=False), {"num_steps": 4}),
    "turbo, 1 step": (EulerDiscreteScheduler(**TRAILING), {"num_steps": 1, "last_step": "sampled"}),
    "tcd, sampled": (TCDScheduler(**BETAS), {"eta": 0.3, "last_step": "sampled"}),
}


@pytest.mark.parametrize("case", TRAINED)
def test_every_kind_is_trained_from_a_ratio_of_one_with_a_gradient_and_finite_weights(
    build_unet: BuildUNet, case: str
) -> None:
    scheduler, config = TRAINED[case]
    policy = policy_of(build_unet, scheduler, **config)
    is_sampled = config.get("last_step") == "sampled"
    assert policy.num_actions == policy.num_steps - (not is_sampled)
    trajectory, x_0 = policy.sample(conditioning(), torch.Generator().manual_seed(0))
    assert torch.equal(x_0, trajectory.latents[:, -1]) == is_sampled
    rows = torch.randperm(trajectory.num_transitions, generator=torch.Generator().manual_seed(0))[:16]
    part = trajectory.transitions(rows)  # samples and steps are mixed
    log_prob = policy.log_prob(part)
    _, stats = functional.clipped_ratio_loss(log_prob, part.log_prob_old, torch.ones(16), 1e-4, 10.0)
    assert stats.ratio_max_deviation < 1e-6
    log_prob.sum().backward()
    gradients = [p.grad for p in policy.unet.parameters()]  # pyright: ignore[reportFunctionMemberAccess]
    assert sum(g.abs().sum() for g in gradients if g is not None) > 0
    assert step_weights(policy.schedule, "sensitivity").isfinite().all()
    # The KL to another output is that of normal distributions around the two means.
    coef, m = policy.coefficients(part.step), torch.randn(part.x_t.shape)
    mean, other = (functional.gaussian_mean(part.x_t, each, coef) for each in (m, m + 0.1))
    sigma = coef[:, 2, None, None, None]
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, sigma), normal(other, sigma)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(functional.gaussian_kl(m, m + 0.1, coef), expected, rtol=1e-3, atol=1e-6)


def test_the_first_state_has_the_standard_deviation_of_the_schedulers(build_unet: BuildUNet) -> None:
    for scheduler, scale in ((TRAINED["euler_ancestral"][0], 0.99767), (TRAINED["tcd"][0], 1.0)):
        policy = policy_of(build_unet, scheduler)
        start = policy.sample(conditioning(), torch.Generator().manual_seed(0))[0].latents[:, 0]
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(start, noise * scale, rtol=1e-4, atol=0)


def test_a_guidance_embedding_is_refused_by_every_other_kind(build_unet: BuildUNet) -> None:
    unet = build_unet(32)
    for kind in ("ddim", "euler_ancestral", "tcd"):
        config: Any = PolicyConfig(kind)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=f"policy.kind={kind}, but the model is a latent consistency model"):
            build_policy(config, Network(unet, unet.config), TCDScheduler(**BETAS).config)
    assert not isinstance(policy_of(lambda _: unet, TCDScheduler(**BETAS)), DiffusionPolicy)
