"""What a scheduler's config says of the noise: alpha_bar, and how the network's output is read.

alpha_bar is that of diffusers in float32: these are the noise levels that networks are trained on, and near t = 0 their
rounding is 3e-5 of 1 - alpha_bar. All other numbers are computed from it once in float64.

Zero terminal SNR (rescale_betas_zero_snr) makes the last alpha_bar 0: x_T is pure noise. An output that predicts v or
x_0 still says what x_0 is; one that predicts the noise does not, so its step from there is refused.
"""

# S steps, T training timesteps

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

_NOT_AFFINE = {
    "clip_sample": "it clips x_0",
    "thresholding": "it clips x_0 at a quantile of its values",
}


def check_is_affine(config: Mapping[str, Any]) -> None:
    """Refuse what makes a step more than A x_t + B m + sigma z."""
    for key, reason in _NOT_AFFINE.items():
        if config.get(key, False):
            raise ValueError(
                f"scheduler config {key}={config[key]}: {reason}, so the step is no affine Gaussian, whose"
                f" log-probability is known; set {key} to false in scheduler_config.json of the model folder"
            )


def alpha_bars(config: Mapping[str, Any]) -> Array:
    """alpha_bar = cumprod(1 - beta) (T,), rounded to float32 as in diffusers, because networks are trained with it."""
    betas = _betas(config)
    if config.get("rescale_betas_zero_snr", False):
        betas = _with_zero_terminal_snr(betas)
    return torch.cumprod(1.0 - betas, dim=0).double().numpy()


def _betas(config: Mapping[str, Any]) -> Tensor:
    """Variances beta (T,) float32 of the training timesteps."""
    # Read them, if the config lists them.
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    missing = [key for key in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps") if key not in config]
    if missing:
        raise ValueError(
            f"scheduler config of {config.get('_class_name', 'unknown class')} has no {missing[0]}: it is not a"
            " variance-preserving diffusion schedule; use a model with an LCM, DDIM, PNDM, DPM-Solver or Euler one"
        )

    # Compute them from the name of their schedule.
    kind, num = config["beta_schedule"], config["num_train_timesteps"]
    start, end = config["beta_start"], config["beta_end"]
    if kind == "linear":
        return torch.linspace(start, end, num, dtype=torch.float32)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num, dtype=torch.float32) ** 2
    if kind == "squaredcos_cap_v2":
        bar = np.cos((np.arange(num + 1) / num + 0.008) / 1.008 * math.pi / 2) ** 2
        return torch.from_numpy(np.minimum(1.0 - bar[1:] / bar[:-1], 0.999)).float()
    raise ValueError(f"scheduler config beta_schedule={kind!r}; use linear, scaled_linear or squaredcos_cap_v2")


def _with_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that the first stays and the last is 0 (arXiv 2305.08891, algorithm 1)."""
    signal = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = signal[0].clone(), signal[-1].clone()
    alpha_bar = ((signal - last) * (first / (first - last))) ** 2
    return 1.0 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def prediction(config: Mapping[str, Any], alpha_bar: Array) -> tuple[Array, Array, Array, Array]:
    """Factors a_0, b_0, a_1, b_1, each (S,), in x_0 = a_0 x_t + b_0 m and eps = a_1 x_t + b_1 m."""
    kind = config.get("prediction_type", "epsilon")
    signal, noise = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
    zero, one = np.zeros_like(signal), np.ones_like(signal)
    if kind == "epsilon":
        if (alpha_bar == 0.0).any():
            raise ValueError(
                "scheduler config prediction_type=epsilon with rescale_betas_zero_snr=true: at the last training"
                " timestep the state is pure noise, so the noise does not say what x_0 is (it divides by zero); give a"
                " model with prediction_type=v_prediction, or policy.timesteps that begin lower"
            )
        return 1.0 / signal, -noise / signal, zero, one
    if kind == "v_prediction":
        return signal, -noise, noise, signal
    if kind == "sample":
        return zero, one, 1.0 / noise, -signal / noise
    raise ValueError(f"scheduler config prediction_type={kind!r}; use epsilon, v_prediction or sample")
