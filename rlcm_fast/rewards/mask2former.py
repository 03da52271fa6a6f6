"""Mask2Former, an instance segmenter (arXiv 2112.01527): objects of an image with class, score, mask and box.

    pixels      the shortest side to 800, the longest to 1333 at most, bilinear, ImageNet's mean and std, zeros to 32 n
    candidates  the 100 largest class probabilities p_qc over queries and classes, the empty class left out
    mask        logit m_q > 0, after bilinear resizes to the padded pixels and to the image
    score       p_qc times the mean of sigmoid(m_q) over the mask
    box         left, top, right, bottom of the mask in pixels; right and bottom are one past it

This is the post-processing of mmdetection's Mask2Former, which GenEval uses. That of transformers resizes every mask to
384 pixels and gives each pixel to one object, so its scores and counts differ.
"""

# B images of H x W pixels, Q queries, C classes, N candidates

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from rlcm_fast.rewards.facts import SHARDS, Part, Weights
from rlcm_fast.rewards.models import ModelFiles, Placement
from rlcm_fast.rewards.pixels import IMAGENET_MEAN, IMAGENET_STD
from rlcm_fast.rewards.towers import load, shared

MASK2FORMER = Weights(
    "facebook/mask2former-swin-small-coco-instance",
    ("config.json", SHARDS),
    0.28,
    "stated as other on the hub; the code is MIT",
    (Part("image", 68.7, 441.8),),
)
_SHORTEST, _LONGEST, _MULTIPLE = 800, 1333, 32  # pixels
_MOST = 100  # candidates of an image


@dataclass(frozen=True)
class Instance:
    """An object that was found."""

    name: str
    score: float
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels
    mask: Tensor  # (H, W) bool


class Segmenter:
    """A Mask2Former model."""

    def __init__(self, network: Any, names: Sequence[str], place: Placement) -> None:
        """`network` is a Mask2FormerForUniversalSegmentation whose classes are called `names`."""
        self._network = network
        self._place = place
        self.names = tuple(names)
        self.batch_size = place.batch_size

    @torch.no_grad()
    def __call__(self, images: Tensor, wanted: Sequence[Collection[str]], threshold: float) -> list[list[Instance]]:
        """The instances of images (B, 3, H, W) in [0, 1] whose class is `wanted` in the image, best first.

        Only those whose score exceeds `threshold`.
        """
        found: list[list[Instance]] = []
        for first in range(0, len(images), self.batch_size):
            chunk = images[first : first + self.batch_size].to(self._place.device)
            resized = resize(chunk)
            output = self._network(pixel_values=prepare(resized).to(self._place.dtype))
            classes, masks = output.class_queries_logits.float(), output.masks_queries_logits.float()
            for row in range(len(chunk)):
                sizes = Sizes(tuple(resized.shape[-2:]), tuple(chunk.shape[-2:]))
                kept = candidates(classes[row], self._numbers(wanted[first + row]), threshold)
                found.append(self._instances(kept, masks[row], sizes, threshold))
        return found

    def _numbers(self, names: Collection[str]) -> list[int]:
        return [number for number, name in enumerate(self.names) if name in names]

    def _instances(self, kept: Candidates, masks: Tensor, sizes: Sizes, threshold: float) -> list[Instance]:
        """The instances of one image; masks (Q, h, w) are the network's logits."""
        if not len(kept.queries):
            return []
        logits = sizes.to_image(masks[kept.queries])  # (N, H, W)
        is_inside = logits > 0
        inside = is_inside.flatten(1).float()
        certainty = (logits.sigmoid().flatten(1) * inside).sum(dim=1) / (inside.sum(dim=1) + 1e-6)
        scores = kept.probabilities * certainty
        instances = []
        for row in scores.argsort(descending=True, stable=True).tolist():
            score = scores[row].item()
            if score > threshold:
                name, mask = self.names[int(kept.classes[row])], is_inside[row]
                instances.append(Instance(name, score, box_of(mask), mask))
        return instances


def segmenter(files: ModelFiles, place: Placement) -> Segmenter:
    """The segmenter of a folder, shared by all who ask for it at this place; the smallest batch size counts."""
    folder = files.folder()

    def make() -> Segmenter:
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

        config: Any = Mask2FormerConfig.from_pretrained(folder, local_files_only=True)
        names = [config.id2label[number].lower() for number in range(len(config.id2label))]
        return Segmenter(load(Mask2FormerForUniversalSegmentation, folder, place, config), names, place)

    made = shared("Mask2Former", folder, place, make)
    made.batch_size = min(made.batch_size, place.batch_size)
    return made


@dataclass(frozen=True)
class Candidates:
    """What may be an object of one image, before its mask is looked at."""

    queries: Tensor  # (N,) int64
    classes: Tensor  # (N,) int64
    probabilities: Tensor  # (N,) float32


def candidates(logits: Tensor, classes: Sequence[int], threshold: float) -> Candidates:
    """The candidates among class logits (Q, C + 1) of the wanted classes whose probability exceeds `threshold`.

    The score is at most the probability, so nothing else can exceed it.
    """
    probabilities = logits.softmax(dim=-1)[:, :-1]  # (Q, C); the last class is none
    num_classes = probabilities.shape[1]
    best, places = probabilities.flatten().topk(min(_MOST, probabilities.numel()))
    numbers = places % num_classes
    is_kept = torch.isin(numbers, torch.tensor(classes, device=numbers.device, dtype=numbers.dtype)) & (
        best > threshold
    )
    return Candidates((places // num_classes)[is_kept], numbers[is_kept], best[is_kept])


@dataclass(frozen=True)
class Sizes:
    """Height and width of an image before and after it was resized for the network, in pixels."""

    resized: tuple[int, ...]
    original: tuple[int, ...]

    def to_image(self, logits: Tensor) -> Tensor:
        """The masks (N, H, W) of an image from the network's (N, h, w), which cover its padded pixels."""
        padded = tuple(_multiple(side) for side in self.resized)
        whole = interpolate(logits[None], padded, mode="bilinear", align_corners=False)
        cut = whole[..., : self.resized[0], : self.resized[1]]
        return interpolate(cut, self.original, mode="bilinear", align_corners=False)[0]


def resize(images: Tensor) -> Tensor:
    """Resize images (B, 3, H, W): the shortest side to 800 pixels, unless the longest would exceed 1333."""
    height, width = images.shape[-2:]
    scale = min(_SHORTEST / min(height, width), _LONGEST / max(height, width))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    return interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=scale < 1)


def prepare(resized: Tensor) -> Tensor:
    """The normalised pixels of resized images (B, 3, H, W), with zeros right and below to multiples of 32."""
    height, width = resized.shape[-2:]
    mean, std = (resized.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return pad((resized - mean) / std, (0, _multiple(width) - width, 0, _multiple(height) - height))


def box_of(mask: Tensor) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a mask (H, W) bool; zeros if it is empty."""
    columns, rows = mask.any(dim=0).nonzero()[:, 0], mask.any(dim=1).nonzero()[:, 0]
    if not len(columns):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _multiple(side: int) -> int:
    return -(-side // _MULTIPLE) * _MULTIPLE
