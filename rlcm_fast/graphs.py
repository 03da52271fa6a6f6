"""Records device work once for each shape of its inputs, and replays it: CUDA graphs without the host's launches.

    first call on new shapes     copy the inputs -> run -> reset -> record -> reset -> replay -> compare with the run
    later calls                  copy the inputs that have changed -> replay -> copy the outputs

A replay reads and writes the same addresses as the recording and repeats its launches, whatever the host's variables
are by then. So work that is recorded gets everything that changes as a tensor, and neither waits for the device nor
draws random numbers. Weights, gradients and other tensors that it uses must stay where they are. Their addresses are
compared before each replay; if one has changed, all graphs are recorded anew.

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

MAX_GRAPHS = 8  # each holds copies of its inputs and outputs
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


def _nothing() -> None:
    pass


def _no_tensors() -> Iterable[Tensor]:
    return ()


@dataclass(frozen=True)
class Work:
    """A function of tensors to record. Tensors travel in (nested) frozen dataclasses and tuples; None may stand in."""

    name: str
    run: Callable[..., Any]
    fixed: Callable[[], Iterable[Tensor]] = _no_tensors  # what it uses besides its inputs: weights, gradients
    reset: Callable[[], None] = _nothing  # undoes what `run` adds to fixed tensors; called while these hold nothing
    effects: Callable[[], Iterable[Tensor]] = _no_tensors  # fixed tensors that it changes


@dataclass(frozen=True)
class _Recorded:
    inputs: tuple[Any, ...]
    outputs: Any
    replay: Callable[[], None]
    addresses: tuple[int, ...]
    sources: list[tuple[ref[Tensor], int]] = field(default_factory=list)  # what lies in `inputs`, and its version

    def fill(self, inputs: tuple[Any, ...]) -> None:
        """Copies the inputs that are not there yet: a rollout's trajectory is copied once for all micro-batches."""
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
        self._recorded: dict[Hashable, _Recorded] = {}
        self._unused: set[str] = set()  # names of work that cannot be recorded
        self._is_full = False

    def __call__(self, work: Work, *inputs: Any) -> Any:
        """Returns work.run(*inputs); the result belongs to the caller."""
        if work.name in self._unused:
            return work.run(*inputs)
        key = (work.name, *((tensor.shape, tensor.dtype, tensor.device) for tensor in leaves(inputs)))
        addresses = tuple(tensor.data_ptr() for tensor in work.fixed())
        if key in self._recorded and self._recorded[key].addresses != addresses:
            self._say(f"graphs: the weights of the {work.name} lie elsewhere now; recording anew")
            self.forget()
        if key not in self._recorded:
            if len(self._recorded) == MAX_GRAPHS:
                return self._without_room(work, inputs)
            problem = self._record(key, work, inputs, addresses)
            if problem:
                return self._without(work, inputs, problem)
        recorded = self._recorded[key]
        recorded.fill(inputs)
        recorded.replay()
        return map_tensors(torch.clone, recorded.outputs)

    def forget(self) -> None:
        """Drops all graphs; those that are used again are recorded anew."""
        self._recorded.clear()
        self._recorder.forget()

    def _without_room(self, work: Work, inputs: tuple[Any, ...]) -> Any:
        if not self._is_full:
            self._say(f"graphs: there are {MAX_GRAPHS} of them; further shapes run without one")
        self._is_full = True
        return work.run(*inputs)

    def _without(self, work: Work, inputs: tuple[Any, ...], problem: str) -> Any:
        self._unused.add(work.name)
        self._say(f"graphs: the {work.name} runs without one from here on: {problem}")
        return work.run(*inputs)

    def _record(self, key: Hashable, work: Work, inputs: tuple[Any, ...], addresses: tuple[int, ...]) -> str:
        """Records the work and returns what is wrong with it; empty if nothing is."""
        # Run it as it is, to compare with.
        start = time.perf_counter()
        static = map_tensors(torch.clone, inputs)
        expected = map_tensors(torch.clone, work.run(*static))
        effects = [
            tensor.detach().to("cpu", copy=True) for tensor in work.effects()
        ]  # the device has no room for two of each
        work.reset()

        # Record it, and see whether a replay gives the same.
        try:
            outputs, replay = self._recorder.record(lambda: work.run(*static))
            work.reset()
            replay()
        except Exception as error:  # noqa: BLE001 (libraries refuse a capture with errors of many kinds)
            work.reset()
            if not self._recorded:
                self._recorder.forget()  # what a broken capture has taken of the pool
            return self._failed(work, f"it could not be recorded ({' '.join(str(error).split())[:200]})")
        is_same = all(_agree(*pair) for pair in zip(leaves(expected), leaves(outputs), strict=True))
        is_same = is_same and _add_up_alike(effects, list(work.effects()))
        work.reset()
        if not is_same:
            return self._failed(work, "its replay gave other results than its first run")
        self._recorded[key] = _Recorded(static, outputs, replay, addresses)
        seconds = time.perf_counter() - start
        self._say(f"graphs: recorded the {work.name} in {seconds:.1f} s, with the run that it was compared with")
        return ""

    def _failed(self, work: Work, problem: str) -> str:
        if self._must_work:
            raise GraphFailed(f"engine.graphs=on: the graph of the {work.name}: {problem}; set engine.graphs=off")
        return problem


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
