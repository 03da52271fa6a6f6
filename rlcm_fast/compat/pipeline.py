"""DefaultDDPOStableDiffusionPipeline: a Stable Diffusion pipeline by its name, with DDIM's scheduler.

It loads the pipeline when it is first asked for a part of it. A pipeline that was never looked at is not loaded at all:
the run loads the model itself. One that was is taken as it is then, with whatever the script changed in it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from rlcm_fast.api import Run
from rlcm_fast.backbones.loading import LORA_FILE, SHIPPED
from rlcm_fast.config import ModelConfig
from rlcm_fast.file_modes import share


class DefaultDDPOStableDiffusionPipeline:
    """The model of a DDPOTrainer; after training, its pipeline is the tuned one."""

    def __init__(
        self, pretrained_model_name: str, *, pretrained_model_revision: str = "main", use_lora: bool = True
    ) -> None:
        """use_lora: train adapters; so does a pytorch_lora_weights.safetensors beside the model, which is loaded."""
        self.pretrained_model = str(pretrained_model_name)
        self.pretrained_revision = pretrained_model_revision
        self._lora = _lora_beside(self.pretrained_model, pretrained_model_revision)
        self.use_lora = use_lora or self._lora is not None
        self._pipeline: Any = None
        self._run: Run | None = None

    @property
    def sd_pipeline(self) -> Any:
        """The diffusers pipeline: the start model, or after training the tuned one (with its adapters loaded)."""
        if self._pipeline is None:
            self._pipeline = self._loaded()
            self._show_tuned()
        return self._pipeline

    @property
    def is_loaded(self) -> bool:
        """Tells whether the script has the pipeline, and may have changed it."""
        return self._pipeline is not None

    @property
    def model(self) -> ModelConfig:
        """The start model as a config has it."""
        return ModelConfig(
            path=self.pretrained_model,
            revision=None if self.pretrained_revision == "main" else self.pretrained_revision,
            lora=self._lora,
        )

    def show(self, run: Run) -> None:
        """Makes the pipeline the tuned one of a run, in place if the script has it."""
        self._run = run
        if self._pipeline is not None:
            self._show_tuned()

    @property
    def unet(self) -> Any:
        return self.sd_pipeline.unet

    @property
    def vae(self) -> Any:
        return self.sd_pipeline.vae

    @property
    def tokenizer(self) -> Any:
        return self.sd_pipeline.tokenizer

    @property
    def text_encoder(self) -> Any:
        return self.sd_pipeline.text_encoder

    @property
    def scheduler(self) -> Any:
        return self.sd_pipeline.scheduler

    @property
    def autocast(self) -> Callable[[], Any] | None:
        return contextlib.nullcontext if self.use_lora else None

    def set_progress_bar_config(self, *arguments: Any, **keywords: Any) -> None:
        self.sd_pipeline.set_progress_bar_config(*arguments, **keywords)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Draws images as the stock pipeline does; TRL's output also has latents and log-probs, this one has not."""
        return self.sd_pipeline(*arguments, **keywords)

    def save_pretrained(self, output_dir: str | Path) -> None:
        """Saves the pipeline as a diffusers folder; with adapters the start model and pytorch_lora_weights beside it.

        So with adapters, `from_pretrained` and then `load_lora_weights` of the folder give the tuned pipeline.
        """
        pipeline, has_adapters = self.sd_pipeline, self._run is not None and self._run.lora is not None
        if has_adapters:
            pipeline.unload_lora_weights()
        pipeline.save_pretrained(output_dir)
        share(output_dir)
        if has_adapters:
            assert self._run is not None and self._run.lora is not None
            for file in self._run.lora.iterdir():
                shutil.copy(file, output_dir)
            self._show_tuned()

    def _loaded(self) -> Any:
        """Loads the start model: with DDIM's scheduler, without the safety checker, its LoRA fused."""
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        path, revision = self.pretrained_model, self.pretrained_revision
        path = str(SHIPPED.get(path, path))
        pipeline: Any = StableDiffusionPipeline.from_pretrained(
            path, revision=revision, safety_checker=None, use_safetensors=True
        )
        if self._lora is not None:
            pipeline.load_lora_weights(self._lora, use_safetensors=True)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        return pipeline

    def _show_tuned(self) -> None:
        """Loads the weights of the run into the pipeline."""
        if self._run is None:
            return
        if self._run.lora is not None:
            self._pipeline.unload_lora_weights()
            self._pipeline.load_lora_weights(self._run.lora, use_safetensors=True)
            return
        weights = self._run.pipeline.unet.state_dict()
        self._pipeline.unet.load_state_dict(weights)


def _lora_beside(model: str, revision: str) -> str | None:
    """Finds adapters in the model's folder or repository; None if it has none."""
    if model in SHIPPED or Path(model).exists():
        file = Path(model) / LORA_FILE
        return str(file) if file.is_file() else None
    try:
        return hf_hub_download(model, LORA_FILE, revision=revision)
    except EntryNotFoundError:
        return None
