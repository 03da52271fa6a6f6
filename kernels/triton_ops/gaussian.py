"""Log-probability and sampling step of x_s = A x_t + B m + sigma z; each row is summed in a fixed order.

    r      = (x_next - A x - B m) (1 / sigma),      m = m_u + w (m_c - m_u) with guidance
    log p  = -mean(r^2) / 2 - log sigma - log(2 pi) / 2
    d log p / d m = B r / (sigma D),   / d x = A r / (sigma D),   / d x_next = -r / (sigma D)

One launch: a program for each tile of a row, and the last to arrive finishes the row (arrival.py). The backward pass
launches once for each input that requires a gradient. It computes r anew, from inputs that are in memory in any case:
a stored float32 r would move as many bytes or more, and would need memory of its own.

1 / sigma is rounded once per row and then multiplied; a row with sigma = 0 has r = 0 and no gradient.
"""

# N rows, D = C H W elements of a row, K tiles of a row; coef rows are A, B, sigma

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# The annotations belong to the kernel: a launch passes numbers for its constexpr, and triton declares NoReturn.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlcm_fast.kernels.triton_ops.arrival import counters_for, is_last, sum_of_tiles
from rlcm_fast.kernels.triton_ops.launches import (
    is_traced,
    kernel,
    launch,
    once,
    operator,
    plan_for,
    traced_plan,
    wrap_triton,
)
from rlcm_fast.kernels.triton_ops.noise import normal
from rlcm_fast.kernels.triton_ops.rounding import product

_HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)


@triton.jit
def place_of_program(num_tiles):
    """Row (int64) and tile of this program; the tiles of a row are neighbours."""
    return (tl.program_id(0) // num_tiles).to(tl.int64), tl.program_id(0) % num_tiles


@triton.jit
def tile_of(k, C, P, tile_c: tl.constexpr, tile_p: tl.constexpr):
    """Channels (tile_c, 1), positions (1, tile_p) of tile k, and which of its elements exist."""
    c, p = tl.arange(0, tile_c)[:, None], k * tile_p + tl.arange(0, tile_p)[None, :]
    return c, p, (c < C) & (p < P)


@triton.jit
def mean_of_tile(x, m, m_uncond, guidance, a, b, x_at, m_at, u_at, inside, guided: tl.constexpr):
    """The mean A x + B m of a tile, float32."""
    x_t = tl.load(x + x_at, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(m + m_at, mask=inside, other=0.0).to(tl.float32)
    if guided:
        uncond = tl.load(m_uncond + u_at, mask=inside, other=0.0).to(tl.float32)
        out = uncond + product(guidance, out - uncond)
    return product(a, x_t) + product(b, out)


@triton.jit
def inverse_of(sigma):
    """1 / sigma, and 0 for the sigma 0 of a row that is no action."""
    return tl.where(sigma > 0, tl.div_rn(1.0, tl.where(sigma > 0, sigma, 1.0)), 0.0)


@triton.jit
def standardised(x_s, mean, inverse, inside):
    """r of a tile, 0 outside."""
    return tl.where(inside, product(inverse, x_s - mean), 0.0)


@triton.jit
def sum_of_squares(r):
    """The sum of r^2 over a tile (C, P)."""
    return tl.sum(tl.sum(product(r, r), axis=1), axis=0)


@triton.jit
def log_prob_of_row(partial, coef, n, num_tiles, size, block: tl.constexpr):
    """log p of row n from the sums of its tiles; 0 where sigma is 0."""
    total = sum_of_tiles(partial + n * num_tiles, num_tiles, block)
    sigma = tl.load(coef + 3 * n + 2)
    half_mean = product(0.5, tl.div_rn(total, size * 1.0))
    log_prob = -half_mean - tl.log(tl.where(sigma > 0, sigma, 1.0)) - _HALF_LOG_TWO_PI
    return tl.where(sigma > 0, log_prob, 0.0)


@kernel
def _log_prob_kernel(
    x, m, m_uncond, x_next, coef, partial, counters, log_prob, guidance,
    N, C, P, num_tiles, x_n, m_n, u_n, s_n,
    x_c: tl.constexpr, x_p: tl.constexpr, m_c: tl.constexpr, m_p: tl.constexpr, u_c: tl.constexpr, u_p: tl.constexpr,
    s_c: tl.constexpr, s_p: tl.constexpr,
    tile_c: tl.constexpr, tile_p: tl.constexpr, block: tl.constexpr, interleaved: tl.constexpr, guided: tl.constexpr,
):  # fmt: skip
    # Sum r^2 over the tile.
    n, k = place_of_program(num_tiles)
    a, b, inverse = tl.load(coef + 3 * n), tl.load(coef + 3 * n + 1), inverse_of(tl.load(coef + 3 * n + 2))
    c, p, inside = tile_of(k, C, P, tile_c, tile_p)
    mean = mean_of_tile(
        x, m, m_uncond, guidance, a, b,
        n * x_n + c * x_c + p * x_p, n * m_n + c * m_c + p * m_p, n * u_n + c * u_c + p * u_p, inside, guided,
    )  # fmt: skip
    x_s = tl.load(x_next + n * s_n + c * s_c + p * s_p, mask=inside, other=0.0).to(tl.float32)
    tl.store(partial + n * num_tiles + k, sum_of_squares(standardised(x_s, mean, inverse, inside)))

    # Finish the row.
    if is_last(counters + n, num_tiles):
        tl.store(log_prob + n, log_prob_of_row(partial, coef, n, num_tiles, C * P, block))


@kernel
def _step_kernel(
    x, m, m_uncond, noise, x_next, seeds, coef, partial, counters, log_prob, guidance,
    N, C, P, num_tiles, x_n, m_n, u_n, z_n, s_n,
    x_c: tl.constexpr, x_p: tl.constexpr, m_c: tl.constexpr, m_p: tl.constexpr, u_c: tl.constexpr, u_p: tl.constexpr,
    z_c: tl.constexpr, z_p: tl.constexpr, s_c: tl.constexpr, s_p: tl.constexpr,
    tile_c: tl.constexpr, tile_p: tl.constexpr, block: tl.constexpr, interleaved: tl.constexpr,
    guided: tl.constexpr, draws: tl.constexpr,
):  # fmt: skip
    """Store x_next = A x + B m + sigma z, with z given or drawn, and the log-probability of the rounded x_next."""
    # Find the mean and the noise of the tile.
    n, k = place_of_program(num_tiles)
    a, b, sigma = tl.load(coef + 3 * n), tl.load(coef + 3 * n + 1), tl.load(coef + 3 * n + 2)
    c, p, inside = tile_of(k, C, P, tile_c, tile_p)
    mean = mean_of_tile(
        x, m, m_uncond, guidance, a, b,
        n * x_n + c * x_c + p * x_p, n * m_n + c * m_c + p * m_p, n * u_n + c * u_c + p * u_p, inside, guided,
    )  # fmt: skip
    if draws:
        run = c * P + p
        z = normal(tl.load(seeds + n), run % interleaved * (P // interleaved) + run // interleaved)
    else:
        z = tl.load(noise + n * z_n + c * z_c + p * z_p, mask=inside, other=0.0).to(tl.float32)

    # Make the next state and sum its r^2.
    x_s = mean + product(sigma, z)
    tl.store(x_next + n * s_n + c * s_c + p * s_p, x_s, mask=inside)
    tl.store(partial + n * num_tiles + k, sum_of_squares(standardised(x_s, mean, inverse_of(sigma), inside)))

    # Finish the row.
    if is_last(counters + n, num_tiles):
        tl.store(log_prob + n, log_prob_of_row(partial, coef, n, num_tiles, C * P, block))


@triton.jit
def gradient_scale(above, row_gradient, sigma, size):
    """What r is multiplied by for the gradient in the mean: (above row_gradient) / (sigma D)."""
    return product(product(above, row_gradient), tl.div_rn(inverse_of(sigma), size * 1.0))


@kernel
def _gradient_kernel(
    x, m, m_uncond, x_next, out, coef, row_gradient, above, guidance, factor, known_above,
    N, C, P, num_tiles, x_n, m_n, u_n, s_n, o_n,
    x_c: tl.constexpr, x_p: tl.constexpr, m_c: tl.constexpr, m_p: tl.constexpr, u_c: tl.constexpr, u_p: tl.constexpr,
    s_c: tl.constexpr, s_p: tl.constexpr, o_c: tl.constexpr, o_p: tl.constexpr,
    tile_c: tl.constexpr, tile_p: tl.constexpr, block: tl.constexpr, interleaved: tl.constexpr,
    guided: tl.constexpr, column: tl.constexpr, has_above: tl.constexpr, is_known: tl.constexpr,
):  # fmt: skip
    """Store out = r row_gradient[n] above coef[n, column] factor / (sigma D); column 3 stands for 1.

    is_known: `out` holds that already for above = known_above, so there is nothing to do if that is what came.
    """
    gain = tl.load(above).to(tl.float32) if has_above else 1.0
    if is_known and gain == known_above:
        return

    # Find what r is multiplied by, before a tile is in registers: a division is a call.
    n, k = place_of_program(num_tiles)
    a, b, sigma = tl.load(coef + 3 * n), tl.load(coef + 3 * n + 1), tl.load(coef + 3 * n + 2)
    inverse = inverse_of(sigma)
    scale = gradient_scale(gain, tl.load(row_gradient + n).to(tl.float32), sigma, C * P) * factor
    if column < 3:
        scale = product(scale, tl.load(coef + 3 * n + column))

    # Compute r of the tile and scale it.
    c, p, inside = tile_of(k, C, P, tile_c, tile_p)
    mean = mean_of_tile(
        x, m, m_uncond, guidance, a, b,
        n * x_n + c * x_c + p * x_p, n * m_n + c * m_c + p * m_p, n * u_n + c * u_c + p * u_p, inside, guided,
    )  # fmt: skip
    x_s = tl.load(x_next + n * s_n + c * s_c + p * s_p, mask=inside, other=0.0).to(tl.float32)
    value = product(scale, standardised(x_s, mean, inverse, inside))
    tl.store(out + n * o_n + c * o_c + p * o_p, value.to(out.dtype.element_ty), mask=inside)


def input_gradient(
    inputs: tuple[Any, ...], place: int, row_gradient: Tensor, above: Tensor | None, out: Tensor | None = None,
    known_above: float = 0.0,
) -> Tensor:  # fmt: skip
    """The gradient of one of x, m, m_uncond, x_next (`place` 0 to 3): of the sum of above row_gradient[n] log p[n].

    inputs: x, m, m_uncond, x_next, coef, guidance. The result has the dtype and layout of that input. `out` is given if
    it holds the gradient for above = known_above already; it is overwritten if above is another number.
    """
    like = inputs[place]
    is_known = out is not None
    made = torch.empty_like(like) if out is None else out
    tensors, flags, head = _gradient_arguments(inputs, place, row_gradient, above, made)
    plan = plan_for("gradient", tensors, *flags, is_known)
    launch(_gradient_kernel, plan, *tensors, *head, known_above)
    return made


def _gradient_arguments(
    inputs: tuple[Any, ...], place: int, row_gradient: Tensor, above: Tensor | None, out: Tensor
) -> tuple[list[Tensor], tuple[bool | int, ...], tuple[Any, ...]]:
    """The tensors of rows, the flags but the last, and the other arguments but the last."""
    x, m, m_uncond, x_next, coef, guidance = inputs
    w = 1.0 if m_uncond is None else guidance
    column, factor = ((0, 1.0), (1, w), (1, 1.0 - w), (3, -1.0))[place]
    tensors = [x, m, m if m_uncond is None else m_uncond, x_next, out]
    flags = (m_uncond is not None, column, above is not None)
    return tensors, flags, (coef, row_gradient, row_gradient if above is None else above, guidance, factor)


@operator("row_gradient")
def row_gradient_operator(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, x_next: Tensor, coef: Tensor, guidance: float,
    place: int, row_gradient: Tensor, above: Tensor | None,
) -> Tensor:  # fmt: skip
    """`input_gradient` for a tracer."""
    inputs = (x, m, m_uncond, x_next, coef, guidance)
    out = torch.empty_like(inputs[place])
    tensors, flags, head = _gradient_arguments(inputs, place, row_gradient.contiguous(), above, out)
    plan = traced_plan(tensors, *flags, False)
    wrap_triton(_gradient_kernel)[plan.grid](*tensors, *head, 0.0, *plan.tail)
    return out


def traced_gradients(ctx: Any, row_gradient: Tensor, above: Tensor | None) -> list[Tensor | None]:
    """Gradients of x, m, m_uncond and x_next, the first inputs of an operator; None for those not needed."""
    gradients: list[Tensor | None] = []
    for place in range(4):
        is_needed = ctx.needs_input_grad[place] and ctx.saved_tensors[place] is not None
        arguments = (*ctx.saved_tensors[:5], ctx.guidance, place, row_gradient, above)
        gradients.append(row_gradient_operator(*arguments) if is_needed else None)
    return gradients


def gradients_of(
    inputs: tuple[Any, ...], needed: tuple[bool, ...], row_gradient: Tensor, above: Tensor | None, done: Tensor | None
) -> list[Tensor | None]:
    """Returns what traced_gradients does, without an operator; `done` is a gradient of m that needs no computing."""
    gradients: list[Tensor | None] = [None, done, None, None]
    for place in range(4):
        if needed[place] and gradients[place] is None and inputs[place] is not None:
            gradients[place] = input_gradient(inputs, place, row_gradient, above)
    return gradients


def gaussian_log_prob(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, x_next: Tensor, coef: Tensor, guidance: float
) -> Tensor:
    """Log-probability (N,) float32, differentiable in x, m, m_uncond and x_next."""
    if is_traced(x, m, m_uncond, x_next, coef):
        return log_prob_operator(x, m, m_uncond, x_next, coef, guidance)
    if torch.is_grad_enabled():
        return _LogProb.apply(x, m, m_uncond, x_next, (coef, guidance))
    return _log_prob(x, m, m_uncond, x_next, coef, guidance)


def _log_prob(x: Tensor, m: Tensor, m_uncond: Tensor | None, x_next: Tensor, coef: Tensor, guidance: float) -> Tensor:
    tensors = [x, m, m if m_uncond is None else m_uncond, x_next]
    plan = plan_for("log_prob", tensors, m_uncond is not None)
    log_prob, partial = coef.new_empty(plan.num_rows), coef.new_empty(plan.grid)
    counters = counters_for(plan.num_rows, plan.device)
    launch(_log_prob_kernel, plan, *tensors, coef, partial, counters, log_prob, guidance)
    return log_prob


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, m, m_uncond, x_next, constants):
        coef, ctx.guidance = constants
        ctx.save_for_backward(x, m, m_uncond, x_next, coef)
        return _log_prob(x, m, m_uncond, x_next, *constants)

    @staticmethod
    @once
    def backward(ctx, gradient):
        inputs = (*ctx.saved_tensors, ctx.guidance)
        return (*gradients_of(inputs, ctx.needs_input_grad, gradient.contiguous(), None, None), None)


@operator("gaussian_log_prob")
def log_prob_operator(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, x_next: Tensor, coef: Tensor, guidance: float
) -> Tensor:
    """`gaussian_log_prob` for a tracer."""
    tensors = [x, m, m if m_uncond is None else m_uncond, x_next]
    plan = traced_plan(tensors, m_uncond is not None)
    log_prob, partial = coef.new_empty(plan.num_rows), coef.new_empty(plan.grid)
    counters = coef.new_zeros(plan.num_rows + 1, dtype=torch.int32)
    arguments = (*tensors, coef, partial, counters, log_prob, guidance)
    wrap_triton(_log_prob_kernel)[plan.grid](*arguments, *plan.tail)
    return log_prob


def _keep_log_prob(ctx, inputs, output):
    *tensors, ctx.guidance = inputs
    ctx.save_for_backward(*tensors)


def _log_prob_backward(ctx, gradient):
    return (*traced_gradients(ctx, gradient, None), None, None)


log_prob_operator.register_autograd(_log_prob_backward, setup_context=_keep_log_prob)


def gaussian_step(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, coef: Tensor, noise: Tensor | None, seeds: Tensor | None,
    guidance: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x_next and log_prob from either noise (N, C, H, W) or seeds (N,) int64; call it without gradients."""
    if is_traced(x, m, m_uncond, coef, noise):
        return step_operator(x, m, m_uncond, coef, noise, seeds, guidance)
    x_next = torch.empty_like(x, dtype=torch.float32)
    tensors = [x, m, m if m_uncond is None else m_uncond, x if noise is None else noise, x_next]
    plan = plan_for("step", tensors, m_uncond is not None, noise is None)
    log_prob, partial = coef.new_empty(plan.num_rows), coef.new_empty(plan.grid)
    counters = counters_for(plan.num_rows, plan.device)
    seeds_or_none = coef if seeds is None else seeds
    launch(_step_kernel, plan, *tensors, seeds_or_none, coef, partial, counters, log_prob, guidance)
    return x_next, log_prob


@operator("gaussian_step")
def step_operator(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, coef: Tensor, noise: Tensor | None, seeds: Tensor | None,
    guidance: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`gaussian_step` for a tracer."""
    x_next = torch.empty_like(x, dtype=torch.float32)
    tensors = [x, m, m if m_uncond is None else m_uncond, x if noise is None else noise, x_next]
    plan = traced_plan(tensors, m_uncond is not None, noise is None)
    log_prob, partial = coef.new_empty(plan.num_rows), coef.new_empty(plan.grid)
    counters = coef.new_zeros(plan.num_rows + 1, dtype=torch.int32)
    arguments = (*tensors, coef if seeds is None else seeds, coef, partial, counters, log_prob, guidance)
    wrap_triton(_step_kernel)[plan.grid](*arguments, *plan.tail)
    return x_next, log_prob
