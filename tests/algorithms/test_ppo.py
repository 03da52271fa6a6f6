from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcm_fast.algorithms import PPO

CLIP = 0.1


def loss_and_gradient(ppo: PPO, log_ratio: list[float], advantages: list[float]) -> tuple[float, torch.Tensor]:
    log_prob = torch.tensor(log_ratio, requires_grad=True)
    loss, _ = ppo.loss(log_prob, torch.zeros(len(log_ratio)), torch.tensor(advantages))
    loss.backward()
    assert log_prob.grad is not None
    return loss.item(), log_prob.grad


@given(advantages=st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=8), on_policy=st.booleans())
@settings(deadline=None)
def test_at_ratio_one_the_gradient_is_minus_the_advantage_over_n(advantages: list[float], on_policy: bool):
    log_prob = torch.linspace(-3, 1, len(advantages)).requires_grad_()
    old = None if on_policy else log_prob.detach().clone()
    values = torch.tensor(advantages)
    loss, stats = PPO().loss(log_prob, old, values)
    loss.backward()
    torch.testing.assert_close(log_prob.grad, -values / len(advantages))
    assert loss.item() == pytest.approx(-values.mean().item(), abs=1e-6)
    assert stats.ratio_mean == 1 and stats.ratio_max_deviation == 0
    assert stats.clip_fraction == 0 and stats.approx_kl == 0


@pytest.mark.parametrize(("log_ratio", "advantage"), [(0.2, 2.0), (-0.2, -2.0)])
def test_beyond_the_clip_range_in_the_favoured_direction_nothing_is_learned(log_ratio: float, advantage: float):
    loss, gradient = loss_and_gradient(PPO(clip_range=CLIP), [log_ratio], [advantage])
    assert gradient.item() == 0
    assert loss == pytest.approx(-advantage * (1 + math.copysign(CLIP, log_ratio)))


@pytest.mark.parametrize(("log_ratio", "advantage"), [(0.2, -2.0), (-0.2, 2.0), (0.05, 2.0), (-0.05, -2.0)])
def test_the_way_back_and_the_inside_are_not_clipped(log_ratio: float, advantage: float):
    loss, gradient = loss_and_gradient(PPO(clip_range=CLIP), [log_ratio], [advantage])
    assert gradient.item() == pytest.approx(-advantage * math.exp(log_ratio), rel=1e-5)
    assert loss == pytest.approx(-advantage * math.exp(log_ratio), rel=1e-5)


def test_the_loss_is_the_mean_over_transitions():
    log_ratio, advantages = [0.2, -0.05, 0.0, -0.3], [1.0, -2.0, 3.0, 0.5]
    whole, gradient = loss_and_gradient(PPO(clip_range=CLIP), log_ratio, advantages)
    pairs = zip(log_ratio, advantages, strict=True)
    parts = [loss_and_gradient(PPO(clip_range=CLIP), [one], [other]) for one, other in pairs]
    assert whole == pytest.approx(sum(loss for loss, _ in parts) / 4, rel=1e-5)
    torch.testing.assert_close(gradient, torch.cat([part for _, part in parts]) / 4)


def test_advantages_are_clamped_before_a_steps_weight_counts():
    ppo = PPO(clip_range=CLIP, advantage_clip=10.0)
    signals = ppo.sample_weights(torch.tensor([50.0, -50.0])) * torch.tensor([1.0, 1.5])
    _, gradient = loss_and_gradient(ppo, [0.0, 0.0], signals.tolist())
    torch.testing.assert_close(gradient, torch.tensor([-5.0, 7.5]))


def test_a_step_along_the_gradient_raises_the_log_prob_of_what_was_good():
    _, gradient = loss_and_gradient(PPO(), [0.0, 0.0], [1.0, -1.0])
    moved = -0.1 * gradient
    assert moved[0] > 0 > moved[1]


def test_the_defaults_are_those_of_the_paper():
    assert PPO() == PPO(clip_range=1e-4, advantage_clip=10.0)


@pytest.mark.parametrize(
    ("field", "value"), [("clip_range", 0.0), ("clip_range", float("nan")), ("advantage_clip", -1.0)]
)
def test_a_range_that_is_not_positive_is_refused(field: str, value: float):
    with pytest.raises(ValueError, match=f"update.{field}={value} must be above 0"):
        PPO(**{field: value})
