"""What tests/gpu asks of every operation, here of the interpreter; and what a call launches beyond its kernels."""

# N rows, C H W latent

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import (
    assert_same_bits,
    check_against_float64,
    check_same_bits_in_every_batch,
    check_same_bits_in_every_run,
    copy_into,
    has_rows_alone,
    other_inputs,
    relaid,
    run,
)
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels.kernel_operations import OPERATIONS, Operation
from rlcm_fast.kernels.triton_ops import gaussian, loss

CPU = torch.device("cpu")
EACH = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_as_exact_as_the_reference(operation: Operation, dtype: torch.dtype):
    inputs = operation.inputs(5, (3, 7, 9), dtype, CPU)
    check_against_float64(operation, inputs)
    if dtype == torch.bfloat16:
        check_against_float64(operation, relaid(inputs, torch.channels_last))


@EACH
def test_runs_give_the_same_bits(operation: Operation):
    check_same_bits_in_every_run(operation, operation.inputs(2, (3, 7, 9), torch.bfloat16, CPU), num_runs=2)


@pytest.mark.parametrize("operation", list(filter(has_rows_alone, OPERATIONS)), ids=lambda operation: operation.name)
def test_a_row_is_the_same_bits_in_every_batch(operation: Operation):
    inputs = operation.inputs(4, (3, 7, 9), torch.bfloat16, CPU)
    check_same_bits_in_every_batch(operation, inputs, [slice(0, 1), slice(1, 3)])


@EACH
def test_inputs_copied_in_give_what_the_copied_inputs_gave(operation: Operation):
    inputs = operation.inputs(2, (3, 4, 5), torch.bfloat16, CPU)
    before, fresh = run(operation, "triton", inputs), other_inputs(inputs)
    expected = run(operation, "triton", fresh)
    copy_into(inputs, fresh)
    assert_same_bits(run(operation, "triton", inputs), expected)
    assert not all(torch.equal(a, b) for a, b in zip(before, expected, strict=True))


class Launches(TorchDispatchMode):
    """Notes what would run on a GPU: operators of torch that compute, and Triton's kernels by their names."""

    FREE = ("empty", "new_empty", "detach", "alias", "view", "unbind", "select", "slice", "as_strided")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace != "rlcm_fast" and not name.startswith(self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("policy_loss forward+backward", ["_policy_kernel", "_gradient_kernel"]),
        ("policy_loss on-policy forward+backward", ["_policy_kernel", "_gradient_kernel"]),
        ("gaussian_log_prob forward+backward", ["_log_prob_kernel", "_gradient_kernel"]),
        ("clipped_ratio_loss forward+backward", ["_loss_kernel", "mul"]),
        ("gaussian_step noise", ["_step_kernel"]),
    ],
)
def test_a_call_launches_these_kernels_and_nothing_else(
    name: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
):
    operation = next(each for each in OPERATIONS if each.name == name)
    inputs = operation.inputs(2, (3, 4, 5), torch.bfloat16, CPU)
    launches = Launches()
    counters = torch.zeros(8, dtype=torch.int32)
    for module in (gaussian, loss):
        monkeypatch.setattr(module, "is_traced", lambda *tensors: False)  # by the mode that notes the launches
        monkeypatch.setattr(module, "counters_for", lambda *size: counters)  # which a GPU keeps from call to call

    def note(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launches.names.append(kernel.__name__)

    monkeypatch.setattr(type(gaussian._step_kernel), "run", note)
    with launches:
        run(operation, "triton", inputs)
    assert launches.names == expected


def test_every_operation_compiles_without_a_graph_break_and_gives_the_same():
    for operation in OPERATIONS:
        torch.compiler.reset()
        inputs = operation.inputs(4, (3, 4, 5), torch.bfloat16, CPU)
        compiled = torch.compile(operation.call, fullgraph=True, dynamic=False, backend="eager")
        for ours, theirs in zip(operation.run(inputs, compiled), operation.run(inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
