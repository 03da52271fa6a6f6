"""Whole loops of the tables against the sums that diffusers' own tests publish for its schedulers.

The network and the first state are those of diffusers' SchedulerCommonTest, written anew from their formulas: the
network multiplies its input by t / (t + 1), and the first state counts from 0 to 1 with the batch innermost. The sums
of absolute values are kept as numbers, with the tolerances that diffusers' tests have (1e-2, at ten steps and less).
"""

# B samples, C H W latent

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler, TCDScheduler
from torch import Tensor

from rlcm_fast.policies import (
    Schedule,
    consistency_schedule,
    ddim_schedule,
    euler_ancestral_schedule,
    tcd_schedule,
)

LINEAR: dict[str, Any] = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
SCALED: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def first_state() -> Tensor:
    """(B, C, H, W) = (4, 3, 8, 8): rising from 0 to 1, the batch innermost"""
    count = 4 * 3 * 8 * 8
    return (torch.arange(count).reshape(3, 8, 8, 4) / count).permute(3, 0, 1, 2)


def network(x: Tensor, t: float) -> Tensor:
    return x * t / (t + 1)


def loop(schedule: Schedule) -> Tensor:
    """The image of that network; noise is drawn as the schedulers do."""
    x, generator = first_state(), torch.Generator().manual_seed(0)
    for k, t in enumerate(schedule.timesteps.tolist()):
        a, b, sigma = schedule.coefficients[k]
        z = torch.randn(x.shape, generator=generator) if sigma > 0 else torch.zeros_like(x)
        x = a * x + b * network(x, t) + sigma * z
    return x


def assert_sum(image: Tensor, published: float) -> None:
    assert image.abs().sum().item() == pytest.approx(published, abs=1e-2)


@pytest.mark.parametrize(("num_steps", "published"), [(1, 18.7097), (10, 197.7616)])
def test_lcm_loops(num_steps: int, published: float) -> None:
    schedule = consistency_schedule(LCMScheduler(**SCALED).config, num_steps)
    assert_sum(loop(schedule), published)


@pytest.mark.parametrize(
    ("changes", "published"),
    [
        ({}, 172.0067),
        ({"prediction_type": "v_prediction"}, 52.5302),
        ({"set_alpha_to_one": True, "beta_start": 0.01}, 149.8295),
        ({"set_alpha_to_one": False, "beta_start": 0.01}, 149.0784),
    ],
    ids=str,
)
def test_ddim_loops(changes: dict[str, Any], published: float) -> None:
    scheduler = DDIMScheduler(**{**LINEAR, "clip_sample": False, **changes})
    assert_sum(loop(ddim_schedule(scheduler.config, 10, eta=0.0)), published)


@pytest.mark.parametrize(("num_steps", "published"), [(1, 29.8715), (10, 181.2040)])
def test_tcd_loops(num_steps: int, published: float) -> None:
    schedule = tcd_schedule(TCDScheduler(**SCALED).config, num_steps, gamma=0.0)
    assert_sum(loop(schedule), published)


@pytest.mark.parametrize(("prediction_type", "published"), [("epsilon", 152.3192), ("v_prediction", 108.4439)])
def test_euler_ancestral_loops(prediction_type: Any, published: float) -> None:
    # diffusers' test hands the state that it scaled for the network to `step`, too, so it is scaled once too often.
    scheduler = EulerAncestralDiscreteScheduler(num_train_timesteps=1100, prediction_type=prediction_type, **LINEAR)
    schedule = euler_ancestral_schedule(scheduler.config, 10)
    scheduler.set_timesteps(10)
    scale = (scheduler.sigmas**2 + 1).rsqrt()  # (S + 1,), from their states to ours
    x, generator = first_state() * scheduler.init_noise_sigma * scale[0], torch.Generator().manual_seed(0)
    for k, t in enumerate(schedule.timesteps.tolist()):
        a, b, sigma = schedule.coefficients[k]
        z = torch.randn(x.shape, generator=generator)
        x = a * x * scale[k] + b * network(x, t) + sigma * z
    assert_sum(x, published)
