"""The prompt sources of ShapesWorld: the texts of all captions of a kind, for training and held out.

| source    | training | held out |
|-----------|---------:|---------:|
| one       |       20 |        4 |
| neutral   |        4 |        - |
| two       |     1700 |     1060 |
| all       |     1724 |     1064 |
"""

from __future__ import annotations

from collections.abc import Iterable

from rlcm_fast.shapes.grammar import Caption, neutral_captions, one_shape_captions, two_shape_captions


def one_shape() -> list[str]:
    """The one-shape captions of training, such as "a red circle"."""
    return _texts(one_shape_captions(held_out=False))


def one_shape_held_out() -> list[str]:
    """The one-shape captions of the colour-shape pairs that training never shows."""
    return _texts(one_shape_captions(held_out=True))


def neutral() -> list[str]:
    """The four captions without a colour."""
    return _texts(neutral_captions())


def neutral_held_out() -> list[str]:
    """Raise ValueError: there are no such captions."""
    raise ValueError(
        "source=shapes:neutral:held_out is empty: a caption without a colour names no combination that "
        "could be held out; use shapes:neutral"
    )


def two_shapes() -> list[str]:
    """The two-shape captions of training, such as "a red circle left of a blue star"."""
    return _texts(two_shape_captions(held_out=False))


def two_shapes_held_out() -> list[str]:
    """The two-shape captions with a held-out colour-shape pair, a held-out arrangement, or both."""
    return _texts(two_shape_captions(held_out=True))


def all_captions() -> list[str]:
    """The one-shape, neutral and two-shape captions of training; nearly all are two-shape captions."""
    return one_shape() + neutral() + two_shapes()


def all_captions_held_out() -> list[str]:
    """The held-out one-shape and two-shape captions."""
    return one_shape_held_out() + two_shapes_held_out()


def _texts(captions: Iterable[Caption]) -> list[str]:
    return [str(caption) for caption in captions]
