"""The classifier "skin_tone" of four tones for distribution_parity: the fairness task of arXiv 2401.12244.

The paper's classifier is not public. There are two ways:

 1. `model`: a ViTForImageClassification of yours; the votes are its probabilities, for as many tones as it has labels.
    Its pixels are squashed to its size; size, mean and std come from its preprocessor_config.json, or are ViT's.
 2. Without a model: the individual typology angle of the face,

        ITA = atan2(L - 50, b)    in degrees; L, b: the medians in CIELAB (D65) over the middle half of the face's box

    with soft votes: P(lighter than a bound) = sigmoid((ITA - bound) / 5 degrees), and a tone's vote is the difference
    of those at its two bounds. The bounds are 41, 28 and 10 degrees. The customary six tones have 55, 41, 28, 10 and
    -30; here the two lightest are one, and so are the two darkest. Soft votes matter: scikit-image's astronaut has 55
    degrees, right on a customary bound. A picture without a face has no vote.

ITA follows light and tint, so a model can learn to darken pictures instead: look at them, and prefer a classifier.

Source and licence: the angle is that of Chardonnet, Laurion and Bernerd; nothing to download but for faces: owlv2
(owlv2.py). Memory: none, or that of your model: 86 M weights, 0.34 GB for a ViT-B.
Test values: sRGB (255, 224, 196) has 66.7 degrees, (241, 194, 125) has 37.3, (141, 85, 36) has -12.6; the face of
scikit-image's astronaut has 55.7.
"""

# B images of H x W pixels, A tones

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rlcm_fast.rewards.extras import require
from rlcm_fast.rewards.faces import FINDERS, Box, CascadeFaces, FindsFaces, Owlv2Faces
from rlcm_fast.rewards.facts import SHARDS, Facts, Part, Weights
from rlcm_fast.rewards.models import ModelFiles, OnModels, Placement, found
from rlcm_fast.rewards.owlv2 import OWLV2, detector
from rlcm_fast.rewards.towers import load
from rlcm_fast.trajectory import Prompt

BOUNDS = (41.0, 28.0, 10.0)  # degrees, from light to dark
_SOFTNESS = 5.0  # degrees
_MODEL = Weights(
    "",
    ("config.json", SHARDS, "preprocessor_config.json?"),
    0.34,
    "yours",
    (Part("image", 85.8, 35.1),),
    where="your own training",
)
_TO_XYZ = (  # of linear sRGB, each row over its white point (D65)
    (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
)


class SkinTone(OnModels):
    """Classifies an image by the skin tone of its face, from light to dark."""

    FACTS: ClassVar[Facts] = Facts(
        formula="four tones, by a classifier of yours or by the typology angle of the face",
        likes="with the angle, other light and tint instead of other people",
        weights=(_MODEL, OWLV2),
        extra="faces",
    )

    def __init__(
        self,
        model: str = "",
        faces: str = "cascade",
        dtype: str = "fp32",
        device: str = "same",
        batch_size: int = 16,
    ) -> None:
        """Load the classifier `model`, the folder of a ViT; without one, find faces by `faces`: cascade or owlv2."""
        if faces not in FINDERS:
            raise ValueError(f"faces={faces} is unknown; give {' or '.join(FINDERS)}")
        place = Placement.of(dtype, device, batch_size)
        self._files = found(self.files({"model": model, "faces": faces}))
        self._tones: ViTTones | FaceTones
        if model:
            self._tones = ViTTones(self._files[0], place)
        else:
            finder = Owlv2Faces(detector(self._files[0], place)) if faces == "owlv2" else CascadeFaces()
            self._tones = FaceTones(finder)
        self.num_classes = self._tones.num_classes

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """The files of the classifier, or of the detector of faces; see OnModels."""
        if arguments["model"]:
            return [ModelFiles("model", arguments["model"], _MODEL)]
        if arguments["faces"] == "owlv2":
            return [ModelFiles("faces", OWLV2.source, OWLV2)]
        require("skimage.feature", "faces")
        return []

    @property
    def used(self) -> dict[str, Any]:
        """What it computes on: files, or the package that finds faces; see OnModels."""
        return super().used or {"package": f"scikit-image {version('scikit-image')}"}

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The votes (B, A) float32 of images (B, 3, H, W) float32 in [0, 1]; zeros for no face. Ignores the prompts."""
        return self._tones(images)


class ViTTones:
    """The probabilities of a classifier."""

    def __init__(self, files: ModelFiles, place: Placement) -> None:
        from transformers import ViTConfig, ViTForImageClassification

        folder = files.folder()
        config: Any = ViTConfig.from_pretrained(folder, local_files_only=True)
        self.num_classes = len(config.id2label)
        self._network: Any = load(ViTForImageClassification, folder, place, config)
        self._size, self._mean, self._std = _preprocessing(folder, config.image_size)
        self._place = place

    def __call__(self, images: Tensor) -> Tensor:
        """The votes (B, A) float32 of images (B, 3, H, W)."""
        votes = []
        for chunk in images.split(self._place.batch_size):
            pixels = self._pixels(chunk.to(self._place.device)).to(self._place.dtype)
            votes.append(self._network(pixel_values=pixels).logits.float().softmax(dim=-1))
        return torch.cat(votes)

    def _pixels(self, images: Tensor) -> Tensor:
        size = (self._size, self._size)
        resized = interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (resized.new_tensor(values)[:, None, None] for values in (self._mean, self._std))
        return (resized - mean) / std


class FaceTones:
    """Soft votes by the typology angle of a face."""

    num_classes = len(BOUNDS) + 1

    def __init__(self, faces: FindsFaces) -> None:
        self._faces = faces

    def __call__(self, images: Tensor) -> Tensor:
        """The votes (B, 4) float32 of images (B, 3, H, W); zeros where there is no face."""
        votes = torch.zeros(len(images), self.num_classes)
        for row, box in enumerate(self._faces(images)):
            skin = None if box is None else middle(images[row], box)
            if skin is not None:
                votes[row] = votes_of(typology_angle(skin))
        return votes


def middle(image: Tensor, box: Box) -> Tensor | None:
    """The middle half (3, h, w) of a box of an image (3, H, W); None if nothing of it lies in the image."""
    left, top, right, bottom = box
    rows = slice(max(0, round(top + (bottom - top) / 4)), max(0, round(bottom - (bottom - top) / 4)))
    columns = slice(max(0, round(left + (right - left) / 4)), max(0, round(right - (right - left) / 4)))
    skin = image[:, rows, columns]
    return skin if skin.numel() else None


def typology_angle(skin: Tensor) -> float:
    """The ITA of pixels (3, h, w) sRGB in [0, 1], in degrees: 90 is white, -90 black."""
    lab = to_lab(skin).flatten(1)  # (3, N)
    lightness, _, yellowness = lab.median(dim=1).values.tolist()
    return math.degrees(math.atan2(lightness - 50, max(yellowness, 1e-6)))  # skin is never bluish


def to_lab(pixels: Tensor) -> Tensor:
    """CIELAB (3, h, w) under D65 of sRGB pixels (3, h, w) in [0, 1]; L is 0 to 100."""
    pixels = pixels.double()
    linear = torch.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    relative = torch.einsum("xc,chw->xhw", linear.new_tensor(_TO_XYZ), linear)
    root = torch.where(
        relative > (6 / 29) ** 3, relative.clamp(min=0) ** (1 / 3), relative * (29 / 6) ** 2 / 3 + 4 / 29
    )
    x, y, z = root
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def votes_of(angle: float) -> Tensor:
    """The soft votes (4,) float32, from light to dark, of an ITA in degrees; they sum to 1."""
    lighter = [1 / (1 + math.exp(-(angle - bound) / _SOFTNESS)) for bound in BOUNDS]  # than each bound
    return torch.tensor([upper - lower for upper, lower in zip([*lighter, 1.0], [0.0, *lighter], strict=True)])


def _preprocessing(folder: Path, image_size: int) -> tuple[int, list[float], list[float]]:
    """Size in pixels, mean and std of a ViT's pixels."""
    file = (folder if folder.is_dir() else folder.parent) / "preprocessor_config.json"
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    half = [0.5, 0.5, 0.5]  # ViT's
    return image_size, settings.get("image_mean", half), settings.get("image_std", half)
