"""The reward "shapes_alignment": the exact score of the detector for an image and its caption."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlcm_fast.shapes.detector import score_images
from rlcm_fast.shapes.grammar import parse
from rlcm_fast.trajectory import Prompt


class ShapesAlignment:
    """How much of its caption an image shows, in [0, 1]; `detector` defines the score."""

    scope = "image"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 of images (B, 3, H, W) float32 in [0, 1].

        Raises:
            ValueError: a prompt does not follow the grammar of ShapesWorld, or an image is not finite.
        """
        return score_images(images, [parse(prompt.text) for prompt in prompts])
