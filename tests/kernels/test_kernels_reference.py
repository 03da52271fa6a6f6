"""The ops against torch.distributions, against closed forms, and by gradcheck in float64."""

# N rows, C H W latent

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from rlcm_fast.kernels import functional

N, SHAPE = 4, (4, 3, 5, 7)


def inputs(dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, m, x_next = (torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    coef = torch.rand(N, 3, generator=generator, dtype=torch.float64) + 0.3
    return x, m.requires_grad_(requires_grad), x_next, coef


def normal(x: Tensor, m: Tensor, coef: Tensor) -> Normal:
    a, b, sigma = (coef[:, i].view(-1, 1, 1, 1).double() for i in range(3))
    return Normal(a * x.double() + b * m.double(), sigma)


def test_log_prob_is_the_mean_of_normal_densities() -> None:
    x, m, x_next, coef = inputs()
    expected = normal(x, m, coef).log_prob(x_next).mean(dim=(1, 2, 3))
    torch.testing.assert_close(functional.gaussian_log_prob(x, m, x_next, coef), expected, rtol=1e-12, atol=1e-12)


def test_kl_is_that_of_torch_distributions() -> None:
    x, m, m_ref, coef = inputs()
    expected = kl_divergence(normal(x, m, coef), normal(x, m_ref, coef)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(functional.gaussian_kl(m, m_ref, coef), expected, rtol=1e-12, atol=1e-12)


def test_a_step_is_mean_plus_noise_with_its_own_log_prob_bitwise() -> None:
    x, m, noise, coef = inputs(torch.float32)
    x_next, log_prob = functional.gaussian_step(x, m, coef.float(), noise)
    distribution = normal(x, m, coef.float())
    torch.testing.assert_close(x_next.double(), distribution.mean + distribution.stddev * noise, rtol=1e-6, atol=1e-6)
    assert torch.equal(log_prob, functional.gaussian_log_prob(x, m, x_next, coef.float()))
    without_mean = -0.5 * noise.square().mean(dim=(1, 2, 3)) - coef[:, 2].log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(log_prob.double(), without_mean, rtol=1e-5, atol=1e-5)


def test_rows_without_noise_give_the_mean_and_log_prob_zero() -> None:
    x, m, noise, coef = inputs(torch.float32)
    coef = coef.float()
    coef[1, 2] = 0.0
    x_next, log_prob = functional.gaussian_step(x, m, coef, noise)
    assert torch.equal(x_next[1], functional.gaussian_mean(x, m, coef)[1])
    assert log_prob[1] == 0.0 and (log_prob[[0, 2, 3]] != 0.0).all() and log_prob.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_float32_and_exact_for_inputs_of_lower_precision(dtype: torch.dtype) -> None:
    x, m, x_next, coef = inputs(dtype)
    coef = coef.float()
    log_prob = functional.gaussian_log_prob(x, m, x_next, coef)
    expected = normal(x, m, coef).log_prob(x_next.double()).mean(dim=(1, 2, 3))
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob.double(), expected, rtol=2e-6, atol=2e-6)
    assert functional.gaussian_kl(m, x, coef).dtype == torch.float32
    assert all(result.dtype == torch.float32 for result in functional.gaussian_step(x, m, coef, x_next))


def test_gradients_hold_in_float64() -> None:
    x, m, x_next, coef = inputs(requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: functional.gaussian_log_prob(x, m, x_next, coef), (m,))
    assert torch.autograd.gradcheck(lambda m: functional.gaussian_kl(m, x_next, coef), (m,))
    assert torch.autograd.gradcheck(lambda m: functional.gaussian_mean(x, m, coef), (m,))
    every = tuple(tensor.detach().requires_grad_(True) for tensor in (x, m, x_next, coef))
    assert torch.autograd.gradcheck(functional.gaussian_log_prob, every)


# rows: ratio inside the range, above and below it, each with both signs of the advantage
ADVANTAGES = torch.tensor([1.5, -2.0, 1.0, -1.0, 0.7, -0.3], dtype=torch.float64)
LOG_RATIO = torch.tensor([0.05, -0.05, 0.4, 0.5, -0.4, -0.6], dtype=torch.float64)


def test_the_clipped_loss_is_ppo_row_by_row() -> None:
    old = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
    loss, stats = functional.clipped_ratio_loss(old + LOG_RATIO, old, ADVANTAGES, 0.1, 10.0)
    rows = []
    for log_ratio, a in zip(LOG_RATIO.tolist(), ADVANTAGES.tolist(), strict=True):
        rho = math.exp(log_ratio)
        rows.append(max(-a * rho, -a * min(max(rho, 0.9), 1.1)))
    assert loss.item() == pytest.approx(sum(rows) / 6, rel=1e-12)
    rho = LOG_RATIO.exp()
    assert stats.ratio_mean.item() == pytest.approx(rho.mean().item(), rel=1e-12)
    assert stats.ratio_max_deviation.item() == pytest.approx((rho - 1).abs().max().item(), rel=1e-12)
    assert stats.clip_fraction.item() == pytest.approx(4 / 6)
    assert stats.approx_kl.item() == pytest.approx((rho - 1 - LOG_RATIO).mean().item(), rel=1e-12)


def test_the_clipped_loss_has_gradient_exactly_where_the_clip_does_not_bind() -> None:
    old = torch.zeros(6, dtype=torch.float64)
    log_prob = LOG_RATIO.clone().requires_grad_(True)
    functional.clipped_ratio_loss(log_prob, old, ADVANTAGES, 0.1, 10.0)[0].backward()
    binds = torch.tensor([False, False, True, False, False, True])
    torch.testing.assert_close(log_prob.grad, torch.where(binds, 0.0, -ADVANTAGES * LOG_RATIO.exp() / 6))
    assert torch.autograd.gradcheck(
        lambda p: functional.clipped_ratio_loss(p, old, ADVANTAGES, 0.1, 10.0)[0], (log_prob,)
    )


def test_on_policy_ratio_is_exactly_one_with_the_policy_gradient() -> None:
    log_prob = torch.randn(6).requires_grad_(True)
    loss, stats = functional.clipped_ratio_loss(log_prob, None, ADVANTAGES.float(), 1e-4, 10.0)
    loss.backward()
    assert stats.ratio_mean == 1.0 and stats.ratio_max_deviation == 0.0 and stats.approx_kl == 0.0
    torch.testing.assert_close(log_prob.grad, -ADVANTAGES.float() / 6)


def test_advantages_and_log_ratios_are_clamped() -> None:
    advantages = torch.tensor([100.0, -100.0])
    loss, _ = functional.clipped_ratio_loss(torch.zeros(2), torch.zeros(2), advantages, 0.1, 10.0)
    assert loss == 0.0
    loss, stats = functional.clipped_ratio_loss(torch.tensor([1e4, 1e4]), torch.zeros(2), -advantages, 0.1, 10.0)
    assert loss.isfinite() and stats.approx_kl.isfinite()
    assert loss.item() == pytest.approx((10.0 * math.exp(20.0) - 10.0 * 1.1) / 2, rel=1e-6)


def test_kl_estimate_is_right_for_ratios_as_close_to_one_as_the_paper_clips() -> None:
    log_ratio = torch.full((8,), 1e-4)
    _, stats = functional.clipped_ratio_loss(log_ratio, torch.zeros(8), torch.ones(8), 1e-4, 10.0)
    assert stats.approx_kl.item() == pytest.approx(0.5e-8, rel=2e-3)
