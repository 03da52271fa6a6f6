"""Embeddings of images for `diversity`: a CLIP model's, which another reward may have computed already, or DINOv2's.

Each embedding has length 1, so a distance is in [0, 2]: sqrt(2 - 2 cos).

Sources and licences: openai/clip-vit-large-patch14, MIT; facebook/dinov2-base, Apache-2.0. Memory: 304 M weights,
1.2 GB in fp32; 86.6 M, 0.35 GB.
"""

# B images, E numbers of an embedding

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rlcm_fast.rewards import clip
from rlcm_fast.rewards.facts import SHARDS, Facts, Part, Weights
from rlcm_fast.rewards.models import ModelFiles, OnModels, Placement, found
from rlcm_fast.rewards.pixels import IMAGENET_MEAN, IMAGENET_STD, Preparation
from rlcm_fast.rewards.towers import ImageTower, load, pooled, shared
from rlcm_fast.trajectory import Prompt

DINO = Weights("facebook/dinov2-base", ("config.json", SHARDS), 0.35, "Apache-2.0", (Part("image", 86.6, 46.3),))


class ClipEmbedding(OnModels):
    """The unit embedding of an image by a CLIP model; with an `aesthetic` or `clip_score` on it, it costs nothing."""

    FACTS = Facts("the unit CLIP embedding", "other subjects, styles and colours", (clip.L_IMAGES,))

    def __init__(
        self, model: str = clip.L_IMAGES.source, dtype: str = "fp32", device: str = "same", batch_size: int = 32
    ) -> None:
        """Load the image tower of `model`, a folder or hub id."""
        self._files = found(self.files({"model": model}))
        self._tower = clip.image_tower(self._files[0], Placement.of(dtype, device, batch_size))

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """The files of the CLIP model; see OnModels."""
        return [ModelFiles("model", arguments["model"], clip.L_IMAGES)]

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The embedding (B, E) float32, each row of length 1, of images (B, 3, H, W) in [0, 1]; ignores prompts."""
        return normalize(self._tower.embed(images), dim=1)


class DinoEmbedding(OnModels):
    """The unit embedding of an image by DINOv2, which learned from images without words."""

    FACTS = Facts("the unit DINOv2 embedding", "other shapes and layouts, less other styles", (DINO,))

    def __init__(
        self, model: str = DINO.source, dtype: str = "fp32", device: str = "same", batch_size: int = 32
    ) -> None:
        """Load `model`, a folder or hub id of a DINOv2 model."""
        self._files = found(self.files({"model": model}))
        self._tower = dino_tower(self._files[0], Placement.of(dtype, device, batch_size))

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """The files of the DINOv2 model; see OnModels."""
        return [ModelFiles("model", arguments["model"], DINO)]

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The embedding (B, E) float32, each row of length 1, of images (B, 3, H, W) in [0, 1]; ignores prompts."""
        return normalize(self._tower.embed(images), dim=1)


def dino_tower(files: ModelFiles, place: Placement) -> ImageTower:
    """The tower of a DINOv2 folder; it embeds with the normalised [CLS] state, to any length, at 224 pixels."""
    folder = files.folder()

    def make() -> ImageTower:
        from transformers import Dinov2Config, Dinov2Model

        config = Dinov2Config.from_pretrained(folder, local_files_only=True)
        prepare = Preparation(224, IMAGENET_MEAN, IMAGENET_STD, shortest_side=256)
        return ImageTower(load(Dinov2Model, folder, place, config), pooled, prepare, place, config.hidden_size)

    return shared("DINOv2", folder, place, make)
