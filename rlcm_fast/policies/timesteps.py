"""The training timesteps at which a sampler calls the network: those of diffusers' schedulers, or those you name."""

# S steps, T training timesteps, O timesteps of distillation

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Timesteps = NDArray[np.int64]


def named_timesteps(timesteps: Sequence[int], num_train: int) -> Timesteps:
    """Timesteps (S,) that a config names, which must fall and lie in [0, T)."""
    t = np.asarray(timesteps, dtype=np.int64)
    if t.max() >= num_train or t.min() < 0:
        raise ValueError(
            f"policy.timesteps={list(timesteps)} must lie in [0, {num_train - 1}], the timesteps that the model was"
            " trained on; give others"
        )
    if (np.diff(t) >= 0).any():
        raise ValueError(f"policy.timesteps={list(timesteps)} must fall from step to step, noisiest first")
    return t


def origin_timesteps(config: Mapping[str, Any], num_train: int) -> Timesteps:
    """Timesteps (O,), rising, that a consistency model was distilled on."""
    origin = int(config.get("original_inference_steps") or 50)
    return np.arange(1, origin + 1) * (num_train // origin) - 1


def distilled_timesteps(
    config: Mapping[str, Any], num_train: int, num_steps: int, named: Sequence[int] = ()
) -> Timesteps:
    """Choose S of the timesteps that the model was distilled on, evenly spaced, noisiest first; or take the named."""
    if named:
        return named_timesteps(named, num_train)
    origin = origin_timesteps(config, num_train)[::-1]
    if num_steps > len(origin):
        raise ValueError(
            f"policy.num_steps={num_steps} is above the {len(origin)} steps that the model was distilled on; use"
            f" {len(origin)} or fewer"
        )
    return origin[np.floor(np.linspace(0, len(origin), num_steps, endpoint=False)).astype(np.int64)]


def spaced_timesteps(config: Mapping[str, Any], num_train: int, num_steps: int) -> Timesteps:
    """Space S timesteps evenly as DDIMScheduler does, noisiest first."""
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "leading":
        t = np.arange(num_steps)[::-1] * (num_train // num_steps) + int(config.get("steps_offset", 0))
    elif spacing == "trailing":
        t = np.round(np.arange(num_train, 0, -num_train / num_steps)).astype(np.int64) - 1
    elif spacing == "linspace":
        t = np.linspace(0, num_train - 1, num_steps).round()[::-1].astype(np.int64)
    else:
        raise ValueError(f"scheduler config timestep_spacing={spacing!r}; use leading, trailing or linspace")
    if len(t) != num_steps or t[0] >= num_train:
        raise ValueError(
            f"policy.num_steps={num_steps} does not fit {num_train} training timesteps with timestep_spacing={spacing};"
            " use fewer steps, e.g. 50"
        )
    return t
