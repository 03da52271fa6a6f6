"""Loads stock diffusers pipelines and runs them with one random generator per image."""

# B images, H W pixels

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from rlcm_fast.backbones import assembly
from rlcm_fast.backbones.file_kinds import is_checkpoint
from rlcm_fast.backbones.loading import SHIPPED, resolve_lora_path, resolve_model_path, variant_of
from rlcm_fast.config import ModelConfig


def load_pipeline(
    model: str, revision: str | None = None, device: str | None = None, lora: str | None = None
) -> DiffusionPipeline:
    """Loads the pipeline of a folder, hub id or single file in evaluation mode, and fuses `lora` into it.

    Its dtype is float16 on a GPU and float32 elsewhere.
    """
    checkpoint = model not in SHIPPED and is_checkpoint(model)
    path = model if checkpoint else resolve_model_path(model, "model")
    lora_path = None if lora is None else resolve_lora_path(lora, "lora")
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


def draw(
    pipeline: DiffusionPipeline, texts: Sequence[str], num_steps: int, guidance_scale: float, seed: int, batch_size: int
) -> tuple[Tensor, float]:
    """Draws images (B, 3, H, W), float32 in [0, 1] on the CPU, and returns them with the seconds that this took.

    Image i has the noise of seed + i.
    """
    # Draw batch by batch; a generator per image makes it independent of its batch.
    batches: list[Tensor] = []
    start = time.perf_counter()
    for first in range(0, len(texts), batch_size):
        chunk = list(texts[first : first + batch_size])
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(chunk))]
        output = pipeline(  # pyright: ignore[reportCallIssue]  # each pipeline class defines its own __call__
            prompt=chunk,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="pt",
            **_size_of(pipeline),
        )
        batches.append(output.images.float().cpu())
    return torch.cat(batches), time.perf_counter() - start


def _size_of(pipeline: Any) -> dict[str, int]:
    """Returns height and width, which pipelines of diffusers need to be told, if the UNet does not draw squares."""
    size = pipeline.unet.config.sample_size
    if isinstance(size, int):
        return {}
    height, width = size
    return {"height": height * pipeline.vae_scale_factor, "width": width * pipeline.vae_scale_factor}
