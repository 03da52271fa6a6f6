"""Time, bandwidth, launches and memory of every kernel operation: plain torch, torch.compile and Triton.

    python benchmarks/kernels/bench_kernels.py                            # on a GPU: N 1 to 256, two sizes, two dtypes
    python benchmarks/kernels/bench_kernels.py --quick --out FOLDER       # three N, the large size
    python benchmarks/kernels/bench_kernels.py --training                 # micro-batches of 8 to 64, bfloat16 outputs
    python benchmarks/kernels/bench_kernels.py --device cpu --quick  # to try it out: wall clock, no launches, no memory
    python benchmarks/kernels/bench_kernels.py --redraw FOLDER/bench_kernels.csv

For each operation of kernel_operations.py, N, latent size and dtype, on the same inputs: `torch` (eager), `compile`
(torch.compile of the same, fullgraph, for static shapes, which is what trainers have and compiles to the fastest code;
so it compiles anew for each N, which is most of the time this takes) and `triton`. Columns:

 ms_20, ms_50, ms_80   quantiles of a call as launched from Python, its inputs not in the L2 cache
 graph_ms_20 ...       the same within a CUDA graph: the kernels alone (kernel_timing.py says how and why both)
 bytes                 that must move (kernel_operations.py says how they are counted, for all providers alike)
 copy_ms, copy_graph_ms   medians of a plain copy that moves as many bytes, in the same run
 copy_share, graph_copy_share   copy's time over the operation's: 1 is the bandwidth of a copy of that size
 peak_share            bytes / graph_ms_50 over the highest bandwidth of any copy in the run
 launches              kernels and fills that a call starts; copies are not counted
 peak_mib              allocated at most beyond the inputs

What was not measured is empty. Operations on N numbers alone (has_latents) are measured once for each N. The CSV is
written after every operation. The summary is the last line on stdout. It names what is left when --seconds are over
(`cut`), what torch.compile failed at (`not_compiled`), and where our 20 % quantile is above the 80 % quantile of
compile (`slower_than_compile`); ratios and shares there are of graph times where they were measured.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.kernels.kernel_plot import PROVIDERS, Row, draw, read_rows
from benchmarks.kernels.kernel_summary import name_of, shares, summarise
from benchmarks.shared.reporting import ROOT, print_summary, write_csv

if TYPE_CHECKING:
    import torch

    from benchmarks.kernels.kernel_operations import Inputs, Operation
    from benchmarks.kernels.kernel_timing import Call, CopyTimes

_ROWS, _QUICK_ROWS, _TRAINING_ROWS = (1, 4, 16, 64, 256), (16, 64, 256), (8, 16, 32, 64)
_SIZES = ("4x64x64", "4x128x128")
_DTYPES = ("float32", "bfloat16")
_NO_GPU = "torch sees no CUDA device; --device cpu tries it out without one"


def main() -> int:
    arguments = _parser().parse_args()
    try:
        if arguments.redraw is not None:
            draw(read_rows(arguments.redraw), arguments.redraw.with_suffix(".png"))
            return 0
        summary = run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_summary(summary)
    return 0


def _parser() -> argparse.ArgumentParser:
    # What to measure.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", nargs="+", default=[""], metavar="NAME", help="beginnings of their names")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="default: all; without triton on a CPU")
    parser.add_argument("--rows", type=int, nargs="+", metavar="N", help=f"default {_words(_ROWS)}")
    parser.add_argument(
        "--sizes", nargs="+", metavar="CxHxW", help=f"default {_words(_SIZES)}, or what an operation meets"
    )
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"),
                        help=f"of the network's outputs (default {_words(_DTYPES)})")  # fmt: skip
    quick = f"N {_words(_QUICK_ROWS)} and the largest size, where they are not given"
    parser.add_argument("--quick", action="store_true", help=quick)
    training = f"N {_words(_TRAINING_ROWS)} and bfloat16, where they are not given: an update's micro-batches"
    parser.add_argument("--training", action="store_true", help=training)

    # Where, for how long, and what is written.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default cuda)")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing after so many (default: none)"
    )
    parser.add_argument("--no-plot", action="store_true", help="no picture, which needs matplotlib")
    folder = "folder (default benchmarks/results/gpu/DEVICE)"
    parser.add_argument("--out", type=Path, help=folder)
    parser.add_argument("--redraw", type=Path, metavar="CSV", help="draw the picture of an earlier run and no more")
    return parser


def _words(values: Sequence[Any]) -> str:
    return " ".join(map(str, values))


@dataclass(frozen=True)
class Case:
    """What one row for each provider is measured on."""

    operation: Operation
    num_rows: int
    size: str
    dtype: str
    device: torch.device

    @property
    def labels(self) -> Row:
        """The case's columns in the CSV; an operation on N numbers has no size and no dtype of latents."""
        latents = {"size": self.size, "dtype": self.dtype} if self.operation.has_latents else {"size": "", "dtype": ""}
        return {"operation": self.operation.name, "rows": self.num_rows, **latents}

    def inputs(self) -> Inputs:
        import torch

        from benchmarks.kernels.kernel_operations import parse_shape

        return self.operation.inputs(self.num_rows, parse_shape(self.size), getattr(torch, self.dtype), self.device)


def run(arguments: argparse.Namespace) -> Row:
    """Measures what was asked for, writes CSV and picture; the summary."""
    import torch

    from benchmarks.kernels.kernel_operations import find_operations
    from benchmarks.kernels.kernel_timing import CopyTimes, device_slug

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(_NO_GPU)
    deadline, device = time.monotonic() + arguments.seconds, torch.device(arguments.device)
    out = arguments.out or ROOT / "benchmarks" / "results" / "gpu" / device_slug(device)
    providers = arguments.providers or _default_providers(device)
    copies = CopyTimes(device)

    # Measure case after case until the time is over; the CSV has what is done.
    rows: list[Row] = []
    cut, not_compiled = [], []
    for operation in find_operations(arguments.operations):
        for case in cases(operation, arguments, device):
            if time.monotonic() > deadline:
                cut.append(name_of(case.labels))
                continue
            measured = measure(case, providers, copies)
            if len(measured) < len(providers):
                not_compiled.append(name_of(case.labels))
            rows += [{"device": _device_name(device), **row} for row in measured]
        write_csv(out / "bench_kernels.csv", rows)

    # Draw and sum up.
    if rows and not arguments.no_plot:
        draw(rows, out / "bench_kernels.png")
    versions = {"torch": torch.__version__, "triton": _version_of("triton"), "device": _device_name(device)}
    left_out = {"cut": cut, "not_compiled": not_compiled}
    return {**summarise(rows), **left_out, **versions, "date": datetime.date.today().isoformat()}


def _default_providers(device: torch.device) -> Sequence[str]:
    return PROVIDERS if device.type == "cuda" else ("torch", "compile")


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _version_of(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cases(operation: Operation, arguments: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """The cases of an operation, small N first."""
    rows, dtypes, usual = _ROWS, _DTYPES, operation.sizes or _SIZES
    if arguments.training:
        rows, dtypes = _TRAINING_ROWS, ("bfloat16",)
    elif arguments.quick:
        rows, usual = _QUICK_ROWS, usual[-1:]
    num_rows = arguments.rows or rows
    latents = list(itertools.product(arguments.sizes or usual, arguments.dtypes or dtypes))
    if not operation.has_latents:
        latents = latents[:1]
    for size, dtype in latents:
        for n in sorted(num_rows):
            yield Case(operation, n, size, dtype, device)


def measure(case: Case, providers: Sequence[str], copies: CopyTimes) -> list[Row]:
    """A row a provider; none for torch.compile where that fails."""
    import torch
    from torch._dynamo.exc import BackendCompilerFailed

    from benchmarks.kernels.kernel_timing import num_copies

    # Make the inputs, on a GPU as many copies as its cache cannot hold, and time a copy of as many bytes.
    num_bytes = case.operation.num_bytes(case.inputs())
    is_cuda = case.device.type == "cuda"
    inputs = [case.inputs() for _ in range(num_copies(num_bytes, case.device) if is_cuda else 1)]
    copy_ms, copy_graph_ms = copies.ms(num_bytes)
    shared = {**case.labels, "bytes": num_bytes, "copy_ms": copy_ms, "copy_graph_ms": copy_graph_ms}

    # Measure one provider after another.
    rows = []
    for provider in providers:
        try:
            found = _measure_provider(case.operation, provider, inputs, case.device)
        except BackendCompilerFailed as error:
            cause = error.inner_exception
            reason = (str(cause).strip().splitlines() or [""])[-1]
            print(f"{name_of(shared)}, {provider}: {type(cause).__name__}: {reason}", file=sys.stderr, flush=True)
            continue
        row = {**shared, "provider": provider, **found}
        rows.append({**row, **shares(row, copies.peak_gb_per_second())})
        print(f"{name_of(row)}, {provider}: {row['ms_50']:.4g} ms", file=sys.stderr, flush=True)
    if is_cuda:
        torch.cuda.empty_cache()
    return rows


def _measure_provider(operation: Operation, provider: str, inputs: list[Inputs], device: torch.device) -> Row:
    """Everything that one provider's calls are measured for; `inputs` are equal copies."""
    from benchmarks.kernels.kernel_timing import graph_ms, launched_ms, num_launches, peak_mib
    from rlcm_fast.kernels import dispatch

    with dispatch.use("triton" if provider == "triton" else "torch"):
        calls = _calls(operation, provider, inputs)
        row = _quantiles("ms", launched_ms(calls[0], device))
        if device.type != "cuda":
            return row
        in_graph = _quantiles("graph_ms", graph_ms(calls))
        return {**row, **in_graph, "launches": num_launches(calls[0]), "peak_mib": peak_mib(calls[0])}


def _calls(operation: Operation, provider: str, inputs: list[Inputs]) -> list[Call]:
    """One for each copy of the inputs."""
    import torch

    function = operation.call
    if provider == "compile":
        torch.compiler.reset()  # or shapes of earlier cases count as recompilations of this one
        function = torch.compile(operation.call, fullgraph=True, dynamic=False)
    return [lambda of_copy=of_copy: operation.run(of_copy, function) for of_copy in inputs]


def _quantiles(name: str, values: Sequence[float]) -> Row:
    return {f"{name}_{share}": value for share, value in zip((20, 50, 80), values, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
