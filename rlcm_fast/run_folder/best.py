"""Keeps the best checkpoint by a metric of the evaluation: checkpoint.best.

    run_dir/checkpoints/best.json    {"checkpoint": "iteration_000012", "iteration": 12, "metric": ..., "value": ...}

An evaluation scores the weights after `iteration` iterations. If they are better than all before, a checkpoint of them
is written first, complete or absent like any other, and then best.json, at once. So a run that is killed between the
two has its earlier best. Pruning (checkpoint.keep) spares the checkpoint that best.json names. The start model has no
checkpoint, so the best is of a trained model, even if every one is worse than the start.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rlcm_fast.engine.tensor_files import sync_folder, write_json
from rlcm_fast.finite_json import is_number, load_json

FILE = "best.json"
_LOWEST = "min:"


@dataclass(frozen=True)
class Best:
    """The best checkpoint of a run."""

    checkpoint: str  # the folder's name
    iteration: int
    metric: str  # as in checkpoint.best
    value: float

    @classmethod
    def find(cls, run_dir: Path) -> Best | None:
        """Returns what best.json names; None without it, or if that checkpoint is gone."""
        file = run_dir / "checkpoints" / FILE
        if not file.is_file():
            return None
        try:
            best = cls(**load_json(file.read_bytes()))
        except (ValueError, TypeError):
            return None
        is_ours = isinstance(best.checkpoint, str) and isinstance(best.iteration, int) and is_number(best.value)
        return best if is_ours and best.folder(run_dir).is_dir() else None

    def folder(self, run_dir: Path) -> Path:
        return run_dir / "checkpoints" / self.checkpoint

    def write(self, run_dir: Path) -> None:
        """Writes best.json, at once and for good."""
        folder = run_dir / "checkpoints"
        unnamed = folder / f".{FILE}"
        write_json(unnamed, asdict(self))
        os.replace(unnamed, folder / FILE)
        sync_folder(folder)


def value_of(metric: str, metrics: Mapping[str, float]) -> float | None:
    """Returns the metric's value in an evaluation; None if it is not there or not finite."""
    value = metrics.get(metric.removeprefix(_LOWEST))
    return value if value is not None and math.isfinite(value) else None


def is_better(metric: str, value: float, best: Best | None, iteration: int) -> bool:
    """Tells whether a value beats the best so far, which counts if it is of this metric and of an earlier iteration."""
    if best is None or best.metric != metric or best.iteration >= iteration:
        return True
    return value < best.value if metric.startswith(_LOWEST) else value > best.value
