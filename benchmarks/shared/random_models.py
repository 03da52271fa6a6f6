"""Full-size models with random weights, made where they are used: speed and memory do not depend on the values.

    with random_weights("cuda"):
        trainer = Trainer(config)  # model.path: a hub id that the planner knows

In the place of a download the Trainer gets a pipeline of the same classes and configs. A model.path that is a folder,
or ships, is loaded as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from rlcm_fast.backbones import assembly
from rlcm_fast.backbones.loading import SHIPPED, resolve_model_path
from rlcm_fast.config import ModelConfig
from rlcm_fast.planner.architecture import Architecture, load_architecture


@contextmanager
def random_weights(device: str) -> Iterator[None]:
    """Inside, a backbone is made on `device` instead of being downloaded."""

    def assemble(model: ModelConfig, dtype: torch.dtype, kind: str, notes: list[str] | None = None) -> Any:
        path = resolve_model_path(model.path)
        if Path(path).is_dir():
            return assembly.assemble(model, dtype, kind, notes)
        return random_pipeline(load_architecture(path), dtype, device)

    with mock.patch("rlcm_fast.backbones.pipeline.assemble", assemble):
        yield


def random_pipeline(architecture: Architecture, dtype: torch.dtype, device: str) -> Any:
    """A pipeline as `assemble` makes it: the UNet in `dtype`, the rest in float32, a consistency model's scheduler.

    Its tokenizer is the shipped models', which knows few words, but gives as many tokens as the text encoders take.
    """
    # Make the networks.
    torch.set_default_dtype(dtype)
    try:
        unet = architecture.build_unet(device)
    finally:
        torch.set_default_dtype(torch.float32)
    vae: Any = architecture.build_vae(device).to("cpu")  # as loaded ones are, until the backbone wants them elsewhere
    text_encoders: list[Any] = [encoder.to("cpu") for encoder in architecture.build_text_encoders(device)]

    # Put them together as the kind of pipeline that has so many text encoders.
    folder = SHIPPED["shapes/lcm"] / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=architecture.num_tokens)
    parts: dict[str, Any] = {"vae": vae, "unet": unet, "tokenizer": tokenizer, "scheduler": LCMScheduler()}
    if len(text_encoders) == 1:
        parts |= {"text_encoder": text_encoders[0], "safety_checker": None, "feature_extractor": None}
        return LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    parts |= {"text_encoder": text_encoders[0], "text_encoder_2": text_encoders[1], "tokenizer_2": tokenizer}
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)
