"""Operators for y = silu(GroupNorm(x)), forward and backward; group_norm_kernels.py has the equations and the kernels.

Arithmetic is float32, with one rounding to the dtype of x at the end. Between the two passes the operators keep only x,
weight, bias and the statistics (2 N G numbers). Separate GroupNorm and SiLU layers keep the normalised tensor too.
"""

# N rows, C channels, H W positions, G groups

# pyright: reportArgumentType=false, reportCallIssue=false
# The annotations belong to the kernel: a launch passes numbers for its constexpr.

from __future__ import annotations

import torch
from torch import Tensor

from rlcm_fast.kernels.triton_ops import group_norm_kernels as kernels
from rlcm_fast.kernels.triton_ops.group_norm_kernels import Chunks, chunks_of, power_of_two
from rlcm_fast.kernels.triton_ops.launches import EXACT
from rlcm_fast.kernels.triton_ops.rows import strides_of

_MERGED = 1024  # elements that a merging program holds in registers


@torch.library.custom_op("rlcm_fast::group_norm_silu", mutates_args=())
def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the layout of x (N, C, H, W), and mean and rstd (N, G) float32, in three launches; weight, bias (C,)."""
    # Sum each chunk, merge the chunks of each group, normalise.
    chunks = chunks_of(x)
    means, squares = _partial(x, chunks)
    options = {"chunk_p": chunks.chunk_p, **EXACT}
    kernels.statistics_kernel[chunks.grid](
        x, means, squares, chunks.channels, chunks.positions, *_strides(x), tile_c=chunks.tile_c, **options
    )
    mean, rstd = (torch.empty(len(x), num_groups, dtype=torch.float32, device=x.device) for _ in range(2))
    grid, sizes, tiles = _merging(chunks, num_groups)
    kernels.merge_kernel[grid](means, squares, mean, rstd, eps, *sizes, **tiles, **options)
    y = torch.empty_like(x)
    kernels.normalise_kernel[chunks.grid](
        x, mean, rstd, weight.contiguous(), bias.contiguous(), y, chunks.channels, chunks.positions, num_groups,
        *_strides(x), *_strides(y),
        silu=silu, tile_c=chunks.tile_c, tile_p=min(2 * chunks.tile_p, chunks.chunk_p), **options,
    )  # fmt: skip
    return y, mean, rstd


@group_norm_silu.register_fake
def _(x, weight, bias, num_groups, eps, silu):
    mean, rstd = (x.new_empty(x.shape[0], num_groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of row, channel and position.

    A single row may have any row stride, for which the compiler could cut it differently; x.numel() avoids that.
    """
    row, channel, position = strides_of(x)
    return row if len(x) > 1 else x.numel(), channel, position


def _partial(x: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Two empty tensors (N, C, K) float32, with one number for each chunk of each channel."""
    shape = (2, chunks.rows, chunks.channels, chunks.per_channel)
    first, second = torch.empty(shape, dtype=torch.float32, device=x.device)
    return first, second


def _merging(chunks: Chunks, num_groups: int) -> tuple[tuple[int], tuple[int, ...], dict[str, int]]:
    """Grid, sizes (G, P, K, chunks per group) and tiles of a kernel that merges the chunks of each group."""
    run = chunks.channels // num_groups * chunks.per_channel
    tile_i = min(power_of_two(run), _MERGED // 4)
    tile_g = min(power_of_two(num_groups), _MERGED // tile_i)
    grid = (chunks.rows * -(-num_groups // tile_g),)
    return grid, (num_groups, chunks.positions, chunks.per_channel, run), {"tile_g": tile_g, "tile_i": tile_i}


@torch.library.custom_op("rlcm_fast::group_norm_silu_sums", mutates_args=())
def group_norm_silu_sums(
    x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """c_1 and c_2 (2, N, G), and the gradients of bias and weight (2, C), all float32, in two launches of Triton."""
    chunks, num_groups = chunks_of(x), mean.shape[1]
    partial = dz_sums, product_sums = _partial(x, chunks)
    weight = weight.contiguous()
    kernels.sums_kernel[chunks.grid](
        x, dy, mean, rstd, weight, bias.contiguous(), dz_sums, product_sums,
        chunks.channels, chunks.positions, num_groups, *_strides(x), *_strides(dy),
        silu=silu, tile_c=chunks.tile_c, tile_p=chunks.tile_p, chunk_p=chunks.chunk_p, **EXACT,
    )  # fmt: skip
    centers = torch.empty(2, len(x), num_groups, dtype=torch.float32, device=x.device)
    grid, sizes, tiles = _merging(chunks, num_groups)
    kernels.merge_sums_kernel[grid](dz_sums, product_sums, weight, centers[0], centers[1], *sizes, **tiles, **EXACT)
    return centers, torch.stack([sums.sum(dim=(0, 2)) for sums in partial])


@group_norm_silu_sums.register_fake
def _(x, dy, mean, rstd, weight, bias, silu):
    return mean.new_empty(2, *mean.shape), mean.new_empty(2, x.shape[1])


@torch.library.custom_op("rlcm_fast::group_norm_silu_input_gradient", mutates_args=())
def group_norm_silu_input_gradient(
    x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, centers: Tensor, silu: bool
) -> Tensor:
    """Gradient of x, in the layout of x and in one launch; centers (2, N, G) holds c_1 and c_2."""
    chunks, dx = chunks_of(x), torch.empty_like(x)
    kernels.input_gradient_kernel[chunks.grid](
        x, dy, mean, rstd, weight.contiguous(), bias.contiguous(), centers[0], centers[1], dx,
        chunks.channels, chunks.positions, mean.shape[1], *_strides(x), *_strides(dy), *_strides(dx),
        silu=silu, tile_c=chunks.tile_c, tile_p=chunks.tile_p, chunk_p=chunks.chunk_p, **EXACT,
    )  # fmt: skip
    return dx


@group_norm_silu_input_gradient.register_fake
def _(x, dy, mean, rstd, weight, bias, centers, silu):
    return torch.empty_like(x)


def _keep(ctx, inputs, output):
    x, weight, bias, _, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx, dy, *_):
    x, weight, bias, mean, rstd = ctx.saved_tensors
    is_channels_last = x.stride(1) == 1
    dy = dy.contiguous(memory_format=torch.channels_last if is_channels_last else torch.contiguous_format)
    tensors = (x, dy, mean, rstd, weight, bias)
    centers, (d_bias, d_weight) = group_norm_silu_sums(*tensors, ctx.silu)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    return (
        group_norm_silu_input_gradient(*tensors, centers, ctx.silu) if needs_x else None,
        d_weight.to(weight.dtype) if needs_weight else None,
        d_bias.to(bias.dtype) if needs_bias else None,
        None, None, None,
    )  # fmt: skip


group_norm_silu.register_autograd(_backward, setup_context=_keep)
