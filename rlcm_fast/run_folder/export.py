"""Exports a run's result: a folder that stock diffusers loads, and the adapters alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rlcm_fast import parallel
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import Config
from rlcm_fast.engine.averaging import AveragingEngine
from rlcm_fast.run_folder.best import Best
from rlcm_fast.run_folder.checkpoint import final_weights
from rlcm_fast.run_folder.model_card import Card, diffusers_usage, lora_usage, with_kind
from rlcm_fast.run_folder.sampler_file import write_sampler


@dataclass(frozen=True)
class Exporter:
    """Writes the final weights, or their average if the run keeps one, or the best checkpoint's."""

    backbone: Backbone
    engine: AveragingEngine
    config: Config

    def __call__(self, run_dir: Path, iteration: int) -> str:
        """Writes what checkpoint.export names, as `write` does; every rank must call.

        iteration: how many are finished. Returns a line that tells the user where the result is.
        """
        best = Best.find(run_dir) if self.config.checkpoint.export == "best" else None
        return f"done: {self.write(run_dir, iteration, best)}; {run_dir}/metrics.jsonl holds the curves"

    def write(self, run_dir: Path, iteration: int, best: Best | None) -> str:
        """Writes run_dir/export, and run_dir/lora if there are adapters, with model cards; every rank must call.

        best: the checkpoint to export; None takes the present weights, those after `iteration` iterations. Returns a
        part of a line that tells the user where they are.
        """
        # This copies all weights to the CPU, so only one process does it; under ZeRO-3 all must help to gather them.
        weights = self.engine.final_weights() if parallel.is_main() or self.engine.zero_stage == 3 else {}
        if best is not None and parallel.is_main():
            weights, iteration = {**weights, **final_weights(best.folder(run_dir))}, best.iteration
        has_adapters = self.backbone.has_adapters
        if parallel.is_main():
            self.backbone.export(weights, run_dir / "export")
            described = with_kind(self.config, self.backbone)
            write_sampler(described.policy, run_dir / "export")
            scheduler = self.backbone.scheduler_config["_class_name"]
            usage = diffusers_usage(described, f"{run_dir.resolve().name}/export", scheduler)
            Card(run_dir.resolve(), described, iteration, usage).write(run_dir / "export")
            if has_adapters:
                self.backbone.export_adapters(weights, run_dir / "lora")
                write_sampler(described.policy, run_dir / "lora")
                card = Card(run_dir.resolve(), described, iteration, lora_usage(described))
                replace(card, is_adapter=True).write(run_dir / "lora")
        adapters = f"; {run_dir}/lora holds its adapters for load_lora_weights" if has_adapters else ""
        chosen = "" if best is None else f" of iteration {best.iteration}, the best by {best.metric} ({best.value:.4g})"
        return f"{run_dir}/export is a diffusers folder{chosen}{adapters}"
