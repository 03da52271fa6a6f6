"""Bytes of an optimizer's two moments: as wide as the weights, or 8 bits per element with a scale per block."""

from __future__ import annotations

from collections.abc import Sequence

_BLOCK = 256  # elements of an 8-bit state that share one float32 scale
_LEAST_8BIT = 4096  # elements of a tensor; smaller tensors have float32 states
_CODEBOOKS = {"bnb_adamw_8bit": 2 * 256 * 4, "bnb_paged_adamw_8bit": 2 * 256 * 4}  # bytes; one pair per optimizer


def moment_bytes(optimizer: str, sizes: Sequence[int], itemsize: int) -> int:
    """Bytes of the optimizer's states for tensors of `sizes` elements of `itemsize` bytes each."""
    if optimizer in ("adamw", "adam"):
        return 2 * itemsize * sum(sizes)
    quantized = sum(2 * (size + 4 * -(-size // _BLOCK)) for size in sizes if size >= _LEAST_8BIT)
    small = sum(2 * 4 * size for size in sizes if size < _LEAST_8BIT)
    return quantized + small + (_CODEBOOKS.get(optimizer, 0) if quantized else 0)
