"""What a call of a kernel operation costs the host, on a machine without a GPU: Python, torch and Triton, not the GPU.

    python benchmarks/kernels/bench_host_cost.py --out benchmarks/results/host_cost.json

Below some 50 us of work on the GPU an eager call costs what the host needs to launch it, so this is what a user waits
for. The operations of kernel_operations.py run on CPU tensors of training's size under a driver that claims to have an
H100 (kernel_driver.py). A call does all that it does on a GPU up to the C function that puts a kernel into a stream.

Included: the public function, dispatch, autograd's forward and backward, the search for the compiled kernel, allocating
results. Not included: that C function and CUDA's launch behind it (some 2 to 5 us per kernel), and the difference
between the two allocators. On a CPU a call fills its counters anew, on a GPU it looks them up, which costs about as
much.

`policy_loss_forward_backward_us` is the median of the dearer of the two cases, on-policy and off-policy. `as_operator`
is the same through the operators that torch.compile traces, where all eager calls went before. `empty_function` is an
autograd.Function that only allocates such results: the least on this machine. The last line on stdout is the summary.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.kernels.kernel_driver import pretending
from benchmarks.kernels.kernel_operations import Inputs, Operation, find_operations
from benchmarks.shared.reporting import percentile, print_summary
from rlcm_fast.kernels import dispatch
from rlcm_fast.kernels.triton_ops import loss

_ARCHITECTURE = 90
_CALLS_TO_WARM_UP = 500
_CALLS_AT_ONCE = 20  # timed together; the clock costs a fraction of a microsecond


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="(default 16)")
    parser.add_argument("--repeats", type=int, default=200, help=f"of {_CALLS_AT_ONCE} calls each (default 200)")
    parser.add_argument("--out", type=Path, help="JSON file of the summary")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: TRITON_INTERPRET=1 interprets the kernels; unset it to time the calls", file=sys.stderr)
        return 2
    print_summary(measure(arguments.rows, arguments.repeats), arguments.out)
    return 0


def measure(num_rows: int, repeats: int) -> dict[str, Any]:
    """The summary: for each operation the 20 %, 50 % and 80 % quantiles in microseconds."""
    # Time the operations, as users call them and through torch's operators.
    summary: dict[str, Any] = {}
    always = mock.patch.object(dispatch, "_interprets", True)  # or it would refuse tensors on a CPU
    with pretending(_ARCHITECTURE), always, dispatch.use("triton"):
        for name, call in calls(num_rows).items():
            summary[name] = microseconds(call, repeats)
            if name.startswith("policy_loss"):
                with mock.patch.object(loss, "is_traced", return_value=True):
                    summary[f"{name}, as_operator"] = microseconds(call, repeats)
    summary["empty_function"] = microseconds(_empty_function(num_rows), repeats)

    # Name the number that has a target.
    of_loss = [summary[name][1] for name in summary if name.startswith("policy_loss") and "as_" not in name]
    return {"policy_loss_forward_backward_us": max(of_loss), "us_20_50_80": summary, "rows": num_rows}


def calls(num_rows: int) -> dict[str, Callable[[], Any]]:
    """Every operation on latents or rows, in bfloat16 outputs of 4 x 64 x 64."""
    made = {}
    for operation in find_operations(["policy", "gaussian", "clipped", "rebel"]):
        inputs = operation.inputs(num_rows, (4, 64, 64), torch.bfloat16, torch.device("cpu"))
        made[operation.name] = partial(_run, operation, inputs)
    return made


def _run(operation: Operation, inputs: Inputs) -> Any:
    """Runs the operation as Operation.run does, without sorting the results."""
    if not operation.wanted:
        return operation.call(*inputs)
    results = operation.call(*inputs[:-1])
    first = results[0] if isinstance(results, tuple) else results
    return torch.autograd.grad(first, [inputs[i] for i in operation.wanted], inputs[-1])


def _empty_function(num_rows: int) -> Callable[[], Any]:
    """Forward and backward of an autograd.Function that makes tensors of the loss's sizes and fills none of them."""

    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, m, row):
            ctx.save_for_backward(m)
            loss, stats, of_rows = m.new_empty(()), m.new_empty(6), m.new_empty(num_rows)
            ctx.mark_non_differentiable(stats, of_rows)
            return loss, stats, of_rows

        @staticmethod
        def backward(ctx, above, *_):
            return torch.empty_like(ctx.saved_tensors[0]), None

    m = torch.zeros(num_rows, 4, 64, 64, dtype=torch.bfloat16, requires_grad=True)
    above = torch.ones((), dtype=torch.bfloat16)
    return lambda: torch.autograd.grad(Empty.apply(m, m)[0], m, above)


def microseconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """20 %, 50 % and 80 % quantiles of a call."""
    for _ in range(_CALLS_TO_WARM_UP):
        call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(_CALLS_AT_ONCE):
            call()
        times.append(1e6 * (time.process_time() - start) / _CALLS_AT_ONCE)
    return [round(percentile(times, share), 1) for share in (0.2, 0.5, 0.8)]


if __name__ == "__main__":
    sys.exit(main())
