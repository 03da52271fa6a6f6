"""How well an image fits its prompt, by a CLIP model of your choice.

    flow_grpo      100 cos / 30            Flow-GRPO and UniRL; the default
    torchmetrics   100 max(cos, 0)         torchmetrics' CLIPScore
    paper          2.5 max(cos, 0)         CLIPScore (arXiv 2104.08718); the prompt begins with "A photo depicts "
    cosine         cos

cos is the cosine between the embeddings of image and prompt. Scores of two CLIP models do not compare: what a run used
is in its environment.json. In place of the model's own exp(logit_scale), all variants have the round 100.

Source and licence: openai/clip-vit-large-patch14, MIT. Memory: 428 M weights, 1.7 GB in fp32.
Test values: openai/clip-vit-base-patch16, `torch.randint(255, (3, 224, 224), generator=manual_seed(42))`, "a photo of
a cat": torchmetrics' score is 24.4255. clip-vit-base-patch32, COCO val 000000039769, "a photo of a cat", "a photo of a
dog": logits 24.5701 and 19.3049.
"""

# B images

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rlcm_fast.rewards import clip
from rlcm_fast.rewards.facts import Facts
from rlcm_fast.rewards.models import ModelFiles, OnModels, Placement, found
from rlcm_fast.trajectory import Prompt

FACTORS = {"flow_grpo": 100 / 30, "torchmetrics": 100.0, "paper": 2.5, "cosine": 1.0}
_CLAMPED = ("torchmetrics", "paper")
_PREFIX = "A photo depicts "  # of the paper


class ClipScore(OnModels):
    """The cosine of image and prompt, in one of the scales that people use."""

    FACTS = Facts(
        formula="a multiple of the cosine between the CLIP embeddings of image and prompt",
        likes="the prompt's nouns, counted or placed in any way; words written into the picture",
        weights=(clip.L,),
    )
    scope = "image"

    def __init__(
        self,
        model: str = clip.L.source,
        variant: Literal["flow_grpo", "torchmetrics", "paper", "cosine"] = "flow_grpo",
        dtype: str = "fp32",
        device: str = "same",
        batch_size: int = 32,
    ) -> None:
        """Load both towers of `model`, a folder or hub id of a CLIP model in transformers' layout."""
        place = Placement.of(dtype, device, batch_size)
        self._files = found(self.files({"model": model, "variant": variant}))
        self._variant = variant
        self._images = clip.image_tower(self._files[0], place)
        self._texts = clip.text_tower(self._files[0], place)

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """The files of the CLIP model; see OnModels."""
        if arguments["variant"] not in FACTORS:
            raise ValueError(f"variant={arguments['variant']} is unknown; give {', '.join(FACTORS)}")
        return [ModelFiles("model", arguments["model"], clip.L)]

    @property
    def used(self) -> dict[str, Any]:
        """What the instance computes on; see OnModels."""
        return {"variant": self._variant, **super().used}

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 of images (B, 3, H, W) float32 in [0, 1], one prompt each."""
        prefix = _PREFIX if self._variant == "paper" else ""
        texts = [prefix + prompt.text for prompt in prompts]
        cosines = cosine(self._images.embed(images), self._texts.embed(texts))
        if self._variant in _CLAMPED:
            cosines = cosines.clamp(min=0)
        return FACTORS[self._variant] * cosines


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine (B,) of each row of a (B, E) with the same row of b (B, E)."""
    return (normalize(a, dim=1) * normalize(b, dim=1)).sum(dim=1)
