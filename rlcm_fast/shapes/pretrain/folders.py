"""Writes the trained parts as diffusers folders that stock pipelines load, with UNet and VAE in half precision.

The text encoder (1.2 MB) stays in float32. transformers loads weights in the precision in which they are stored, but
diffusers loads them in float32. A pipeline with both precisions would not run without a `torch_dtype`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel

from rlcm_fast.shapes.pretrain.teacher import noise_schedule
from rlcm_fast.shapes.pretrain.text import new_tokenizer


def save_teacher(
    vae: AutoencoderTiny, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, folder: Path
) -> StableDiffusionPipeline:
    """Write the diffusion teacher, with DDIM as its sampler."""
    scheduler = DDIMScheduler.from_config(noise_schedule().config, set_alpha_to_one=False, clip_sample=False)
    pipeline = StableDiffusionPipeline(
        vae,  # type: ignore[arg-type]
        text_encoder,
        new_tokenizer(),
        unet,
        scheduler,  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    return _save(pipeline, folder)


def save_lcm(
    vae: AutoencoderTiny, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, folder: Path
) -> LatentConsistencyModelPipeline:
    """Write the latent consistency model, which was distilled on 50 steps."""
    scheduler = LCMScheduler.from_config(noise_schedule().config, original_inference_steps=50, clip_sample=False)
    pipeline = LatentConsistencyModelPipeline(
        vae,  # type: ignore[arg-type]
        text_encoder,
        new_tokenizer(),
        unet,
        scheduler,  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    return _save(pipeline, folder)


def _save(pipeline: Any, folder: Path) -> Any:
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(folder)
    # Drop the path that the VAE came from, and a value that its class derives and would warn about.
    config = folder / "vae" / "config.json"
    dropped = ("_name_or_path", "block_out_channels")
    values = {key: value for key, value in json.loads(config.read_text()).items() if key not in dropped}
    config.write_text(json.dumps(values, indent=2) + "\n")
    return pipeline
