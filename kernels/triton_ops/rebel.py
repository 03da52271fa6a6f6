"""The residual of REBEL for pairs of trajectories, and its gradient, in one launch.

residual = (d(y) - d(y')) / eta - (r(y) - r(y')),    d = sum over the K actions of log_prob - log_prob_old
gradient of mean(residual^2) in each log_prob of y: 2 residual / (P eta); in each log_prob of y': its negative
"""

# P pairs in neighbouring rows, K actions

# pyright: reportArgumentType=false, reportCallIssue=false
# The annotations belong to the kernel: a launch passes numbers for its constexpr.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlcm_fast.kernels.triton_ops.launches import EXACT

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


@triton.jit
def _rebel_kernel(
    log_prob, log_prob_old, rewards, residual, gradient, num_pairs, num_actions, eta, block: tl.constexpr
):  # fmt: skip
    pairs = tl.program_id(0) * block + tl.arange(0, block)
    inside = pairs < num_pairs
    first, second = 2 * pairs, 2 * pairs + 1
    moved = _moved(log_prob, log_prob_old, first, inside, num_actions)
    moved -= _moved(log_prob, log_prob_old, second, inside, num_actions)
    better = tl.load(rewards + first, mask=inside, other=0.0).to(tl.float32)
    better -= tl.load(rewards + second, mask=inside, other=0.0).to(tl.float32)
    value = tl.div_rn(moved, tl.zeros_like(moved) + eta) - better
    weight = tl.div_rn(2.0 * value, tl.zeros_like(value) + num_pairs * eta)
    tl.store(residual + pairs, value, mask=inside)
    tl.store(gradient + first, weight, mask=inside)
    tl.store(gradient + second, -weight, mask=inside)


@torch.library.custom_op("rlcm_fast::rebel_residual", mutates_args=())
def rebel_residual(log_prob: Tensor, log_prob_old: Tensor, rewards: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Residual (P,) and gradient (2 P,), float32."""
    num_pairs, num_actions = len(log_prob) // 2, log_prob.shape[1]
    residual = log_prob.new_empty(num_pairs, dtype=torch.float32)
    gradient = log_prob.new_empty(2 * num_pairs, dtype=torch.float32)
    _rebel_kernel[(triton.cdiv(num_pairs, _BLOCK),)](
        log_prob.contiguous(), log_prob_old.contiguous(), rewards.contiguous(), residual, gradient,
        num_pairs, num_actions, eta, block=_BLOCK, **EXACT,
    )  # fmt: skip
    return residual, gradient


@rebel_residual.register_fake
def _(log_prob, log_prob_old, rewards, eta):
    num_rows = log_prob.shape[0]
    return log_prob.new_empty(num_rows // 2, dtype=torch.float32), log_prob.new_empty(num_rows, dtype=torch.float32)
