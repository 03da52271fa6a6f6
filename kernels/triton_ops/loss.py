"""Clipped loss of log-probabilities, or directly of network outputs, with its statistics, in one launch.

    rho  = exp(log_prob - log_prob_old), the exponent clamped to +-20;  a = advantage clamped to +-advantage_clip
    loss = mean of max(-a rho, -a clip(rho, 1 - clip_range, 1 + clip_range))
    d loss / d log_prob = -a rho / N, and 0 where the clip holds: a > 0 above the range, a < 0 below it

One program walks over the rows in order, so sums have the same bits in every run. For network outputs it is the last
that finishes a row (arrival.py). ratio - 1 is computed as expm1 of the log-ratio: in float32, the subtraction would be
nothing but rounding below 1e-7, where these ratios lie.

On-policy, rho = 1 and d loss / d log_prob = -a / N do not depend on the row's sum. So the program of a tile writes the
tile's gradient in the output m at once, for the factor that the caller says it will multiply the loss by. The backward
pass compares that factor with the one that came, on the device; only if they differ does it compute the gradient anew.
"""

# N rows, K tiles of a row

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# The annotations belong to the kernel: a launch passes numbers for its constexpr, and triton declares NoReturn.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlcm_fast.kernels.triton_ops.arrival import counters_for, is_last
from rlcm_fast.kernels.triton_ops.gaussian import (
    gradient_scale,
    gradients_of,
    input_gradient,
    inverse_of,
    log_prob_of_row,
    mean_of_tile,
    place_of_program,
    standardised,
    sum_of_squares,
    tile_of,
    traced_gradients,
)
from rlcm_fast.kernels.triton_ops.launches import (
    Plan,
    is_traced,
    kernel,
    launch,
    once,
    operator,
    plan_for,
    plan_for_rows,
    traced_plan,
    wrap_triton,
)
from rlcm_fast.kernels.triton_ops.rounding import product

NUM_STATS = 6  # per loss, in the order of reference.RatioStats
_BLOCK = 128  # rows at a time; more would take registers from the programs of the tiles


@triton.jit
def _expm1(d):
    """exp(d) - 1; for |d| below one half by its series, whose remainder is under 1e-9 of it."""
    series = 1.0 + d / 10.0
    for i in tl.static_range(8):  # pyright: ignore[reportGeneralTypeIssues]
        series = 1.0 + product(d / (9.0 - i), series)
    return tl.where(tl.abs(d) < 0.5, product(d, series), tl.exp(d) - 1.0)


@triton.jit
def clamped(values, limit):
    """The values within +-limit; NaN stays."""
    return tl.minimum(tl.maximum(values, -limit), limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _finish_loss(
    log_prob, log_prob_old, advantages, loss, stats, row_gradient, N, clip_range, advantage_clip,
    is_on_policy: tl.constexpr, rows_at_once: tl.constexpr,
):  # fmt: skip
    """Store loss (), stats (6,) and d loss / d log_prob (N,)."""
    losses = tl.zeros((rows_at_once,), dtype=tl.float32)
    deviations = tl.zeros((rows_at_once,), dtype=tl.float32)
    largest = tl.zeros((rows_at_once,), dtype=tl.float32)
    above = tl.zeros((rows_at_once,), dtype=tl.float32)
    below = tl.zeros((rows_at_once,), dtype=tl.float32)
    k1 = tl.zeros((rows_at_once,), dtype=tl.float32)
    k3 = tl.zeros((rows_at_once,), dtype=tl.float32)
    for first in range(0, N, rows_at_once):
        rows = first + tl.arange(0, rows_at_once)
        inside = rows < N

        # Compute the clamped log-ratio and the clamped advantage.
        if is_on_policy:
            d = tl.zeros((rows_at_once,), dtype=tl.float32)
            moves = inside
        else:
            new = tl.load(log_prob + rows, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
            raw = tl.where(inside, new - tl.load(log_prob_old + rows, mask=inside, other=0.0).to(tl.float32), 0.0)
            d = clamped(raw, 20.0)
            moves = inside & (raw == d)
        a = clamped(tl.load(advantages + rows, mask=inside, other=0.0).to(tl.float32), advantage_clip)

        # Add the loss of these rows and store its gradient.
        deviation = _expm1(d)
        rho = 1.0 + deviation
        is_above, is_below = deviation > clip_range, deviation < -clip_range
        bounded = tl.where(is_above, 1.0 + clip_range, tl.where(is_below, 1.0 - clip_range, rho))
        holds = (is_above & (a > 0)) | (is_below & (a < 0))
        losses += tl.where(inside, product(-a, tl.where(holds, bounded, rho)), 0.0)
        tl.store(row_gradient + rows, tl.where(moves & (holds == 0), product(-a, rho) / N, 0.0), mask=inside)

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


@kernel
def _loss_kernel(
    log_prob, log_prob_old, advantages, loss, stats, row_gradient, clip_range, advantage_clip,
    N, is_on_policy: tl.constexpr, rows_at_once: tl.constexpr,
):  # fmt: skip
    _finish_loss(
        log_prob, log_prob_old, advantages, loss, stats, row_gradient, N, clip_range, advantage_clip,
        is_on_policy, rows_at_once,
    )  # fmt: skip


@kernel
def _policy_kernel(
    x, m, m_uncond, x_next, m_gradient,
    coef, log_prob_old, advantages, scratch, counters, loss, stats, row_gradient,
    guidance, clip_range, advantage_clip, known_above,
    N, C, P, num_tiles, x_n, m_n, u_n, s_n, g_n,
    x_c: tl.constexpr, x_p: tl.constexpr, m_c: tl.constexpr, m_p: tl.constexpr, u_c: tl.constexpr, u_p: tl.constexpr,
    s_c: tl.constexpr, s_p: tl.constexpr, g_c: tl.constexpr, g_p: tl.constexpr,
    tile_c: tl.constexpr, tile_p: tl.constexpr, block: tl.constexpr, interleaved: tl.constexpr,
    guided: tl.constexpr, is_on_policy: tl.constexpr, writes_gradient: tl.constexpr, rows_at_once: tl.constexpr,
):  # fmt: skip
    """scratch (N K + N,): the sums of all tiles, then the log-probabilities."""
    # Find what r is multiplied by in the gradient, in the arithmetic of _finish_loss and _gradient_kernel. A division
    # is a call, at which a tile in registers would be spilled.
    n, k = place_of_program(num_tiles)
    a, b, sigma = tl.load(coef + 3 * n), tl.load(coef + 3 * n + 1), tl.load(coef + 3 * n + 2)
    inverse = inverse_of(sigma)
    if writes_gradient:
        advantage = clamped(tl.load(advantages + n).to(tl.float32), advantage_clip)
        scale = product(gradient_scale(known_above, -advantage / N, sigma, C * P), b)

    # Compute r of the tile and its gradient, and sum its squares.
    c, p, inside = tile_of(k, C, P, tile_c, tile_p)
    mean = mean_of_tile(
        x, m, m_uncond, guidance, a, b,
        n * x_n + c * x_c + p * x_p, n * m_n + c * m_c + p * m_p, n * u_n + c * u_c + p * u_p, inside, guided,
    )  # fmt: skip
    x_s = tl.load(x_next + n * s_n + c * s_c + p * s_p, mask=inside, other=0.0).to(tl.float32)
    r = standardised(x_s, mean, inverse, inside)
    if writes_gradient:
        value = product(scale, r).to(m_gradient.dtype.element_ty)
        tl.store(m_gradient + n * g_n + c * g_c + p * g_p, value, mask=inside)
    tl.store(scratch + n * num_tiles + k, sum_of_squares(r))

    # Finish the row, and with the last row the loss.
    if is_last(counters + n, num_tiles):
        log_prob = scratch + N.to(tl.int64) * num_tiles
        tl.store(log_prob + n, log_prob_of_row(scratch, coef, n, num_tiles, C * P, block))
        if is_last(counters + N, N):
            _finish_loss(
                log_prob, log_prob_old, advantages, loss, stats, row_gradient, N, clip_range, advantage_clip,
                is_on_policy, rows_at_once,
            )  # fmt: skip


def clipped_ratio_loss(
    log_prob: Tensor, log_prob_old: Tensor | None, advantages: Tensor, clip_range: float, advantage_clip: float
) -> tuple[Tensor, Tensor]:
    """Loss () and stats (6,), differentiable in log_prob; all arguments and results are float32."""
    arguments = (log_prob, log_prob_old, advantages, clip_range, advantage_clip)
    if is_traced(log_prob, log_prob_old, advantages):
        return loss_operator(*arguments)[:2]
    stats = log_prob.new_empty(NUM_STATS)
    if torch.is_grad_enabled():
        return _ClippedRatioLoss.apply(log_prob, arguments, stats), stats
    return _clipped_ratio_loss(arguments, stats)[0], stats


def _clipped_ratio_loss(inputs: tuple[Any, ...], stats: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and d loss / d log_prob (N,); fills stats."""
    log_prob, log_prob_old, advantages, clip_range, advantage_clip = inputs
    loss, row_gradient = log_prob.new_empty(()), log_prob.new_empty(log_prob.shape[0])
    plan = plan_for_rows("loss", log_prob, 1, log_prob.shape[0], log_prob_old is None, _BLOCK)
    old = log_prob if log_prob_old is None else log_prob_old
    tensors = (log_prob, old, advantages, loss, stats, row_gradient)
    launch(_loss_kernel, plan, *tensors, clip_range, advantage_clip)
    return loss, row_gradient


class _ClippedRatioLoss(torch.autograd.Function):
    """Its one result is the loss; autograd need not know of the stats that it fills."""

    @staticmethod
    def forward(ctx, log_prob, inputs, stats):
        loss, row_gradient = _clipped_ratio_loss(inputs, stats)
        ctx.save_for_backward(row_gradient)
        return loss

    @staticmethod
    @once
    def backward(ctx, above):
        return ctx.saved_tensors[0] * above, None, None


def _results(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for loss (), stats (6,) and d loss / d log_prob (N,)."""
    return like.new_empty(()), like.new_empty(NUM_STATS), like.new_empty(like.shape[0])


@operator("clipped_ratio_loss")
def loss_operator(
    log_prob: Tensor, log_prob_old: Tensor | None, advantages: Tensor, clip_range: float, advantage_clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`clipped_ratio_loss` for a tracer, and d loss / d log_prob (N,)."""
    results, old = _results(log_prob), log_prob if log_prob_old is None else log_prob_old
    arguments = (log_prob, old, advantages, *results, clip_range, advantage_clip, log_prob.shape[0])
    wrap_triton(_loss_kernel)[(1,)](*arguments, log_prob_old is None, _BLOCK)
    return results


def _keep_loss(ctx, inputs, output):
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)  # otherwise autograd fills zeros for both, in two launches


def _loss_backward(ctx, above, *_):
    gradient = None if above is None else ctx.saved_tensors[0] * above
    return gradient, None, None, None, None


loss_operator.register_autograd(_loss_backward, setup_context=_keep_loss)


def policy_loss(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, x_next: Tensor, coef: Tensor, guidance: float,
    log_prob_old: Tensor | None, advantages: Tensor, clip_range: float, advantage_clip: float, factor: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss () and stats (6,), differentiable in x, m, m_uncond and x_next.

    factor: what the caller multiplies the loss by before its backward pass. It decides about speed, not about results.
    """
    arguments = (x, m, m_uncond, x_next, coef, guidance, log_prob_old, advantages, clip_range, advantage_clip)
    if is_traced(x, m, m_uncond, x_next, coef, log_prob_old, advantages):
        return policy_operator(*arguments)[:2]
    stats = coef.new_empty(NUM_STATS)
    if torch.is_grad_enabled():
        return _PolicyLoss.apply(x, m, m_uncond, x_next, arguments, stats, factor), stats
    return _policy_loss(arguments, stats, None, factor)[0], stats


def _policy_loss(
    inputs: tuple[Any, ...], stats: Tensor, m_gradient: Tensor | None, factor: float
) -> tuple[Tensor, Tensor]:
    """Loss and d loss / d log_prob (N,); fills stats and, if it is given, m_gradient with factor d loss / d m."""
    tensors, flags, head, settings = _policy_arguments(inputs, m_gradient)
    plan, coef = plan_for("policy", tensors, *flags), inputs[4]
    loss, row_gradient, scratch = coef.new_empty(()), coef.new_empty(plan.num_rows), _scratch(plan, coef)
    counters = counters_for(plan.num_rows, plan.device)
    launch(_policy_kernel, plan, *tensors, *head, scratch, counters, loss, stats, row_gradient, *settings, factor)
    return loss, row_gradient


def _policy_arguments(
    inputs: tuple[Any, ...], m_gradient: Tensor | None
) -> tuple[list[Tensor], tuple[bool | int, ...], tuple[Tensor, ...], tuple[float, ...]]:
    """The tensors of latents, the flags, the tensors of rows, and the numbers."""
    x, m, m_uncond, x_next, coef, guidance, log_prob_old, advantages, clip_range, advantage_clip = inputs
    tensors = [x, m, m if m_uncond is None else m_uncond, x_next, m if m_gradient is None else m_gradient]
    flags = (m_uncond is not None, log_prob_old is None, m_gradient is not None, _BLOCK)
    of_rows = (coef, coef if log_prob_old is None else log_prob_old, advantages)
    return tensors, flags, of_rows, (guidance, clip_range, advantage_clip)


def _scratch(plan: Plan, coef: Tensor) -> Tensor:
    return coef.new_empty(plan.num_rows * (plan.num_tiles + 1))


class _PolicyLoss(torch.autograd.Function):
    """Its one result is the loss; autograd need not know of the stats that it fills."""

    @staticmethod
    def forward(ctx, x, m, m_uncond, x_next, inputs, stats, factor):
        # On-policy, the gradient of m is written in the same pass.
        writes = inputs[6] is None and m_uncond is None and ctx.needs_input_grad[1]
        m_gradient = torch.empty_like(m) if writes else None
        loss, row_gradient = _policy_loss(inputs, stats, m_gradient, factor)
        ctx.save_for_backward(x, m, m_uncond, x_next, inputs[4], row_gradient)
        ctx.guidance, ctx.factor, ctx.m_gradient = inputs[5], factor, m_gradient
        return loss

    @staticmethod
    @once
    def backward(ctx, above):
        *tensors, row_gradient = ctx.saved_tensors
        inputs = (*tensors, ctx.guidance)
        # Whoever gets the gradient may change it, so a second backward pass computes its own.
        done, ctx.m_gradient = ctx.m_gradient, None
        if done is not None:
            done = input_gradient(inputs, 1, row_gradient, above, done, ctx.factor)
        return (*gradients_of(inputs, ctx.needs_input_grad, row_gradient, above, done), None, None, None)


@operator("policy_loss")
def policy_operator(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, x_next: Tensor, coef: Tensor, guidance: float,
    log_prob_old: Tensor | None, advantages: Tensor, clip_range: float, advantage_clip: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`policy_loss` for a tracer, and d loss / d log_prob (N,); the backward pass computes the gradient of m."""
    inputs = (x, m, m_uncond, x_next, coef, guidance, log_prob_old, advantages, clip_range, advantage_clip)
    tensors, flags, head, settings = _policy_arguments(inputs, None)
    plan = traced_plan(tensors, *flags)
    results, counters = _results(coef), coef.new_zeros(plan.num_rows + 1, dtype=torch.int32)
    arguments = (*tensors, *head, _scratch(plan, coef), counters, *results, *settings, 1.0)
    wrap_triton(_policy_kernel)[plan.grid](*arguments, *plan.tail)
    return results


def _keep_policy(ctx, inputs, output):
    x, m, m_uncond, x_next, coef, ctx.guidance = inputs[:6]
    ctx.save_for_backward(x, m, m_uncond, x_next, coef, output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise autograd fills zeros for both, in two launches


def _policy_backward(ctx, above, *_):
    if above is None:
        return (None,) * 10
    return (*traced_gradients(ctx, ctx.saved_tensors[5], above), *[None] * 6)


policy_operator.register_autograd(_policy_backward, setup_context=_keep_policy)
