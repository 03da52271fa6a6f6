"""Clipped loss of log-probabilities, or directly of network outputs, with its statistics in the same launch.

    rho  = exp(log_prob - log_prob_old), the exponent clamped to +-20;  a = advantage clamped to +-advantage_clip
    loss = mean of max(-a rho, -a clip(rho, 1 - clip_range, 1 + clip_range))
    d loss / d log_prob = -a rho / N, and 0 where the clip holds: a > 0 above the range, a < 0 below it

One program walks over the rows in order, so sums have the same bits in every run. ratio - 1 is computed as expm1 of the
log-ratio: in float32, the subtraction would be nothing but rounding below 1e-7, where these ratios lie.
"""

# N rows

# pyright: reportArgumentType=false, reportCallIssue=false
# The annotations belong to the kernel: a launch passes numbers for its constexpr.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlcm_fast.kernels.triton_ops.gaussian import EXACT, input_gradients, launch_residual, log_prob_of_rows

NUM_STATS = 6  # per loss, in the order of reference.RatioStats
_BLOCK = 1024


@triton.jit
def _expm1(d):
    """exp(d) - 1; for |d| below one half by its series, whose remainder is under 1e-9 of it."""
    series = 1.0 + d / 10.0
    for i in tl.static_range(8):  # pyright: ignore[reportGeneralTypeIssues]
        series = 1.0 + d / (9.0 - i) * series
    return tl.where(tl.abs(d) < 0.5, d * series, tl.exp(d) - 1.0)


@triton.jit
def _loss_kernel(
    log_prob, log_prob_old, advantages, partial, coef, loss, stats, grad,
    N, num_chunks, size, clip_range, advantage_clip,
    is_on_policy: tl.constexpr, ends_rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Store loss (), stats (6,) and d loss / d log_prob (N,); `ends_rows` makes log_prob (N,) from partial sums."""
    losses = tl.zeros((block,), dtype=tl.float32)
    deviations = tl.zeros((block,), dtype=tl.float32)
    largest = tl.zeros((block,), dtype=tl.float32)
    above = tl.zeros((block,), dtype=tl.float32)
    below = tl.zeros((block,), dtype=tl.float32)
    k1 = tl.zeros((block,), dtype=tl.float32)
    k3 = tl.zeros((block,), dtype=tl.float32)
    for first in range(0, N, block):
        rows = first + tl.arange(0, block)
        inside = rows < N

        # Load or finish the log-probabilities.
        if ends_rows:
            new = log_prob_of_rows(partial, coef, rows, inside, num_chunks, size)
            tl.store(log_prob + rows, new, mask=inside)
        else:
            new = tl.load(log_prob + rows, mask=inside, other=0.0).to(tl.float32)

        # Compute the clamped log-ratio and the clamped advantage.
        if is_on_policy:
            d = tl.zeros((block,), dtype=tl.float32)
            moves = inside
        else:
            raw = new - tl.load(log_prob_old + rows, mask=inside, other=0.0).to(tl.float32)
            raw = tl.where(inside, raw, 0.0)
            d = tl.minimum(tl.maximum(raw, -20.0), 20.0, propagate_nan=tl.PropagateNan.ALL)
            moves = inside & (raw == d)
        a = tl.load(advantages + rows, mask=inside, other=0.0).to(tl.float32)
        a = tl.minimum(tl.maximum(a, -advantage_clip), advantage_clip, propagate_nan=tl.PropagateNan.ALL)

        # Add the loss of these rows and store its gradient.
        deviation = _expm1(d)
        rho = 1.0 + deviation
        is_above, is_below = deviation > clip_range, deviation < -clip_range
        bounded = tl.where(is_above, 1.0 + clip_range, tl.where(is_below, 1.0 - clip_range, rho))
        holds = (is_above & (a > 0)) | (is_below & (a < 0))
        losses += tl.where(inside, -a * tl.where(holds, bounded, rho), 0.0)
        tl.store(grad + rows, tl.where(moves & (holds == 0), -a * rho / N, 0.0), mask=inside)

        # Add the statistics.
        deviations += deviation
        largest = tl.maximum(largest, tl.abs(deviation), propagate_nan=tl.PropagateNan.ALL)
        above += is_above.to(tl.float32)
        below += is_below.to(tl.float32)
        k1 -= d
        k3 += deviation - d

    # Store the means over all rows.
    tl.store(loss, tl.sum(losses, axis=0) / N)
    tl.store(stats, 1.0 + tl.sum(deviations, axis=0) / N)
    tl.store(stats + 1, tl.max(largest, axis=0))
    tl.store(stats + 2, tl.sum(above, axis=0) / N)
    tl.store(stats + 3, tl.sum(below, axis=0) / N)
    tl.store(stats + 4, tl.sum(k1, axis=0) / N)
    tl.store(stats + 5, tl.sum(k3, axis=0) / N)


def _launch_loss(
    log_prob: Tensor, log_prob_old: Tensor | None, advantages: Tensor, clip_range: float, advantage_clip: float,
    partial: Tensor | None = None, coef: Tensor | None = None, size: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    loss, stats = log_prob.new_empty((), dtype=torch.float32), log_prob.new_empty(NUM_STATS, dtype=torch.float32)
    grad = torch.empty(len(log_prob), dtype=torch.float32, device=log_prob.device)
    num_chunks = 1 if partial is None else partial.shape[1]
    unused = log_prob
    _loss_kernel[(1,)](
        log_prob, unused if log_prob_old is None else log_prob_old.contiguous(), advantages.contiguous(),
        unused if partial is None else partial, unused if coef is None else coef, loss, stats, grad,
        len(log_prob), num_chunks, size, clip_range, advantage_clip,
        is_on_policy=log_prob_old is None, ends_rows=partial is not None, block=_BLOCK, **EXACT,
    )  # fmt: skip
    return loss, stats, grad


@torch.library.custom_op("rlcm_fast::clipped_ratio_loss", mutates_args=())
def clipped_ratio_loss(
    log_prob: Tensor, log_prob_old: Tensor | None, advantages: Tensor, clip_range: float, advantage_clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), stats (6,) and d loss / d log_prob (N,), all float32."""
    return _launch_loss(log_prob.contiguous(), log_prob_old, advantages, clip_range, advantage_clip)


@clipped_ratio_loss.register_fake
def _(log_prob, log_prob_old, advantages, clip_range, advantage_clip):
    new = {"dtype": torch.float32}
    return log_prob.new_empty((), **new), log_prob.new_empty(NUM_STATS, **new), torch.empty_like(log_prob, **new)


def _keep_loss(ctx, inputs, output):
    ctx.save_for_backward(output[2])
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)  # otherwise autograd fills zeros for both, in two launches


def _loss_backward(ctx, upstream, *_):
    if upstream is None:
        return (None,) * 5
    (grad,) = ctx.saved_tensors
    return (grad * upstream).to(ctx.dtype), None, None, None, None


clipped_ratio_loss.register_autograd(_loss_backward, setup_context=_keep_loss)


@torch.library.custom_op("rlcm_fast::policy_loss", mutates_args=())
def policy_loss(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, x_next: Tensor, coef: Tensor, guidance: float,
    log_prob_old: Tensor | None, advantages: Tensor, clip_range: float, advantage_clip: float, keeps_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss (), stats (6,), log_prob (N,), d loss / d log_prob (N,) and, if kept, r / (sigma D), in two launches."""
    residual = torch.empty_like(m, dtype=torch.float32) if keeps_residual else None
    partial, walk = launch_residual(x, m, m_uncond, x_next, coef, guidance, residual)
    log_prob = torch.empty(len(x), dtype=torch.float32, device=x.device)
    loss, stats, grad = _launch_loss(
        log_prob, log_prob_old, advantages, clip_range, advantage_clip, partial, coef, walk.size
    )
    return loss, stats, log_prob, grad, coef.new_empty(0) if residual is None else residual


@policy_loss.register_fake
def _(
    x, m, m_uncond, x_next, coef, guidance, log_prob_old, advantages, clip_range, advantage_clip, keeps_residual
):  # fmt: skip
    num_rows = x.shape[0]
    residual = torch.empty_like(m, dtype=torch.float32) if keeps_residual else coef.new_empty(0)
    return coef.new_empty(()), coef.new_empty(NUM_STATS), coef.new_empty(num_rows), coef.new_empty(num_rows), residual


def _keep_policy(ctx, inputs, output):
    x, m, m_uncond, x_next, coef, ctx.guidance = inputs[:6]
    ctx.keeps_residual = inputs[-1]
    ctx.save_for_backward(x, m, m_uncond, x_next, coef, *output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise autograd fills zeros for all four, one as large as the residual


def _policy_backward(ctx, upstream, *_):
    if upstream is None:
        return (None,) * 11
    assert ctx.keeps_residual, "a call without keeps_residual has no gradient"
    grad, residual = ctx.saved_tensors[5:]
    return *input_gradients(ctx, residual, grad, upstream), *[None] * 7


policy_loss.register_autograd(_policy_backward, setup_context=_keep_policy)
