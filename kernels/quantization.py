"""Block-wise 8-bit quantisation of optimizer states (8-bit Optimizers, arXiv 2110.02861), the format of bitsandbytes.

256 neighbouring elements IN MEMORY are a block: state = codebook[code] * absmax of the block. A codebook has 256 values
in [-1, 1], or in [0, 1] without signs; its decades 10^-7 .. 1 have twice as many values each as the one below, so that
large values are exact to a few per cent and small ones still have an order of magnitude.

One departure from bitsandbytes: a second moment above 0 is never quantised to 0, but to the smallest code, 3e-7 of its
block's largest. Where it is lost while the first moment is not, which has signs and no squares and so survives much
longer, the next small gradient makes a step of m / eps: measured in tests/kernels/test_adamw.py.
"""

# M blocks of 256 elements, the last one perhaps shorter

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
_DECADES = 7


@cache
def codebook(is_signed: bool, device: torch.device) -> Tensor:
    """(256,) float32, ascending: for the first moment with signs, for the second without. Shared: never write to it."""
    positive = []
    for decade in range(_DECADES):
        num_values = 2**decade * (1 if is_signed else 2)
        edges = torch.linspace(0.1, 1.0, num_values + 1)
        positive.append(10 ** (decade + 1 - _DECADES) * (edges[:-1] + edges[1:]) / 2.0)
    values = torch.cat([*positive, *(-part for part in positive if is_signed), torch.tensor([0.0, 1.0])])
    return values.sort().values.to(device)


@cache
def edges_between(is_signed: bool, device: torch.device) -> Tensor:
    """(256,) float32: the value from which on the next code is nearer; the last one is infinite."""
    values = codebook(is_signed, device)
    return torch.cat([(values[:-1] + values[1:]) / 2, torch.tensor([torch.inf], device=device)])


def quantize(values: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    """uint8 codes like `values` (float32, any shape, dense), the nearest, and the blocks' absmax (M,) float32."""
    blocks = in_blocks(values)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / torch.where(absmax > 0, absmax, 1.0)[:, None]
    codes = _nearest(scaled, is_signed)
    if not is_signed:
        codes = torch.where(scaled > 0, codes.clamp(min=1), codes)
    return laid_out_like(codes, values), absmax


def _nearest(scaled: Tensor, is_signed: bool) -> Tensor:
    """uint8, the number of edges below each value of [-1, 1], of which the upper 16 bits leave two to choose from.

    4 million values in pieces of 2^16: 0.24 s with torch.bucketize, 0.06 s so (quantize, one core of a 2.5 GHz Xeon).
    """
    upper = (scaled.view(torch.int32) >> 16) & 0xFFFF
    codes = _codes_of_upper_bits(is_signed, scaled.device)[upper]
    return codes + (scaled > edges_between(is_signed, scaled.device)[codes.int()])


@cache
def _codes_of_upper_bits(is_signed: bool, device: torch.device) -> Tensor:
    """(65536,) uint8: the code of the lowest float32 with these upper bits. No two edges share upper bits."""
    bits = torch.arange(2**16, dtype=torch.int32)
    lowest = (bits << 16) + (bits >= 2**15).int() * 0xFFFF  # negative numbers fall as their bits rise
    values = lowest.view(torch.float32).nan_to_num(0.0, torch.inf, -torch.inf)
    edges = edges_between(is_signed, torch.device("cpu"))
    return torch.bucketize(values, edges).clamp(max=255).to(torch.uint8).to(device)


def dequantize(codes: Tensor, absmax: Tensor, is_signed: bool) -> Tensor:
    """float32 values like `codes`, which is uint8 and dense."""
    blocks = codebook(is_signed, codes.device)[in_blocks(codes).int()] * absmax[:, None]
    return laid_out_like(blocks, codes)


def in_memory_order(tensor: Tensor) -> Tensor:
    """A view (numel,) of a dense tensor, its elements as they lie in memory.

    Raises:
        ValueError: the elements overlap or leave gaps.
    """
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} with strides {tensor.stride()} has gaps or overlaps in "
                "memory; call .contiguous() on it"
            )
        expected *= size
    return tensor.as_strided((tensor.numel(),), (1,))


def has_memory_order_of(tensor: Tensor, other: Tensor) -> bool:
    """Whether elements of one place have one place in memory in both, of one shape; a dimension of 1 has no order."""
    strides = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    return all(size == 1 or a == b for size, a, b in strides)


def in_blocks(tensor: Tensor) -> Tensor:
    """(M, 256), in memory order, padded with zeros: a view if it comes out even, else a copy."""
    flat = in_memory_order(tensor)
    return F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def laid_out_like(blocks: Tensor, like: Tensor) -> Tensor:
    """Blocks (M, 256) as a tensor of the shape and the strides of `like`."""
    return blocks.flatten()[: like.numel()].as_strided(like.shape, like.stride())
