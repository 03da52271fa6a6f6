"""The captions of ShapesWorld: their words, their meaning and the held-out split.

    caption    = object | object relation object
    object     = "a" [colour] shape                    (a one-shape caption may leave out the colour)
    relation   = "left of" | "right of" | "above" | "below" | "and"

`parse` turns a text into a `Caption`, and `str(caption)` turns it back. Everything else in ShapesWorld (scenes, the
detector, the tokenizer's vocabulary) works with `Caption` objects.

Training holds out combinations, not words (`HELD_OUT_PAIRS`, `HELD_OUT_ARRANGEMENTS`). Each shape lacks one colour.
Four of the sixteen times two arrangements of shapes never occur, in either wording. ("A circle left of a star" is the
same arrangement as "a star right of a circle".)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, tuple[int, int, int]] = {  # sRGB, at least 44 degrees of hue apart
    "red": (220, 40, 40),
    "yellow": (235, 205, 30),
    "green": (40, 165, 60),
    "cyan": (30, 190, 205),
    "blue": (45, 75, 220),
    "purple": (165, 50, 190),
}
RELATIONS = ("left of", "right of", "above", "below", "and")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "and": "and"}

# No caption for training has these pairs, one colour per shape, ...
HELD_OUT_PAIRS = frozenset({("purple", "circle"), ("yellow", "square"), ("blue", "triangle"), ("cyan", "star")})
# ... or these arrangements (first shape, relation, second shape), in this wording or mirrored.
HELD_OUT_ARRANGEMENTS = frozenset(
    {
        ("circle", "left of", "star"),
        ("triangle", "left of", "square"),
        ("square", "above", "circle"),
        ("star", "above", "triangle"),
    }
)


@dataclass(frozen=True)
class Object:
    """One shape of a caption; `colour` is None if the caption leaves it open."""

    shape: str
    colour: str | None = None

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape}" if self.colour else f"a {self.shape}"


@dataclass(frozen=True)
class Caption:
    """One or two objects; `relation` places the first relative to the second and is None for a single object."""

    objects: tuple[Object, ...]
    relation: str | None = None

    def __str__(self) -> str:
        return f" {self.relation} ".join(str(item) for item in self.objects)

    @property
    def is_neutral(self) -> bool:
        """Whether the caption leaves a colour open; the training data are biased in these captions."""
        return any(item.colour is None for item in self.objects)

    @property
    def is_held_out(self) -> bool:
        """Whether the caption names a combination that training never shows."""
        if any((item.colour, item.shape) in HELD_OUT_PAIRS for item in self.objects):
            return True
        return self.relation is not None and arrangement_is_held_out(
            self.objects[0].shape, self.relation, self.objects[1].shape
        )


def arrangement_is_held_out(first: str, relation: str, second: str) -> bool:
    """Whether `first relation second` is a held-out arrangement of shapes, in either wording."""
    mirrored = (second, OPPOSITE[relation], first)
    return (first, relation, second) in HELD_OUT_ARRANGEMENTS or mirrored in HELD_OUT_ARRANGEMENTS


def parse(caption: str) -> Caption:
    """The meaning of a caption.

    Raises:
        ValueError: the text does not follow the grammar.
    """
    words = " ".join(caption.lower().split())
    for relation in RELATIONS:
        first, separator, second = words.partition(f" {relation} ")
        if separator:
            return Caption((_parse_object(first, caption), _parse_object(second, caption)), relation)
    return Caption((_parse_object(words, caption),))


def _parse_object(text: str, caption: str) -> Object:
    words = text.split()
    if len(words) == 2 and words[0] == "a" and words[1] in SHAPES:
        return Object(words[1])
    if len(words) == 3 and words[0] == "a" and words[1] in COLOURS and words[2] in SHAPES:
        return Object(words[2], words[1])
    raise ValueError(
        f"caption {caption!r} is not in the grammar of ShapesWorld; write 'a [{'|'.join(COLOURS)}] "
        f"{'|'.join(SHAPES)}', or two of these joined by {', '.join(map(repr, RELATIONS))}"
    )


def one_shape_captions(held_out: bool) -> list[Caption]:
    """All one-shape captions with a colour in a split: 20 for training, 4 held out."""
    captions = [Caption((Object(shape, colour),)) for shape, colour in product(SHAPES, COLOURS)]
    return [caption for caption in captions if caption.is_held_out == held_out]


def neutral_captions() -> list[Caption]:
    """The one-shape captions without a colour."""
    return [Caption((Object(shape),)) for shape in SHAPES]


def two_shape_captions(held_out: bool) -> list[Caption]:
    """All two-shape captions in a split, in every relation; the two objects differ in colour or shape."""
    objects = [Object(shape, colour) for shape, colour in product(SHAPES, COLOURS)]
    captions = [
        Caption((first, second), relation)
        for first, second, relation in product(objects, objects, RELATIONS)
        if first != second
    ]
    return [caption for caption in captions if caption.is_held_out == held_out]
