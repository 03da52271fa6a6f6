"""How a kernel walks over N rows of C x H x W: in chunks and tiles, in every memory format, without a copy.

A program sums one chunk of one row, tile by tile. Whoever reads the sums of the chunks adds them in their order. Chunks
and tiles depend only on the size of a row, so the result of a row has the same bits at every place of every batch. If
all tensors of a call have one memory format, the kernel sees a row as one run of D elements. If the formats differ, a
tile is a block of channels times positions, and the kernel uses the strides of each tensor.
"""

# N rows, C channels, P = H W positions, D = C P elements of a row

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_TILE = 1024  # elements: 8 per thread with 4 warps; some architectures spill with 16
_CHUNK = 8192  # elements: 2 programs per row at 4 x 64 x 64, 8 at 4 x 128 x 128
_MAX_CHANNELS = 1024


@dataclass(frozen=True)
class Walk:
    """The shape in which the kernels see a row, and how they cut it."""

    channels: int
    positions: int
    tile_channels: int  # a power of two, at least `channels`
    tile_positions: int
    chunk_positions: int
    interleaved: int  # the number of channels if a channels_last row is walked as one run; otherwise 1

    @property
    def num_chunks(self) -> int:
        return -(-self.positions // self.chunk_positions)

    @property
    def size(self) -> int:
        return self.channels * self.positions


def walk_over(tensors: Sequence[Tensor]) -> tuple[Walk, list[tuple[int, int, int]]]:
    """The walk over tensors (N, C, H, W) of one shape, and the strides of each: row, channel, position.

    Raises:
        ValueError: a tensor is neither contiguous nor channels_last within its rows (rows may have any stride).
    """
    _, channels, height, width = tensors[0].shape
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
    tile_positions = max(1, _TILE // tile_channels)
    num_tiles = min(_CHUNK // _TILE, -(-positions // tile_positions))
    return Walk(channels, positions, tile_channels, tile_positions, num_tiles * tile_positions, interleaved)


def strides_of(tensor: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = tensor.shape
    row, channel, down, right = tensor.stride()
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
