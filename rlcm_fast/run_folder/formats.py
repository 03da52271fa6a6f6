"""Writes the weights of a run's checkpoint in the format that another tool reads; the run itself is not touched.

    diffusers         a folder for from_pretrained
    single-file       RUN.safetensors with text encoders and VAE, for ComfyUI and A1111
    safetensors-unet  RUN_unet.safetensors, the UNet alone under its original names, for ComfyUI's diffusion_models/
    lora              PEFT's file and kohya's: the trained adapters, or the difference to the start model by rank

Each is a folder with a model card (model_card.py).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from rlcm_fast.backbones.extraction import Extracted, extract_lora
from rlcm_fast.backbones.lora_layouts import KOHYA_FILE, write_kohya
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.backbones.single_file_writing import modelspec, save_single_file, save_unet_file, textual_inversions
from rlcm_fast.config import Config, parse_config, to_dict
from rlcm_fast.file_modes import share
from rlcm_fast.run_folder import checkpoint as checkpoints
from rlcm_fast.run_folder.best import Best
from rlcm_fast.run_folder.model_card import Card, diffusers_usage, lora_usage, sampler, shown, with_kind
from rlcm_fast.run_folder.resume import put_weights
from rlcm_fast.run_folder.sampler_file import RECIPE, write_sampler
from rlcm_fast.run_folder.tracking import say
from rlcm_fast.run_folder.wholeness import damage

FORMATS = ("diffusers", "single-file", "lora", "safetensors-unet")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, its config and one of its checkpoints."""

    run_dir: Path
    config: Config
    checkpoint: Path

    @classmethod
    def find(cls, run: str, iteration: int | None) -> FinishedRun:
        """Finds a run's checkpoint: that after `iteration` iterations, or the newest; reads no weights.

        Raises:
            ValueError: it is no run, or has no such checkpoint.
        """
        run_dir = _folder_of(run)
        config = parse_config(["--config", str(run_dir / "config.yaml")])
        kept = {checkpoints.read_state(folder)["iteration"]: folder for folder in checkpoints.complete(run_dir)}
        if iteration is None:
            folder = checkpoints.newest_whole(run_dir, say)
            if folder is None:
                raise ValueError(f"run={run} has no checkpoint that is whole; let it finish an iteration first")
            return cls(run_dir, config, folder)
        if iteration not in kept:
            known = ", ".join(map(str, kept)) or "none"
            raise ValueError(
                f"iteration={iteration} is not among the checkpoints that run={run} kept ({known}); give one of them"
            )
        fault = damage(kept[iteration])
        if fault is not None:
            raise ValueError(f"iteration={iteration} is damaged ({fault}); give another one")
        return cls(run_dir, config, kept[iteration])

    @classmethod
    def find_best(cls, run: str) -> FinishedRun:
        """Finds a run's best checkpoint by checkpoint.best; raises ValueError as `find`, or if there is none."""
        best = Best.find(_folder_of(run))
        if best is None:
            raise ValueError(
                f"best=true finds no best checkpoint in run={run}: it was trained without checkpoint.best, or was not "
                "evaluated after its first iteration; leave --best out for the newest one"
            )
        say(f"the best by {best.metric}: {best.value:.4g} after {best.iteration} iterations")
        return cls.find(run, best.iteration)

    @property
    def iteration(self) -> int:
        return checkpoints.read_state(self.checkpoint)["iteration"]

    @property
    def has_adapters(self) -> bool:
        return self.config.lora.rank > 0

    def load(self) -> tuple[Backbone, dict[str, Tensor]]:
        """Loads the start model on the CPU, with adapters if they were trained, and the weights to export.

        The weights are the moving average if the run kept one, as at the end of the run.
        """
        config = self.config
        backbone = Backbone.load(config.model, torch.device("cpu"), torch.float32, config.policy.kind)
        if self.has_adapters:
            backbone.add_adapters(config.lora)
        weights = checkpoints.final_weights(self.checkpoint)
        start = backbone.unet.state_dict()
        misfits = [name for name, weight in weights.items() if name not in start or start[name].shape != weight.shape]
        if misfits:
            put_weights(weights, backbone.unet, f"checkpoint={self.checkpoint}")  # says it in its words
        return backbone, {**start, **weights}


def _folder_of(run: str) -> Path:
    """Returns the folder of a run; raises ValueError if it is none."""
    folder = Path(run)
    if not folder.is_dir():
        raise ValueError(f"run={run} is not a folder; give the run_dir of a run")
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"run={run} is not the folder of a run: it has no config.yaml; give a run_dir")
    return folder


@dataclass(frozen=True)
class Export:
    """One export of a run into a folder that exists."""

    run: FinishedRun
    folder: Path
    dtype: str
    guidance_scale: float
    repository: str | None = None  # of the hub, where it goes; its card names it

    @property
    def name(self) -> str:
        return self.run.run_dir.resolve().name

    def diffusers(self) -> Path:
        backbone, weights = self.run.load()
        pipeline = backbone.with_weights(weights)
        pipeline.to(DTYPES[self.dtype]).save_pretrained(self.folder)
        share(self.folder)
        config, scheduler = with_kind(self.run.config, backbone), backbone.scheduler_config["_class_name"]
        place = self.repository or f"{self.name}/{self.folder.name}"
        self._card(config, diffusers_usage(config, place, scheduler), [])
        return self.folder

    def single_file(self) -> Path:
        backbone, weights = self.run.load()
        pipeline, file = backbone.with_weights(weights), self.folder / f"{self.name}.safetensors"
        save_single_file(pipeline, file, DTYPES[self.dtype], self.guidance_scale, **self._metadata())
        usage = f"`{file.name}` goes into ComfyUI's `models/checkpoints` or A1111's `models/Stable-diffusion`."
        config = with_kind(self.run.config, backbone)
        notes = [*_guidance_notes(pipeline.unet, self.guidance_scale), *_inversion_notes(pipeline)]
        for note in _inversion_notes(pipeline):
            say(note)
        self._card(config, f"{usage} {sampler(config)}", notes)
        return file

    def safetensors_unet(self) -> Path:
        backbone, weights = self.run.load()
        pipeline, file = backbone.with_weights(weights), self.folder / f"{self.name}_unet.safetensors"
        save_unet_file(pipeline, file, DTYPES[self.dtype], self.guidance_scale, **self._metadata())
        usage = f"`{file.name}` holds the UNet alone and goes into ComfyUI's `models/diffusion_models`."
        config = with_kind(self.run.config, backbone)
        self._card(config, f"{usage} {sampler(config)}", _guidance_notes(pipeline.unet, self.guidance_scale))
        return file

    def lora(self) -> Path:
        """Writes the trained adapters."""
        backbone, weights = self.run.load()
        kept = {name: w.to(DTYPES[self.dtype]) if ".lora_" in name else w for name, w in weights.items()}
        backbone.export_adapters(kept, self.folder)
        config = with_kind(self.run.config, backbone)
        self._card(config, lora_usage(config), [], is_adapter=True)
        return self.folder / KOHYA_FILE

    def extracted_lora(self, rank: int, relative_to: UNet2DConditionModel | None = None) -> tuple[Path, Extracted]:
        """Writes the difference to the start model, or to another one, as kohya's file."""
        backbone, weights = self.run.load()
        pipeline = backbone.with_weights(weights)
        start: Any = backbone.start_unet() if relative_to is None else relative_to
        extracted = extract_lora(start, _without_guidance(pipeline.unet.state_dict(), start), rank)
        layers = {name: layer.to(DTYPES[self.dtype]) for name, layer in extracted.layers.items()}
        file = self.folder / KOHYA_FILE
        architecture = f"{modelspec(pipeline)['modelspec.architecture']}/lora"
        spec = {"modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": architecture}
        write_kohya(file, layers, pipeline.unet.config, **self._metadata(), **spec)
        note = (
            f"Extracted with rank {rank}: the LoRA leaves out {extracted.error:.1%} of the change of the weights (in"
            f" norm), {extracted.unreachable:.1%} of it in norms and biases, which a LoRA does not reach."
        )
        config = with_kind(self.run.config, backbone)
        self._card(config, lora_usage(config), [note], is_adapter=True)
        return file, extracted

    def _metadata(self) -> dict[str, str]:
        """Returns the texts of the file's header: title, date, recipe."""
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        recipe = json.dumps({**_without_places(to_dict(self.run.config)), "finished_iterations": self.run.iteration})
        return {"modelspec.title": self.name, "modelspec.date": today, RECIPE: recipe}

    def _card(self, config: Config, usage: str, notes: Sequence[str], is_adapter: bool = False) -> None:
        write_sampler(config.policy, self.folder)
        Card(self.run.run_dir.resolve(), config, self.run.iteration, usage, notes, is_adapter).write(self.folder)


def _without_places(value: Any) -> Any:
    """Returns a config's values with the names of files and folders alone where they are absolute paths."""
    if isinstance(value, dict):
        return {name: _without_places(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(inner) for inner in value]
    return shown(value) if isinstance(value, str) else value


def _guidance_notes(unet: Any, guidance_scale: float) -> list[str]:
    if not unet.config.time_cond_proj_dim:
        return []
    return [
        f"The UNet's input for the guidance scale is fixed to {guidance_scale:g} in this file: draw with your tool's"
        " CFG at 1. rlcm_fast reads the input itself back from the file."
    ]


def _inversion_notes(pipeline: Any) -> list[str]:
    added = textual_inversions(pipeline)
    if not added:
        return []
    return [
        f"A single file has no place for the textual inversions of this model ({', '.join(added[:4])}): load them in"
        " your tool, or use --format diffusers, which keeps them."
    ]


def _without_guidance(tuned: Mapping[str, Tensor], other: Any) -> dict[str, Tensor]:
    """Leaves the guidance input out if the other UNet has none."""
    names = other.state_dict().keys()
    return {name: weight for name, weight in tuned.items() if "cond_proj" not in name or name in names}
