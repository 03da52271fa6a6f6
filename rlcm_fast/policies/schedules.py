"""Schedules: every sampler here is a table of x_s = A x_t + B m + sigma z, with one row per step.

alpha_bar_t is cumprod(1 - beta). The prediction type reads the network output m as x_0 = a_0 x_t + b_0 m and
eps = a_1 x_t + b_1 m. With the next timestep s:

    consistency   f = c_skip x_t + c_out x_0;  x_s = sqrt(alpha_bar_s) f + sqrt(1 - alpha_bar_s) z
                  c_skip = .25 / ((k t)^2 + .25), c_out = k t / sqrt((k t)^2 + .25), k = timestep_scaling
    DDIM(eta)     x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma z
                  sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)

(LCM: arXiv 2310.04378; DDIM: 2010.02502, eq. 12 and 16; few_step_schedules.py has Euler ancestral and TCD.) Numbers are
computed once in float64 and kept in float32. Timesteps are those of diffusers' LCMScheduler and DDIMScheduler, or those
that the config names. DDIMScheduler's include a step to t - T // S even if that is not the next timestep, because S
does not divide T; between named timesteps a step goes to the next one, and the last one to the image.

By default the last step is deterministic and makes the image, so it is no action. It becomes an action in these cases:
 - `with_sampled_image`: it draws the image itself, with a small sigma that no scheduler has.
 - last_step="renoise", consistency: it follows the paper literally. The action re-noises f to the level of its t, and
   the image is decoded from f.
 - last_step="renoise", DDIM: it keeps the last noise of the scheduler, which exists if set_alpha_to_one is false and
   eta is not 0.

Departures from diffusers:
 1. In DDIM the image is the MEAN of the last step, even if diffusers adds noise to it (as in folders of Stable
    Diffusion with eta = 1, where sigma = .02 in the latent).
 2. DDIM also samples folders with another noise scheduler (Stable Diffusion comes with PNDM, others with DPM-Solver or
    Euler). It uses only their betas, prediction type, timestep spacing, steps_offset and set_alpha_to_one.
 3. What is not affine or divides by zero is refused (noise_schedule.py).
 4. steps_offset comes from the folder; StableDiffusionPipeline (but not DDIMScheduler) overwrites it with 1.
"""

# S steps, K actions, T training timesteps

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlcm_fast.policies.noise_schedule import Array, alpha_bars, check_is_affine, prediction
from rlcm_fast.policies.timesteps import distilled_timesteps, named_timesteps, origin_timesteps, spaced_timesteps

_SIGMA_DATA = 0.5


@dataclass(frozen=True)
class NoiseLevels:
    """Noise levels that the network was trained on, for every sampler: one row for each of the T training timesteps."""

    signal: Tensor  # (T,) float32, sqrt(alpha_bar): x_t = signal x_0 + noise eps
    noise: Tensor  # (T,) float32, sqrt(1 - alpha_bar)
    target: Tensor  # (T, 2) float32, factors of x_0 and eps: the ideal output by prediction type
    consistency: Tensor  # (T, 2) float32, factors of x_t and m: the consistency function f
    origin_timesteps: Tensor  # (O,) int64, rising: the timesteps that a consistency model was distilled on

    def to(self, device: torch.device | str) -> NoiseLevels:
        return NoiseLevels(**{name: table.to(device) for name, table in vars(self).items()})


@dataclass(frozen=True)
class Schedule:
    """Steps of a sampler, noisiest first; the first `num_actions` of them are actions."""

    kind: str  # of policy.kind, without auto
    timesteps: Tensor  # (S,) int64; float32 if a scheduler spaces them in fractions
    coefficients: Tensor  # (S, 3) float32, A, B, sigma of each step
    image_coefficients: Tensor  # (3,) float32, A, B, 0: the image's latent from the state before the last step
    num_actions: int  # K: S - 1 if the last step is deterministic, otherwise S; 0 for DDIM with eta = 0
    levels: NoiseLevels
    image_is_action: bool = False  # the image is the state that the last action draws, not its mean
    start_scale: float = 1.0  # the standard deviation of the first state

    @property
    def num_steps(self) -> int:
        return self.timesteps.shape[0]

    def to(self, device: torch.device | str) -> Schedule:
        return replace(
            self,
            timesteps=self.timesteps.to(device),
            coefficients=self.coefficients.to(device),
            image_coefficients=self.image_coefficients.to(device),
            levels=self.levels.to(device),
        )

    def __str__(self) -> str:
        """Returns the kind and the timesteps; of many the first and the last."""
        named = [f"{t:g}" for t in self.timesteps.tolist()]
        shown = named if len(named) <= 16 else [*named[:2], "...", named[-1]]
        return f"{self.kind}, timesteps {' '.join(shown)}"

    def with_sampled_image(self, sigma: float) -> Schedule:
        """Turn the last step, which must have no noise, into an action that draws the image around its mean."""
        assert self.coefficients[-1, 2] == 0.0
        coefficients = self.coefficients.clone()
        coefficients[-1, 2] = sigma
        return replace(self, coefficients=coefficients, num_actions=self.num_steps, image_is_action=True)

    def require_actions(self) -> None:
        """Refuse to train a schedule without actions."""
        if self.num_actions == 0:
            raise ValueError(
                f"policy.num_steps={self.num_steps} has no action to train: the last step makes the image and is"
                " deterministic (sigma = 0, so it has no log-probability), and so is every step of DDIM with eta=0; use"
                " policy.num_steps >= 2 (and policy.eta > 0 for DDIM), or policy.last_step=renoise"
            )


def consistency_schedule(
    scheduler_config: Mapping[str, Any],
    num_steps: int,
    last_step: str = "deterministic",
    timesteps: Sequence[int] = (),
) -> Schedule:
    """Schedule of multistep consistency sampling for an LCMScheduler config; `timesteps` replaces its own."""
    check(scheduler_config, num_steps, last_step)
    alpha_bar = alpha_bars(scheduler_config)
    t = distilled_timesteps(scheduler_config, len(alpha_bar), num_steps, timesteps)
    f = _consistency_function(scheduler_config, alpha_bar[t], t)  # (S, 2)
    level = alpha_bar[np.append(t[1:], t[-1])]  # the last step returns to its own level
    table = np.concatenate([np.sqrt(level)[:, None] * f, np.sqrt(1.0 - level)[:, None]], axis=1)
    image = np.append(f[-1], 0.0)
    if last_step == "deterministic":
        table[-1] = image
    return schedule_of("consistency", t, table, image, scheduler_config)


def ddim_schedule(
    scheduler_config: Mapping[str, Any],
    num_steps: int,
    eta: float = 1.0,
    last_step: str = "deterministic",
    timesteps: Sequence[int] = (),
) -> Schedule:
    """Schedule of DDIM(eta), eta in [0, 1], for the config of a DDIM, PNDM, DPM-Solver or Euler scheduler."""
    check(scheduler_config, num_steps, last_step)
    check_eta(eta)

    # Find the timesteps and their noise levels.
    alpha_bar = alpha_bars(scheduler_config)
    if timesteps:
        t = named_timesteps(timesteps, len(alpha_bar))
        s = np.append(t[1:], -1)
    else:
        t = spaced_timesteps(scheduler_config, len(alpha_bar), num_steps)
        s = t - len(alpha_bar) // num_steps
    final = 1.0 if scheduler_config.get("set_alpha_to_one", True) else alpha_bar[0]
    ab_t, ab_s = alpha_bar[t], np.where(s >= 0, alpha_bar[np.maximum(s, 0)], final)

    # Make the table.
    a_0, b_0, a_1, b_1 = prediction(scheduler_config, ab_t)
    sigma = eta * np.sqrt((1.0 - ab_s) / (1.0 - ab_t) * (1.0 - ab_t / ab_s))
    direction = np.sqrt(np.maximum(1.0 - ab_s - sigma**2, 0.0))
    table = np.stack(
        [np.sqrt(ab_s) * a_0 + direction * a_1, np.sqrt(ab_s) * b_0 + direction * b_1, sigma], axis=1
    )  # (S, 3)

    # Let the last step make the image, with or without noise.
    image = table[-1] * np.array([1.0, 1.0, 0.0])
    if last_step == "deterministic":
        table[-1] = image
    elif table[-1, 2] == 0.0:
        raise ValueError(
            "policy.last_step=renoise, but the last step of this DDIM schedule has no noise (eta=0 or"
            " set_alpha_to_one=true); use policy.last_step=deterministic"
        )
    return schedule_of("ddim", t, table, image, scheduler_config)


def _consistency_function(config: Mapping[str, Any], alpha_bar: Array, t: NDArray[np.int64]) -> Array:
    """Factors (S, 2) of x_t and m in f = c_skip x_t + c_out x_0, at timesteps t (S,) with alpha_bar (S,)."""
    a_0, b_0, _, _ = prediction(config, alpha_bar)
    scaled = t * float(config.get("timestep_scaling", 10.0))
    c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    c_out = scaled / np.sqrt(scaled**2 + _SIGMA_DATA**2)
    return np.stack([c_skip + c_out * a_0, c_out * b_0], axis=1)


def schedule_of(
    kind: str, t: NDArray[Any], table: Array, image: Array, scheduler_config: Mapping[str, Any]
) -> Schedule:
    """Schedule of a table (S, 3) whose steps with noise come first; image (3,) are the coefficients of the image."""
    is_action = table[:, 2] > 0.0
    num_actions = int(is_action.sum())
    assert is_action[:num_actions].all(), "a step without noise between actions"
    return Schedule(
        kind,
        torch.from_numpy(np.ascontiguousarray(t)),
        torch.from_numpy(table).float(),
        torch.from_numpy(image).float(),
        num_actions,
        noise_levels(scheduler_config),
    )


def noise_levels(scheduler_config: Mapping[str, Any]) -> NoiseLevels:
    """Tables of all training timesteps."""
    alpha_bar = alpha_bars(scheduler_config)
    t = np.arange(len(alpha_bar))
    signal, noise = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
    zero, one = np.zeros_like(signal), np.ones_like(signal)
    kind = scheduler_config.get("prediction_type", "epsilon")
    target = {"epsilon": (zero, one), "v_prediction": (-noise, signal), "sample": (one, zero)}[kind]
    # At zero terminal SNR f of an eps-prediction is infinite; no loss and no step reads that row.
    not_zero = np.where(alpha_bar > 0.0, alpha_bar, 2.0**-24)
    return NoiseLevels(
        torch.from_numpy(signal).float(),
        torch.from_numpy(noise).float(),
        torch.from_numpy(np.stack(target, axis=1)).float(),
        torch.from_numpy(_consistency_function(scheduler_config, not_zero, t)).float(),
        torch.from_numpy(origin_timesteps(scheduler_config, len(alpha_bar))),
    )


def check(config: Mapping[str, Any], num_steps: int, last_step: str) -> None:
    """Refuse values that no schedule can have, and a scheduler whose steps are not affine."""
    if last_step not in ("deterministic", "renoise"):
        raise ValueError(f"policy.last_step={last_step!r} is unknown; use deterministic or renoise")
    if num_steps < 1:
        raise ValueError(f"policy.num_steps={num_steps} must be at least 1")
    check_is_affine(config)


def check_eta(eta: float) -> None:
    """Refuse a share of noise outside [0, 1]."""
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"policy.eta={eta} is outside [0, 1]; use 1 for the noise of DDPM, 0 for none")
