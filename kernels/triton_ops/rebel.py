"""The residual of REBEL for pairs of trajectories, and its gradient, in one launch.

residual = (d(y) - d(y')) / eta - (r(y) - r(y')),    d = sum over the K actions of log_prob - log_prob_old
gradient of mean(residual^2) in each log_prob of y: 2 residual / (P eta); in each log_prob of y': its negative
"""

# P pairs in neighbouring rows, K actions

# pyright: reportArgumentType=false, reportCallIssue=false
# The annotations belong to the kernel: a launch passes numbers for its constexpr.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlcm_fast.kernels.triton_ops.launches import (
    is_traced,
    kernel,
    launch,
    operator,
    plan_for_rows,
    wrap_triton,
)

_BLOCK = 128


@triton.jit
def _moved(log_prob, log_prob_old, rows, inside, num_actions):
    """Sum of log_prob - log_prob_old over the actions of a trajectory, in order."""
    total = tl.zeros(rows.shape, dtype=tl.float32)
    for k in range(num_actions):
        new = tl.load(log_prob + rows * num_actions + k, mask=inside, other=0.0).to(tl.float32)
        old = tl.load(log_prob_old + rows * num_actions + k, mask=inside, other=0.0).to(tl.float32)
        total += new - old
    return total


@kernel
def _rebel_kernel(
    log_prob, log_prob_old, rewards, residual, gradient, eta, N, num_actions, block: tl.constexpr
):  # fmt: skip
    """N is the number of pairs."""
    pairs = tl.program_id(0) * block + tl.arange(0, block)
    inside = pairs < N
    first, second = 2 * pairs, 2 * pairs + 1
    moved = _moved(log_prob, log_prob_old, first, inside, num_actions)
    moved -= _moved(log_prob, log_prob_old, second, inside, num_actions)
    better = tl.load(rewards + first, mask=inside, other=0.0).to(tl.float32)
    better -= tl.load(rewards + second, mask=inside, other=0.0).to(tl.float32)
    value = tl.div_rn(moved, tl.zeros_like(moved) + eta) - better
    weight = tl.div_rn(2.0 * value, tl.zeros_like(value) + N * eta)
    tl.store(residual + pairs, value, mask=inside)
    tl.store(gradient + first, weight, mask=inside)
    tl.store(gradient + second, -weight, mask=inside)


def rebel_residual(log_prob: Tensor, log_prob_old: Tensor, rewards: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Residual (P,) and gradient (2 P,), from dense float32 tensors; call it without gradients."""
    if is_traced(log_prob, log_prob_old, rewards):
        return rebel_operator(log_prob, log_prob_old, rewards, eta)
    residual, gradient = _results(log_prob)
    num_pairs = residual.shape[0]
    plan = plan_for_rows("rebel", log_prob, triton.cdiv(num_pairs, _BLOCK), num_pairs, log_prob.shape[1], _BLOCK)
    launch(_rebel_kernel, plan, log_prob, log_prob_old, rewards, residual, gradient, eta)
    return residual, gradient


def _results(log_prob: Tensor) -> tuple[Tensor, Tensor]:
    return log_prob.new_empty(log_prob.shape[0] // 2), log_prob.new_empty(log_prob.shape[0])


@operator("rebel_residual")
def rebel_operator(log_prob: Tensor, log_prob_old: Tensor, rewards: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """`rebel_residual` for a tracer."""
    residual, gradient = _results(log_prob)
    num_pairs, num_actions = residual.shape[0], log_prob.shape[1]
    arguments = (log_prob, log_prob_old, rewards, residual, gradient, eta, num_pairs, num_actions)
    wrap_triton(_rebel_kernel)[(triton.cdiv(num_pairs, _BLOCK),)](*arguments, _BLOCK)
    return residual, gradient
