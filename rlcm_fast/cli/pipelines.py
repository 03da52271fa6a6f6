"""Loads stock diffusers pipelines and runs them with one random generator per image."""

# B images, H W pixels

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from rlcm_fast.backbones import assembly
from rlcm_fast.backbones.file_kinds import is_checkpoint
from rlcm_fast.backbones.loading import SHIPPED, resolve_lora_path, resolve_model_path, variant_of
from rlcm_fast.backbones.model_checks import check_hub, check_model, is_of_this_kind
from rlcm_fast.backbones.text_checks import check_configs, check_pipeline
from rlcm_fast.backbones.texts import TextEncoder, TextSettings
from rlcm_fast.config import ModelConfig, PromptsConfig
from rlcm_fast.config.files import check_name
from rlcm_fast.hub import check_there, fetch_configs


def load_pipeline(
    model: str, revision: str | None = None, device: str | None = None, lora: str | None = None
) -> DiffusionPipeline:
    """Loads the pipeline of a folder, hub id or single file in evaluation mode, and fuses `lora` into it.

    Its dtype is float16 on a GPU and float32 elsewhere.
    """
    check_name("model", model)
    check_name("lora", lora or "")
    checkpoint = model not in SHIPPED and is_checkpoint(model)
    path = model if checkpoint else resolve_model_path(model, "model")
    lora_path = None if lora is None else resolve_lora_path(lora, "lora")
    for field, place in (("model", path), ("lora", lora_path)):
        if place is not None and not Path(place).exists():
            check_there(place, f"{field}={place}")
    if not checkpoint:
        folder = Path(path) if Path(path).is_dir() else fetch_configs(path, revision, f"model={model}")
        if is_of_this_kind(folder, f"model={model}"):
            check_model(ModelConfig(model))
            check_hub(ModelConfig(model, revision=revision))
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float16 if target.type == "cuda" else torch.float32
    if checkpoint:
        pipeline = assembly.assemble(ModelConfig(model), dtype, kind="ddim")
        pipeline.to(dtype)
    else:
        variant = variant_of(path, None)
        pipeline = assembly.load_pipeline(path, revision, dtype, f"model={model}", variant=variant)
    if lora_path is not None:
        print(assembly.fuse_lora(pipeline, lora_path, f"lora={lora}"), file=sys.stderr)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(target)


OPTIONS = ("clip-skip", "negative")


def text_settings(arguments: argparse.Namespace) -> TextSettings:
    """Returns how the arguments say that texts are read; refuses what the model has no use for, before it loads.

    Raises:
        ValueError: the model cannot skip so many layers, or has no use for a negative prompt.
    """
    prompts = PromptsConfig(negative=arguments.negative, long=arguments.long, max_chunks=arguments.max_chunks)
    settings = TextSettings(arguments.clip_skip, prompts)
    check_configs(ModelConfig(arguments.model, revision=arguments.revision), settings, OPTIONS)
    return settings


def encoder_of(pipeline: Any, settings: TextSettings, texts: Sequence[str]) -> TextEncoder | None:
    """Returns what reads texts as the settings say; says on stderr how many of them are cut.

    It is None if the pipeline can read them itself, or has text encoders of another kind.

    Raises:
        ValueError: as `text_settings`, or the text encoders are of another kind.
    """
    encoder_names = [name for name in pipeline.components if name.startswith("text_encoder")]
    encoders = [pipeline.components[name] for name in encoder_names]
    if not encoders or not all(isinstance(one, CLIPTextModel | CLIPTextModelWithProjection) for one in encoders):
        if settings != TextSettings():
            raise ValueError(
                "negative, clip-skip and long are for the text encoders of Stable Diffusion and SDXL, and this model "
                "has others; leave them out"
            )
        return None
    check_pipeline(pipeline, settings, OPTIONS)
    encoder = TextEncoder(pipeline, pipeline.device, settings)
    encoder.cut.tell = _to_stderr
    encoder.survey(texts)
    return None if encoder.is_plain else encoder


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def draw(
    pipeline: DiffusionPipeline,
    texts: Sequence[str],
    num_steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    encoder: TextEncoder | None = None,
) -> tuple[Tensor, float]:
    """Draws images (B, 3, H, W), float32 in [0, 1] on the CPU, and returns them with the seconds that this took.

    Image i has the noise of seed + i. encoder: reads the texts, as `encoder_of` made it; None: the pipeline does.
    """
    # Draw batch by batch; a generator per image makes it independent of its batch.
    batches: list[Tensor] = []
    start = time.perf_counter()
    for first in range(0, len(texts), batch_size):
        chunk = list(texts[first : first + batch_size])
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(chunk))]
        output = pipeline(  # pyright: ignore[reportCallIssue]  # each pipeline class defines its own __call__
            **({"prompt": chunk} if encoder is None else _encoded(pipeline, encoder, chunk)),
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="pt",
            **_size_of(pipeline),
        )
        batches.append(output.images.float().cpu())
    return torch.cat(batches), time.perf_counter() - start


def _encoded(pipeline: Any, encoder: TextEncoder, texts: Sequence[str]) -> dict[str, Tensor]:
    """Returns the encodings of texts as arguments of a pipeline; those with guidance get the negative prompt, too."""
    embeds, pooled = encoder.stacked(encoder.encode(texts))
    found = {"prompt_embeds": embeds}
    accepted = inspect.signature(pipeline.__call__).parameters
    negative, negative_pooled = encoder.stacked([encoder.negative()] * len(texts))
    if "negative_prompt_embeds" in accepted:
        found["negative_prompt_embeds"] = negative
    if "pooled_prompt_embeds" in accepted and pooled is not None and negative_pooled is not None:
        found |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
    return found


def set_size(pipeline: Any, size: tuple[int, int] | None) -> None:
    """Makes `draw` draw images of so many pixels, height and width; None leaves the model's size.

    Raises ValueError if a side is no whole number of latents.
    """
    if size is None:
        return
    step = pipeline.vae_scale_factor
    if any(side % step for side in size):
        height, width = (max(1, round(side / step)) * step for side in size)
        raise ValueError(f"size={size[0]}x{size[1]} must divide by {step}; try {height}x{width}")
    pipeline.unet.register_to_config(sample_size=[side // pipeline.vae_scale_factor for side in size])


def _size_of(pipeline: Any) -> dict[str, int]:
    """Returns height and width, which pipelines of diffusers need to be told, if the UNet does not draw squares."""
    size = pipeline.unet.config.sample_size
    if isinstance(size, int):
        return {}
    height, width = size
    return {"height": height * pipeline.vae_scale_factor, "width": width * pipeline.vae_scale_factor}
