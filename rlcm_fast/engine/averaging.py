"""The engine with an exponential moving average of the trained weights, by diffusers' EMAModel.

    average <- d average + (1 - d) weights     after update n = 1, 2, ...;  d = min(ema.decay, n / (n + 9)), 0 for n = 1

The average is float32, whatever the network's dtype is. Evaluations, grids and the export use it instead of the
weights; sampling and training never do. Every process holds the whole average.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from rlcm_fast import parallel
from rlcm_fast.config import EmaConfig
from rlcm_fast.engine.base import Engine, are_finite
from rlcm_fast.engine.shards import check_same_weights
from rlcm_fast.engine.tensor_files import read_metadata, read_tensors, write_tensors

_FILE = "ema.safetensors"


class AveragingEngine(Engine):
    """Wraps an engine and keeps an average of its weights; with ema.decay = 0 it only forwards to that engine."""

    def __init__(self, engine: Engine, network: nn.Module, config: EmaConfig) -> None:
        """Starts the average at the network's present weights; ema.decay = 0 turns it off."""
        self.engine = engine
        self.average = WeightAverage(network, config) if config.decay > 0 else None
        self.zero_stage = engine.zero_stage
        self.num_updates = 0  # that moved the weights, since the start of this process
        self.skips_whole_updates = engine.skips_whole_updates

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.engine(*arguments, **keywords)

    def begin_update(self, num_micro_batches: int) -> None:
        self.engine.begin_update(num_micro_batches)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    @property
    def graph_problem(self) -> str:
        return self.engine.graph_problem

    def hold_gradients(self) -> Mapping[Tensor, Tensor]:
        return self.engine.hold_gradients()

    def differentiate(self, loss: Tensor) -> None:
        self.engine.differentiate(loss)

    def note_backward(self) -> None:
        self.engine.note_backward()

    def may_begin_again(self, num_micro_batches: int) -> bool:
        return self.engine.may_begin_again(num_micro_batches)

    def drop_gradients(self) -> None:
        self.engine.drop_gradients()

    def step(self) -> float | None:
        norm = self.engine.step()
        if norm is not None and math.isfinite(norm):
            self.num_updates += 1
            if self.average:
                self.average.update()
        return norm

    @property
    def lr(self) -> float:
        return self.engine.lr

    def metrics(self) -> dict[str, float]:
        return self.engine.metrics()

    def weights_are_finite(self) -> bool:
        """Tells whether all trained weights are finite on every process, and the average as well."""
        return self.engine.weights_are_finite() and (self.average is None or self.average.is_finite())

    def full_weights(self) -> dict[str, Tensor]:
        return self.engine.full_weights()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Gives the network the averaged weights inside the block, and restores the trained ones bitwise after it."""
        if self.average is None:
            yield
            return
        with self.average.applied():
            yield

    def final_weights(self) -> dict[str, Tensor]:
        """Returns `full_weights`, with the average in place of the trained weights; under ZeRO-3 all must call."""
        return self.full_weights() | (self.average.weights() if self.average else {})

    def save(self, folder: Path) -> None:
        self.engine.save(folder)
        if self.average and parallel.is_main():
            self.average.save(folder)

    def load(self, folder: Path, trusts_old: bool = False) -> None:
        self.engine.load(folder, trusts_old)
        if self.average:
            self.average.load(folder)


class WeightAverage:
    """The moving average of a network's trained parameters, which must be whole on this process."""

    def __init__(self, network: nn.Module, config: EmaConfig) -> None:
        self._trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._is_on_cpu = config.device == "cpu"
        # EMAModel clones parameters on their own device, and a GPU may have no room for a second set: copy first.
        start = (nn.Parameter(p.detach().cpu()) if self._is_on_cpu else p for p in self._trained.values())
        self._ema = EMAModel(start, decay=config.decay)
        self._ema.to(None, torch.float32)

    def update(self) -> None:
        """Moves the average towards the weights; call it after each update."""
        parameters = list(self._trained.values())
        if self._is_on_cpu:  # as nn.Parameter, because EMAModel averages only what requires a gradient
            parameters = [nn.Parameter(parameter.detach().cpu()) for parameter in parameters]
        self._ema.step(parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the network the averaged weights inside the block, rounded to its dtype."""
        self._ema.store(self._trained.values())
        self._ema.copy_to(self._trained.values())
        try:
            yield
        finally:
            self._ema.restore(self._trained.values())

    def weights(self) -> dict[str, Tensor]:
        """Returns the average by name, in float32 on the CPU, not rounded to the network's dtype."""
        return {name: value.cpu().clone() for name, value in self._named().items()}

    def is_finite(self) -> bool:
        """Tells whether the average is finite on every process; every process must call this."""
        return are_finite(self._ema.shadow_params)

    def save(self, folder: Path) -> None:
        write_tensors(folder / _FILE, self._named(), {"num_updates": str(self._ema.optimization_step)})

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        if not (folder / _FILE).is_file():
            raise ValueError(f"resume={folder} holds no {_FILE}: its run had ema.decay=0; set it to 0, or start anew")
        saved = read_tensors(folder / _FILE)
        check_same_weights(*({name: value.shape for name, value in named.items()} for named in (saved, self._named())))
        self._ema.optimization_step = int(read_metadata(folder / _FILE)["num_updates"])
        for name, value in self._named().items():
            value.copy_(saved[name])

    def _named(self) -> dict[str, Tensor]:
        return dict(zip(self._trained, self._ema.shadow_params, strict=True))
