"""What a scheduler's config says of the noise: alpha_bar, and how the network's output is read.

alpha_bar is that of diffusers in float32: these are the noise levels that networks are trained on, and near t = 0 their
rounding is 3e-5 of 1 - alpha_bar. All other numbers are computed from it once in float64.

Zero terminal SNR (rescale_betas_zero_snr) makes the last alpha_bar 0: x_T is pure noise. An output that predicts v or
x_0 still says what x_0 is; one that predicts the noise does not, so its step from there is refused.
"""

# S steps, T training timesteps

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

_CORRECT = "correct scheduler_config.json of the model folder"
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


def check_numbers(config: Mapping[str, Any]) -> None:
    """Refuse numbers that no schedule can have."""
    for key in ("num_train_timesteps", "original_inference_steps"):
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"scheduler config {key}={value} is no whole number from 1 on; {_CORRECT}")
    for key in ("beta_start", "beta_end"):
        value = config.get(key)
        if value is not None and not (isinstance(value, int | float) and 0.0 < value < 1.0):
            raise ValueError(f"scheduler config {key}={value} is not between 0 and 1; {_CORRECT}")
    scaling, offset = config.get("timestep_scaling", 10.0), config.get("steps_offset", 0)
    if not (isinstance(scaling, int | float) and 0.0 < scaling < math.inf):
        raise ValueError(f"scheduler config timestep_scaling={scaling} is no number above 0; {_CORRECT}")
    if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise ValueError(f"scheduler config steps_offset={offset} is no whole number from 0 on; {_CORRECT}")
    num_train, num_origin = config.get("num_train_timesteps"), config.get("original_inference_steps")
    if num_train is not None and num_origin is not None and num_origin > num_train:
        raise ValueError(
            f"scheduler config original_inference_steps={num_origin} is above num_train_timesteps={num_train};"
            f" {_CORRECT}"
        )


def alpha_bars(config: Mapping[str, Any]) -> Array:
    """alpha_bar = cumprod(1 - beta) (T,), rounded to float32 as in diffusers, because networks are trained with it."""
    check_numbers(config)
    betas = _betas(config)
    if not ((betas > 0.0) & (betas < 1.0)).all():  # NaN compares as False
        raise ValueError(f"scheduler config has betas that are not between 0 and 1; {_CORRECT}")
    if config.get("rescale_betas_zero_snr", False):
        betas = _with_zero_terminal_snr(betas)
    return torch.cumprod(1.0 - betas, dim=0).double().numpy()


def _betas(config: Mapping[str, Any]) -> Tensor:
    """Variances beta (T,) float32 of the training timesteps."""
    # Read them, if the config lists them.
    if config.get("trained_betas") is not None:
        return _trained_betas(config)
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


def _trained_betas(config: Mapping[str, Any]) -> Tensor:
    """Variances beta (T,) float32 that a config lists."""
    listed, num = config["trained_betas"], config.get("num_train_timesteps")
    is_list = isinstance(listed, Sequence | np.ndarray) and not isinstance(listed, str) and len(listed) > 0
    if not is_list or not all(isinstance(beta, int | float) for beta in listed):
        raise ValueError(f"scheduler config trained_betas={str(listed)[:40]} is no list of numbers; {_CORRECT}")
    if num not in (None, len(listed)):
        raise ValueError(
            f"scheduler config trained_betas lists {len(listed)} betas, and num_train_timesteps={num}; {_CORRECT}"
        )
    return torch.tensor(listed, dtype=torch.float32)


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
