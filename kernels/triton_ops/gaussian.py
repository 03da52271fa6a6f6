"""Log-probability and sampling step of x_s = A x_t + B m + sigma z; each row is summed in a fixed order.

    r      = (x_next - A x - B m) / sigma,          m = m_u + w (m_c - m_u) with guidance
    log p  = -mean(r^2) / 2 - log sigma - log(2 pi) / 2
    d log p / d m = B r / (sigma D),   / d x = A r / (sigma D),   / d x_next = -r / (sigma D)

The first launch sums r^2 chunk by chunk and, if an input requires a gradient, writes r / (sigma D). The second launch
adds the chunks of each row and finishes the formula. The backward pass launches once for each input that requires a
gradient.
"""

# N rows, D = C H W elements of a row, K chunks of a row; coef rows are A, B, sigma

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# The annotations belong to the kernel: a launch passes numbers for its constexpr, and triton declares NoReturn.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlcm_fast.kernels.triton_ops.noise import normal
from rlcm_fast.kernels.triton_ops.rows import Walk, walk_over

_HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)
_ROWS = 128  # per program that finishes rows
# Fused multiply-adds would round differently from the reference, and differently in each version of triton.
EXACT = {"enable_fp_fusion": False, "num_warps": 4}


@triton.jit
def mean_of_tile(x, m, m_uncond, guidance, a, b, x_at, m_at, u_at, inside, guided: tl.constexpr):
    """The mean A x + B m of a tile, float32."""
    x_t = tl.load(x + x_at, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(m + m_at, mask=inside, other=0.0).to(tl.float32)
    if guided:
        uncond = tl.load(m_uncond + u_at, mask=inside, other=0.0).to(tl.float32)
        out = uncond + guidance * (out - uncond)
    return a * x_t + b * out


@triton.jit
def tile_of(first, tile_c: tl.constexpr, tile_p: tl.constexpr):
    """Channels (tile_c, 1) and positions (1, tile_p) of the tile that begins at position `first`."""
    return tl.arange(0, tile_c)[:, None], first + tl.arange(0, tile_p)[None, :]


@triton.jit
def _residual_kernel(
    x, m, m_uncond, x_next, coef, partial, residual, guidance,
    x_n, m_n, u_n, s_n, r_n,
    C, P, size,
    x_c: tl.constexpr, x_p: tl.constexpr, m_c: tl.constexpr, m_p: tl.constexpr, u_c: tl.constexpr, u_p: tl.constexpr,
    s_c: tl.constexpr, s_p: tl.constexpr, r_c: tl.constexpr, r_p: tl.constexpr,
    tile_c: tl.constexpr, tile_p: tl.constexpr, chunk_p: tl.constexpr,
    guided: tl.constexpr, writes_residual: tl.constexpr,
):  # fmt: skip
    """Store partial[n, k], the sum of r^2 over chunk k, and residual = r / (sigma D)."""
    n, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    a, b, sigma = tl.load(coef + 3 * n), tl.load(coef + 3 * n + 1), tl.load(coef + 3 * n + 2)

    # Walk over the tiles of the chunk and sum r^2.
    total = tl.zeros((tile_c, tile_p), dtype=tl.float32)
    for first in range(0, chunk_p, tile_p):
        c, p = tile_of(k * chunk_p + first, tile_c, tile_p)
        inside = (c < C) & (p < P)
        mean = mean_of_tile(
            x, m, m_uncond, guidance, a, b,
            n * x_n + c * x_c + p * x_p, n * m_n + c * m_c + p * m_p, n * u_n + c * u_c + p * u_p, inside, guided,
        )  # fmt: skip
        x_s = tl.load(x_next + n * s_n + c * s_c + p * s_p, mask=inside, other=0.0).to(tl.float32)
        r = tl.where(inside, tl.div_rn(x_s - mean, tl.zeros_like(mean) + sigma), 0.0)
        total += r * r
        if writes_residual:
            scaled = tl.div_rn(r, tl.zeros_like(r) + sigma * size)
            tl.store(residual + n * r_n + c * r_c + p * r_p, scaled, mask=inside)
    tl.store(partial + n * tl.num_programs(1) + k, tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit
def _step_kernel(
    x, m, m_uncond, noise, seeds, coef, x_next, partial, guidance,
    x_n, m_n, u_n, z_n, s_n,
    C, P,
    x_c: tl.constexpr, x_p: tl.constexpr, m_c: tl.constexpr, m_p: tl.constexpr, u_c: tl.constexpr, u_p: tl.constexpr,
    z_c: tl.constexpr, z_p: tl.constexpr, s_c: tl.constexpr, s_p: tl.constexpr,
    tile_c: tl.constexpr, tile_p: tl.constexpr, chunk_p: tl.constexpr,
    guided: tl.constexpr, draws: tl.constexpr, interleaved: tl.constexpr,
):  # fmt: skip
    """Store x_next = A x + B m + sigma z, with z given or drawn, and the partial sums of r^2 of the rounded x_next."""
    n, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    a, b, sigma = tl.load(coef + 3 * n), tl.load(coef + 3 * n + 1), tl.load(coef + 3 * n + 2)
    divisor = tl.where(sigma > 0, sigma, 1.0)

    # Walk over the tiles of the chunk, make the next state and sum its r^2.
    total = tl.zeros((tile_c, tile_p), dtype=tl.float32)
    for first in range(0, chunk_p, tile_p):
        c, p = tile_of(k * chunk_p + first, tile_c, tile_p)
        inside = (c < C) & (p < P)
        mean = mean_of_tile(
            x, m, m_uncond, guidance, a, b,
            n * x_n + c * x_c + p * x_p, n * m_n + c * m_c + p * m_p, n * u_n + c * u_c + p * u_p, inside, guided,
        )  # fmt: skip
        if draws:
            run = c * P + p
            z = normal(tl.load(seeds + n), run % interleaved * (P // interleaved) + run // interleaved)
        else:
            z = tl.load(noise + n * z_n + c * z_c + p * z_p, mask=inside, other=0.0).to(tl.float32)
        x_s = mean + sigma * z
        tl.store(x_next + n * s_n + c * s_c + p * s_p, x_s, mask=inside)
        r = tl.where(inside, tl.div_rn(x_s - mean, tl.zeros_like(mean) + divisor), 0.0)
        total += r * r
    tl.store(partial + n * tl.num_programs(1) + k, tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit
def log_prob_of_rows(partial, coef, rows, inside, num_chunks, size):
    """log p of some rows from their partial sums, which are added in order; 0 where sigma is 0."""
    total = tl.zeros(rows.shape, dtype=tl.float32)
    for k in range(num_chunks):
        total += tl.load(partial + rows.to(tl.int64) * num_chunks + k, mask=inside, other=0.0)
    sigma = tl.load(coef + 3 * rows + 2, mask=inside, other=1.0)
    is_action = sigma > 0
    log_sigma = tl.log(tl.where(is_action, sigma, 1.0))
    return tl.where(is_action, -0.5 * tl.div_rn(total, tl.zeros_like(total) + size) - log_sigma - _HALF_LOG_TWO_PI, 0.0)


@triton.jit
def _end_rows_kernel(partial, coef, log_prob, N, num_chunks, size, block: tl.constexpr):
    rows = tl.program_id(0) * block + tl.arange(0, block)
    inside = rows < N
    tl.store(log_prob + rows, log_prob_of_rows(partial, coef, rows, inside, num_chunks, size), mask=inside)


@triton.jit
def _scale_rows_kernel(
    residual, grad, upstream, coef, out, factor,
    r_n, o_n, C, P,
    column: tl.constexpr, has_upstream: tl.constexpr,
    r_c: tl.constexpr, r_p: tl.constexpr, o_c: tl.constexpr, o_p: tl.constexpr,
    tile_c: tl.constexpr, tile_p: tl.constexpr, chunk_p: tl.constexpr,
):  # fmt: skip
    """Store out = residual * grad[n] * upstream * coef[n, column] * factor; column 3 stands for 1."""
    n, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale = tl.load(grad + n) * factor
    if has_upstream:
        scale *= tl.load(upstream)
    if column < 3:
        scale *= tl.load(coef + 3 * n + column)
    for first in range(0, chunk_p, tile_p):
        c, p = tile_of(k * chunk_p + first, tile_c, tile_p)
        inside = (c < C) & (p < P)
        value = tl.load(residual + n * r_n + c * r_c + p * r_p, mask=inside, other=0.0)
        tl.store(out + n * o_n + c * o_c + p * o_p, (value * scale).to(out.dtype.element_ty), mask=inside)


def launch_residual(
    x: Tensor,
    m: Tensor,
    m_uncond: Tensor | None,
    x_next: Tensor,
    coef: Tensor,
    guidance: float,
    residual: Tensor | None,
) -> tuple[Tensor, Walk]:
    """The partial sums (N, K) and their walk; fills `residual` (N, C, H, W) float32 if you give it."""
    # Let m stand in for absent tensors; the kernel does not access them.
    tensors = [x, m, m if m_uncond is None else m_uncond, x_next, m if residual is None else residual]
    walk, strides = walk_over(tensors)
    partial = torch.empty(len(x), walk.num_chunks, dtype=torch.float32, device=x.device)
    _residual_kernel[(len(x), walk.num_chunks)](
        *tensors[:4], coef, partial, tensors[4], guidance,
        *(row for row, _, _ in strides),
        walk.channels, walk.positions, walk.size,
        *(inner for _, *pair in strides for inner in pair),
        tile_c=walk.tile_channels, tile_p=walk.tile_positions, chunk_p=walk.chunk_positions,
        guided=m_uncond is not None, writes_residual=residual is not None, **EXACT,
    )  # fmt: skip
    return partial, walk


def end_rows(partial: Tensor, coef: Tensor, walk: Walk) -> Tensor:
    """Log-probabilities (N,) from partial sums (N, K)."""
    log_prob = torch.empty(len(partial), dtype=torch.float32, device=partial.device)
    grid = (triton.cdiv(len(partial), _ROWS),)
    _end_rows_kernel[grid](partial, coef, log_prob, len(partial), walk.num_chunks, walk.size, block=_ROWS, **EXACT)
    return log_prob


@torch.library.custom_op("rlcm_fast::row_gradient", mutates_args=())
def row_gradient(
    residual: Tensor, grad: Tensor, upstream: Tensor | None, coef: Tensor, column: int, factor: float, like: Tensor
) -> Tensor:
    """Product of residual (N, C, H, W), grad (N,), upstream (), coef[:, column] (1 for column 3) and factor.

    The result has the dtype and layout of `like`. It is a separate operator, so that a compiled backward pass sees it.
    """
    out = torch.empty_like(like)
    walk, (of_residual, of_out) = walk_over([residual, out])
    _scale_rows_kernel[(len(out), walk.num_chunks)](
        residual, grad.contiguous(), grad if upstream is None else upstream, coef, out, factor,
        of_residual[0], of_out[0], walk.channels, walk.positions, column, upstream is not None,
        *of_residual[1:], *of_out[1:],
        tile_c=walk.tile_channels, tile_p=walk.tile_positions, chunk_p=walk.chunk_positions, **EXACT,
    )  # fmt: skip
    return out


@row_gradient.register_fake
def _(residual, grad, upstream, coef, column, factor, like):
    return torch.empty_like(like)


def input_gradients(
    ctx, residual: Tensor, grad: Tensor, upstream: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, m, m_uncond and x_next, the first four inputs of an operator; None for those not needed."""
    x, m, m_uncond, x_next, coef = ctx.saved_tensors[:5]
    w = ctx.guidance if m_uncond is not None else 1.0
    factors = ((x, 0, 1.0), (m, 1, w), (m_uncond, 1, 1.0 - w), (x_next, 3, -1.0))
    x_grad, m_grad, u_grad, s_grad = (
        row_gradient(residual, grad, upstream, coef, column, factor, like) if is_needed and like is not None else None
        for (like, column, factor), is_needed in zip(factors, ctx.needs_input_grad[:4], strict=True)
    )
    return x_grad, m_grad, u_grad, s_grad


@torch.library.custom_op("rlcm_fast::gaussian_log_prob", mutates_args=())
def gaussian_log_prob(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, x_next: Tensor, coef: Tensor, guidance: float, keeps_residual: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability (N,), and r / (sigma D) float32 in the layout of m, empty unless keeps_residual is set."""
    residual = torch.empty_like(m, dtype=torch.float32) if keeps_residual else None
    partial, walk = launch_residual(x, m, m_uncond, x_next, coef, guidance, residual)
    return end_rows(partial, coef, walk), coef.new_empty(0) if residual is None else residual


@gaussian_log_prob.register_fake
def _(x, m, m_uncond, x_next, coef, guidance, keeps_residual):
    residual = torch.empty_like(m, dtype=torch.float32) if keeps_residual else coef.new_empty(0)
    return coef.new_empty(x.shape[0]), residual


def _keep_log_prob(ctx, inputs, output):
    x, m, m_uncond, x_next, coef, ctx.guidance, ctx.keeps_residual = inputs
    ctx.save_for_backward(x, m, m_uncond, x_next, coef, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise autograd launches a kernel that fills zeros of the residual's size


def _log_prob_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    assert ctx.keeps_residual, "a call without keeps_residual has no gradient"
    return *input_gradients(ctx, ctx.saved_tensors[5], grad, None), None, None, None


gaussian_log_prob.register_autograd(_log_prob_backward, setup_context=_keep_log_prob)


@torch.library.custom_op("rlcm_fast::gaussian_step", mutates_args=())
def gaussian_step(
    x: Tensor, m: Tensor, m_uncond: Tensor | None, coef: Tensor, noise: Tensor | None, seeds: Tensor | None,
    guidance: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x_next and log_prob from either noise (N, C, H, W) or seeds (N,) int64; not differentiable."""
    x_next = torch.empty_like(x, dtype=torch.float32)
    tensors = [x, m, m if m_uncond is None else m_uncond, x if noise is None else noise, x_next]
    walk, strides = walk_over(tensors)
    partial = torch.empty(len(x), walk.num_chunks, dtype=torch.float32, device=x.device)
    _step_kernel[(len(x), walk.num_chunks)](
        *tensors[:4], coef if seeds is None else seeds, coef, x_next, partial, guidance,
        *(row for row, _, _ in strides),
        walk.channels, walk.positions,
        *(inner for _, *pair in strides for inner in pair),
        tile_c=walk.tile_channels, tile_p=walk.tile_positions, chunk_p=walk.chunk_positions,
        guided=m_uncond is not None, draws=noise is None, interleaved=walk.interleaved, **EXACT,
    )  # fmt: skip
    return x_next, end_rows(partial, coef, walk)


@gaussian_step.register_fake
def _(x, m, m_uncond, coef, noise, seeds, guidance):
    return torch.empty_like(x, dtype=torch.float32), coef.new_empty(x.shape[0])
