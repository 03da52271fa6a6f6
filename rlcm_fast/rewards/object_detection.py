"""The mean confidence of a detector in the objects of the prompt: the composition reward of arXiv 2401.12244, 4.3.

    r(image, prompt) = mean over the prompt's objects q of  max over the boxes j of q of  sigmoid(l_jq)

A box belongs to the object with its largest logit, and counts if its sigmoid exceeds `threshold`; an object without a
box has 0. objects.py says how objects come out of a prompt. The query of an object is "a photo of a NAME".

Source and licence: google/owlv2-base-patch16-ensemble, Apache-2.0. Memory: 155 M weights, 0.62 GB in fp32, at 960
pixels; an image costs 1.1 TFLOP.
Test value: on COCO val 000000039769 with the queries cat and dog, the two cats have 0.614 and 0.665 (transformers'
documentation), so the reward is 0.665 / 2 for "a cat and a dog".

Departure: the paper names no query; here it is the one that OWLv2's authors use.
"""

# B images, P boxes, Q objects

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlcm_fast.rewards.facts import Facts
from rlcm_fast.rewards.models import ModelFiles, OnModels, Placement, found
from rlcm_fast.rewards.objects import objects_of
from rlcm_fast.rewards.owlv2 import OWLV2, detector
from rlcm_fast.trajectory import Prompt

QUERY = "a photo of a {}"


class ObjectDetection(OnModels):
    """How sure a detector is that the prompt's objects are in the image."""

    FACTS: ClassVar[Facts] = Facts(
        formula="the mean over the prompt's objects of OWLv2's best score, 0 to 1",
        likes="each object large and in plain sight, as if pasted side by side; not counts, colours or places",
        weights=(OWLV2,),
    )
    scope = "image"

    def __init__(
        self,
        model: str = OWLV2.source,
        threshold: float = 0.1,
        dtype: str = "fp32",
        device: str = "same",
        batch_size: int = 8,
    ) -> None:
        """Load the detector `model`, a folder or hub id; a score that does not exceed `threshold` counts as 0."""
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1:
            raise ValueError(f"threshold={threshold!r} is no score below 1; give a number from 0 on, such as 0.1")
        self._files = found(self.files({"model": model}))
        self._detector = detector(self._files[0], Placement.of(dtype, device, batch_size))
        self._threshold = threshold

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """The files of the detector; see OnModels."""
        return [ModelFiles("model", arguments["model"], OWLV2)]

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 in [0, 1] of images (B, 3, H, W) float32 in [0, 1], one prompt each."""
        queries = [[QUERY.format(name) for name in objects_of(prompt)] for prompt in prompts]
        return torch.stack([self._score(found.scores) for found in self._detector(images, queries)])

    def _score(self, scores: Tensor) -> Tensor:
        """The reward () of one image from the scores (P, Q) of its boxes."""
        best, owner = scores.max(dim=1)  # (P,), (P,)
        counts = torch.where(best > self._threshold, best, 0.0)
        of_object = scores.new_zeros(scores.shape[1]).scatter_reduce(0, owner, counts, "amax")  # (Q,)
        return of_object.mean()
