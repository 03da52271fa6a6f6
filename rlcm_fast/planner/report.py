"""Reports at a run's start whether the planner expects it to fit, and after one iteration how far off it was.

Only on GPUs. A separate process makes the plan with `rlcm-fast plan --json` while weights load: it traces the model for
15 to 30 seconds, which must not run beside real passes. The main process prints the report, for its GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlcm_fast import parallel
from rlcm_fast.config import Config, to_yaml

_GIB = 2**30
_ROOT = Path(__file__).resolve().parent.parent.parent  # holds the package, which may not be installed
_MOST_SECONDS = 180.0  # a run waits no longer for its plan


class MemoryReport:
    """Holds the plan of a run; silent on a CPU, on all but the main process, and with tracking.plan=false."""

    def __init__(self, config: Config, device: torch.device) -> None:
        """Starts planning in the background."""
        self._device = device
        self._planned: dict[str, Any] | None = None
        self._plan: subprocess.Popen[str] | None = None
        if config.tracking.plan and device.type == "cuda" and parallel.is_main():
            self._folder = tempfile.TemporaryDirectory()  # deleted with this object
            self._plan = _start_plan(config, Path(self._folder.name) / "config.yaml")

    def verdict(self, say: Callable[[str], None]) -> None:
        """Says whether the run will fit; call it before the first iteration."""
        if self._plan is None:
            return
        self._planned, reason = _read_plan(self._plan)
        if self._planned is None:
            say(f"no plan of the memory: {reason}")
            return
        stages = self._planned["peak_bytes"]
        stage = max(stages, key=lambda name: stages[name])
        total = torch.cuda.get_device_properties(self._device).total_memory
        peak = f"{stages[stage] / _GIB:.1f} of the GPU's {total / _GIB:.1f} GiB, at the peak of {stage}"
        if stages[stage] <= total:
            say(f"plan: it fits, {peak}")
        else:
            say(f"plan: it does not fit, {peak}; rlcm-fast plan with this config says what to change")

    def of(self, config: Config) -> MemoryReport:
        """Returns the report of a run whose numbers are others by now, and stops planning with those before."""
        if self._plan is not None:
            self._plan.kill()
            self._plan.communicate()
            self._plan = None
        return MemoryReport(config, self._device)

    def begin(self) -> None:
        """Starts measuring the peak anew: the plan leaves out the evaluation before an iteration."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def metrics(self) -> dict[str, float]:
        """Returns memory/peak_gib: the most that any process allocated since `begin`."""
        if self._device.type != "cuda":
            return {}
        peak = torch.cuda.max_memory_allocated(self._device) / _GIB
        return {"memory/peak_gib": max(parallel.all_gather_list([peak]))}

    def compare(self, say: Callable[[str], None]) -> None:
        """Compares the first peak with the plan, once; both leave out what CUDA takes besides allocations."""
        if self._planned is None:
            return
        planned = max(self._planned["peak_bytes"].values()) - self._planned["bytes"]["overhead"]
        peak = torch.cuda.max_memory_allocated(self._device)
        say(
            f"memory: {peak / _GIB:.2f} GiB allocated at the first iteration's peak, {planned / _GIB:.2f} planned "
            f"({planned / peak - 1:+.1%})"
        )
        self._planned = None


def _start_plan(config: Config, file: Path) -> subprocess.Popen[str]:
    """Starts `rlcm-fast plan` on the resolved config; the process sees no GPU.

    It plans for the largest GPU of the table, so that it seldom has to search for settings that make the run fit. Only
    the bytes are used, and they do not depend on the GPU.
    """
    file.write_text(to_yaml(config), encoding="utf-8")
    command = [sys.executable, "-m", "rlcm_fast.cli.main", "plan", "--json", "--gpu", "h200", "--config", str(file)]
    paths = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [*command, "--processes", str(parallel.world_size())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def _read_plan(process: subprocess.Popen[str]) -> tuple[dict[str, Any] | None, str]:
    """Returns the plan and no reason, or None and the reason why there is no plan."""
    try:
        output, errors = process.communicate(timeout=_MOST_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None, f"it took more than {_MOST_SECONDS:.0f} s"
    if process.returncode != 0:
        return None, (errors.strip().splitlines() or ["no reason given"])[-1].removeprefix("error: ")
    return json.loads(output), ""
