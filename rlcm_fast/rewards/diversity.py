"""Measures how different the images of a group are: the mean distance between two of them in an embedding.

    r(group) = 2 / (k (k - 1)) sum_{i < j} |e_i - e_j|,        0 for a single image

The default embedding averages an image down to 8 x 8 RGB pixels and divides by the square root of the number of values.
The distance is then a root mean square difference in [0, 1]. The embedding sees colours, backgrounds and where things
are, and needs no network. embeddings.py has those of CLIP and DINOv2.
"""

# B images, F numbers that describe one image, G groups of k images

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from rlcm_fast.plugins import build, load_class
from rlcm_fast.rewards.models import ModelFiles, OnModels, files_of
from rlcm_fast.trajectory import Prompt

EMBEDDINGS = {
    "thumbnails": "rlcm_fast.rewards.diversity:Thumbnails",
    "clip": "rlcm_fast.rewards.embeddings:ClipEmbedding",
    "dinov2": "rlcm_fast.rewards.embeddings:DinoEmbedding",
    "shapes": "rlcm_fast.shapes.embedding:ShapesEmbedding",
}
_THUMBNAIL = 8  # pixels a side


class Thumbnails:
    """The images at 8 x 8 pixels, scaled so that distances are root mean square differences."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The embedding (B, 192) float32 of images (B, 3, H, W) in [0, 1]; ignores the prompts."""
        thumbnails = adaptive_avg_pool2d(images.detach().float(), _THUMBNAIL).flatten(1)
        return thumbnails / thumbnails.shape[1] ** 0.5


class OnEmbedding(OnModels):
    """A reward that computes on an embedding of images."""

    def __init__(self, embedding: str = "thumbnails", embedding_arguments: Mapping[str, Any] | None = None) -> None:
        """Make the embedding, a key of EMBEDDINGS or "package.module:Class", with `embedding_arguments`.

        It is called with (images, prompts) and returns (B, F).
        """
        self._embedding = build(embedding, embedding_arguments or {}, EMBEDDINGS, "embedding")

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """The files of the embedding; see OnModels."""
        return files_of(load_class(arguments["embedding"], EMBEDDINGS, "embedding"), arguments["embedding_arguments"])

    @classmethod
    def part(cls, arguments: Mapping[str, Any]) -> tuple[str, Any]:
        """The embedding; see OnModels."""
        embedding = arguments.get("embedding", "thumbnails")
        return "embedding_arguments", load_class(embedding, EMBEDDINGS, "embedding")

    @property
    def used(self) -> dict[str, Any]:
        """What the embedding computes on; see OnModels."""
        return self._embedding.used if isinstance(self._embedding, OnModels) else {}


class Diversity(OnEmbedding):
    """The mean distance between two images of a group, in an embedding."""

    scope = "set"

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The embedding (B, F) float32 of images (B, 3, H, W) float32 in [0, 1]."""
        return self._embedding(images, prompts).float()

    def value(self, described: Tensor) -> Tensor:
        """The values (G,) float32, at least 0, of the embeddings described (G, k, F) float32."""
        if described.shape[1] < 2:
            return described.new_zeros(len(described))
        # pdist, because cdist uses a matrix product, which loses the small distances of nearly equal images.
        return torch.stack([torch.pdist(group.double()).mean() for group in described]).float()
