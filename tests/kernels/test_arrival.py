"""One launch that finishes what it begins: no order of programs changes a bit, and counters end as they began."""

# N rows, C H W latent

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from benchmarks.kernels.kernel_operations import find_operations
from rlcm_fast.kernels import dispatch
from rlcm_fast.kernels.triton_ops import arrival, gaussian, launches, loss

NUM_ROWS, SHAPE = 2, (4, 24, 27)  # three tiles a row
NUM_PROGRAMS = NUM_ROWS * 3
LAST_FINISHES = find_operations(["policy_loss", "gaussian_log_prob forward", "gaussian_step noise"])


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Those of every launch, as a stream of a GPU has them."""
    kept = torch.zeros(NUM_ROWS + 1, dtype=torch.int32)
    for module in (gaussian, loss):
        monkeypatch.setattr(module, "counters_for", lambda *size: kept)
    return kept


@pytest.fixture
def run_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[int]], None]:
    """Sets the order in which the interpreter runs programs from now on."""
    builder = type(interpreter.interpreter_builder)
    plain = builder.set_grid_idx

    def use(order: Sequence[int]) -> None:
        def set_grid_idx(self: object, x: int, y: int, z: int) -> None:
            plain(self, order[x], y, z)

        monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)

    return use


@pytest.mark.parametrize("operation", LAST_FINISHES, ids=lambda operation: operation.name)
def test_the_order_of_arrival_changes_no_bit_and_counters_end_at_zero(
    operation, counters: Tensor, run_in: Callable[[Sequence[int]], None]
):
    inputs = operation.inputs(NUM_ROWS, SHAPE, torch.float32, torch.device("cpu"))
    shuffled = torch.randperm(NUM_PROGRAMS, generator=torch.Generator().manual_seed(0)).tolist()
    results = []
    for order in (list(range(NUM_PROGRAMS)), shuffled):
        run_in(order)
        with dispatch.use("triton"):
            results.append(operation.run(inputs))
        assert not counters.any()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_captured_launches_share_no_counters_and_no_line_of_them():
    reserved = arrival._Captured(torch.zeros(160, dtype=torch.int32))
    first, second, third = reserved.take(17), reserved.take(32), reserved.take(33)
    assert first is not None and second is not None and third is not None
    assert [each.storage_offset() for each in (first, second, third)] == [0, 32, 64]
    assert [len(each) for each in (first, second, third)] == [17, 32, 33]
    assert reserved.take(33) is None  # such a launch fills its own
    assert reserved.take(32) is not None


def test_a_plan_is_found_again_only_for_tensors_that_the_compiled_kernel_fits():
    x = torch.zeros(4, 3, 4, 5)
    plan = launches.plan_for("test", [x, x], True)
    assert launches.plan_for("test", [x.clone(), x], True) is plan
    beside = torch.zeros(241)[1:].view(4, 3, 4, 5)
    others = [
        launches.plan_for("test", [beside, x], True),  # its loads may not be of 16 bytes
        launches.plan_for("test", [x, x.contiguous(memory_format=torch.channels_last)], True),
        launches.plan_for("test", [x, x.bfloat16()], True),
        launches.plan_for("test", [x[:2], x[:2]], True),
        launches.plan_for("test", [x, x], False),
        launches.plan_for("other", [x, x], True),
    ]
    assert len({id(each) for each in (plan, *others)}) == 7


def test_plans_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launches, "_plans", {})
    monkeypatch.setattr(launches, "_MAX_PLANS", 3)
    for num_rows in range(1, 9):
        launches.plan_for("test", [torch.zeros(num_rows, 1, 2, 2)])
    assert 1 <= len(launches._plans) <= 3
