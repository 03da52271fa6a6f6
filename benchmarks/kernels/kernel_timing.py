"""What bench_kernels.py measures of one call: time as launched, time in a CUDA graph, launches, peak memory.

As launched: `triton.testing.do_bench`, events around each call, the L2 cache overwritten before it. Below some 50 us a
call costs what Python and the driver need to launch it, so that this is what a user waits for in plain eager code and
says little about the kernels. In a CUDA graph: calls captured one after another and replayed, no Python between them;
this is the kernels' own time, and what bandwidths are computed from. `triton.testing.do_bench_cudagraph` would find its
inputs in the L2 cache, so calls go round several copies of the inputs, together more than four times the cache, and a
copy's results stay until its next turn, so that writing goes to memory as well. (At most 256 copies: calls that move
less than a megabyte stay within the cache of a large GPU.) A replay's time over its calls is one measurement.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.shared.reporting import percentile

Call = Callable[[], Any]

QUANTILES = (0.2, 0.5, 0.8)
_MIB = 2**20
_MOST_COPIES = 256
_LEAST_CALLS = 20  # of a graph: events have a resolution of half a microsecond
_NUM_REPLAYS = 25
_SECONDS = 0.1  # of calls timed by the wall clock


def device_slug(device: torch.device) -> str:
    """nvidia_h100_80gb_hbm3, as folders are named; cpu without a GPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def launched_ms(call: Call, device: torch.device) -> list[float]:
    """Milliseconds of a call at `QUANTILES`; on a CPU by the wall clock."""
    if device.type != "cuda":
        return _wall_ms(call)
    from triton.testing import do_bench

    times = do_bench(call, warmup=10, rep=50, quantiles=list(QUANTILES))
    assert times is not None  # as its annotation has it for other arguments
    return times


def _wall_ms(call: Call) -> list[float]:
    from torch.utils.benchmark import Timer

    call()  # which may compile
    measured = Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=_SECONDS)
    return [1e3 * percentile(measured.times, share) for share in QUANTILES]


def graph_ms(calls: Sequence[Call]) -> list[float]:
    """Milliseconds of a call at `QUANTILES` within a CUDA graph that goes round `calls`, one a copy of the inputs."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()  # inputs were made on another stream
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), [None] * len(calls)
    num_calls = max(len(calls), _LEAST_CALLS)
    with torch.cuda.graph(graph, stream=stream):
        for i in range(num_calls):
            kept[i % len(calls)] = calls[i % len(calls)]()
    times = [_replay_ms(graph) / num_calls for _ in range(_NUM_REPLAYS + 2)][2:]
    kept.clear()
    graph.reset()
    return [percentile(times, share) for share in QUANTILES]


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def num_copies(num_bytes: int, device: torch.device) -> int:
    """Number of copies of the inputs that `graph_ms` needs if a call moves `num_bytes`; at least 2."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_COPIES, 1 + -(-4 * cache // num_bytes))


def num_launches(call: Call) -> int | None:
    """Kernels, and fills of memory, that a call starts on the GPU; copies are not counted.

    None where the profiler sees nothing, as on machines that keep its counters to the administrator.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    launches = 0
    for event in seen.events() or ():
        is_work = event.device_type == DeviceType.CUDA and not event.is_user_annotation
        if is_work and not event.name.startswith("Memcpy"):
            launches += 1
    return launches or None


def peak_mib(call: Call) -> float:
    """What a call allocates at most beyond what was allocated before it, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / _MIB


class CopyTimes:
    """Times of plain copies in this run, each size once: the yardstick of bandwidth."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._times: dict[int, tuple[float, float | None]] = {}

    def ms(self, num_bytes: int) -> tuple[float, float | None]:
        """Median ms of a copy that moves `num_bytes`, half of them read: as launched, and within a graph."""
        if num_bytes not in self._times:
            self._times[num_bytes] = self._measure(num_bytes)
        return self._times[num_bytes]

    def peak_gb_per_second(self) -> float:
        """The highest of copies that move 128 MiB and 1 GiB; on a CPU of 128 MiB alone."""
        sizes = (128 * _MIB, 1024 * _MIB) if self.device.type == "cuda" else (128 * _MIB,)
        rates = []
        for size in sizes:
            launched, in_graph = self.ms(size)
            rates.append(size / 1e6 / (in_graph or launched))
        return max(rates)

    def _measure(self, num_bytes: int) -> tuple[float, float | None]:
        size = max(1, num_bytes // 2)
        source = torch.ones(size, dtype=torch.uint8, device=self.device)  # empty pages would be read for nothing
        target = torch.ones_like(source)
        launched = launched_ms(lambda: target.copy_(source), self.device)[1]
        if self.device.type != "cuda":
            return launched, None
        calls = []
        for _ in range(num_copies(num_bytes, self.device)):
            calls.append(partial(torch.empty_like(source).copy_, torch.empty_like(source)))
        return launched, graph_ms(calls)[1]
