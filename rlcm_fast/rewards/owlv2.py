"""OWLv2, an open-vocabulary detector (arXiv 2306.09683): boxes of an image, each with a logit for each text query.

    pixels   zeros below or to the right until the image is a square, bilinear to 960 pixels, CLIP's mean and std
    logits   (B, P, Q) for P = 3600 patches, each with a box, and Q queries of at most 16 tokens

Texts are encoded once in the life of the detector (towers.py). Enlarging a photograph from 512 to 960 pixels agrees
with the original to 3e-5 of the range, but for the outermost pixels, where the original mirrors. Shrinking is bilinear
with antialias here, with a Gaussian before it in the original: from 1024 pixels they differ by at most 0.025, by 0.0005
on average (tests/rewards/test_object_detection.py).
"""

# B images, P patches, Q queries, E numbers of an embedding

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from rlcm_fast.rewards.facts import CLIP_WORDS, SHARDS, Part, Weights
from rlcm_fast.rewards.models import ModelFiles, Placement
from rlcm_fast.rewards.pixels import CLIP_MEAN, CLIP_STD
from rlcm_fast.rewards.towers import TextTower, Tokens, load, shared

OWLV2 = Weights(
    "google/owlv2-base-patch16-ensemble",
    ("config.json", SHARDS, *CLIP_WORDS),
    0.62,
    "Apache-2.0",
    (Part("image", 91.8, 1105.3), Part("text", 63.1, 1.2)),
)


@dataclass(frozen=True)
class Detections:
    """What the detector finds in one image."""

    scores: Tensor  # (P, Q) float32 in [0, 1], the sigmoid of the logit
    boxes: Tensor  # (P, 4) float32, left, top, right, bottom in pixels of the image


class Detector:
    """An OWLv2 model that several rewards may share."""

    def __init__(self, network: Any, texts: TextTower, size: int, place: Placement) -> None:
        """`network` is an Owlv2ForObjectDetection, which sees squares of `size` pixels."""
        self._network = network
        self._texts = texts
        self._size = size
        self._place = place
        self.batch_size = place.batch_size

    @torch.no_grad()
    def __call__(self, images: Tensor, queries: Sequence[Sequence[str]]) -> list[Detections]:
        """The detections of images (B, 3, H, W) in [0, 1], each with its own queries, at least one."""
        found = []
        for first in range(0, len(images), self.batch_size):
            rows = slice(first, first + self.batch_size)
            found += self._detect(images[rows], queries[rows])
        return found

    def _detect(self, images: Tensor, queries: Sequence[Sequence[str]]) -> list[Detections]:
        """The detections of one pass."""
        # Read the images.
        network, place = self._network, self._place
        pixels = prepare(images.to(place.device), self._size)
        feature_map, _ = network.image_embedder(pixel_values=pixels.to(place.dtype))  # (B, h, w, E)
        features = feature_map.flatten(1, 2)  # (B, P, E)

        # Compare them with the queries; those that an image lacks are masked.
        most = max(len(texts) for texts in queries)
        embeds = torch.stack([self._texts.embed([*texts, *[texts[0]] * (most - len(texts))]) for texts in queries])
        is_there = torch.tensor([[row < len(texts) for row in range(most)] for texts in queries], device=place.device)
        logits, _ = network.class_predictor(features, embeds.to(place.dtype), is_there)  # (B, P, Q)
        boxes = network.box_predictor(features, feature_map).float()  # (B, P, 4), centre and size over the square's

        # Turn logits into scores and boxes into pixels.
        scores, side = logits.float().sigmoid(), max(images.shape[-2:])
        centres, halves = boxes[..., :2] * side, boxes[..., 2:] * side / 2
        corners = torch.cat([centres - halves, centres + halves], dim=-1)
        return [Detections(scores[row, :, : len(texts)], corners[row]) for row, texts in enumerate(queries)]


def detector(files: ModelFiles, place: Placement) -> Detector:
    """The detector of a folder, shared by all who ask for it at this place; the smallest batch size counts."""
    folder = files.folder()

    def make() -> Detector:
        from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection

        config: Any = Owlv2Config.from_pretrained(folder, local_files_only=True)
        network = load(Owlv2ForObjectDetection, folder, place, config)
        most = config.text_config.max_position_embeddings
        tokens = Tokens(CLIPTokenizer.from_pretrained(folder, local_files_only=True), most, files.source)
        texts = TextTower(network, _embed_text, tokens, place)
        return Detector(network, texts, config.vision_config.image_size, place)

    made = shared("OWLv2", folder, place, make)
    made.batch_size = min(made.batch_size, place.batch_size)
    return made


def prepare(images: Tensor, size: int) -> Tensor:
    """The pixels (B, 3, size, size) float32, normalised, of images (B, 3, H, W) in [0, 1]."""
    height, width = images.shape[-2:]
    side = max(height, width)
    square = pad(images.float(), (0, side - width, 0, side - height))
    if side != size:
        square = interpolate(square, (size, size), mode="bilinear", align_corners=False, antialias=side > size)
    mean, std = (square.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (square - mean) / std


def _embed_text(network: Any, ids: Tensor) -> Tensor:
    """The embedding (1, E) of tokens (1, L)."""
    return network.owlv2.get_text_features(input_ids=ids).pooler_output
