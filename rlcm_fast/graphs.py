"""Records device work once for each shape of its inputs, and replays it: CUDA graphs without the host's launches.

    first call on new shapes     copy the inputs -> run -> record -> replay -> compare with the run
    later calls                  copy the inputs that have changed -> replay -> copy the outputs

A replay reads and writes the same addresses as the recording and repeats its launches, whatever the host's variables
are by then. So work that is recorded gets everything that changes as a tensor, and neither waits for the device nor
draws random numbers. Weights, gradients and other tensors that it uses must stay where they are. Their addresses are
compared before each replay; if one has changed, all graphs are recorded anew.

Work that adds to tensors, as a backward pass adds to gradients, adds to them while it is recorded, too. So it is
recorded on request, while these sums are zero, and a call on shapes without a graph runs it as it is.

`CudaRecorder` records CUDA graphs, all in one memory pool, because they run one after the other. Tests have a recorder
for CPUs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor

from rlcm_fast.faults import Fault

MAX_GRAPHS = 8  # of one kind of work; each holds copies of its inputs and outputs
_WARM_UP = 2  # runs before a capture, in which libraries choose their kernels and torch.compile compiles


class GraphFailed(Fault):
    """Device work could not be recorded, or its replay gave other results."""


class Recorder(Protocol):
    """Records the device work of a function."""

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Returns what `run` returned, and a function that computes it anew in the same tensors."""
        ...

    def forget(self) -> None:
        """Is called when no graph is in use any more."""
        ...


class CudaRecorder:
    """Records CUDA graphs. What `run` returns is valid after the first replay only."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        # Warm up on another stream, as torch asks for: the backward pass remembers the stream of its forward pass.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)

        # Capture; threads that compute rewards on the GPU may go on meanwhile.
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = run()
        return outputs, graph.replay

    def forget(self) -> None:
        self._pool = None


def _no_tensors() -> Iterable[Tensor]:
    return ()


@dataclass(frozen=True)
class Work:
    """A function of tensors to record. Tensors travel in (nested) frozen dataclasses and tuples; None may stand in."""

    name: str
    run: Callable[..., Any]
    fixed: Callable[[], Iterable[Tensor]] = _no_tensors  # what it uses besides its inputs: weights, gradients
    sums: Callable[[], Iterable[Tensor]] | None = None  # fixed tensors that it adds to
    state: Hashable = None  # what a recording keeps of the host besides shapes: whether adapters are on


@dataclass(frozen=True)
class _Recorded:
    inputs: tuple[Any, ...]
    outputs: Any
    replay: Callable[[], None]
    sources: list[tuple[ref[Tensor], int]] = field(default_factory=list)  # what lies in `inputs`, and its version

    def fill(self, inputs: tuple[Any, ...]) -> None:
        """Copies the inputs that are not there yet; what several calls share is copied once."""
        given = list(leaves(inputs))
        known = [(source(), version) for source, version in self.sources] or [(None, 0)] * len(given)
        for static, tensor, (source, version) in zip(leaves(self.inputs), given, known, strict=True):
            if tensor is not source or tensor._version != version:
                static.copy_(tensor)
        self.sources[:] = [(ref(tensor), tensor._version) for tensor in given]


class Graphs:
    """Runs work by graphs; what has too many shapes runs as it is, and says so."""

    def __init__(self, recorder: Recorder, say: Callable[[str], None], must_work: bool = False) -> None:
        """must_work: a graph that cannot be recorded raises GraphFailed; else it is said, and graphs are not used."""
        self._recorder, self._say, self._must_work = recorder, say, must_work
        self._recorded: dict[Hashable, dict[Hashable, _Recorded]] = {}  # by the work's name, then by shapes and state
        self._addresses: dict[str, tuple[int, ...]] = {}  # of the fixed tensors, by the work's name
        self._unused: set[str] = set()  # names of work that cannot be recorded
        self._full: set[str] = set()  # names of work with MAX_GRAPHS

    def __call__(self, work: Work, *inputs: Any) -> Any:
        """Returns work.run(*inputs); the result belongs to the caller. Work with sums must be recorded before."""
        recorded = self._found(work, inputs, may_record=work.sums is None)
        if recorded is None:
            return work.run(*inputs)
        recorded.fill(inputs)
        recorded.replay()
        return map_tensors(torch.clone, recorded.outputs)

    def record(self, work: Work, *inputs: Any) -> None:
        """Records the work if it has no graph for such inputs; its sums must be zero, and are zero afterwards."""
        self._found(work, inputs, may_record=True)

    def forget(self) -> None:
        """Drops all graphs; those that are used again are recorded anew."""
        self._recorded.clear()
        self._addresses.clear()
        self._recorder.forget()

    def _found(self, work: Work, inputs: tuple[Any, ...], may_record: bool) -> _Recorded | None:
        """Returns the graph of the work for such inputs; None if there is none."""
        # Drop graphs that would read and write elsewhere.
        if work.name in self._unused:
            return None
        addresses = tuple(tensor.data_ptr() for tensor in work.fixed())
        if self._addresses.get(work.name, addresses) != addresses:
            self._say(f"graphs: the weights of the {work.name} lie elsewhere now; recording anew")
            self.forget()
        self._addresses[work.name] = addresses

        # Find it, or record it if there is room.
        of_work = self._recorded.setdefault(work.name, {})
        key = (work.state, *((tensor.shape, tensor.dtype, tensor.device) for tensor in leaves(inputs)))
        if key not in of_work and may_record and self._has_room(work, len(of_work)):
            recorded, problem = self._record(work, inputs)
            if recorded is None:
                self._give_up(work, problem)
            else:
                of_work[key] = recorded
        return of_work.get(key)

    def _has_room(self, work: Work, num_graphs: int) -> bool:
        if num_graphs < MAX_GRAPHS:
            return True
        if work.name not in self._full:
            self._say(f"graphs: there are {MAX_GRAPHS} of the {work.name}; further shapes run without one")
        self._full.add(work.name)
        return False

    def _give_up(self, work: Work, problem: str) -> None:
        """Uses no graph of the work any more, because one could not be recorded."""
        self._unused.add(work.name)
        self._recorded.pop(work.name).clear()
        if not any(self._recorded.values()):
            self._recorder.forget()  # what a broken capture has taken of the pool
        self._say(f"graphs: the {work.name} runs without one from here on: {problem}")

    def _record(self, work: Work, inputs: tuple[Any, ...]) -> tuple[_Recorded | None, str]:
        """Records the work and returns its graph, or None and what is wrong with it."""
        # Run it as it is, to compare with. Sums go to the CPU: the device has no room for two of each.
        start = time.perf_counter()
        sums = list(work.sums() if work.sums else ())
        static = map_tensors(torch.clone, inputs)
        expected = map_tensors(torch.clone, work.run(*static))
        expected_sums = [tensor.detach().to("cpu", copy=True) for tensor in sums]
        _zero(sums)

        # Record it, and see whether a replay gives the same.
        try:
            outputs, replay = self._recorder.record(lambda: work.run(*static))
            _zero(sums)
            replay()
        except Exception as error:  # noqa: BLE001 (libraries refuse a capture with errors of many kinds)
            _zero(sums)
            return self._failed(work, f"it could not be recorded ({' '.join(str(error).split())[:200]})")
        is_same = all(_agree(*pair) for pair in zip(leaves(expected), leaves(outputs), strict=True))
        is_same = is_same and _add_up_alike(expected_sums, sums)
        _zero(sums)
        if not is_same:
            return self._failed(work, "its replay gave other results than its first run")
        seconds = time.perf_counter() - start
        self._say(f"graphs: recorded the {work.name} in {seconds:.1f} s, with the run that it was compared with")
        return _Recorded(static, outputs, replay), ""

    def _failed(self, work: Work, problem: str) -> tuple[None, str]:
        if self._must_work:
            raise GraphFailed(f"engine.graphs=on: the graph of the {work.name}: {problem}; set engine.graphs=off")
        return None, problem


def _zero(sums: list[Tensor]) -> None:
    if sums:
        torch._foreach_zero_(sums)


def leaves(bundle: Any) -> Iterator[Tensor]:
    """Yields the tensors of a bundle: a tensor, None, or a (nested) tuple or frozen dataclass of them."""
    if isinstance(bundle, Tensor):
        yield bundle
    elif isinstance(bundle, tuple):
        for item in bundle:
            yield from leaves(item)
    elif is_dataclass(bundle):
        for each in fields(bundle):
            yield from leaves(getattr(bundle, each.name))


def map_tensors(function: Callable[[Tensor], Tensor], bundle: Any) -> Any:
    """Returns the bundle with function(tensor) in place of each tensor."""
    if isinstance(bundle, Tensor):
        return function(bundle)
    if isinstance(bundle, tuple):
        return tuple(map_tensors(function, item) for item in bundle)
    if is_dataclass(bundle) and not isinstance(bundle, type):
        mapped = {each.name: map_tensors(function, getattr(bundle, each.name)) for each in fields(bundle)}
        return replace(bundle, **mapped)
    return bundle


def _agree(one: Tensor, other: Tensor) -> bool:
    """Tells whether two results differ by no more than the order of sums: 1 % of an element and of the largest one."""
    first, second = one.detach().float(), other.detach().float()
    largest = first.nan_to_num().abs().max().item() if first.numel() else 0.0
    return torch.allclose(first, second, rtol=1e-2, atol=1e-2 * largest, equal_nan=True)


def _add_up_alike(first: list[Tensor], second: list[Tensor]) -> bool:
    """Tells whether sums on the CPU, as gradients are, differ from others by no more than rounding.

    Each may differ by 4 sqrt(eps) of its norm: a sum that is zero or has another sign differs by 1 or 2 of it. One that
    is tiny beside all others, below 1e-3 of their root mean square, is made of rounding.
    """
    num_elements = sum(tensor.numel() for tensor in first)
    square = sum(tensor.float().square().sum().item() for tensor in first)
    floor = 1e-3 * math.sqrt(square / max(1, num_elements))
    for one, other in zip(first, second, strict=True):
        like = one.to(other.device).float()
        scale = like.norm() + floor * math.sqrt(like.numel())
        limit = 4 * math.sqrt(torch.finfo(one.dtype).eps)
        difference = (other.detach().float() - like).nan_to_num().norm()
        if not torch.equal(other.isnan(), like.isnan()) or not difference <= limit * scale.nan_to_num():
            return False
    return True
