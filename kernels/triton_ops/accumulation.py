"""A sum of bfloat16 gradients that is rounded stochastically, in one pass over memory: reference_adamw.add_rounded.

A program adds 4 blocks of 256 elements that are neighbours in memory, so no memory format needs a copy. It has the
random numbers of the AdamW kernel with another counter, of which it loads what changes between launches: a CUDA graph
repeats its launches with the same numbers, and reads the same addresses.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# The annotations belong to the kernel: a launch passes numbers for its constexpr, and triton declares NoReturn.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlcm_fast.kernels.quantization import BLOCK
from rlcm_fast.kernels.triton_ops.adamw import _random_halves, _rounded

_BLOCKS = 4  # per program, as in the AdamW kernel


@triton.jit(do_not_specialize=["seed", "index"])
def _add_kernel(total, addend, addition, size, seed, index, blocks: tl.constexpr):
    first_block = tl.program_id(0) * blocks
    block = first_block + tl.arange(0, blocks)[:, None]
    place = block.to(tl.int64) * 256 + tl.arange(0, 256)[None, :]
    inside = place < size
    exact = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
    exact += tl.load(addend + place, mask=inside, other=0.0).to(tl.float32)
    step, number = tl.load(addition), tl.load(addition + 1)
    halves = _random_halves(seed, step, index, first_block, blocks, number)
    to_nearest_even = 0x7FFF + ((exact.to(tl.int32, bitcast=True) >> 16) & 1)
    halves = tl.where(number == 0, to_nearest_even, halves)
    tl.store(total + place, _rounded(exact, halves).to(tl.bfloat16), mask=inside)


@torch.library.custom_op("rlcm_fast::add_rounded_", mutates_args=("total",))
def add_rounded_(total: Tensor, addend: Tensor, seed: int, addition: Tensor, index: int) -> None:
    """Add `addend` to `total` in place; both are bfloat16 with the same dense strides; addition is (2,) int64."""
    grid = (triton.cdiv(total.numel(), _BLOCKS * BLOCK),)
    _add_kernel[grid](total, addend, addition, total.numel(), seed, index, blocks=_BLOCKS)
