"""The pretraining loss against its closed forms."""

# N pairs, C H W latent

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, LCMScheduler
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.policies import (
    ConsistencyPolicy,
    DiffusionPolicy,
    GaussianPolicy,
    Network,
    consistency_schedule,
    ddim_schedule,
)
from rlcm_fast.policies.consistency import guidance_embedding
from rlcm_fast.policies.real_image_loss import drop_captions, real_image_loss
from rlcm_fast.trajectory import Conditioning

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER: dict[str, Any] = {**BETAS, "num_train_timesteps": 1000}
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
UNET_CONFIG: dict[str, Any] = {"in_channels": 4, "sample_size": 8}
N = 16


@dataclass
class Oracle:
    """Called as a UNet is; answers m(x_t, t), and remembers what it was asked."""

    answer: Callable[[Tensor, Tensor], Tensor]
    asked: Any = None

    def __call__(self, x_t: Tensor, t: Tensor, **keywords: Any) -> tuple[Tensor]:
        self.asked = (x_t, t, keywords)
        return (self.answer(x_t, t),)


def latents() -> Tensor:
    return torch.randn(N, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def texts(num_samples: int = N) -> Conditioning:
    embeds = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))
    return Conditioning(embeds, torch.arange(num_samples) % 3, negative_embeds=torch.zeros(1, 5, 6))


def generator(seed: int = 0) -> torch.Generator:
    return parallel.generator(seed)


def diffusion(network: Any, prediction: str = "epsilon") -> GaussianPolicy:
    schedule = ddim_schedule({**SCHEDULER, "prediction_type": prediction}, 10)
    return DiffusionPolicy(Network(network, UNET_CONFIG), schedule, 7.0)


def consistency(network: Any, prediction: str = "epsilon", guidance: float = 4.0) -> GaussianPolicy:
    schedule = consistency_schedule({**SCHEDULER, "prediction_type": prediction}, 4)
    return ConsistencyPolicy(Network(network, {**UNET_CONFIG, "time_cond_proj_dim": 16}), schedule, guidance)


def truth(prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """What a network that knows the image answers: diffusers' own definition of its target."""
    scheduler: Any = DDPMScheduler(**BETAS, prediction_type=prediction)
    x_0 = latents()

    def answer(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = scheduler.alphas_cumprod[t][:, None, None, None]
        eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        return {"epsilon": eps, "v_prediction": scheduler.get_velocity(x_0, eps, t), "sample": x_0}[prediction]

    return answer


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_diffusion_network_that_knows_the_truth_loses_nothing(prediction: str):
    loss = real_image_loss(diffusion(Oracle(truth(prediction)), prediction), latents(), texts(), generator())
    assert loss.shape == (N,)
    assert loss.dtype == torch.float32
    assert loss.max() < 1e-9  # of a float32 eps that divides by a noise of .03


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_diffusion_network_loses_the_square_of_its_error(prediction: str):
    right = truth(prediction)
    oracle = Oracle(lambda x_t, t: right(x_t, t) + 0.5)
    loss = real_image_loss(diffusion(oracle, prediction), latents(), texts(), generator())
    torch.testing.assert_close(loss, torch.full((N,), 0.25), atol=1e-4, rtol=0)


def test_the_noised_images_are_those_of_diffusers():
    oracle = Oracle(lambda x_t, t: torch.zeros_like(x_t))
    real_image_loss(diffusion(oracle), latents(), texts(), generator())
    x_t, t, _ = oracle.asked
    draws = generator()
    assert torch.equal(t, torch.randint(1000, (N,), generator=draws))
    scheduler: Any = DDPMScheduler(**BETAS)
    expected = scheduler.add_noise(latents(), torch.randn(latents().shape, generator=draws), t)
    torch.testing.assert_close(x_t, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("build, num_timesteps", [(diffusion, 1000), (consistency, 500)])
def test_timesteps_are_all_of_a_diffusion_model_and_the_lower_half_of_a_consistency_model(
    build: Callable[..., GaussianPolicy], num_timesteps: int
):
    oracle = Oracle(lambda x_t, t: x_t)
    num_pairs = 20 * num_timesteps
    real_image_loss(build(oracle), torch.zeros(num_pairs, 4, 1, 1), texts(num_pairs), generator())
    counts = torch.bincount(oracle.asked[1])
    assert len(counts) == num_timesteps
    assert counts.min() >= 4  # 20 +- 4.5 expected
    assert counts.max() <= 44


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_consistency_network_loses_the_square_of_f_minus_the_image(prediction: str):
    right, shift = truth(prediction), 0.5
    oracle = Oracle(lambda x_t, t: right(x_t, t) + shift)
    loss = real_image_loss(consistency(oracle, prediction), latents(), texts(), generator())
    x_t, t, _ = oracle.asked
    scheduler: Any = LCMScheduler(**BETAS, prediction_type=prediction)
    alpha_bar = scheduler.alphas_cumprod[t][:, None, None, None].double()
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t[:, None, None, None].double())
    of_m = {
        "epsilon": -(1 / alpha_bar - 1).sqrt(),
        "v_prediction": -(1 - alpha_bar).sqrt(),
        "sample": torch.ones_like(alpha_bar),
    }[prediction]
    error = c_skip * (x_t - latents()) + c_out * of_m * shift
    weight = (alpha_bar / (1 - alpha_bar)).clamp(max=5.0)
    torch.testing.assert_close(loss, (weight * error**2).mean(dim=(1, 2, 3)).float(), rtol=2e-3, atol=1e-6)


def test_f_is_the_identity_at_the_smallest_timestep():
    levels = consistency(None).schedule.levels
    assert levels.consistency[0].tolist() == [1.0, 0.0]
    assert levels.consistency[1:, 1].abs().min() > 0


def test_the_levels_at_the_sampling_steps_are_the_sampler_s():
    schedule = consistency_schedule(SCHEDULER, 8)
    torch.testing.assert_close(
        schedule.levels.consistency[schedule.timesteps[-1]], schedule.image_coefficients[:2], rtol=0, atol=0
    )
    assert schedule.levels.origin_timesteps.tolist() == list(range(19, 1000, 20))


@pytest.mark.parametrize("build", [diffusion, consistency])
def test_the_gradient_is_that_of_the_mean_square(build: Callable[..., GaussianPolicy]):
    weight = torch.tensor(0.3, requires_grad=True)
    policy = build(Oracle(lambda x_t, t: weight * x_t))
    loss = real_image_loss(policy, latents(), texts(), generator()).mean()
    (gradient,) = torch.autograd.grad(loss, weight)
    with torch.no_grad():
        step = 1e-2
        above, below = (
            real_image_loss(build(Oracle(lambda x_t, t, w=w: w * x_t)), latents(), texts(), generator()).mean()
            for w in (0.3 + step, 0.3 - step)
        )
    torch.testing.assert_close(gradient, (above - below) / (2 * step), rtol=1e-3, atol=0)  # exact for a square


@pytest.mark.parametrize("build", [diffusion, consistency])
def test_the_generator_alone_decides(build: Callable[..., GaussianPolicy]):
    policy = build(Oracle(lambda x_t, t: torch.zeros_like(x_t)))
    first, again, other = (real_image_loss(policy, latents(), texts(), generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_guidance_is_one_pass_with_the_embedding_of_no_guidance():
    oracle = Oracle(lambda x_t, t: torch.zeros_like(x_t))
    real_image_loss(diffusion(oracle), latents(), texts(), generator())
    assert len(oracle.asked[0]) == N
    assert "timestep_cond" not in oracle.asked[2]
    real_image_loss(consistency(oracle), latents(), texts(), generator())
    assert len(oracle.asked[0]) == N
    assert torch.equal(oracle.asked[2]["timestep_cond"], guidance_embedding(1.0, 16).expand(N, -1))


def test_a_consistency_model_without_a_guidance_input_runs_once():
    oracle = Oracle(lambda x_t, t: torch.zeros_like(x_t))
    policy = ConsistencyPolicy(Network(oracle, UNET_CONFIG), consistency_schedule(SCHEDULER, 4), 1.5)
    real_image_loss(policy, latents(), texts(), generator())
    assert len(oracle.asked[0]) == N
    assert "timestep_cond" not in oracle.asked[2]


def test_dropped_captions_are_the_text_that_guidance_leads_away_from():
    conditioning = replace(texts(4000), pooled_embeds=torch.ones(3, 2), negative_pooled=torch.zeros(1, 2))
    dropped = drop_captions(conditioning, 0.25, generator())
    is_empty = (dropped.embeds == 0).all(dim=(1, 2))
    assert 0.22 < is_empty.float().mean() < 0.28
    assert torch.equal(dropped.embeds[~is_empty], conditioning.embeds[~is_empty])
    assert dropped.pooled is not None
    assert torch.equal(dropped.pooled[:, 0], (~is_empty).float())
    assert torch.equal(drop_captions(conditioning, 0.25, generator()).index, dropped.index)
    assert drop_captions(conditioning, 0.0, generator()) is conditioning
