"""The kernels where they are meant to run; needs torch, triton and pytest, a GPU, and nothing else.

The checks are of tests/support/kernel_checks.py, which tests/kernels/test_kernel_checks.py runs in the interpreter.
"""

# N rows, C H W latent

from __future__ import annotations

from collections.abc import Iterator

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

from benchmarks.kernels.kernel_operations import OPERATIONS, Operation, find_operations
from benchmarks.kernels.kernel_timing import num_launches
from rlcm_fast.kernels import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DEVICE = torch.device("cuda")
SIZES = [
    pytest.param(5, (3, 7, 9), id="odd"),
    pytest.param(33, (4, 64, 64), id="a latent of 512 pixels"),
    pytest.param(4, (4, 256, 256), id="large rows"),
    pytest.param(65_536, (4, 4, 4), id="many rows"),  # more than a grid has in y and z
]
EACH = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
POLICY_LOSSES = find_operations(["policy_loss"])


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_rows", "shape"), SIZES)
def test_results_are_as_exact_as_the_reference(operation: Operation, dtype: torch.dtype, num_rows: int, shape):
    check_against_float64(operation, operation.inputs(num_rows, shape, dtype, DEVICE))


@EACH
def test_results_in_channels_last_are_as_exact_as_the_reference(operation: Operation):
    inputs = operation.inputs(5, (4, 48, 53), torch.bfloat16, DEVICE)
    check_against_float64(operation, relaid(inputs, torch.channels_last))


@EACH
def test_ten_runs_give_the_same_bits(operation: Operation):
    check_same_bits_in_every_run(operation, operation.inputs(64, (4, 64, 64), torch.bfloat16, DEVICE), num_runs=10)


@pytest.mark.parametrize("operation", list(filter(has_rows_alone, OPERATIONS)), ids=lambda operation: operation.name)
def test_a_row_is_the_same_bits_in_every_batch(operation: Operation):
    inputs = operation.inputs(64, (4, 64, 64), torch.bfloat16, DEVICE)
    check_same_bits_in_every_batch(operation, inputs, [slice(0, 1), slice(63, 64), slice(5, 8), slice(20, 52)])


@pytest.fixture
def syncs_are_errors() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@EACH
def test_nothing_waits_for_the_device(operation: Operation, request: pytest.FixtureRequest):
    inputs = operation.inputs(16, (4, 64, 64), torch.bfloat16, DEVICE)
    run(operation, "triton", inputs)  # kernels are compiled and loaded
    request.getfixturevalue("syncs_are_errors")
    run(operation, "triton", inputs)


@EACH
def test_a_captured_graph_replays_on_new_inputs_bit_for_bit(operation: Operation):
    inputs = operation.inputs(16, (4, 64, 64), torch.bfloat16, DEVICE)
    fresh = other_inputs(inputs)
    expected = run(operation, "triton", fresh)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        run(operation, "triton", inputs)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(operation, "triton", inputs)
    copy_into(inputs, fresh)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, expected)


@pytest.mark.parametrize("operation", POLICY_LOSSES, ids=lambda operation: operation.name)
def test_the_policy_loss_and_its_gradient_are_two_launches(operation: Operation):
    """Of every kernel and fill on the device; the gradient from above is given and m.grad is not added to."""
    inputs = operation.inputs(64, (4, 128, 128), torch.bfloat16, DEVICE)
    with dispatch.use("triton"):
        count = num_launches(lambda: operation.run(inputs))
    if count is None:
        pytest.skip("the profiler sees no kernels on this machine")
    assert count <= 2


@pytest.mark.parametrize("operation", [*POLICY_LOSSES, *find_operations(["gaussian_step"])], ids=lambda each: each.name)
@pytest.mark.parametrize("num_rows", [1, 16, 256])
def test_a_thousand_launches_that_hurry_each_other_give_the_same_bits(operation: Operation, num_rows: int):
    """A sum that its reader does not see, or a counter that is not back at zero, would show here."""
    inputs = operation.inputs(num_rows, (4, 64, 64), torch.bfloat16, DEVICE)
    expected = run(operation, "triton", inputs)
    differs = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for _ in range(1000):
        for ours, theirs in zip(run(operation, "triton", inputs), expected, strict=True):
            differs |= (ours != theirs).any()
    assert not differs


@pytest.mark.parametrize("operation", POLICY_LOSSES, ids=lambda operation: operation.name)
def test_graphs_and_eager_calls_in_several_streams_at_once_share_no_counters(operation: Operation):
    # Capture two graphs on inputs of their own, in torch's one stream for captures.
    of_graphs = [operation.inputs(16, (4, 64, 64), torch.bfloat16, DEVICE) for _ in range(2)]
    eager = operation.inputs(16, (4, 64, 64), torch.bfloat16, DEVICE)
    expected = run(operation, "triton", eager)
    torch.cuda.synchronize()
    graphs, captured = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph, inputs in zip(graphs, of_graphs, strict=True):
        with torch.cuda.graph(graph):
            captured.append(run(operation, "triton", inputs))

    # Replay both and call eagerly in two more streams, none waiting for another.
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(200):
        for stream, graph in zip(streams, graphs, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        for stream in streams[2:]:
            with torch.cuda.stream(stream):
                results.append(run(operation, "triton", eager))
    torch.cuda.synchronize()
    for found in (*captured, *results[-8:]):
        assert_same_bits(found, expected)


@pytest.mark.parametrize("operation", POLICY_LOSSES, ids=lambda operation: operation.name)
def test_inductor_gives_the_bits_of_an_eager_call(operation: Operation):
    """It compiles our kernels itself, with fused multiply-adds allowed, which `product` withstands."""
    torch.compiler.reset()
    inputs = operation.inputs(16, (4, 64, 64), torch.bfloat16, DEVICE)
    with dispatch.use("triton"):
        compiled = torch.compile(operation.call, fullgraph=True, dynamic=False)
        found = operation.run(inputs, compiled)
    assert_same_bits(found, run(operation, "triton", inputs))
