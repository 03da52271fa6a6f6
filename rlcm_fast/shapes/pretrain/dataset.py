"""Renders training scenes as tensors; the same seed gives the same scenes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rlcm_fast.shapes.renderer import render
from rlcm_fast.shapes.scenes import training_scenes


@dataclass(frozen=True)
class CaptionedLatents:
    """The latents of the training images and their captions."""

    latents: Tensor  # (N, 8, 8, 8) float32, scaled
    captions: list[str]  # N


def training_images(num_images: int, seed: int) -> tuple[Tensor, list[str]]:
    """The images (N, 3, 64, 64) uint8 of a seed, and their captions."""
    scenes = islice(training_scenes(np.random.default_rng(seed)), num_images)
    images, captions = [], []
    for scene in tqdm(scenes, total=num_images, desc="rendering"):
        images.append(torch.from_numpy(np.asarray(render(scene)).copy()))
        captions.append(str(scene.caption))
    return torch.stack(images).permute(0, 3, 1, 2).contiguous(), captions


def to_model_range(images: Tensor) -> Tensor:
    """Convert uint8 [0, 255] to float32 [-1, 1], the input and output range of diffusers' VAEs."""
    return images.float() / 127.5 - 1
