"""Euler ancestral and TCD tables against diffusers' schedulers, step by step; named timesteps; zero terminal SNR."""

# S steps, C H W latent

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from rlcm_fast.config import PolicyConfig
from rlcm_fast.policies import (
    Schedule,
    consistency_schedule,
    ddim_schedule,
    euler_ancestral_schedule,
    tcd_schedule,
)
from rlcm_fast.policies.build import resolve_kind
from rlcm_fast.stages.selection import step_weights

SHAPE = (2, 4, 8, 8)
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR: dict[str, Any] = {**BETAS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
STEPS = (1, 2, 3, 4, 7, 8, 10, 25, 50)
DMD2 = [999, 749, 499, 249]
RLCM = [999, 879, 759, 639, 519, 399, 279, 159]
MAX_ERROR = 1e-5  # of the largest element of x_s, float32; measured on a CPU: Euler 2.4e-6, TCD 4.7e-7

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def affine(schedule: Schedule, k: int, x_t: Tensor, m: Tensor, z: Tensor) -> Tensor:
    a, b, sigma = schedule.coefficients[k]
    return a * x_t + b * m + sigma * z


def assert_close(ours: Tensor, theirs: Tensor, step: str, tolerance: float = MAX_ERROR) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < tolerance, f"{step}: relative error {error:.1e}"


def assert_same_steps(schedule: Schedule, scheduler: Any, **step_arguments: float) -> None:
    """Every step with fresh x_t and m, the scheduler drawing the same z; Euler's states scaled to ours."""
    assert torch.equal(schedule.timesteps.float(), scheduler.timesteps.float())
    is_euler = hasattr(scheduler, "sigmas")
    scale = (scheduler.sigmas**2 + 1).sqrt() if is_euler else torch.ones(schedule.num_steps + 1)
    assert schedule.start_scale * scale[0] == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
    for k, t in enumerate(scheduler.timesteps):
        x_t, m = torch.randn(SHAPE), torch.randn(SHAPE)
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(k))
        generator = torch.Generator().manual_seed(k)
        state = x_t * scale[k]
        if is_euler:
            torch.testing.assert_close(scheduler.scale_model_input(state, t), x_t)  # the network sees our state
        expected = scheduler.step(m, t, state, generator=generator, **step_arguments, return_dict=False)[0]
        # Their states at zero terminal SNR have a scale of 4096, so their own rounding is 5e-4.
        tolerance = max(MAX_ERROR, 2**-23 * float(scale[k]))
        assert_close(affine(schedule, k, x_t, m, z), expected / scale[k + 1], f"step {k}, t={t}", tolerance)


def assert_whole(schedule: Schedule, num_steps: int) -> None:
    """S - 1 actions, the image without noise, and finite weights by sensitivity."""
    assert schedule.num_actions == num_steps - 1
    assert torch.equal(schedule.coefficients[-1], schedule.image_coefficients)
    assert schedule.coefficients.isfinite().all() and schedule.coefficients[-1, 2] == 0
    assert step_weights(schedule.with_sampled_image(0.1), "sensitivity").isfinite().all()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("rescale", [False, True])
def test_euler_ancestral_steps_are_those_of_diffusers(spacing: Any, prediction_type: Any, rescale: bool) -> None:
    if rescale and prediction_type == "epsilon":
        return  # refused by none of diffusers' Euler schedulers; see the test of what is refused
    scheduler = EulerAncestralDiscreteScheduler(
        **BETAS, timestep_spacing=spacing, prediction_type=prediction_type, steps_offset=1,
        rescale_betas_zero_snr=rescale,
    )  # fmt: skip
    for num_steps in STEPS:
        scheduler.set_timesteps(num_steps)
        schedule = euler_ancestral_schedule({**scheduler.config, "set_alpha_to_one": False}, num_steps)
        assert_same_steps(schedule, scheduler)
        assert_whole(schedule, num_steps)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_tcd_steps_are_those_of_diffusers(gamma: float, prediction_type: str) -> None:
    scheduler = TCDScheduler(**BETAS, prediction_type=prediction_type)
    for num_steps in STEPS:
        scheduler.set_timesteps(num_steps)
        schedule = tcd_schedule(scheduler.config, num_steps, gamma)
        assert_same_steps(schedule, scheduler, eta=gamma)
        if gamma > 0:
            assert_whole(schedule, num_steps)


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_tcd_steps_follow_the_scheduler_config(gamma: float) -> None:
    for changes in ({"original_inference_steps": 100}, {"beta_schedule": "linear", "num_train_timesteps": 500}):
        scheduler = TCDScheduler(**{**BETAS, **changes})
        for num_steps in range(1, 51, 4):
            scheduler.set_timesteps(num_steps)
            assert_same_steps(tcd_schedule(scheduler.config, num_steps, gamma), scheduler, eta=gamma)


def test_turbos_sampler_is_ddim_with_full_noise_at_trailing_timesteps() -> None:
    config = EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing").config
    for num_steps in (1, 2, 4, 8):  # which divide 1,000: otherwise DDIM's next timestep is not the next of the list
        euler = euler_ancestral_schedule(config, num_steps)
        ddim = ddim_schedule({**config, "set_alpha_to_one": True}, num_steps)
        assert torch.equal(euler.timesteps, ddim.timesteps)
        torch.testing.assert_close(euler.coefficients, ddim.coefficients, rtol=1e-6, atol=1e-6)
        assert euler.start_scale == pytest.approx((1 - 0.00466) ** 0.5, abs=1e-5) and ddim.start_scale == 1.0


MARGINALS = [(spacing, num_steps) for spacing in ("trailing", "leading") for num_steps in (2, 4, 8, 50)]


@pytest.mark.parametrize(("spacing", "num_steps"), MARGINALS)
def test_the_ancestral_step_has_the_marginals_of_the_deterministic_euler(spacing: Any, num_steps: int) -> None:
    # A network that knows x_0 outputs eps = (x_t - sqrt(ab_t) x_0) / sqrt(1 - ab_t): both steps are linear in x_0, eps.
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(num_steps)
    schedule = euler_ancestral_schedule(scheduler.config, num_steps)
    assert torch.equal(schedule.timesteps.float(), scheduler.timesteps)
    sigmas = scheduler.sigmas.double()
    a, b, noise = schedule.coefficients.double().T
    signal_t, noise_t = (sigmas[:-1] ** 2 + 1).rsqrt(), sigmas[:-1] * (sigmas[:-1] ** 2 + 1).rsqrt()
    signal_s, noise_s = (sigmas[1:] ** 2 + 1).rsqrt(), sigmas[1:] * (sigmas[1:] ** 2 + 1).rsqrt()
    mean, variance = a * signal_t, (a * noise_t + b) ** 2 + noise**2
    torch.testing.assert_close(mean, signal_s, rtol=0, atol=2e-7)
    torch.testing.assert_close(variance, noise_s**2, rtol=0, atol=2e-7)
    # The same of diffusers' own step: x_0 and eps as states, without noise.
    for k, t in enumerate(scheduler.timesteps):
        of_x_0 = float(scheduler.step(torch.zeros(1), t, torch.ones(1), return_dict=False)[0])
        scheduler._step_index = k  # once more from here
        of_eps = float(scheduler.step(torch.ones(1), t, sigmas[[k]].float(), return_dict=False)[0])
        assert of_x_0 * float(signal_s[k]) == pytest.approx(float(mean[k]), abs=1e-6)
        assert (of_eps * float(signal_s[k])) ** 2 == pytest.approx(float(variance[k]), abs=1e-6)


def test_one_step_of_an_x_0_prediction_is_the_output_as_of_lightnings_one_step_unet() -> None:
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing", prediction_type="sample")
    scheduler.set_timesteps(1)
    schedule = euler_ancestral_schedule(scheduler.config, 1)
    x_t, m = torch.randn(SHAPE), torch.randn(SHAPE)
    scheduler.scale_model_input(x_t, scheduler.timesteps[0])
    theirs = scheduler.step(m, scheduler.timesteps[0], x_t * scheduler.init_noise_sigma, return_dict=False)[0]
    assert_close(affine(schedule, 0, x_t, m, x_t), theirs, "the only step")
    assert_close(affine(schedule, 0, x_t, m, x_t), m, "the only step")


Build = Callable[..., Schedule]
NAMED: list[tuple[Any, Build, dict[str, float]]] = [
    (LCMScheduler, consistency_schedule, {}),
    (TCDScheduler, tcd_schedule, {"eta": 0.3}),
]


@pytest.mark.parametrize("timesteps", [DMD2, RLCM, [399], [800], [999, 1]], ids=str)
@pytest.mark.parametrize(("scheduler_class", "build", "arguments"), NAMED)
def test_named_timesteps_are_taken_as_diffusers_takes_them(
    scheduler_class: Any, build: Build, arguments: dict[str, float], timesteps: list[int]
) -> None:
    scheduler = scheduler_class(**BETAS)
    scheduler.set_timesteps(timesteps=timesteps)
    schedule = build(scheduler.config, len(timesteps), timesteps=timesteps)
    assert_same_steps(schedule, scheduler, **arguments)
    assert_whole(schedule, len(timesteps))


def test_named_timesteps_that_a_scheduler_spaces_itself_give_its_table() -> None:
    trailing: dict[str, Any] = {**BETAS, "timestep_spacing": "trailing"}
    for build, scheduler in (
        (ddim_schedule, DDIMScheduler(**trailing, clip_sample=False)),
        (euler_ancestral_schedule, EulerAncestralDiscreteScheduler(**trailing)),
    ):
        own, named = build(scheduler.config, 4), build(scheduler.config, 4, timesteps=DMD2)
        assert named.timesteps.tolist() == DMD2 and named.start_scale == own.start_scale
        assert torch.equal(own.coefficients, named.coefficients)
    config = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False).config
    assert_whole(ddim_schedule(config, 8, timesteps=RLCM), 8)
    assert consistency_schedule(LCMScheduler(**BETAS).config, 8).timesteps.tolist() != RLCM


def test_euler_at_named_timesteps_has_the_sigmas_of_diffusers_euler() -> None:
    scheduler = EulerDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(timesteps=RLCM)
    schedule = euler_ancestral_schedule(scheduler.config, 8, timesteps=RLCM)
    x_t, m = torch.randn(SHAPE), torch.randn(SHAPE)
    scale = (scheduler.sigmas**2 + 1).sqrt()
    x_0 = (x_t - scheduler.sigmas[7] / scale[7] * m) * scale[7]
    torch.testing.assert_close(affine(schedule, 7, x_t, m, m), x_0, rtol=0, atol=1e-5 * x_0.abs().max().item())


def test_zero_terminal_snr_with_v_prediction_has_the_steps_of_diffusers() -> None:
    ddim = DDIMScheduler(**ZERO_SNR, clip_sample=False, timestep_spacing="trailing")
    for eta in (0.0, 0.5, 0.999):  # at eta = 1 diffusers takes the root of -6e-8 in the first step, which is NaN
        for num_steps in (1, 2, 4, 10, 50):
            ddim.set_timesteps(num_steps)
            schedule = ddim_schedule(ddim.config, num_steps, eta)
            assert_same_steps(schedule, ddim, eta=eta)
            assert schedule.timesteps[0] == 999 and schedule.levels.signal[-1] == 0
            assert all(table.isfinite().all() for table in vars(schedule.levels).values())
    full, (x_t, m, z) = ddim_schedule(ddim.config, 4, 1.0), torch.randn(3, *SHAPE)
    ab_s = ddim.alphas_cumprod[749]
    assert_close(affine(full, 0, x_t, m, z), -ab_s.sqrt() * m + (1 - ab_s).sqrt() * z, "eta = 1")
    tcd, lcm = TCDScheduler(**ZERO_SNR), LCMScheduler(**ZERO_SNR)
    for num_steps in (1, 4, 8):
        tcd.set_timesteps(num_steps)
        lcm.set_timesteps(num_steps)
        assert_same_steps(tcd_schedule(tcd.config, num_steps, 0.3), tcd, eta=0.3)
        assert_same_steps(consistency_schedule(lcm.config, num_steps), lcm)


def test_zero_terminal_snr_is_refused_only_where_the_noise_is_predicted_from_pure_noise() -> None:
    config = {**DDIMScheduler(**{**ZERO_SNR, "prediction_type": "epsilon"}, clip_sample=False).config}
    assert ddim_schedule(config, 4).coefficients.isfinite().all()  # leading: begins at 750
    for call in (
        lambda: ddim_schedule({**config, "timestep_spacing": "trailing"}, 4),
        lambda: consistency_schedule(config, 4),
        lambda: tcd_schedule(config, 4),
    ):
        with pytest.raises(ValueError, match="prediction_type=epsilon with rescale_betas_zero_snr=true: at the last"):
            call()
    assert consistency_schedule(config, 4, timesteps=[979, 499]).coefficients.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda c: euler_ancestral_schedule({**c, "use_karras_sigmas": True}, 4),
            "use_karras_sigmas=True: these noise",
        ),
        (
            lambda c: euler_ancestral_schedule({**c, "timestep_type": "continuous"}, 4),
            "timestep_type=continuous: these",
        ),
        (
            lambda c: euler_ancestral_schedule({**c, "final_sigmas_type": "sigma_min"}, 4),
            "set final_sigmas_type to zero",
        ),
        (lambda c: euler_ancestral_schedule(c, 4, "renoise"), "last step of euler_ancestral has no noise to keep"),
        (lambda c: tcd_schedule(c, 4, 0.3, "renoise"), "last step of tcd has no noise to keep"),
        (lambda c: tcd_schedule(c, 4, 1.5), "policy.eta=1.5 is outside"),
        (lambda c: tcd_schedule({**c, "thresholding": True}, 4), "thresholding=True: it clips x_0 at a quantile"),
        (lambda c: tcd_schedule(c, 2, timesteps=[999, 0]), "ends at 0, where tcd arrives without noise"),
        (lambda c: tcd_schedule(c, 51), "policy.num_steps=51 is above the 50 steps"),
        (lambda c: ddim_schedule({**c, "num_train_timesteps": 500}, 2, timesteps=[999, 1]), "must lie in .0, 499."),
        (lambda c: ddim_schedule(c, 2, timesteps=[1, 999]), "must fall from step to step"),
    ],
)
def test_what_no_table_expresses_is_refused_with_the_reason(call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(dict(TCDScheduler(**BETAS).config))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LCMScheduler", "consistency"),
        ("DDIMScheduler", "ddim"),
        ("PNDMScheduler", "ddim"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral"),
        ("EulerDiscreteScheduler", "euler_ancestral"),
        ("TCDScheduler", "tcd"),
    ],
)
def test_auto_is_what_the_folders_scheduler_says(name: str, kind: str) -> None:
    assert resolve_kind(PolicyConfig(), {}, {"_class_name": name}) == kind
    assert resolve_kind(PolicyConfig("ddim"), {}, {"_class_name": name}) == "ddim"
    assert resolve_kind(PolicyConfig(), {"time_cond_proj_dim": 256}, {"_class_name": name}) == "consistency"


def test_auto_takes_a_distilled_model_of_no_known_scheduler_for_a_consistency_model_and_refuses_multistep_ones() -> (
    None
):
    assert resolve_kind(PolicyConfig(), {}, {"original_inference_steps": 50}) == "consistency"
    solver = DPMSolverMultistepScheduler(**BETAS)
    config = {**solver.config, "_class_name": "DPMSolverMultistepScheduler"}
    with pytest.raises(
        ValueError, match="DPMSolverMultistepScheduler: .* its step depends on earlier outputs and is no"
    ):
        resolve_kind(PolicyConfig(), {}, config)
    assert resolve_kind(PolicyConfig("ddim"), {}, config) == "ddim"


def test_a_schedule_shows_its_kind_and_timesteps() -> None:
    config = dict(TCDScheduler(**BETAS).config)
    assert str(tcd_schedule(config, 4, timesteps=DMD2)) == "tcd, timesteps 999 749 499 249"
    assert str(ddim_schedule(config, 50)) == "ddim, timesteps 980 960 ... 0"
    assert "999 499.5 0" in str(euler_ancestral_schedule({**config, "timestep_spacing": "linspace"}, 3))
    assert np.isclose(euler_ancestral_schedule({**config, "timestep_spacing": "leading"}, 4).start_scale, 1)


def test_a_network_that_knows_only_the_mean_draws_less_spread_with_noise_than_without() -> None:
    # Gaussian data of variance 1: eps = sqrt(1 - ab_t) x_t is the mean of the noise, so states stay Gaussian.
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    schedule = euler_ancestral_schedule(scheduler.config, 4)
    sigmas = scheduler.sigmas.double().tolist()
    without, ancestral = sigmas[0] ** 2, schedule.start_scale**2  # variances of the states of Euler, and of ours
    for k, (a, b, z) in enumerate(schedule.coefficients.tolist()):
        noise = (sigmas[k] ** 2 / (sigmas[k] ** 2 + 1)) ** 0.5
        ancestral = (a + b * noise) ** 2 * ancestral + z**2
        without *= (1 + (sigmas[k + 1] - sigmas[k]) * sigmas[k] / (sigmas[k] ** 2 + 1)) ** 2
    assert (without**0.5, ancestral**0.5) == (pytest.approx(0.7046, abs=1e-4), pytest.approx(0.6339, abs=1e-4))
