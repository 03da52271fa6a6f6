"""The classifier "shapes_colour" for the reward distribution_parity: which of the six colours an image shows."""

# B images, A colours

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlcm_fast.shapes.detector import MIN_CONFIDENCE, Detection, detect
from rlcm_fast.shapes.grammar import COLOURS
from rlcm_fast.trajectory import Prompt


class ColourClassifier:
    """Classifies an image by the colour of the largest shape of which the detector is sure."""

    num_classes = len(COLOURS)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The votes (B, 6) float32 of images (B, 3, H, W) float32 in [0, 1], in the order of COLOURS.

        A row is 1 at the colour of the image; it is all zeros if there is no such shape. Ignores the prompts.
        """
        votes = torch.zeros(len(images), len(COLOURS))
        for row, detections in enumerate(detect(images)):
            largest = _largest(detections)
            if largest is not None:
                votes[row, list(COLOURS).index(largest.colour)] = 1.0
        return votes


def _largest(detections: Sequence[Detection]) -> Detection | None:
    return next((found for found in detections if found.confidence >= MIN_CONFIDENCE), None)  # largest first
