"""A last step that draws the image (policy.last_step=sampled), and weights that make every step pull alike."""

from __future__ import annotations

import pytest
import torch
from tiny_policies import SCHEDULER, UNET_CONFIG, TinyNetwork, encode, prompts
from torch import Tensor

from rlcm_fast.config import PolicyConfig
from rlcm_fast.policies import GaussianPolicy, Network, build_policy
from rlcm_fast.stages.selection import step_weights

NUM_SAMPLES, SIGMA = 6, 0.2
LCM = {**SCHEDULER, "_class_name": "LCMScheduler"}


def policy_of(last_step: str, num_steps: int = 3) -> GaussianPolicy:
    config = PolicyConfig(num_steps=num_steps, last_step=last_step, last_sigma=SIGMA)  # pyright: ignore[reportArgumentType]
    return build_policy(config, Network(TinyNetwork(), UNET_CONFIG), LCM)


def sample(policy: GaussianPolicy, **keywords: bool) -> tuple[Tensor, Tensor]:
    """(states, x_0)"""
    conditioning = encode(prompts(NUM_SAMPLES))
    trajectory, x_0 = policy.sample(conditioning, torch.Generator().manual_seed(2), **keywords)
    return trajectory.latents, x_0


def test_the_image_is_the_last_state_and_lies_around_the_deterministic_one():
    states, x_0 = sample(policy_of("sampled"))
    plain, mean = sample(policy_of("deterministic"))
    assert torch.equal(states[:, :3], plain) and torch.equal(states[:, 3], x_0)
    noise = (x_0 - mean) / SIGMA
    assert abs(noise.mean().item()) < 0.1 and noise.std().item() == pytest.approx(1, abs=0.05)  # 1536 numbers


def test_evaluations_draw_the_image_without_its_noise():
    _, x_0 = sample(policy_of("sampled"), explores=False)
    _, mean = sample(policy_of("deterministic"))
    assert torch.equal(x_0, mean)


def test_its_log_prob_is_that_of_the_noise_and_trains_the_last_output():
    policy = policy_of("sampled", num_steps=1)  # one step, which no other last step can train
    trajectory, x_0 = policy.sample(encode(prompts(NUM_SAMPLES)), torch.Generator().manual_seed(2))
    _, mean = sample(policy, explores=False)
    closed = torch.distributions.Normal(mean, SIGMA).log_prob(x_0).flatten(1).mean(dim=1)
    torch.testing.assert_close(trajectory.log_probs[:, 0], closed, rtol=1e-5, atol=1e-5)
    log_prob = policy.log_prob(trajectory.transitions(torch.arange(NUM_SAMPLES)))
    torch.testing.assert_close(log_prob, trajectory.log_probs[:, 0])
    log_prob.sum().backward()
    gradient = policy.unet.of_state.weight.grad  # pyright: ignore[reportFunctionMemberAccess]
    assert gradient.abs().sum() > 0


def test_step_weights_undo_what_each_step_moves_by_the_networks_output():
    schedule = policy_of("sampled").schedule
    assert step_weights(schedule, "equal").tolist() == [1.0, 1.0, 1.0]
    weights = step_weights(schedule, "sensitivity")
    _, b, sigma = schedule.coefficients.T
    pulls = weights * (b / sigma).abs()
    assert weights.mean().item() == pytest.approx(1)
    torch.testing.assert_close(pulls, pulls[:1].expand(3))
    assert not torch.allclose(weights, torch.ones(3), atol=0.1)
