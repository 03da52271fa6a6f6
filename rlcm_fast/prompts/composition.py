"""Prompts of two objects and a relation, for the composition task of arXiv 2401.12244.

    training     "a dog next to a bicycle": every ordered pair of training classes in every relation
    held_out     the same for classes that training never names

Departure: the paper uses 532 classes, 450 of them for training. Here they are the 80 classes of COCO, 68 of them for
training.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from rlcm_fast.permission import plug_in

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
"""Classes from all over the list, because neighbours in the list are alike."""


@plug_in
def training() -> list[str]:
    """The 22,780 training prompts."""
    return _prompts([name for name in CLASSES if name not in HELD_OUT])


@plug_in
def held_out() -> list[str]:
    """The 660 held-out prompts."""
    return _prompts(HELD_OUT)


def _prompts(classes: Sequence[str]) -> list[str]:
    return [
        f"{_with_article(first)} {relation} {_with_article(second)}"
        for first, second in permutations(classes, 2)
        for relation in RELATIONS
    ]


def _with_article(name: str) -> str:
    return "some broccoli" if name == "broccoli" else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
