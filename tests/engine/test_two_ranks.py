"""A NaN on one of two processes, and sums of micro-batches of both, under every engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks
from engine_cases import OURS, distance

from benchmarks.shared import run_processes

pytestmark = [pytest.mark.slow, pytest.mark.telling]
ENGINES: dict[str, dict[str, Any]] = {
    "zero_0": {"stage": 0},
    **{f"zero_{stage}_{dtype}": {"stage": stage, "dtype": dtype} for stage in (1, 2, 3) for dtype in ("fp32", "bf16")},
    "pure_bf16": {"dtype": "pure_bf16", **OURS},
    "in_backward": {"dtype": "pure_bf16", "in_backward": True, **OURS},
}


def run(target: Any, *values: Any, folder: Path) -> None:
    group = (2, run_processes.free_port())
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = [
        run_processes.start(target, *values, folder, log=log, rank=rank, group=group) for rank, log in enumerate(logs)
    ]
    for process, log in zip(processes, logs, strict=True):
        process.join(timeout=600)
        assert process.exitcode == 0, log.read_text()[-3000:]


def test_a_nan_on_one_process_skips_the_update_on_both(tmp_path: Path):
    run(two_ranks.update_with_a_fault, ENGINES, folder=tmp_path)
    for name in ENGINES:
        first, second = (torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True) for rank in range(2))
        assert first["finite"] == second["finite"] == [True, True], name
        assert not math.isfinite(first["bad norm"]) and not math.isfinite(second["bad norm"]), name
        assert first["good norm"] == second["good norm"] and math.isfinite(first["good norm"]), name
        assert distance(first["bad"], first["start"]) == distance(second["bad"], second["start"]) == 0.0, name
        assert distance(first["good"], second["good"]) == 0.0 < distance(first["good"], first["start"]), name


def test_many_micro_batches_of_two_processes_add_up_in_float32(tmp_path: Path):
    """To the last digit of bfloat16 weights and of what is sent."""
    run(two_ranks.add_up, folder=tmp_path)
    seen = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    expected = (seen[0]["x"] + seen[1]["x"]) / 2
    for stage in (1, 2, 3):
        off = (seen[0]["gradients"][stage] - expected).norm() / expected.norm()
        assert off < 2**-7, stage
