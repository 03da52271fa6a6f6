"""Finds the face of a picture, for the classifier skin_tone.

cascade   scikit-image's frontal-face cascade on local binary patterns (extra faces): 0.1 s a picture of 512 pixels on
          one core, weights inside the package; it finds the face of scikit-image's astronaut, but also one in its cat
owlv2     the box of OWLv2 with the highest score for "a photo of a human face", if that exceeds 0.1; a model
"""

# B images of H x W pixels

from __future__ import annotations

import threading
from typing import Any, Protocol

from torch import Tensor

from rlcm_fast.rewards.extras import require
from rlcm_fast.rewards.jpeg import to_uint8
from rlcm_fast.rewards.owlv2 import Detector

FINDERS = ("cascade", "owlv2")
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

_SMALLEST = 1 / 10  # of the shortest side: the least size of a face for the cascade
_QUERY, _THRESHOLD = "a photo of a human face", 0.1


class FindsFaces(Protocol):
    """Finds at most one face in each image."""

    def __call__(self, images: Tensor) -> list[Box | None]:
        """The box of the face in each of images (B, 3, H, W) in [0, 1], or None."""
        ...


class CascadeFaces:
    """The largest face that the cascade finds."""

    def __init__(self) -> None:
        feature = require("skimage.feature", "faces")
        data = require("skimage.data", "faces")
        self._cascade = feature.Cascade(data.lbp_frontal_face_cascade_filename())
        self._lock = threading.Lock()  # nothing says that a cascade may be used by several threads

    def __call__(self, images: Tensor) -> list[Box | None]:
        """See FindsFaces."""
        return [self._largest(pixels) for pixels in to_uint8(images).numpy()]

    def _largest(self, pixels: Any) -> Box | None:
        """The largest face of pixels (H, W, 3) uint8."""
        shortest = min(pixels.shape[:2])
        least = max(24, round(_SMALLEST * shortest))  # the cascade looks at windows of 24 pixels
        if shortest < least:
            return None
        with self._lock:
            found = self._cascade.detect_multi_scale(
                img=pixels, scale_factor=1.2, step_ratio=1, min_size=(least, least), max_size=(shortest, shortest)
            )
        if not found:
            return None
        face = max(found, key=lambda box: box["width"] * box["height"])
        left, top = float(face["c"]), float(face["r"])
        return left, top, left + face["width"], top + face["height"]


class Owlv2Faces:
    """The face of which OWLv2 is surest."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector

    def __call__(self, images: Tensor) -> list[Box | None]:
        """See FindsFaces."""
        boxes: list[Box | None] = []
        for found in self._detector(images, [[_QUERY]] * len(images)):
            best = int(found.scores[:, 0].argmax())
            left, top, right, bottom = found.boxes[best].tolist()
            boxes.append((left, top, right, bottom) if found.scores[best, 0] > _THRESHOLD else None)
        return boxes
