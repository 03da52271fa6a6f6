"""How kernels walk over N rows of C x H x W: a program for each tile of a row, in every memory format, without copies.

A program sums one tile. Whoever reads the sums of a row's tiles adds them in a fixed order. Tiles depend only on the
size of a row, so the result of a row has the same bits at every place of every batch. If all tensors of a call have one
memory format, the kernel sees a row as one run of D elements. If the formats differ, a tile is a block of channels
times positions, and the kernel uses the strides of each tensor.
"""

# N rows, C channels, P = H W positions, D = C P elements of a row, K tiles of a row

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_TILE = 1024  # elements: 8 per thread with 4 warps; some architectures spill with 16
_MAX_CHANNELS = 1024
_MAX_BLOCK = 1024  # sums of tiles that are loaded at a time


@dataclass(frozen=True)
class Walk:
    """The shape in which the kernels see a row, and how they cut it."""

    channels: int
    positions: int
    tile_channels: int  # a power of two, at least `channels`
    tile_positions: int
    interleaved: int  # the number of channels if a channels_last row is walked as one run; otherwise 1

    @property
    def num_tiles(self) -> int:
        return -(-self.positions // self.tile_positions)

    @property
    def block(self) -> int:
        """How many sums of tiles are loaded at a time: a power of two, and all of a row's up to 1024."""
        return min(_MAX_BLOCK, 1 << (self.num_tiles - 1).bit_length())


def walk_over(tensors: Sequence[Tensor]) -> tuple[Walk, list[tuple[int, int, int]]]:
    """The walk over tensors (N, C, H, W) of one shape, and the strides of each: row, channel, position.

    Raises:
        ValueError: a tensor is neither contiguous nor channels_last within its rows (rows may have any stride).
    """
    _, channels, height, width = map(int, tensors[0].shape)
    positions = height * width
    strides = [strides_of(tensor) for tensor in tensors]
    if len({of_row[1:] for of_row in strides}) == 1:
        is_channels_last = strides[0][2] == channels > 1
        run = _walk(1, channels * positions, interleaved=channels if is_channels_last else 1)
        return run, [(row, 0, 1) for row, _, _ in strides]
    if channels > _MAX_CHANNELS:
        raise ValueError(f"C={channels} channels in mixed memory formats exceed {_MAX_CHANNELS}; give all tensors one")
    return _walk(channels, positions), strides


def _walk(channels: int, positions: int, interleaved: int = 1) -> Walk:
    tile_channels = 1 << (channels - 1).bit_length()
    return Walk(channels, positions, tile_channels, max(1, _TILE // tile_channels), interleaved)


def strides_of(tensor: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = map(int, tensor.shape)
    row, channel, down, right = map(int, tensor.stride())
    if width == 1:
        right = down if height > 1 else 0
    is_even = height == 1 or down == right * width
    if is_even and right == 1 and (channels == 1 or channel == height * width):
        return row, height * width, 1
    if is_even and right == channels and channel == 1:
        return row, 1, channels
    if height * width == 1 and (channels == 1 or channel == 1):
        return row, 1, 1
    raise ValueError(
        f"strides {tensor.stride()} of a tensor {tuple(tensor.shape)} are neither contiguous nor channels_last within "
        "its rows; call .contiguous() on it"
    )
