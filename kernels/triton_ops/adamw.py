"""AdamW with 8-bit moments, for many tensors in one launch; bfloat16 weights are rounded stochastically.

A program updates 4 blocks of 256 elements of one tensor that are neighbours in memory, so no memory format needs a
copy. It dequantises both moments, updates them and the weights (reference_adamw.adamw_step), and quantises the moments
by the new largest value of their block. A table on the device tells which tensor a program updates and where it lies;
the addresses get there in one copy from pinned memory, for which nothing waits.
"""

# T tensors, M blocks of 256 elements per tensor

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# The annotations belong to the kernel: a launch passes numbers for its constexpr, and triton declares NoReturn.

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlcm_fast.kernels.quantization import BLOCK, codebook, edges_between
from rlcm_fast.kernels.triton_ops.launches import EXACT

_BLOCKS = 4  # per program: 8 elements per thread, as many as one counter of Philox serves
_COLUMNS = tl.constexpr(8)  # of the table: six addresses, number of elements, index
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def _address(row, column: tl.constexpr, dtype: tl.constexpr, is_aligned: tl.constexpr):
    address = tl.load(row + column).to(tl.pointer_type(dtype))
    if is_aligned:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _code(scaled, edges):
    """The nearest code: the number of edges below each value, by bisection."""
    code = tl.zeros(scaled.shape, dtype=tl.int32)
    for bit in tl.static_range(8):
        code += tl.where(scaled > tl.load(edges + code + ((128 >> bit) - 1)), 128 >> bit, 0)
    return code


@triton.jit
def _store_quantized(codes, absmax, place, block, inside, num_blocks, values, edges, is_signed: tl.constexpr):
    """Quantise the values as quantization.quantize does, and store them."""
    largest = tl.max(tl.where(inside, tl.abs(values), 0.0), axis=1, keep_dims=True)
    scaled = tl.div_rn(values, tl.zeros_like(values) + tl.where(largest > 0, largest, 1.0))
    code = _code(scaled, edges)
    if not is_signed:
        code = tl.where(scaled > 0, tl.maximum(code, 1), code)
    tl.store(codes + place, code.to(tl.uint8), mask=inside)
    tl.store(absmax + block, largest, mask=block < num_blocks)


@triton.jit
def _sum(flags):
    return tl.sum(tl.sum(flags.to(tl.int32), axis=1), axis=0)


@triton.jit
def _word(numbers):
    return numbers.to(tl.uint32)


@triton.jit
def _random_halves(seed, step, index, first_block, blocks: tl.constexpr, number=0):
    """Random numbers (blocks, 256) int32 in [0, 2^16), the same as those of reference_adamw.philox_halves."""
    eights = (first_block + tl.arange(0, blocks)[:, None]) * 32 + tl.arange(0, 32)[None, :]
    zero = tl.zeros((blocks, 32), dtype=tl.int32)
    words = tl.philox(seed, _word(eights), _word(zero + step), _word(zero + index), _word(zero + number))
    joined = tl.join(tl.join(words[0], words[1]), tl.join(words[2], words[3]))
    halves = tl.join(joined & 0xFFFF, joined >> 16)
    return tl.reshape(halves, (blocks, 256)).to(tl.int32)


@triton.jit
def _rounded(values, halves):
    bits = values.to(tl.int32, bitcast=True)
    rounded = ((bits + halves) & -65536).to(tl.float32, bitcast=True)
    is_finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, rounded, values)


@triton.jit(do_not_specialize=["step", "seed"])
def _adamw_kernel(
    table, tensor_of_program, first_program, codes_1, codes_2, edges_1, edges_2, grad_scale, counted,
    decay, step_size, inverse_root, beta_1, one_less_beta_1, beta_2, one_less_beta_2, eps, step, seed,
    param_dtype: tl.constexpr, grad_dtype: tl.constexpr, is_quantized: tl.constexpr, rounds: tl.constexpr,
    scales: tl.constexpr, counts: tl.constexpr, is_aligned: tl.constexpr, blocks: tl.constexpr,
):  # fmt: skip
    # Look up the tensor of this program, its addresses and its size.
    tensor = tl.load(tensor_of_program + tl.program_id(0))
    row = table + tensor * _COLUMNS
    state_dtype: tl.constexpr = tl.uint8 if is_quantized else tl.float32
    param, grad = _address(row, 0, param_dtype, is_aligned), _address(row, 1, grad_dtype, is_aligned)
    state_1, state_2 = _address(row, 2, state_dtype, is_aligned), _address(row, 3, state_dtype, is_aligned)
    absmax_1, absmax_2 = _address(row, 4, tl.float32, False), _address(row, 5, tl.float32, False)
    size, index = tl.load(row + 6), tl.load(row + 7)
    if scales:
        scale = tl.load(grad_scale)
        size = tl.where(tl.abs(scale) < float("inf"), size, 0)  # a scale that is not finite: nothing is inside
    if is_aligned:
        size = tl.multiple_of(size, 16)

    # Find the blocks of this program.
    first_block = (tl.program_id(0) - tl.load(first_program + tensor)) * blocks
    block = first_block + tl.arange(0, blocks)[:, None]
    place = block.to(tl.int64) * 256 + tl.arange(0, 256)[None, :]
    inside = place < size
    num_blocks = (size + 255) // 256

    # Load the gradient and the moments.
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if scales:
        g = g * scale
    m = tl.load(state_1 + place, mask=inside, other=0)
    v = tl.load(state_2 + place, mask=inside, other=0)
    if is_quantized:
        m = tl.load(codes_1 + m.to(tl.int32)) * tl.load(absmax_1 + block, mask=block < num_blocks, other=0.0)
        v = tl.load(codes_2 + v.to(tl.int32)) * tl.load(absmax_2 + block, mask=block < num_blocks, other=0.0)

    # Update the moments and the weights.
    m = beta_1 * m + one_less_beta_1 * g
    v = beta_2 * v + one_less_beta_2 * (g * g)
    change = tl.div_rn(m, tl.sqrt_rn(v) * inverse_root + eps)
    before = tl.load(param + place, mask=inside, other=0.0)
    exact = decay * before.to(tl.float32) - step_size * change
    if rounds:
        after = _rounded(exact, _random_halves(seed, step, index, first_block, blocks)).to(param_dtype)
    else:
        after = exact.to(param_dtype)
    tl.store(param + place, after, mask=inside)

    # Count the updates that rounding loses, and store the moments.
    if counts:
        is_wanted = inside & (exact != before.to(tl.float32))
        tl.store(counted + 2 * tl.program_id(0), _sum(is_wanted))
        tl.store(counted + 2 * tl.program_id(0) + 1, _sum(is_wanted & (after == before)))
    if is_quantized:
        _store_quantized(state_1, absmax_1, place, block, inside, num_blocks, m, edges_1, True)
        _store_quantized(state_2, absmax_2, place, block, inside, num_blocks, v, edges_2, False)
    else:
        tl.store(state_1 + place, m, mask=inside)
        tl.store(state_2 + place, v, mask=inside)


_WRITTEN = ("params", "states_1", "states_2", "absmax_1", "absmax_2", "counts")


@torch.library.custom_op("rlcm_fast::adamw_8bit_", mutates_args=_WRITTEN)
def adamw_8bit_(
    params: Sequence[Tensor], grads: Sequence[Tensor], states_1: Sequence[Tensor], states_2: Sequence[Tensor],
    absmax_1: Sequence[Tensor], absmax_2: Sequence[Tensor], indices: Sequence[int], scalars: Sequence[float],
    step: int, seed: int, rounds: bool, grad_scale: Tensor | None, counts: Tensor | None,
) -> None:  # fmt: skip
    """Step T tensors in one launch; they share a dtype, their gradients too, and their states are uint8 or float32.

    All tensors of one index have the same dense strides. The absmax lists are empty for float32 states. scalars holds
    the fields of reference_adamw.AdamWScalars.
    """
    # Copy the table of addresses to the device.
    is_quantized = states_1[0].dtype == torch.uint8
    device = params[0].device
    lists = [params, grads, states_1, states_2, *((absmax_1, absmax_2) if is_quantized else (states_1, states_2))]
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    sizes = [param.numel() for param in params]
    table = _on(device, [*map(list, zip(*addresses, sizes, indices, strict=True))])

    # Assign programs to tensors.
    num_programs = [triton.cdiv(size, _BLOCKS * BLOCK) for size in sizes]
    first_program = [0, *accumulate(num_programs)][:-1]
    tensors = torch.arange(len(sizes), dtype=torch.int32, device=device)
    tensor_of_program = tensors.repeat_interleave(_on(device, num_programs), output_size=sum(num_programs))
    counted = None if counts is None else torch.empty(sum(num_programs), 2, dtype=torch.int32, device=device)

    # Launch, and add up what the programs counted.
    _adamw_kernel[(sum(num_programs),)](
        table, tensor_of_program, _on(device, first_program),
        codebook(True, device), codebook(False, device), edges_between(True, device), edges_between(False, device),
        table if grad_scale is None else grad_scale, table if counted is None else counted, *scalars, step, seed,
        param_dtype=_TRITON_DTYPES[params[0].dtype], grad_dtype=_TRITON_DTYPES[grads[0].dtype],
        is_quantized=is_quantized, rounds=rounds, scales=grad_scale is not None, counts=counts is not None,
        is_aligned=all(number % 16 == 0 for column in (*addresses[:4], sizes) for number in column),
        blocks=_BLOCKS, **EXACT,
    )  # fmt: skip
    if counts is not None and counted is not None:
        counts += counted.sum(dim=0)


def _on(device: torch.device, numbers: list) -> Tensor:
    """Tensor of int64 numbers, copied to the device without waiting for it."""
    tensor = torch.tensor(numbers, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
