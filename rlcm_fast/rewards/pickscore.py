"""PickScore v1 (arXiv 2305.01569): how probably people would pick the image for its prompt.

    exp(logit_scale) cos(image, prompt)      about 18 to 24 for images of a good model

The difference of two images' scores is the logit of the one being picked. Peers divide by 26: a weight does it.

Source and licence: yuvalkirstain/PickScore_v1, a CLIP ViT-H/14 tuned on people's choices; MIT (its code). Memory: 986 M
weights, 3.9 GB in fp32.
"""

# B images

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlcm_fast.rewards import clip
from rlcm_fast.rewards.clip_score import cosine
from rlcm_fast.rewards.facts import CLIP_WORDS, SHARDS, Facts, Weights
from rlcm_fast.rewards.models import ModelFiles, OnModels, Placement, found
from rlcm_fast.trajectory import Prompt

MODEL = Weights(
    "yuvalkirstain/PickScore_v1", ("config.json", SHARDS, *CLIP_WORDS), 3.94, "MIT (its code)", clip.H_PARTS
)


class PickScore(OnModels):
    """The scaled cosine of image and prompt in a CLIP model that learned which of two images people pick."""

    FACTS = Facts(
        formula="exp(logit_scale) times the cosine of image and prompt, about 18 to 24",
        likes="crisp, contrasty, busy pictures that show the prompt; drifts to one glossy style",
        weights=(MODEL,),
    )
    scope = "image"

    def __init__(
        self, model: str = MODEL.source, dtype: str = "fp32", device: str = "same", batch_size: int = 32
    ) -> None:
        """Load both towers of `model`, a folder or hub id."""
        place = Placement.of(dtype, device, batch_size)
        self._files = found(self.files({"model": model}))
        self._images = clip.image_tower(self._files[0], place)
        self._texts = clip.text_tower(self._files[0], place)
        self._scale = clip.logit_scale(self._files[0])

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """The files of the CLIP model; see OnModels."""
        return [ModelFiles("model", arguments["model"], MODEL)]

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 of images (B, 3, H, W) float32 in [0, 1], one prompt each."""
        texts = self._texts.embed([prompt.text for prompt in prompts])
        return self._scale * cosine(self._images.embed(images), texts)
