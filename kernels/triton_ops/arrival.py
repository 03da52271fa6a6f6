"""One launch in which the last program to arrive finishes what all programs began, and the counters that it needs.

A row has K tiles, each with a program. A program stores the sum of its tile and adds 1 to its row's counter. The one
that finds K - 1 there is the last; it adds the K sums in a fixed order, so the order of arrival does not change a bit.
A loss counts finished rows in the same way, with one more counter.

Why the last program sees every sum (PTX memory model, which HIP's and SPIR-V's resemble):

1. `tl.debug_barrier()` orders the stores of all threads of a program before the atomic of its one thread.
2. The atomic is acq_rel at the scope of the GPU: its release half publishes those stores, its acquire half receives
   what the programs before it published. Each addition reads what the previous one wrote, so they form one chain and
   the last program is ordered after all others. Acquiring also drops stale lines of the multiprocessor's L1 cache.
3. Triton hands an atomic's result to all threads through shared memory and a barrier, so what one thread acquired, all
   may read; they read in the branch that depends on it, past L1 (`.cg`), where no earlier copy can be.

Nobody waits for anybody, so programs that do not run at once cannot block each other.

The last program sets its counter back to 0. Nobody reads it again in this launch, and the next launch of the stream
begins after this one has ended. So a replayed CUDA graph finds zeros, as the first launch did. Two launches that may
overlap must not share counters: each stream has its own, and so has each launch that is captured into a graph.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# triton declares the functions that a kernel calls as NoReturn.

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUM_COUNTERS = 1024  # of a stream at first; more when a call has more rows
_NUM_CAPTURED = 1 << 18  # 1 MiB on each device: 8,192 captured launches of up to 31 rows
_LINE = 32  # counters in a cache line of 128 bytes; no two captured launches share one


@triton.jit
def is_last(counter, num_programs):
    """Whether this program is the last of `num_programs` that come here; the counter is 0 before and afterwards."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def sum_of_tiles(partial, num_tiles, block: tl.constexpr):
    """The sum of a row's `num_tiles` numbers at `partial`, in an order that depends on their number alone."""
    total = tl.zeros((block,), dtype=tl.float32)
    for first in range(0, num_tiles, block):
        k = first + tl.arange(0, block)
        total += tl.load(partial + k, mask=k < num_tiles, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@dataclass
class _Captured:
    """Zeros on one device that captured launches take for good: a graph may be replayed as long as the process runs."""

    zeros: Tensor  # (_NUM_CAPTURED,) int32
    used: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, size: int) -> Tensor | None:
        with self.lock:
            first = self.used
            if first + size > len(self.zeros):
                return None
            self.used += -(-size // _LINE) * _LINE
        return self.zeros[first : first + size]


_of_stream: dict[tuple[int, int], Tensor] = {}  # by device and stream
_captured: dict[int, _Captured] = {}  # by device


def counters_for(num_rows: int, device: torch.device) -> Tensor:
    """At least num_rows + 1 zeros, int32, for the next launch in the current stream of `device`.

    They cost no launch, except on a CPU and for a captured launch that finds none reserved: there a fill comes first.
    """
    if device.type != "cuda":
        return torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    if torch.cuda.is_current_stream_capturing():
        reserved = _captured[index].take(num_rows + 1) if index in _captured else None
        return torch.zeros(num_rows + 1, dtype=torch.int32, device=device) if reserved is None else reserved
    stream = torch.cuda.current_stream(index)
    counters = _of_stream.get((index, stream.cuda_stream))
    if counters is None or len(counters) <= num_rows:
        counters = torch.zeros(max(_NUM_COUNTERS, num_rows + 1), dtype=torch.int32, device=device)
        _of_stream[index, stream.cuda_stream] = counters
    if index not in _captured:
        zeros = torch.zeros(_NUM_CAPTURED, dtype=torch.int32, device=device)
        stream.synchronize()  # once in a process; a graph may be replayed in any stream
        _captured[index] = _Captured(zeros)
    return counters
