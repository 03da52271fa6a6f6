"""Two objects and a relation: the prompts of the composition task of arXiv 2401.12244.

    training     "a dog next to a bicycle": every ordered pair of the classes for training, in every relation
    held_out     the same of classes that training never names

Departure: the paper has 532 classes, 450 of them for training; here they are the 80 of COCO, 68 of them for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

RELATIONS = ("and", "next to", "near", "on side of", "beside")
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("pair of skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "television", "laptop", "computer mouse", "remote control"),
    *("keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase"),
    *("pair of scissors", "teddy bear", "hair dryer", "toothbrush"),
)
HELD_OUT = CLASSES[3::7] + CLASSES[-1:]
"""From all over the list, whose neighbours are alike."""


def training() -> list[str]:
    """22,780 prompts."""
    return _prompts([name for name in CLASSES if name not in HELD_OUT])


def held_out() -> list[str]:
    """660 prompts."""
    return _prompts(HELD_OUT)


def _prompts(classes: Sequence[str]) -> list[str]:
    return [
        f"{_with_article(one)} {relation} {_with_article(other)}"
        for one, other in permutations(classes, 2)
        for relation in RELATIONS
    ]


def _with_article(name: str) -> str:
    return "some broccoli" if name == "broccoli" else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
