"""Describes an image of ShapesWorld by what the detector finds in it: an embedding that needs no network."""

# B images, F numbers that describe one image

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlcm_fast.shapes.detector import Detection, detect
from rlcm_fast.shapes.grammar import COLOURS, SHAPES
from rlcm_fast.trajectory import Prompt

_COLOURS = tuple(COLOURS)
_MOST = 4  # shapes that are counted
NUM_FEATURES = len(_COLOURS) * len(SHAPES) + len(_COLOURS) + len(SHAPES) + 2


class ShapesEmbedding:
    """How clearly an image shows each coloured shape, each colour and each shape; how many shapes, how large."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Returns (B, 36) float32 in [0, 1] for images (B, 3, H, W) in [0, 1]; ignores the prompts."""
        side = min(images.shape[-2:])
        return torch.stack([_described(found, side) for found in detect(images)])


def _described(detections: Sequence[Detection], side: int) -> Tensor:
    """Returns the numbers (F,) of an image of `side` pixels."""
    pairs = torch.zeros(len(_COLOURS), len(SHAPES))
    for found in detections:
        colour = _COLOURS.index(found.colour)
        pairs[colour] = torch.maximum(pairs[colour], torch.tensor(found.likeness))
    count = min(len(detections), _MOST) / _MOST
    largest = max((found.size for found in detections), default=0.0) / side
    whole = torch.tensor([count, min(1.0, largest)])
    return torch.cat([pairs.flatten(), pairs.amax(dim=1), pairs.amax(dim=0), whole])
