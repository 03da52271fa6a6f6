"""What an optimizer step costs: ours with 8-bit moments, torch's fused AdamW, bitsandbytes' AdamW8bit.

    python benchmarks/kernels/bench_adamw.py                              # the SD1.5 UNet's 859.6 M weights on a GPU
    python benchmarks/kernels/bench_adamw.py --device cpu --share 0.01    # every hundredth of them on a CPU

The weights have the shapes of a UNet, with random values: a step's time does not depend on them.
Ours has bfloat16 weights and gradients and rounds stochastically, bitsandbytes' has bfloat16 ones without, torch's has
float32 ones: the master copy. Bytes are those that must move: weights, gradients and states, read and written once.
The last line on stdout is the summary: for each optimizer the median time, its spread, GB/s and bytes a weight.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.shared.reporting import print_summary

# shapes of a UNet's weights in turn: a convolution, attention, feed-forward, a norm
_SHAPES = ((1280, 1280, 3, 3), (1280, 1280), (10240, 1280), (1280, 5120), (1280,), (640, 640, 3, 3), (320, 320, 3, 3))
_NUM_WEIGHTS = 859_600_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--share", type=float, default=1.0, help="of the SD1.5 UNet's 859.6 M weights (default 1)")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps (default 10)")
    parser.add_argument("--optimizers", nargs="+", choices=tuple(OPTIMIZERS), default=list(OPTIMIZERS))
    arguments = parser.parse_args()
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA device; try it out with --device cpu --share 0.01", file=sys.stderr)
        return 2
    shapes = shapes_of(int(_NUM_WEIGHTS * arguments.share))
    summary: dict[str, Any] = {"weights": sum(torch.Size(shape).numel() for shape in shapes), "tensors": len(shapes)}
    for name in arguments.optimizers:
        summary[name] = measure(name, shapes, torch.device(arguments.device), arguments.repeats)
    print_summary(summary)
    return 0


def shapes_of(num_weights: int) -> list[tuple[int, ...]]:
    """Shapes in turn, until they hold that many."""
    import torch

    shapes, total = [], 0
    while total < num_weights:
        shapes.append(_SHAPES[len(shapes) % len(_SHAPES)])
        total += torch.Size(shapes[-1]).numel()
    return shapes


def measure(name: str, shapes: list[tuple[int, ...]], device: Any, repeats: int) -> dict[str, float]:
    """Median and spread of `repeats` steps after three to warm up."""
    import torch

    # Make weights and gradients, and the optimizer.
    dtype, build = OPTIMIZERS[name]
    params = []
    for shape in shapes:
        weight = torch.randn(shape, device=device).to(getattr(torch, dtype))
        params.append(torch.nn.Parameter(weight))
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    optimizer = build(params)

    # Time its steps, and add up what each of them moves.
    times = [_seconds(optimizer.step, device) for _ in range(3 + repeats)][3:]
    weights = _bytes(params)
    states = sum(_bytes(_moments(state)) for state in optimizer.state.values())
    median = statistics.median(times)
    return {
        "ms": 1e3 * median,
        "fastest_ms": 1e3 * min(times),
        "slowest_ms": 1e3 * max(times),
        "gb_per_second": (2 * states + 3 * weights) / median / 1e9,
        "bytes_a_weight": (states + 2 * weights) / sum(param.numel() for param in params),
    }


def _moments(state: dict[str, Any]) -> list[Any]:
    """The tensors of one weight's state that a step reads and writes; bitsandbytes' tables are shared and small."""
    return [tensor for name, tensor in state.items() if name not in ("qmap1", "qmap2", "step")]


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _seconds(call: Callable[[], Any], device: Any) -> float:
    import time

    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _ours(params: list[Any]) -> Any:
    from rlcm_fast.kernels.adamw import AdamW8bit

    return AdamW8bit(params, lr=1e-5)


def _of_bitsandbytes(params: list[Any]) -> Any:
    import bitsandbytes.optim

    return bitsandbytes.optim.AdamW8bit(params, lr=1e-5)


def _of_torch(params: list[Any]) -> Any:
    import torch

    return torch.optim.AdamW(params, lr=1e-5, fused=True)


OPTIMIZERS: dict[str, tuple[str, Callable[[list[Any]], Any]]] = {
    "adamw_8bit": ("bfloat16", _ours),
    "bnb_adamw_8bit": ("bfloat16", _of_bitsandbytes),
    "adamw": ("float32", _of_torch),
}


if __name__ == "__main__":
    sys.exit(main())
