"""The reward "shapes_alignment", and the diversity of a set of images, which runs watch but do not optimise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from rlcm_fast.shapes.detector import score_images
from rlcm_fast.shapes.grammar import parse
from rlcm_fast.trajectory import Prompt

_THUMBNAIL = 8  # pixels a side


class ShapesAlignment:
    """How much of its caption an image shows: the detector's score, in [0, 1] (see `detector`)."""

    scope = "image"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B,) float32 of images (B, 3, H, W) float32 in [0, 1].

        Raises:
            ValueError: a prompt is not in the grammar of ShapesWorld, or an image is not finite.
        """
        return score_images(images, [parse(prompt.text) for prompt in prompts])


def image_diversity(images: Tensor) -> float:
    """Mean distance between two different images of (B, 3, H, W) in [0, 1]; 0 = all the same, at most 1.

    The distance is the root mean square difference of the images averaged down to 8 x 8 RGB pixels: it sees where
    things stand, their colours and the backgrounds, and needs no network.
    """
    if images.ndim != 4 or len(images) < 2:
        raise ValueError(f"images.shape={tuple(images.shape)} must be (B, 3, H, W) with B >= 2; pass more images")
    thumbnails = adaptive_avg_pool2d(images.detach().float(), _THUMBNAIL).flatten(1).double()
    return torch.pdist(thumbnails).mean().item() / thumbnails.shape[1] ** 0.5
