"""REBEL's residual against autograd, and the two passes against one, in torch and in Triton's interpreter."""

# P pairs, K actions

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlcm_fast.kernels import dispatch, functional
from rlcm_fast.kernels.triton_ops import rebel

ETA = 0.7


def pairs(num_pairs: int = 3, num_actions: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    log_prob, old = (torch.randn(2 * num_pairs, num_actions, generator=generator) for _ in range(2))
    return log_prob, old, torch.randn(2 * num_pairs, generator=generator)


def loss_of(log_prob: Tensor, old: Tensor, rewards: Tensor) -> Tensor:
    """The paper's, written out."""
    total = torch.zeros((), dtype=log_prob.dtype)
    for i in range(0, len(rewards), 2):
        d, d_other = (log_prob[i] - old[i]).sum(), (log_prob[i + 1] - old[i + 1]).sum()
        total = total + ((d - d_other) / ETA - (rewards[i] - rewards[i + 1])) ** 2
    return total / (len(rewards) // 2)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("num_pairs", [1, 3, 200])
def test_the_gradient_is_that_of_the_mean_squared_residual(kernels: str, num_pairs: int):
    log_prob, old, rewards = pairs(num_pairs)
    with dispatch.use(kernels):
        residual, gradient = functional.rebel_residual(log_prob, old, rewards, ETA)
    wide = log_prob.double().requires_grad_()
    loss = loss_of(wide, old.double(), rewards.double())
    torch.testing.assert_close(residual.double().square().mean(), loss.detach(), rtol=1e-5, atol=1e-6)
    (expected,) = torch.autograd.grad(loss, wide)
    torch.testing.assert_close(gradient.double()[:, None].expand(-1, 4), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_two_passes_give_the_gradient_of_one(kernels: str):
    generator = torch.Generator().manual_seed(1)
    x, x_next = (
        torch.randn(2, 3, 4, 2, 3, 3, generator=generator).flatten(0, 1) for _ in range(2)
    )  # 6 rows, 4 actions
    coef = torch.tensor([[0.8, 0.3, 0.5]]).expand(6, 3)
    weight = torch.tensor(0.4, requires_grad=True)  # of the "network" m = weight x
    rewards, old = torch.randn(6, generator=generator), torch.randn(6, 4, generator=generator)

    def log_prob(action: int) -> Tensor:
        return functional.gaussian_log_prob(x[:, action], weight * x[:, action], x_next[:, action], coef)

    with dispatch.use("torch"):
        one_pass = loss_of(torch.stack([log_prob(k) for k in range(4)], dim=1), old, rewards)
        (expected,) = torch.autograd.grad(one_pass, weight)
    with dispatch.use(kernels):
        with torch.no_grad():
            every = torch.stack([log_prob(k) for k in range(4)], dim=1)
        _, gradient = functional.rebel_residual(every, old, rewards, ETA)
        for k in range(4):
            (gradient * log_prob(k)).sum().backward()
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_rows_that_are_no_pairs_are_refused():
    log_prob, old, rewards = pairs()
    for arguments in (
        (log_prob[:5], old[:5], rewards[:5]),
        (log_prob, old[:, :3], rewards),
        (log_prob, old, rewards[:4]),
    ):
        with pytest.raises(ValueError, match="pairs in neighbouring rows"):
            functional.rebel_residual(*arguments, ETA)


def test_the_operator_passes_torchs_own_checks():
    torch.library.opcheck(rebel.rebel_operator, (*pairs(), ETA))
