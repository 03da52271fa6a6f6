"""What a run leaves for others to use: a folder that stock diffusers loads, and the adapters alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlcm_fast import parallel
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.engine.averaging import AveragingEngine


@dataclass(frozen=True)
class Exporter:
    """Writes the final weights, averaged where there is an average."""

    backbone: Backbone
    engine: AveragingEngine

    def __call__(self, run_dir: Path) -> str:
        """Writes run_dir/export, with adapters run_dir/lora too, and returns a line that says so; every rank calls."""
        # under ZeRO-3 all must gather; else a copy in the CPU's memory is enough
        weights = self.engine.final_weights() if parallel.is_main() or self.engine.zero_stage == 3 else {}
        has_adapters = self.backbone.has_adapters
        if parallel.is_main():
            self.backbone.export(weights, run_dir / "export")
            if has_adapters:
                self.backbone.export_adapters(weights, run_dir / "lora")
        adapters = f"; {run_dir}/lora its adapters for load_lora_weights" if has_adapters else ""
        return f"done: {run_dir}/export is a diffusers folder{adapters}; {run_dir}/metrics.jsonl the curves"
