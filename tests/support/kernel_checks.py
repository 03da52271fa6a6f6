"""What every kernel operation must satisfy, on whatever device: the tests of a GPU and of the interpreter call these.

The rule for errors: no larger than the reference's own in the same dtype, plus an absolute term for the order of
summation (float32 has a rounding of 6e-8 of the value at each addition).
"""

# N rows, C H W latent

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels.kernel_operations import Inputs, Operation
from rlcm_fast.kernels import dispatch

Results = list[Tensor]

_PER_UNIT = 2e-6  # of the largest true value; for one number of 1 where that is larger


def assert_no_worse(ours: Tensor, theirs: Tensor, truth: Tensor, per_unit: float) -> None:
    """Largest error of ours at most that of the reference, plus `per_unit` of the largest true value.

    To bfloat16 the interpreter cuts off where a GPU rounds: an error of one unit in the last place for one half.
    """
    per_unit += 2.0**-8 if ours.dtype == torch.bfloat16 and not ours.is_cuda else 0.0
    assert torch.equal(ours.isfinite(), theirs.isfinite())  # float16 overflows for both
    ours, theirs, truth = (values[theirs.isfinite()].double() for values in (ours, theirs, truth))
    error, allowed = (ours - truth).abs().max(), (theirs - truth).abs().max() + per_unit * truth.abs().max()
    assert error <= allowed, f"{error} > {allowed}"


def wide(inputs: Inputs) -> Inputs:
    """In float64, each still a leaf where it was one."""
    return tuple(
        tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for tensor in inputs
    )


def run(operation: Operation, choice: str, inputs: Inputs) -> Results:
    with dispatch.use(choice):
        return operation.run(inputs)


def check_against_float64(operation: Operation, inputs: Inputs) -> None:
    """Results and gradients, each against the float64 truth."""
    ours, theirs = run(operation, "triton", inputs), run(operation, "torch", inputs)
    for our, their, true in zip(ours, theirs, run(operation, "torch", wide(inputs)), strict=True):
        assert our.dtype == their.dtype and our.shape == their.shape
        if our.ndim > 0:
            assert_no_worse(our, their, true, _PER_UNIT)
        else:  # a mean over rows may be near zero where its terms are not
            assert (our - true).abs() <= (their - true).abs() + _PER_UNIT * true.abs().clamp(min=1.0)


def check_same_bits_in_every_run(operation: Operation, inputs: Inputs, num_runs: int) -> None:
    first = run(operation, "triton", inputs)
    for _ in range(num_runs - 1):
        assert_same_bits(run(operation, "triton", inputs), first)


def check_same_bits_in_every_batch(operation: Operation, inputs: Inputs, slices: list[slice]) -> None:
    """For operations whose results are rows: a row does not know of its neighbours."""
    together = run(operation, "triton", inputs)
    for rows in slices:
        alone = tuple(tensor.detach()[rows].requires_grad_(tensor.requires_grad) for tensor in inputs)
        assert_same_bits(run(operation, "triton", alone), [result[rows] for result in together])


def assert_same_bits(ours: Results, theirs: Results) -> None:
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


def has_rows_alone(operation: Operation) -> bool:
    """Whether its results are one for each row; losses mix rows."""
    return operation.name.startswith("gaussian")


def relaid(inputs: Inputs, memory_format: torch.memory_format) -> Inputs:
    """The inputs with latents (N, C, H, W) in another memory format."""
    return tuple(
        tensor.detach().contiguous(memory_format=memory_format).requires_grad_(tensor.requires_grad)
        if tensor.ndim == 4
        else tensor
        for tensor in inputs
    )


def other_inputs(inputs: Inputs) -> Inputs:
    """The same rows in the opposite order."""
    return tuple(
        tensor.detach().flip(0).requires_grad_(tensor.requires_grad) if tensor.ndim > 0 else tensor for tensor in inputs
    )


def copy_into(targets: Inputs, sources: Inputs) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
