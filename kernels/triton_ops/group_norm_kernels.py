"""Kernels of y = silu(GroupNorm(x)) and of its gradients; group_norm.py launches them.

    x_hat = (x - mean) rstd,   z = x_hat w + b,   y = z sigmoid(z);   mean and rstd of a group of one row, D elements
    dz = dy silu'(z),          silu'(z) = s (1 + z (1 - s)) with s = sigmoid(z)
    dw = sum dz x_hat,         db = sum dz                                                      over N, H, W
    dx = rstd (dz w - c_1 - x_hat c_2),   c_1 = sum dz w / D,   c_2 = sum dz w x_hat / D        over the group

A row is cut into chunks of some channels times some positions. The first launch writes a mean and a sum of squared
deviations for each channel of each chunk, in two passes over registers, so that a large mean costs no digits. The
second launch merges these numbers for each group by the formula of Chan, Golub and LeVeque 1979; the third normalises.
The backward pass takes the same three steps and recomputes x_hat and z. No launch adds atomically, and only the size
and the memory format of a row decide how it is cut. So the result of a row has the same bits in every run, in every
batch and at every place in the batch.
"""

# N rows, C channels, P = H W positions, G groups of D = C P / G elements, K chunks per channel

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# The annotations belong to the kernel: a launch passes numbers for its constexpr, and triton declares NoReturn.

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from rlcm_fast.kernels.triton_ops.rows import strides_of

_TILE = 1024  # elements of x, and as many of dy, in registers at a time: 8 per thread with 4 warps
_TILES = 4  # per chunk; the statistics load a whole chunk at a time
_RUN = 256  # neighbouring positions of a contiguous row
_CHANNELS = 32  # neighbouring channels of a channels_last row: 64 bytes or more
_MAX_ROW = 2**31  # elements, because a place in a row is an int32


@dataclass(frozen=True)
class Chunks:
    """How a row is cut: a program works on tile_c channels times chunk_p positions, tile_p positions at a time."""

    rows: int
    channels: int
    positions: int
    tile_c: int  # a power of two, as are the next two
    tile_p: int
    chunk_p: int

    @property
    def per_channel(self) -> int:
        return -(-self.positions // self.chunk_p)

    @property
    def grid(self) -> tuple[int]:
        return (self.rows * -(-self.channels // self.tile_c) * self.per_channel,)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def chunks_of(x: Tensor) -> Chunks:
    """Choose the chunks from the size and the memory format of a row of x (N, C, H, W)."""
    rows, channels, height, width = x.shape
    positions = height * width
    if channels * positions >= _MAX_ROW:
        raise ValueError(f"C H W={channels * positions} must be below 2^31; choose kernels=torch for such images")
    all_c, all_p = power_of_two(channels), power_of_two(positions)
    if strides_of(x)[1] == 1:
        tile_c = min(all_c, _CHANNELS)
        tile_p = min(all_p, _TILE // tile_c)
    else:
        tile_p = min(all_p, _RUN)
        tile_c = min(all_c, _TILE // tile_p)
    return Chunks(rows, channels, positions, tile_c, tile_p, min(all_p, _TILES * tile_p))


@triton.jit
def _chunk(C, P, tile_c: tl.constexpr, chunk_p: tl.constexpr):
    """Row, channels (tile_c,), index of the chunk within its channels, and number of chunks per channel."""
    program = tl.program_id(0)
    K = tl.cdiv(P, chunk_p)
    per_row = tl.cdiv(C, tile_c) * K
    c = program % per_row // K * tile_c + tl.arange(0, tile_c)
    return (program // per_row).to(tl.int64), c, program % K, K


@triton.jit
def statistics_kernel(x, means, squares, C, P, x_n, x_c, x_p, tile_c: tl.constexpr, chunk_p: tl.constexpr):
    """Store the mean (N, C, K) of each chunk of a channel and the sum of squared deviations from it."""
    n, c, k, K = _chunk(C, P, tile_c, chunk_p)
    p = k * chunk_p + tl.arange(0, chunk_p)[None, :]
    inside = (c[:, None] < C) & (p < P)
    value = tl.load(x + n * x_n + c[:, None] * x_c + p * x_p, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(P - k * chunk_p, chunk_p).to(tl.float32)
    mean = tl.sum(value, axis=1) / count
    deviation = tl.where(inside, value - mean[:, None], 0.0)
    at = (n * C + c) * K + k
    tl.store(means + at, mean, mask=c < C)
    tl.store(squares + at, tl.sum(deviation * deviation, axis=1), mask=c < C)


@triton.jit
def _groups(G, tile_g: tl.constexpr):
    """Row and groups (tile_g, 1) of a merging program."""
    program = tl.program_id(0)
    per_row = tl.cdiv(G, tile_g)
    return (program // per_row).to(tl.int64), program % per_row * tile_g + tl.arange(0, tile_g)[:, None]


@triton.jit
def merge_kernel(
    means, squares, mean, rstd, eps, G, P, K, run, chunk_p: tl.constexpr, tile_g: tl.constexpr, tile_i: tl.constexpr
):  # fmt: skip
    """Store mean and rstd (N, G). The chunks of a group are `run` neighbouring numbers in memory, K per channel."""
    n, g = _groups(G, tile_g)
    first = (n * G + g) * run

    # Merge the means, as differences from the first one: sums of small numbers round less.
    anchor = tl.load(means + first, mask=g < G, other=0.0)
    total = tl.zeros((tile_g, tile_i), dtype=tl.float32)
    for start in range(0, run, tile_i):
        i = start + tl.arange(0, tile_i)[None, :]
        inside = (g < G) & (i < run)
        count = tl.minimum(P - i % K * chunk_p, chunk_p).to(tl.float32)
        difference = tl.load(means + first + i, mask=inside, other=0.0) - anchor
        total += tl.where(inside, count * difference, 0.0)
    size = tl.cast(run // K * P, tl.float32)
    center = anchor + (tl.sum(total, axis=1) / size)[:, None]

    # Merge the squared deviations: those within each chunk, and those of its mean.
    total = tl.zeros((tile_g, tile_i), dtype=tl.float32)
    for start in range(0, run, tile_i):
        i = start + tl.arange(0, tile_i)[None, :]
        inside = (g < G) & (i < run)
        count = tl.minimum(P - i % K * chunk_p, chunk_p).to(tl.float32)
        difference = tl.load(means + first + i, mask=inside, other=0.0) - center
        within = tl.load(squares + first + i, mask=inside, other=0.0)
        total += tl.where(inside, within + count * difference * difference, 0.0)
    variance = (tl.sum(total, axis=1) / size)[:, None]

    # Store mean and 1 / sqrt(variance + eps).
    tl.store(mean + n * G + g, center, mask=g < G)
    root = tl.sqrt_rn(variance + eps)
    tl.store(rstd + n * G + g, tl.div_rn(tl.zeros_like(root) + 1.0, root), mask=g < G)


@triton.jit
def _column_of(numbers, at, inside):
    """Some of `numbers` as a column (tile_c, 1) float32; a load of the column would load each once per position."""
    return tl.load(numbers + at, mask=inside, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _sigmoid(z):
    """Sigmoid of z within 2 units in the last place, the precision of tl.exp.

    A division rounded to nearest took 25 more registers and spilled. exp(-z) may be infinite; 1 / inf is then 0, which
    is right.
    """
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def normalise_kernel(
    x, mean, rstd, weight, bias, y, C, P, G,
    x_n, x_c, x_p, y_n, y_c, y_p,
    silu: tl.constexpr, tile_c: tl.constexpr, tile_p: tl.constexpr, chunk_p: tl.constexpr,
):  # fmt: skip
    n, c, k, _ = _chunk(C, P, tile_c, chunk_p)
    g, is_channel = n * G + c // (C // G), c < C
    m, r = _column_of(mean, g, is_channel), _column_of(rstd, g, is_channel)
    w, b = _column_of(weight, c, is_channel), _column_of(bias, c, is_channel)
    c = c[:, None]
    for first in range(0, chunk_p, tile_p):
        p = k * chunk_p + first + tl.arange(0, tile_p)[None, :]
        inside = (c < C) & (p < P)
        value = tl.load(x + n * x_n + c * x_c + p * x_p, mask=inside, other=0.0).to(tl.float32)
        z = (value - m) * r * w + b
        if silu:
            z = z * _sigmoid(z)
        tl.store(y + n * y_n + c * y_c + p * y_p, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_of_tile(x, dy, x_at, dy_at, inside, m, r, w, b, silu: tl.constexpr):
    """x_hat and dz of a tile; dz is 0 outside of the row."""
    x_hat = (tl.load(x + x_at, mask=inside, other=0.0).to(tl.float32) - m) * r
    dz = tl.load(dy + dy_at, mask=inside, other=0.0).to(tl.float32)
    if silu:
        z = x_hat * w + b
        s = _sigmoid(z)
        dz = dz * s * (1.0 + z * (1.0 - s))
    return x_hat, dz


@triton.jit
def sums_kernel(
    x, dy, mean, rstd, weight, bias, dz_sums, product_sums, C, P, G,
    x_n, x_c, x_p, dy_n, dy_c, dy_p,
    silu: tl.constexpr, tile_c: tl.constexpr, tile_p: tl.constexpr, chunk_p: tl.constexpr,
):  # fmt: skip
    """Store the sums (N, C, K) of dz and of dz x_hat over each chunk of a channel."""
    # Load what all positions of a channel share.
    n, c, k, K = _chunk(C, P, tile_c, chunk_p)
    at = (n * C + c) * K + k
    g, is_channel = n * G + c // (C // G), c < C
    m, r = _column_of(mean, g, is_channel), _column_of(rstd, g, is_channel)
    w, b = _column_of(weight, c, is_channel), _column_of(bias, c, is_channel)
    c = c[:, None]

    # Walk over the tiles of the chunk and sum.
    sum_1 = tl.zeros((tile_c, tile_p), dtype=tl.float32)
    sum_2 = tl.zeros((tile_c, tile_p), dtype=tl.float32)
    for first in range(0, chunk_p, tile_p):
        p = k * chunk_p + first + tl.arange(0, tile_p)[None, :]
        inside = (c < C) & (p < P)
        x_at, dy_at = n * x_n + c * x_c + p * x_p, n * dy_n + c * dy_c + p * dy_p
        x_hat, dz = _gradient_of_tile(x, dy, x_at, dy_at, inside, m, r, w, b, silu)
        sum_1 += dz
        sum_2 += dz * x_hat
    tl.store(dz_sums + at, tl.sum(sum_1, axis=1), mask=is_channel)
    tl.store(product_sums + at, tl.sum(sum_2, axis=1), mask=is_channel)


@triton.jit
def merge_sums_kernel(
    dz_sums, product_sums, weight, c_1, c_2, G, P, K, run, tile_g: tl.constexpr, tile_i: tl.constexpr
):  # fmt: skip
    """Store c_1 and c_2 (N, G)."""
    n, g = _groups(G, tile_g)
    sum_1 = tl.zeros((tile_g, tile_i), dtype=tl.float32)
    sum_2 = tl.zeros((tile_g, tile_i), dtype=tl.float32)
    for start in range(0, run, tile_i):
        i = start + tl.arange(0, tile_i)[None, :]
        inside = (g < G) & (i < run)
        w = tl.load(weight + g * (run // K) + i // K, mask=inside, other=0.0).to(tl.float32)
        at = (n * G + g) * run + i
        sum_1 += w * tl.load(dz_sums + at, mask=inside, other=0.0)
        sum_2 += w * tl.load(product_sums + at, mask=inside, other=0.0)
    size = tl.cast(run // K * P, tl.float32)
    tl.store(c_1 + n * G + g, (tl.sum(sum_1, axis=1) / size)[:, None], mask=g < G)
    tl.store(c_2 + n * G + g, (tl.sum(sum_2, axis=1) / size)[:, None], mask=g < G)


@triton.jit
def input_gradient_kernel(
    x, dy, mean, rstd, weight, bias, c_1, c_2, dx, C, P, G,
    x_n, x_c, x_p, dy_n, dy_c, dy_p, dx_n, dx_c, dx_p,
    silu: tl.constexpr, tile_c: tl.constexpr, tile_p: tl.constexpr, chunk_p: tl.constexpr,
):  # fmt: skip
    n, c, k, _ = _chunk(C, P, tile_c, chunk_p)
    g, is_channel = n * G + c // (C // G), c < C
    m, r = _column_of(mean, g, is_channel), _column_of(rstd, g, is_channel)
    w, b = _column_of(weight, c, is_channel), _column_of(bias, c, is_channel)
    center_1, center_2 = _column_of(c_1, g, is_channel), _column_of(c_2, g, is_channel)
    c = c[:, None]
    for first in range(0, chunk_p, tile_p):
        p = k * chunk_p + first + tl.arange(0, tile_p)[None, :]
        inside = (c < C) & (p < P)
        x_at, dy_at = n * x_n + c * x_c + p * x_p, n * dy_n + c * dy_c + p * dy_p
        x_hat, dz = _gradient_of_tile(x, dy, x_at, dy_at, inside, m, r, w, b, silu)
        value = r * (dz * w - center_1 - x_hat * center_2)
        tl.store(dx + n * dx_n + c * dx_c + p * dx_p, value.to(dx.dtype.element_ty), mask=inside)
