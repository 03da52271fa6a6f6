"""Schedule tables against diffusers' own schedulers, step by step, and what they refuse."""

# S steps, C H W latent

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler
from torch import Tensor

from rlcm_fast.policies import Schedule, consistency_schedule, ddim_schedule

SHAPE = (2, 4, 8, 8)
BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
PREDICTIONS: list[Any] = ["epsilon", "v_prediction", "sample"]


def affine(schedule: Schedule, k: int, x_t: Tensor, m: Tensor, z: Tensor) -> Tensor:
    a, b, sigma = schedule.coefficients[k]
    return a * x_t + b * m + sigma * z


def assert_same_steps(schedule: Schedule, scheduler: Any, **step_arguments: float) -> None:
    """Every step with fresh x_t and m, the scheduler drawing the same z: x_s to 1e-5 of its largest element."""
    assert torch.equal(schedule.timesteps, scheduler.timesteps)
    for k, t in enumerate(scheduler.timesteps):
        x_t, m = torch.randn(SHAPE), torch.randn(SHAPE)
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(k))
        generator = torch.Generator().manual_seed(k)
        expected = scheduler.step(m, t, x_t, generator=generator, **step_arguments, return_dict=False)[0]
        error = (affine(schedule, k, x_t, m, z) - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, f"step {k} of {schedule.num_steps}, t={t}: relative error {error:.1e}"


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("num_steps", range(1, 51))
def test_consistency_steps_are_those_of_diffusers(num_steps: int, prediction_type: str) -> None:
    scheduler = LCMScheduler(**BETAS, prediction_type=prediction_type)
    scheduler.set_timesteps(num_steps)
    schedule = consistency_schedule(scheduler.config, num_steps)
    assert_same_steps(schedule, scheduler)
    assert schedule.num_actions == num_steps - 1
    assert torch.equal(schedule.coefficients[-1], schedule.image_coefficients)


@pytest.mark.parametrize(
    "changes",
    [
        {"original_inference_steps": 100},
        {"original_inference_steps": 20},
        {"timestep_scaling": 0.01},
        {"timestep_scaling": 1.0, "original_inference_steps": 1000},
        {"beta_schedule": "linear", "num_train_timesteps": 500},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.001 + 0.00001 * i for i in range(1000)]},
    ],
    ids=str,
)
def test_consistency_steps_follow_the_scheduler_config(changes: dict[str, Any]) -> None:
    scheduler = LCMScheduler(**{**BETAS, **changes})
    for num_steps in (1, 4, 7, 20):
        scheduler.set_timesteps(num_steps)
        assert_same_steps(consistency_schedule(scheduler.config, num_steps), scheduler)


def test_four_consistency_timesteps_are_those_of_diffusers_not_of_the_paper() -> None:
    assert consistency_schedule(LCMScheduler(**BETAS).config, 4).timesteps.tolist() == [999, 759, 499, 259]


@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_renoise_is_the_papers_letter(num_steps: int) -> None:
    config = LCMScheduler(**BETAS).config
    plain, letter = consistency_schedule(config, num_steps), consistency_schedule(config, num_steps, "renoise")
    alpha_bar = LCMScheduler(**BETAS).alphas_cumprod[letter.timesteps[-1]]
    assert letter.num_actions == num_steps
    assert torch.equal(letter.coefficients[:-1], plain.coefficients[:-1])
    assert torch.equal(letter.image_coefficients, plain.image_coefficients)
    torch.testing.assert_close(letter.coefficients[-1, :2], alpha_bar.sqrt() * plain.coefficients[-1, :2])
    torch.testing.assert_close(letter.coefficients[-1, 2], (1 - alpha_bar).sqrt())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("final", [{"set_alpha_to_one": True}, {"set_alpha_to_one": False, "steps_offset": 1}], ids=str)
def test_ddim_steps_are_those_of_diffusers(eta: float, spacing: Any, final: dict[str, Any]) -> None:
    for prediction_type in PREDICTIONS:
        scheduler = DDIMScheduler(**BETAS, **final, timestep_spacing=spacing, prediction_type=prediction_type)
        for num_steps in (1, 2, 3, 7, 10, 25, 50):
            scheduler.set_timesteps(num_steps)
            if can_renoise := final_sigma(scheduler, eta) > 0:
                schedule = ddim_schedule(scheduler.config, num_steps, eta, last_step="renoise")
            else:
                schedule = ddim_schedule(scheduler.config, num_steps, eta)
            assert_same_steps(schedule, scheduler, eta=eta)
            assert schedule.num_actions == (0 if eta == 0 else num_steps - 1 + can_renoise)


def final_sigma(scheduler: DDIMScheduler, eta: float) -> float:
    t = int(scheduler.timesteps[-1])
    variance = scheduler._get_variance(t, t - 1000 // len(scheduler.timesteps))
    return eta * float(variance) ** 0.5


def test_a_deterministic_last_ddim_step_is_the_mean_of_the_schedulers() -> None:
    config = DDIMScheduler(**BETAS, set_alpha_to_one=False, steps_offset=1).config
    noisy, plain = ddim_schedule(config, 10, 1.0, "renoise"), ddim_schedule(config, 10, 1.0)
    assert (noisy.num_actions, plain.num_actions) == (10, 9)
    assert torch.equal(plain.coefficients[-1, :2], noisy.coefficients[-1, :2])
    assert plain.coefficients[-1, 2] == 0
    assert torch.equal(noisy.image_coefficients, plain.coefficients[-1])
    assert torch.equal(plain.coefficients[-1], plain.image_coefficients)


@pytest.mark.parametrize("source", [PNDMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_folders_of_other_schedulers_give_ddims_table(source: type) -> None:
    betas = {key: value for key, value in BETAS.items() if key != "clip_sample"}
    other = source(**betas, prediction_type="v_prediction", steps_offset=1, timestep_spacing="leading")
    as_stored = {key: value for key, value in other.config.items() if key != "_use_default_values"}
    ddim: Any = DDIMScheduler.from_config(as_stored, clip_sample=False)
    ours, theirs = (ddim_schedule(config, 20, 1.0) for config in (as_stored, ddim.config))
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.coefficients, theirs.coefficients)


@pytest.mark.parametrize("key", ["clip_sample", "thresholding"])
def test_steps_that_are_not_affine_are_refused(key: str) -> None:
    for scheduler, build in ((LCMScheduler, consistency_schedule), (DDIMScheduler, ddim_schedule)):
        with pytest.raises(ValueError, match=f"{key}=True"):
            build(scheduler(**{**BETAS, key: True}).config, 4)


def test_bad_values_are_refused_by_name() -> None:
    lcm, ddim = LCMScheduler(**BETAS).config, DDIMScheduler(**BETAS, steps_offset=1).config
    refused = [
        (lambda: consistency_schedule(lcm, 0), "policy.num_steps=0"),
        (lambda: consistency_schedule(lcm, 51), "policy.num_steps=51"),
        (lambda: consistency_schedule(lcm, 4, "none"), "policy.last_step='none'"),
        (lambda: ddim_schedule(ddim, 4, eta=1.5), "policy.eta=1.5"),
        (lambda: ddim_schedule(ddim, 4, eta=0.0, last_step="renoise"), "policy.last_step=renoise"),
        (lambda: ddim_schedule(ddim, 1000), "policy.num_steps=1000"),
        (lambda: ddim_schedule({**ddim, "timestep_spacing": "other"}, 4), "timestep_spacing='other'"),
        (lambda: ddim_schedule({**ddim, "beta_schedule": "other"}, 4), "beta_schedule='other'"),
        (lambda: ddim_schedule({**ddim, "prediction_type": "flow"}, 4), "prediction_type='flow'"),
        (lambda: ddim_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 4), "has no beta_schedule"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()


def test_training_without_an_action_is_refused_with_the_reason() -> None:
    config = LCMScheduler(**BETAS).config
    with pytest.raises(ValueError, match="policy.num_steps=1 has no action"):
        consistency_schedule(config, 1).require_actions()
    consistency_schedule(config, 1, "renoise").require_actions()
    consistency_schedule(config, 2).require_actions()
