"""What becomes of our kernels where they are compiled instead of interpreted: a script, as the choice is per process.

Prints one JSON document: the PTX of the kernels that count arrivals, the fused multiply-adds of every kernel with and
without fusing allowed, and the calls in the graphs of a traced loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from benchmarks.kernels.kernel_driver import pretending
from benchmarks.kernels.kernel_operations import Operation, find_operations
from rlcm_fast.kernels import dispatch
from rlcm_fast.kernels.triton_ops import launches

CPU = torch.device("cpu")
SHAPE = (4, 64, 64)
NAMES = ["policy_loss", "gaussian_log_prob", "gaussian_step", "clipped", "rebel"]


def compiled(operation: Operation, fuses: bool) -> list[Any]:
    inputs = operation.inputs(4, SHAPE, torch.bfloat16, CPU)
    settings = {**launches.EXACT, "enable_fp_fusion": fuses}
    with mock.patch.object(launches, "EXACT", settings), pretending(90) as kernels:
        operation.run(inputs)
    return kernels


def fused(kernels: list[Any]) -> dict[str, int]:
    """Multiply-adds by kernel whose addend is not the 0 of `product`."""
    counts = {}
    for kernel in kernels:
        adds = re.findall(r"fma\.rn\.f32\s+\S+, \S+, \S+, (\S+);", kernel.asm["ptx"])
        counts[kernel.name] = len([addend for addend in adds if addend != "0f00000000"])
    return counts


def graphs(operation: Operation) -> list[list[str]]:
    """Calls in the forward and the backward graph that a compiler gets, and what each of our kernels writes."""
    found: list[list[str]] = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        calls = []
        for node in graph.graph.nodes:
            if node.op != "call_function":
                continue
            name = getattr(node.target, "__name__", None) or str(node.target)
            written = node.kwargs.get("tensors_to_clone")
            calls.append(name if written is None else f"kernel writes {' '.join(written)}")
        found.append(calls)
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    inputs = operation.inputs(4, SHAPE, torch.bfloat16, CPU)
    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    with pretending(90):
        operation.run(inputs, torch.compile(operation.call, fullgraph=True, backend=backend))
    return found


if __name__ == "__main__":
    document: dict[str, Any] = {"ptx": {}, "fused": []}
    always = mock.patch.object(dispatch, "_interprets", True)  # or it would refuse tensors on a CPU
    with always, dispatch.use("triton"):
        for operation in find_operations(NAMES):
            plain = compiled(operation, fuses=False)
            document["fused"].append([operation.name, fused(plain), fused(compiled(operation, fuses=True))])
            document["ptx"] |= {kernel.name: kernel.asm["ptx"] for kernel in plain}
        document["graphs"] = graphs(find_operations(["policy_loss forward"])[0])
    print(json.dumps(document))
