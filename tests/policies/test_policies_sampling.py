"""Sampling by the policies against diffusers' pipelines; ratios before the first update."""

# B samples, K actions, N transitions, C H W latent

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline
from torch import Tensor

from rlcm_fast.config import PolicyConfig
from rlcm_fast.kernels import functional
from rlcm_fast.policies import (
    ConsistencyPolicy,
    DiffusionPolicy,
    GaussianPolicy,
    Network,
    build_policy,
    consistency_schedule,
    ddim_schedule,
)
from rlcm_fast.policies.consistency import guidance_embedding
from rlcm_fast.trajectory import Conditioning, Trajectory, Transitions

BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
DDIM: dict[str, Any] = {**BETAS, "steps_offset": 1}  # StableDiffusionPipeline sets 1 whatever the folder says
PROMPTS = ["a red circle", "a blue square left of a disc", "a circle", "a red circle"]
DISTINCT, INDEX = PROMPTS[:3], [0, 1, 2, 0]
MAX_IMAGE_DIFFERENCE = 2e-6  # on [0, 1]; measured on a CPU: consistency at most 4.2e-7, DDIM 7.7e-7 (50 steps)

CPU = torch.device("cpu")
DIFFUSION_PIPELINE: Any = StableDiffusionPipeline  # its annotations name an enumeration
BuildUNet = Callable[[int | None], Any]


def encode(pipeline: Any) -> Conditioning:
    with torch.no_grad():
        embeds, negative = pipeline.encode_prompt(DISTINCT, torch.device("cpu"), 1, True)
    return Conditioning(embeds, torch.tensor(INDEX), negative[:1])


def images(pipeline: Any, x_0: Tensor) -> Tensor:
    with torch.no_grad():
        decoded = pipeline.vae.decode(x_0 / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    return (decoded / 2 + 0.5).clamp(0, 1)


def pipeline_images(pipeline: Any, num_steps: int, guidance_scale: float, **arguments: float) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        PROMPTS,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
        **arguments,
    )
    return out.images


def assert_same_images(policy: GaussianPolicy, pipeline: Any, expected: Tensor) -> None:
    _, x_0 = policy.sample(encode(pipeline), torch.Generator().manual_seed(7))
    difference = (images(pipeline, x_0) - expected).abs().max().item()
    assert expected.std() > 0.01, "a flat picture would prove nothing"
    assert difference < MAX_IMAGE_DIFFERENCE, f"maximum difference {difference:.1e}"


def consistency(
    unet: Any, num_steps: int, w: float = 4.0, last: str = "deterministic", **more: Any
) -> ConsistencyPolicy:
    schedule = consistency_schedule(LCMScheduler(**BETAS).config, num_steps, last)
    return ConsistencyPolicy(Network(unet, unet.config, **more), schedule, w)


def diffusion(unet: Any, num_steps: int, eta: float, w: float = 5.0, **more: Any) -> DiffusionPolicy:
    schedule = ddim_schedule(DDIMScheduler(**DDIM).config, num_steps, eta)
    return DiffusionPolicy(Network(unet, unet.config, **more), schedule, w)


@pytest.mark.parametrize("last_step", ["deterministic", "renoise"])
@pytest.mark.parametrize(("num_steps", "w"), [(1, 4.0), (2, 1.0), (4, 8.5), (8, 4.0)])
def test_consistency_sampling_gives_the_pipelines_images(
    build_unet: BuildUNet, pipeline_parts: dict[str, Any], num_steps: int, w: float, last_step: str
) -> None:
    unet = build_unet(32)
    pipeline = LatentConsistencyModelPipeline(unet=unet, scheduler=LCMScheduler(**BETAS), **pipeline_parts)
    policy = consistency(unet, num_steps, w, last_step)
    assert_same_images(policy, pipeline, pipeline_images(pipeline, num_steps, w))


@pytest.mark.parametrize("w", [1.0, 1.5])
def test_consistency_sampling_without_a_guidance_embedding_gives_the_pipelines_images(
    build_unet: BuildUNet, pipeline_parts: dict[str, Any], w: float
) -> None:
    # A base model with an LCM-LoRA fused into it: stock diffusers runs it by two calls a step where w > 1.
    unet, scheduler = build_unet(None), LCMScheduler(**BETAS)
    pipeline: Any = DIFFUSION_PIPELINE(unet=unet, scheduler=scheduler, **pipeline_parts)
    config = PolicyConfig(num_steps=4, guidance_scale=w)
    policy = build_policy(config, Network(unet, unet.config), scheduler.config)
    assert policy.needs_negative == (w > 1)
    assert_same_images(policy, pipeline, pipeline_images(pipeline, 4, w))


@pytest.mark.parametrize(
    ("num_steps", "w", "eta"),
    [*((10, w, eta) for w in (5.0, 1.0) for eta in (0.0, 0.5, 1.0)), (50, 5.0, 0.5)],
)
def test_diffusion_sampling_gives_the_pipelines_images(
    build_unet: BuildUNet, pipeline_parts: dict[str, Any], num_steps: int, w: float, eta: float
) -> None:
    unet = build_unet(None)
    pipeline: Any = DIFFUSION_PIPELINE(unet=unet, scheduler=DDIMScheduler(**DDIM), **pipeline_parts)
    policy = diffusion(unet, num_steps, eta, w)
    assert_same_images(policy, pipeline, pipeline_images(pipeline, num_steps, w, eta=eta))


def test_the_image_of_stable_diffusions_folders_is_the_pipelines_without_its_last_noise(
    build_unet: BuildUNet, pipeline_parts: dict[str, Any]
) -> None:
    unet, scheduler = build_unet(None), DDIMScheduler(**DDIM, set_alpha_to_one=False)
    pipeline: Any = DIFFUSION_PIPELINE(unet=unet, scheduler=scheduler, **pipeline_parts)
    pipeline.set_progress_bar_config(disable=True)
    noisy = pipeline(
        PROMPTS, num_inference_steps=10, guidance_scale=5.0, eta=1.0, output_type="latent",
        generator=torch.Generator().manual_seed(7),
    ).images  # fmt: skip
    schedule, generator = ddim_schedule(scheduler.config, 10, 1.0), torch.Generator().manual_seed(7)
    _, x_0 = DiffusionPolicy(Network(unet, unet.config), schedule, 5.0).sample(encode(pipeline), generator)
    sigma = ddim_schedule(scheduler.config, 10, 1.0, "renoise").coefficients[-1, 2]
    z = torch.randn(x_0.shape, generator=generator)
    assert 0.02 < sigma < 0.021
    torch.testing.assert_close(x_0 + sigma * z, noisy, rtol=0, atol=1e-5 * noisy.abs().max().item())


def conditioning() -> Conditioning:
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(4, 8, 24, generator=generator)
    return Conditioning(table[:3], torch.arange(16) % 3, table[3:])


def rollout(policy: GaussianPolicy) -> Trajectory:
    return policy.sample(conditioning(), torch.Generator().manual_seed(0))[0]


POLICIES: dict[str, Callable[[BuildUNet], GaussianPolicy]] = {
    "consistency, 2 steps": lambda build: consistency(build(32), 2),
    "consistency, 8 steps": lambda build: consistency(build(32), 8),
    "consistency, 50 steps": lambda build: consistency(build(32), 50),
    "consistency, 4 steps, renoise": lambda build: consistency(build(32), 4, last="renoise"),
    "ddim, 10 steps": lambda build: diffusion(build(None), 10, 1.0),
    "ddim, 50 steps": lambda build: diffusion(build(None), 50, 1.0),
    "ddim, 50 steps, eta .1": lambda build: diffusion(build(None), 50, 0.1),
}


@pytest.mark.parametrize("name", POLICIES)
def test_ratio_is_one_before_the_first_update(build_unet: BuildUNet, name: str) -> None:
    policy = POLICIES[name](build_unet)
    trajectory = rollout(policy)
    shuffled = torch.randperm(trajectory.num_transitions, generator=torch.Generator().manual_seed(0))
    # 16 is the rollout's own batch size; another shape changes the network's result by 1e-7, which eta = .1 magnifies
    sizes = (16,) if "eta .1" in name else (16, 5)
    for rows in (rows for size in sizes for rows in shuffled.split(size)[:8]):  # samples and steps are mixed
        part = trajectory.transitions(rows)
        log_prob = policy.log_prob(part).detach()
        _, stats = functional.clipped_ratio_loss(log_prob, part.log_prob_old, torch.ones(len(rows)), 1e-4, 10.0)
        assert stats.ratio_max_deviation < 1e-6, f"|ratio - 1| = {stats.ratio_max_deviation.item():.1e}"


def test_the_same_batch_gives_the_same_log_probs_to_the_bit(build_unet: BuildUNet) -> None:
    policy = consistency(build_unet(32), 4)
    trajectory = rollout(policy)
    for k in range(policy.num_actions):
        part = trajectory.transitions(torch.arange(16) * policy.num_actions + k)
        assert torch.equal(policy.log_prob(part), part.log_prob_old)


def test_bfloat16_networks_keep_float32_states_and_a_ratio_of_one_in_the_same_batch(build_unet: BuildUNet) -> None:
    policies: list[GaussianPolicy] = [
        consistency(build_unet(32).bfloat16(), 4, dtype=torch.bfloat16),
        diffusion(build_unet(None).bfloat16(), 6, 1.0, dtype=torch.bfloat16),
    ]
    for policy in policies:
        trajectory, x_0 = policy.sample(conditioning(), torch.Generator().manual_seed(0))
        assert (trajectory.latents.dtype, trajectory.log_probs.dtype, x_0.dtype) == (torch.float32,) * 3
        part = trajectory.transitions(torch.arange(16) * policy.num_actions)
        assert torch.equal(policy.log_prob(part), part.log_prob_old)


def test_log_prob_is_that_of_normal_around_the_schedulers_mean(build_unet: BuildUNet) -> None:
    policy = consistency(build_unet(32), 4)
    scheduler: Any = LCMScheduler(**BETAS)
    trajectory, k = rollout(policy), 1
    part = trajectory.transitions(torch.arange(16) * 3 + k)
    with torch.no_grad():
        m = policy.network_output(part.x_t, part.step, part.conditioning)
    scheduler.set_timesteps(4)
    t, s = scheduler.timesteps[k], scheduler.timesteps[k + 1]
    denoised = scheduler.step(m, t, part.x_t, return_dict=False)[1]
    alpha_bar = scheduler.alphas_cumprod[s]
    density = torch.distributions.Normal(alpha_bar.sqrt() * denoised, (1 - alpha_bar).sqrt())
    expected = density.log_prob(part.x_s).mean(dim=(1, 2, 3))
    torch.testing.assert_close(part.log_prob_old, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_mixed_steps_is_that_of_one_transition_at_a_time(build_unet: BuildUNet) -> None:
    policies: list[GaussianPolicy] = [consistency(build_unet(32), 4), diffusion(build_unet(None), 5, 1.0)]
    for policy in policies:
        trajectory = rollout(policy)
        unet: Any = policy.unet
        part = trajectory.transitions(torch.tensor([0, 5, 10, 2]))
        unet.zero_grad()
        policy.log_prob(part).sum().backward()
        mixed = [parameter.grad.clone() for parameter in unet.parameters()]
        unet.zero_grad()
        for row in (0, 5, 10, 2):
            policy.log_prob(trajectory.transitions(torch.tensor([row]))).sum().backward()
        scale = max(gradient.abs().max() for gradient in mixed)
        assert scale > 0
        for gradient, parameter in zip(mixed, unet.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5 * scale.item())


def test_the_trajectory_ends_before_the_image(build_unet: BuildUNet) -> None:
    unet = build_unet(32)
    for last, num_actions in (("deterministic", 3), ("renoise", 4)):
        policy = consistency(unet, 4, last=last)
        trajectory, x_0 = policy.sample(conditioning(), torch.Generator().manual_seed(0))
        assert trajectory.latents.shape == (16, num_actions + 1, 4, 8, 8)
        assert trajectory.log_probs.shape == (16, num_actions) and x_0.shape == (16, 4, 8, 8)
    trajectory, _ = diffusion(build_unet(None), 3, 0.0).sample(conditioning(), torch.Generator().manual_seed(0))
    assert trajectory.latents.shape == (16, 1, 4, 8, 8) and trajectory.log_probs.shape == (16, 0)


@pytest.mark.parametrize("width", [32, 33, 256])
def test_the_guidance_embedding_is_that_of_diffusers(width: int) -> None:
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    for w in (1.0, 4.0, 8.5):
        expected = theirs(None, torch.tensor([w - 1]), embedding_dim=width)  # type: ignore[arg-type]
        torch.testing.assert_close(guidance_embedding(w, width), expected, rtol=0, atol=1e-6 * 1000 * w)


def test_mistaken_policies_are_refused_by_name(build_unet: BuildUNet) -> None:
    lcm, plain = build_unet(32), build_unet(None)
    with pytest.raises(ValueError, match="policy.kind=consistency, but .* use policy.kind=ddim, or make it a latent"):
        build_policy(PolicyConfig("consistency"), Network(plain, plain.config), DDIMScheduler(**DDIM).config)
    with pytest.raises(ValueError, match="policy.kind=ddim"):
        diffusion(lcm, 4, 1.0)
    with pytest.raises(ValueError, match="policy.guidance_scale=0.5"):
        diffusion(plain, 4, 1.0, w=0.5)
    only_positive = Conditioning(torch.randn(1, 8, 24), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="negative_embeds"):
        diffusion(plain, 4, 1.0).sample(only_positive, torch.Generator())


def test_training_one_deterministic_step_is_refused(build_unet: BuildUNet) -> None:
    policy, x = consistency(build_unet(32), 1), torch.zeros(1, 4, 8, 8)
    zero = torch.zeros(1, dtype=torch.int64)
    part = Transitions(x, x, zero, zero, torch.zeros(1), conditioning().take(zero))
    with pytest.raises(ValueError, match="policy.num_steps=1 has no action to train"):
        policy.log_prob(part)
