"""The reward "shapes_alignment": the detector's exact score of an image against its caption."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlcm_fast.shapes.detector import score_images
from rlcm_fast.shapes.grammar import parse
from rlcm_fast.trajectory import Prompt


class ShapesAlignment:
    """How much of its caption an image shows: the detector's score, in [0, 1] (see `detector`)."""

    scope = "image"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B,) float32 of images (B, 3, H, W) float32 in [0, 1].

        Raises:
            ValueError: a prompt is not in the grammar of ShapesWorld, or an image is not finite.
        """
        return score_images(images, [parse(prompt.text) for prompt in prompts])
