"""Profiles one iteration with torch.profiler (`--profile N`): a trace, and a table of where its time goes.

    stage("sample")                    marks work; looks at a flag and does nothing else while nothing is profiled
    RUN/profile/iteration_00000N.json.gz       opens in Perfetto or chrome://tracing
    RUN/profile/iteration_00000N_stages.json   the table, which is also printed

The iteration lasts from the line of the iteration before to its own line in metrics.jsonl. Of marks inside marks the
outermost counts: images that an evaluation draws are `evaluation`. A stage of a GPU has two durations:

    seconds        the host is in it: it launches the stage's work, and does not wait for it
    gpu_seconds    from the start of the first kernel that it launched to the end of the last, for each time it ran
    gpu_busy       the share of gpu_seconds in which a kernel or a copy ran; gaps are the GPU waiting for launches

A kernel belongs to the stage in which it was launched, whatever the thread: the backward pass has its own. So kernels
of rewards that are launched meanwhile count for the stage beside them.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import profiler as torch_profiler
from torch.profiler import ProfilerActivity, profile, record_function

from rlcm_fast.finite_json import finite_json

_MARK = "rlcm_fast: "
_NOTHING = nullcontext()
_LAUNCHES = ("cu", "hip")  # how calls of the driver and of its runtime begin: cudaLaunchKernel, cuLaunchKernelEx
_NS = 1e-9


def stage(name: str) -> AbstractContextManager[Any]:
    """Marks the work inside as a stage of the profile, if one is being taken."""
    if not torch_profiler._is_profiler_enabled:
        return _NOTHING
    return record_function(_MARK + name)


@dataclass(frozen=True)
class Span:
    """A time in which something ran, in nanoseconds of the profiler's clock."""

    start: int
    end: int
    name: str = ""


@dataclass(frozen=True)
class Events:
    """What a profile holds of stages and of a GPU."""

    stages: list[Span] = field(default_factory=list)
    launches: Mapping[int, int] = field(default_factory=dict)  # correlation -> when the host launched it
    kernels: list[tuple[int, Span]] = field(default_factory=list)  # with the correlation of their launch


@dataclass(frozen=True)
class StageRow:
    """A line of the table; what only a GPU has is None without one."""

    stage: str
    calls: int
    seconds: float
    share: float  # of the iteration's seconds, 0 to 1
    gpu_seconds: float | None = None
    gpu_busy: float | None = None  # 0 to 1


@dataclass(frozen=True)
class StageTable:
    """Says where the time of an iteration goes."""

    iteration: int  # counted from 1
    seconds: float
    gpu_busy: float | None  # the share of `seconds` in which a kernel or a copy ran
    stages: list[StageRow]

    def lines(self) -> list[str]:
        """Returns the table as text."""
        busy = "" if self.gpu_busy is None else f", the GPU busy {self.gpu_busy:.0%} of them"
        heads = ["stage", "calls", "seconds", "share", *(() if self.gpu_busy is None else ("GPU seconds", "GPU busy"))]
        rows = [heads, *(_cells(row, self.gpu_busy is not None) for row in self.stages)]
        lines = [f"{row[0]:18}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in rows]
        return [f"profile of iteration {self.iteration}: {self.seconds:.3f} s{busy}", *lines]


def _cells(row: StageRow, has_gpu: bool) -> list[str]:
    cells = [row.stage, str(row.calls), f"{row.seconds:.3f}", f"{row.share:.1%}"]
    if has_gpu:
        cells += ["" if row.gpu_seconds is None else f"{row.gpu_seconds:.3f}"]
        cells += ["" if row.gpu_busy is None else f"{row.gpu_busy:.0%}"]
    return cells


class IterationProfile:
    """Takes the profile of iteration `number`, counted from 1 over the whole run; 0: of none."""

    def __init__(self, folder: Path, number: int, say: Callable[[str], None]) -> None:
        self._folder, self._number, self._say = folder, number, say
        self._running: profile | None = None
        self._began = 0.0

    def begin_run(self, first: int) -> None:
        """Starts if the run's first iteration, counted from 0, is the one; says so if a resumed run is past it."""
        if 0 < self._number <= first:
            self._say(f"profile={self._number} was done before the run resumed; profile={first + 2} is still to come")
        self.begin(first)

    def begin(self, iteration: int) -> None:
        """Starts if `iteration`, counted from 0, is the one; call it when an iteration begins."""
        if iteration + 1 != self._number:
            return
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._running = profile(activities=kinds)
        self._running.start()
        self._began = time.perf_counter()

    def end(self) -> None:
        """Writes and prints the profile if one is being taken; call it when an iteration has ended."""
        if self._running is None:
            return
        # Stop; what the iteration has launched belongs to it.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        taken = self._running
        self.close()

        # Write the trace and the table.
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"iteration_{self._number:06d}"
        taken.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        table = stage_table(self._number, seconds, events_of(taken))
        (self._folder / f"{name}_stages.json").write_text(finite_json(asdict(table), indent=2) + "\n")
        self._say("\n".join([*table.lines(), f"its trace: {self._folder / name}.json.gz"]))

    def close(self) -> None:
        """Stops without a word: a profile that has not come to its end is lost."""
        if self._running is not None:
            self._running.stop()
            self._running = None


def events_of(taken: profile) -> Events:
    """Returns what a stopped profile holds of stages and of a GPU, without torch's tree of all events."""
    stages: list[Span] = []
    launches: dict[int, int] = {}
    kernels: list[tuple[int, Span]] = []
    recorded: Any = taken.profiler
    for event in recorded.kineto_results.events():
        name, is_host = event.name(), event.device_type() == torch.autograd.DeviceType.CPU
        span = Span(event.start_ns(), event.start_ns() + event.duration_ns(), name.removeprefix(_MARK))
        if is_host and name.startswith(_MARK):
            stages.append(span)
        elif is_host and name.startswith(_LAUNCHES):
            launches[event.correlation_id()] = span.start
        elif not is_host and not event.is_user_annotation():  # annotations are marks again, on the GPU's side
            kernels.append((event.correlation_id(), span))
    return Events(stages, launches, kernels)


def stage_table(iteration: int, seconds: float, events: Events) -> StageTable:
    """Returns the table of an iteration of so many seconds, the longest stage first."""
    # Which kernels each stage launched, each time it ran.
    spans = _outermost(events.stages)
    starts = [span.start for span in spans]
    launched: list[list[Span]] = [[] for _ in spans]
    for correlation, kernel in events.kernels:
        at = events.launches.get(correlation, kernel.start)
        place = bisect_right(starts, at) - 1
        if place >= 0 and at <= spans[place].end:
            launched[place].append(kernel)

    # Add up, by stage.
    has_gpu = bool(events.kernels)
    rows = []
    for name in dict.fromkeys(span.name for span in spans):
        places = [place for place, span in enumerate(spans) if span.name == name]
        host = sum(spans[place].end - spans[place].start for place in places) * _NS
        on_gpu = _on_gpu([launched[place] for place in places]) if has_gpu else (None, None)
        rows.append(StageRow(name, len(places), host, host / seconds, *on_gpu))
    rows.sort(key=lambda row: -row.seconds)
    rest = max(0.0, seconds - sum(row.seconds for row in rows))
    rows.append(StageRow("other", 1, rest, rest / seconds))
    busy = _covered([kernel for _, kernel in events.kernels]) * _NS / seconds if has_gpu else None
    return StageTable(iteration, seconds, busy, rows)


def _outermost(spans: Sequence[Span]) -> list[Span]:
    """Returns the spans that lie in no other, in the order of time."""
    kept: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept


def _on_gpu(runs: Iterable[list[Span]]) -> tuple[float, float | None]:
    """Returns the GPU's seconds of a stage's runs and the share in which it was busy; None if it ran nothing."""
    window, busy = 0, 0
    for kernels in runs:
        if kernels:
            window += max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)
            busy += _covered(kernels)
    return window * _NS, busy / window if window else None


def _covered(spans: Iterable[Span]) -> int:
    """Returns how many nanoseconds at least one of the spans covers."""
    total, until = 0, 0
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total
