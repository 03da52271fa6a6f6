"""Exports a run's result: a folder that stock diffusers loads, and the adapters alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlcm_fast import parallel
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.engine.averaging import AveragingEngine


@dataclass(frozen=True)
class Exporter:
    """Writes the final weights, or their average if the run keeps one."""

    backbone: Backbone
    engine: AveragingEngine

    def __call__(self, run_dir: Path) -> str:
        """Writes run_dir/export, and run_dir/lora if there are adapters; every rank must call.

        Returns a line that tells the user where they are.
        """
        # This copies all weights to the CPU, so only one process does it; under ZeRO-3 all must help to gather them.
        weights = self.engine.final_weights() if parallel.is_main() or self.engine.zero_stage == 3 else {}
        has_adapters = self.backbone.has_adapters
        if parallel.is_main():
            self.backbone.export(weights, run_dir / "export")
            if has_adapters:
                self.backbone.export_adapters(weights, run_dir / "lora")
        adapters = f"; {run_dir}/lora holds its adapters for load_lora_weights" if has_adapters else ""
        return f"done: {run_dir}/export is a diffusers folder{adapters}; {run_dir}/metrics.jsonl holds the curves"
