"""Schedules of distilled models that are no consistency models: Euler ancestral (Turbo, Lightning) and TCD (Hyper-SD).

    Euler ancestral   with s_t = sqrt((1 - alpha_bar_t) / alpha_bar_t) and the next level s_s, which ends at 0:
                      up = s_s sqrt(1 - s_s^2 / s_t^2), down = s_s^2 / s_t
                      x_s = sqrt(alpha_bar_s) (x_0 + down eps + up z)
    TCD(gamma)        with r = floor((1 - gamma) s), a timestep below the next timestep s:
                      x_r = sqrt(alpha_bar_r) x_0 + sqrt(1 - alpha_bar_r) eps
                      x_s = sqrt(alpha_bar_s / alpha_bar_r) x_r + sqrt(1 - alpha_bar_s / alpha_bar_r) z

(Ancestral steps: DDPM, arXiv 2006.11239, as k-diffusion writes them; TCD: 2402.19159, algorithm 4.) Both are affine in
x_t and m, because x_0 and eps are. diffusers' Euler schedulers keep x_t / sqrt(alpha_bar_t) and scale it before each
call of the network; here a state is what the network sees, so states are theirs times sqrt(alpha_bar_t), and the image,
where alpha_bar is 1, is the same. The first state has their standard deviation: sqrt(1 - alpha_bar_t) with trailing or
linspace spacing, 1 with leading.

A folder with EulerDiscreteScheduler (SDXL-Lightning, SD-Turbo) names a sampler without noise, which has no
log-probability. It gets the ancestral step. The two have the same marginals: given x_0, both map N(sqrt(alpha_bar_t)
x_0, 1 - alpha_bar_t) to N(sqrt(alpha_bar_s) x_0, 1 - alpha_bar_s), whatever the timesteps. So the network sees states
of the noise level that it was distilled for. Measured on the tables at 1 to 50 steps: mean and variance agree within
2e-7 (tests/policies/test_few_step_schedules.py). With one step both are the same map. For a network whose x_0 is only
the mean of the data they differ: from Gaussian data of variance 1, four steps draw a standard deviation of .705 without
noise and .634 with it.

Departures from diffusers:
 1. Euler ends at alpha_bar = 1 whatever set_alpha_to_one says, as diffusers' Euler schedulers do, which ignore it.
 2. prediction_type=sample works for Euler ancestral (SDXL-Lightning's one-step UNet); diffusers has it for Euler only.
 3. Sigmas that are no training timesteps' (use_karras_sigmas and the like) are refused: no ancestral scheduler of
    diffusers has them.
"""

# S steps, T training timesteps

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlcm_fast.policies.noise_schedule import alpha_bars, prediction
from rlcm_fast.policies.schedules import Schedule, check, check_eta, schedule_of
from rlcm_fast.policies.timesteps import distilled_timesteps, named_timesteps, spaced_timesteps

_LAST_ALPHA_BAR = 2.0**-24  # of diffusers' Euler schedulers with zero terminal SNR, against an infinite sigma
_OTHER_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "timestep_type": "discrete",
    "interpolation_type": "linear",
    "final_sigmas_type": "zero",
}


def euler_ancestral_schedule(
    scheduler_config: Mapping[str, Any],
    num_steps: int,
    last_step: str = "deterministic",
    timesteps: Sequence[int] = (),
) -> Schedule:
    """Schedule of ancestral Euler sampling for the config of an EulerAncestralDiscrete- or EulerDiscreteScheduler."""
    check(scheduler_config, num_steps, last_step)
    _refuse_renoise("euler_ancestral", last_step)
    for key, usual in _OTHER_SIGMAS.items():
        if scheduler_config.get(key, usual) not in (usual, None):
            raise ValueError(
                f"scheduler config {key}={scheduler_config[key]}: these noise levels are not those of training"
                f" timesteps, which EulerAncestralDiscreteScheduler needs; set {key} to {str(usual).lower()} in"
                " scheduler_config.json of the model folder, or use policy.kind=ddim"
            )

    # Find the timesteps and their noise levels.
    alpha_bar = alpha_bars(scheduler_config)
    if scheduler_config.get("rescale_betas_zero_snr", False):
        alpha_bar[-1] = _LAST_ALPHA_BAR
    t = _euler_timesteps(scheduler_config, len(alpha_bar), num_steps, timesteps)
    s_t = np.interp(t, np.arange(len(alpha_bar)), np.sqrt((1.0 - alpha_bar) / alpha_bar))
    s_s = np.append(s_t[1:], 0.0)

    # Make the table.
    a_0, b_0, a_1, b_1 = prediction(scheduler_config, 1.0 / (1.0 + s_t**2))
    up, down = s_s * np.sqrt(1.0 - (s_s / s_t) ** 2), s_s**2 / s_t
    table = np.stack([a_0 + down * a_1, b_0 + down * b_1, up], axis=1) / np.sqrt(1.0 + s_s**2)[:, None]  # (S, 3)
    schedule = schedule_of("euler_ancestral", t, table, table[-1], scheduler_config)
    is_leading = _spacing(scheduler_config) == "leading"
    return replace(schedule, start_scale=1.0 if is_leading else float(s_t[0] / np.sqrt(1.0 + s_t[0] ** 2)))


def tcd_schedule(
    scheduler_config: Mapping[str, Any],
    num_steps: int,
    gamma: float = 0.3,
    last_step: str = "deterministic",
    timesteps: Sequence[int] = (),
) -> Schedule:
    """Schedule of strategic stochastic sampling for a TCDScheduler config; gamma in [0, 1] is its eta."""
    check(scheduler_config, num_steps, last_step)
    check_eta(gamma)
    _refuse_renoise("tcd", last_step)

    # Find the timesteps and their noise levels; the last step ends at timestep 0.
    alpha_bar = alpha_bars(scheduler_config)
    t = distilled_timesteps(scheduler_config, len(alpha_bar), num_steps, timesteps)
    if len(t) > 1 and t[-1] == 0:
        raise ValueError(
            f"policy.timesteps={t.tolist()} ends at 0, where tcd arrives without noise, so the step before the last is"
            " no action; end above 0"
        )
    s = np.append(t[1:], 0)
    r = np.floor(np.float32(1.0 - gamma) * s.astype(np.float32)).astype(np.int64)  # in float32, as diffusers
    ab_s, ab_r = alpha_bar[s], alpha_bar[r]

    # Make the table.
    a_0, b_0, a_1, b_1 = prediction(scheduler_config, alpha_bar[t])
    signal, noise, kept = np.sqrt(ab_r), np.sqrt(1.0 - ab_r), np.sqrt(ab_s / ab_r)
    table = np.stack(
        [kept * (signal * a_0 + noise * a_1), kept * (signal * b_0 + noise * b_1), np.sqrt(1.0 - ab_s / ab_r)], axis=1
    )  # (S, 3)
    return schedule_of("tcd", t, table, table[-1], scheduler_config)


def _euler_timesteps(
    config: Mapping[str, Any], num_train: int, num_steps: int, timesteps: Sequence[int]
) -> NDArray[Any]:
    """Timesteps (S,) int64, or float32 with fractions: Euler's linspace, unlike DDIM's, does not round."""
    if timesteps:
        return named_timesteps(timesteps, num_train)
    spacing = _spacing(config)
    if spacing == "linspace":
        return np.linspace(0, num_train - 1, num_steps, dtype=np.float32)[::-1].copy()
    return spaced_timesteps({**config, "timestep_spacing": spacing}, num_train, num_steps)


def _spacing(config: Mapping[str, Any]) -> str:
    return config.get("timestep_spacing", "linspace")


def _refuse_renoise(kind: str, last_step: str) -> None:
    if last_step == "renoise":
        raise ValueError(
            f"policy.last_step=renoise, but the last step of {kind} has no noise to keep; use deterministic, or sampled"
            " to train it too"
        )
