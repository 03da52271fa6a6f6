"""What is allocated at most while a stage runs: from a GPU's allocator, or by counting storages on a CPU."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlcm_fast.planner.tracing import LiveBytes


class Meter(ABC):
    """Peaks in bytes by stage; a stage within another has its own, which is not the outer one's."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = defaultdict(int)
        self._running: list[str] = []

    @abstractmethod
    def take(self) -> int:
        """The peak since the last call."""

    @abstractmethod
    def begin(self) -> None:
        """Counts from here on; what the run has made before is there."""

    def beside(self) -> dict[str, int]:
        """Bytes of the process beside its tensors, where they are known."""
        return {}

    def wrap(self, owner: Any, method: str, stage: str) -> None:
        """Every call of owner.method is of the stage; the largest peak of an iteration is kept."""
        function: Callable[..., Any] = getattr(owner, method)

        def metered(*arguments: Any, **keywords: Any) -> Any:
            self._note()
            self._running.append(stage)
            try:
                return function(*arguments, **keywords)
            finally:
                self._note()
                self._running.pop()

        setattr(owner, method, metered)

    def _note(self) -> None:
        """Charges the peak since the last note to the stage that ran."""
        peak = self.take()
        if self._running:
            stage = self._running[-1]
            self.peaks[stage] = max(self.peaks[stage], peak)


class CudaMeter(Meter):
    """Reads bytes of tensors from torch's allocator."""

    _reserved = 0

    def begin(self) -> None:
        torch.cuda.empty_cache()  # of what loading took
        self.take()
        self._reserved = 0

    def take(self) -> int:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        self._reserved = max(self._reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        return peak

    def beside(self) -> dict[str, int]:
        """reserved: the allocator's peak, fragments included; used: what is taken of the GPU, by whomever."""
        free, total = torch.cuda.mem_get_info()
        return {"reserved": self._reserved, "used_beside": total - free - torch.cuda.memory_reserved()}


class StorageMeter(LiveBytes, Meter):
    """Counts the storages of tensors that are made in its `with` block."""

    def __init__(self) -> None:
        Meter.__init__(self)
        LiveBytes.__init__(self, known=_all_tensors())

    def begin(self) -> None:
        for tensor in _all_tensors():  # files are read past the operations that are counted
            self._add(tensor, tensor.untyped_storage().nbytes())

    def take(self) -> int:
        peak, self.peak = self.peak, self.now
        return peak


def _all_tensors() -> list[Tensor]:
    """All tensors on the CPU that Python can reach."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    return [tensor for tensor in found if tensor.device.type == "cpu"]
