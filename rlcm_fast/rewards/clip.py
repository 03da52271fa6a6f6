"""The two towers of a CLIP model in transformers' layout, and the logit scale; several rewards are built on them.

The image tower and the text tower load separately: a reward that asks for images only holds no text weights.
"""

# B images, E numbers of an embedding, L tokens

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rlcm_fast.rewards.facts import CLIP_WORDS, SHARDS, Part, Weights
from rlcm_fast.rewards.heads import read_tensors
from rlcm_fast.rewards.models import ModelFiles, Placement
from rlcm_fast.rewards.pixels import Preparation
from rlcm_fast.rewards.towers import ImageTower, TextTower, Tokens, load, shared

_L, _L_IMAGES, _L_TEXTS = "openai/clip-vit-large-patch14", Part("image", 304.0, 162.0), Part("text", 123.7, 2.7)
L_IMAGES = Weights(_L, ("config.json", SHARDS), 1.71, "MIT", (_L_IMAGES,))
L = Weights(_L, ("config.json", SHARDS, *CLIP_WORDS), 1.71, "MIT", (_L_IMAGES, _L_TEXTS))
H_PARTS = (Part("image", 632.1, 334.6), Part("text", 354.0, 9.7))
"""The image and the text tower of a ViT-H/14."""


def image_tower(files: ModelFiles, place: Placement) -> ImageTower:
    """The image tower of a CLIP folder; it embeds with the projection, to any length."""
    folder = files.folder()

    def make() -> ImageTower:
        from transformers import CLIPVisionModelWithProjection

        config = _config(folder).vision_config
        return ImageTower(
            load(CLIPVisionModelWithProjection, folder, place, config),
            embed_images,
            Preparation(config.image_size),
            place,
            config.projection_dim,
        )

    return shared("CLIP images", folder, place, make)


def text_tower(files: ModelFiles, place: Placement) -> TextTower:
    """The text tower of a CLIP folder; it embeds with the projection, to any length."""
    folder = files.folder()

    def make() -> TextTower:
        from transformers import CLIPTextModelWithProjection

        config = _config(folder).text_config
        tokens = clip_tokens(folder, config.max_position_embeddings, files.source)
        return TextTower(load(CLIPTextModelWithProjection, folder, place, config), embed_text, tokens, place)

    return shared("CLIP texts", folder, place, make)


def clip_tokens(folder: Path, max_tokens: int, reader: str) -> Tokens:
    """The tokenizer of a CLIP folder."""
    from transformers import CLIPTokenizer

    return Tokens(CLIPTokenizer.from_pretrained(folder, local_files_only=True), max_tokens, reader)


def logit_scale(files: ModelFiles) -> float:
    """exp(logit_scale), the factor of a cosine in the model's training: 100 at most, for most models."""
    folder = files.folder()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model.bin")]):
        tensors = read_tensors(file)
        if "logit_scale" in tensors:
            return math.exp(tensors["logit_scale"].float().item())
    raise ValueError(f"{files.field}={files.source} has no logit_scale; give a whole CLIP model")


def embed_images(network: nn.Module, pixels: Tensor) -> Tensor:
    """The embeddings (B, E) of pixels (B, 3, size, size)."""
    return network(pixel_values=pixels).image_embeds


def embed_text(network: nn.Module, ids: Tensor) -> Tensor:
    """The embedding (1, E) of tokens (1, L)."""
    return network(input_ids=ids).text_embeds


def _config(folder: Path) -> Any:
    """The CLIPConfig of a folder; the widths of projections in its halves are not always right, and become so."""
    from transformers import CLIPConfig

    config: Any = CLIPConfig.from_pretrained(folder, local_files_only=True)
    config.vision_config.projection_dim = config.text_config.projection_dim = config.projection_dim
    return config
