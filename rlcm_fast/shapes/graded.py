"""The reward "shapes_alignment_graded": the detector's score with slopes in the place of steps, to learn from.

`detector.score` is exact, so it does not show how far off an image is. A star too rough to be recognised earns what a
blank image earns, and most images of one caption earn the same. Here

    part of an object    clip((likeness - 0.6) / 0.2, 0, 1) * clip((margin + 0.1) / 0.15, 0, 1), times 0.5 in a wrong
                         colour; `likeness` is the detection's intersection over union with the best template of the
                         shape in the caption, and `margin` is its lead over the likeness of all other shapes (without
                         the margin, a star that has grown round would earn as much, and count as a circle)
    part of a relation   the smaller part of its two objects, times clip(0.5 + (along - abs(across)) / 40, 0, 1), where
                         along and across are the displacement of their centres along the relation's axis and across
                         it, in pixels
    score                weighted mean of the parts, with weight `relation_weight` for relations and 1 for objects,
                         times num_objects / max(num_objects, num_detections) as in `detector`

under the best assignment of detections to objects. An image that shows its caption scores 1 or slightly less. You
cannot compare the numbers of the two scores, so measure with `shapes_alignment`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from rlcm_fast.shapes.detector import AXES, Detection, detect
from rlcm_fast.shapes.grammar import SHAPES, Caption, Object, parse
from rlcm_fast.trajectory import Prompt

_NO_LIKENESS, _FULL_LIKENESS = 0.6, 0.8  # on either side of detector.MIN_CONFIDENCE
_NO_MARGIN, _FULL_MARGIN = -0.1, 0.05  # scenes reach 0.11 or more
_RELATION_WIDTH = 40  # pixels of displacement between no part and a full part


class ShapesAlignmentGraded:
    """How nearly an image shows its caption, in [0, 1]; smoother than `ShapesAlignment`."""

    scope = "image"

    def __init__(self, relation_weight: float = 1.0) -> None:
        """Set the weight of the part of a relation, relative to 1 for an object; 0 leaves relations out."""
        if not 0 <= relation_weight < float("inf"):
            raise ValueError(f"relation_weight={relation_weight} must be 0 or more and finite")
        self._relation_weight = relation_weight

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 of images (B, 3, H, W) float32 in [0, 1].

        Raises:
            ValueError: a prompt does not follow the grammar of ShapesWorld, or an image is not finite.
        """
        captions = [parse(prompt.text) for prompt in prompts]
        weight = self._relation_weight
        scores = [graded_score(found, caption, weight) for found, caption in zip(detect(images), captions, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)


def graded_score(detections: Sequence[Detection], caption: Caption, relation_weight: float = 1.0) -> float:
    """How nearly the detections show `caption`, in [0, 1]."""
    num_objects = len(caption.objects)
    weights = num_objects + relation_weight * (caption.relation in AXES)
    candidates = [*detections, *[None] * num_objects]
    best = max(_parts_sum(chosen, caption, relation_weight) for chosen in permutations(candidates, num_objects))
    return best / weights * num_objects / max(num_objects, len(detections))


def _parts_sum(chosen: Sequence[Detection | None], caption: Caption, relation_weight: float) -> float:
    parts = [_object_part(found, item) for found, item in zip(chosen, caption.objects, strict=True)]
    if caption.relation in AXES:
        share = _relation_share(chosen[0], chosen[1], caption.relation)
        parts.append(relation_weight * min(parts) * share)
    return sum(parts)


def _object_part(found: Detection | None, item: Object) -> float:
    if found is None:
        return 0.0
    wanted = SHAPES.index(item.shape)
    likeness = found.likeness[wanted]
    margin = likeness - max(found.likeness[:wanted] + found.likeness[wanted + 1 :])
    part = _clip((likeness - _NO_LIKENESS) / (_FULL_LIKENESS - _NO_LIKENESS))
    part *= _clip((margin - _NO_MARGIN) / (_FULL_MARGIN - _NO_MARGIN))
    return part if item.colour in (None, found.colour) else 0.5 * part


def _relation_share(first: Detection | None, second: Detection | None, relation: str) -> float:
    if first is None or second is None:
        return 0.0
    axis, sign = AXES[relation]
    displacement = (first.x - second.x, first.y - second.y)
    return _clip(0.5 + (sign * displacement[axis] - abs(displacement[1 - axis])) / _RELATION_WIDTH)


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))
