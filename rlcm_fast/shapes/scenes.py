"""Makes random scenes of ShapesWorld with a `numpy.random.Generator`.

A scene is data: a background, objects with positions, radii and angles, and the caption that names some of it.
`renderer.render` draws the scene. Training scenes avoid every held-out combination. They are biased as web data are: a
neutral caption ("a circle") shows the `BIASED_COLOUR` of its shape in `BIAS` of the cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rlcm_fast.shapes.grammar import (
    COLOURS,
    HELD_OUT_PAIRS,
    RELATIONS,
    SHAPES,
    Caption,
    Object,
    arrangement_is_held_out,
)

IMAGE_SIZE = 64
BIAS = 0.7
BIASED_COLOUR = {"circle": "red", "square": "blue", "triangle": "green", "star": "yellow"}
_KINDS, _KIND_PROBABILITIES = ("one", "neutral", "two"), (0.3, 0.15, 0.55)
_POSITIONAL = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class PlacedObject:
    """A shape on the canvas; lengths are in pixels, the angle in degrees; `radius` is of the circumscribed circle."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Background:
    """A linear gradient between two near-grey colours, sRGB in [0, 255]; equal colours make a plain background."""

    start: tuple[float, float, float]
    end: tuple[float, float, float]
    angle: float  # degrees; 0 runs left to right


@dataclass(frozen=True)
class Scene:
    """The contents of an image and the caption that names them."""

    caption: Caption
    objects: tuple[PlacedObject, ...]
    background: Background


def training_scenes(rng: np.random.Generator) -> Iterator[Scene]:
    """An endless stream of training scenes: about 35 % one shape, 20 % neutral, 45 % two shapes."""
    while True:
        yield scene_of(_training_caption(rng), rng)


def scene_of(caption: Caption, rng: np.random.Generator) -> Scene:
    """A random scene that shows exactly what `caption` says; open colours are drawn with the bias."""
    colours = [item.colour or _biased_colour(item.shape, rng) for item in caption.objects]
    if len(caption.objects) == 1:
        radius = rng.uniform(10, 20)
        x, y = rng.uniform(radius + 2, IMAGE_SIZE - radius - 2, size=2)
        places = [(x, y, radius)]
    else:
        places = _two_places(_shown_relation(caption, rng), rng)
    objects = tuple(
        PlacedObject(item.shape, colour, x, y, radius, rng.uniform(-10, 10))
        for item, colour, (x, y, radius) in zip(caption.objects, colours, places, strict=True)
    )
    return Scene(caption, objects, _background(rng))


def _training_caption(rng: np.random.Generator) -> Caption:
    while True:
        kind = rng.choice(_KINDS, p=_KIND_PROBABILITIES)
        shapes = [str(shape) for shape in rng.choice(SHAPES, size=2)]
        colours = [str(colour) for colour in rng.choice(list(COLOURS), size=2)]
        if kind == "neutral":
            return Caption((Object(shapes[0]),))
        objects = tuple(Object(shape, colour) for shape, colour in zip(shapes, colours, strict=True))
        if kind == "one":
            caption = Caption(objects[:1])
        else:
            caption = Caption(objects, str(rng.choice(RELATIONS)))
        if not caption.is_held_out and len(set(caption.objects)) == len(caption.objects):
            return caption


def _biased_colour(shape: str, rng: np.random.Generator) -> str:
    if rng.random() < BIAS:
        return BIASED_COLOUR[shape]
    rare = [c for c in COLOURS if c != BIASED_COLOUR[shape] and (c, shape) not in HELD_OUT_PAIRS]
    return str(rng.choice(rare))


def _shown_relation(caption: Caption, rng: np.random.Generator) -> str:
    """The arrangement to draw: that of the caption, or for "and" any that training may show."""
    if caption.relation != "and":
        return str(caption.relation)
    first, second = (item.shape for item in caption.objects)
    return str(rng.choice([r for r in _POSITIONAL if not arrangement_is_held_out(first, r, second)]))


def _two_places(relation: str, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """The centres and radii of two shapes that do not touch; the first is in `relation` to the second."""
    # Place them along the main axis, the first before the second.
    radii = rng.uniform(8, 13, size=2)
    gap = rng.uniform(3, 8)
    span = float(radii.sum() * 2 + gap)
    start = rng.uniform(1, max(1.5, IMAGE_SIZE - 1 - span))
    along = (start + radii[0], start + 2 * radii[0] + gap + radii[1])

    # Shift them across it.
    middle = rng.uniform(16, IMAGE_SIZE - 16)
    across = np.clip(middle + rng.uniform(-5, 5, size=2), radii + 1, IMAGE_SIZE - radii - 1)

    # Mirror and turn the axis, as the relation says.
    if relation in ("right of", "below"):
        along = (IMAGE_SIZE - along[0], IMAGE_SIZE - along[1])
    points = list(zip(along, across, strict=True))
    if relation in ("above", "below"):
        points = [(y, x) for x, y in points]
    return [(float(x), float(y), float(r)) for (x, y), r in zip(points, radii, strict=True)]


def _background(rng: np.random.Generator) -> Background:
    """A light or dark background, plain in 40 % of the scenes, with a tint too faint to pass for a colour."""
    start, end = _near_grey(rng), _near_grey(rng)
    return Background(start, start if rng.random() < 0.4 else end, float(rng.uniform(0, 360)))


def _near_grey(rng: np.random.Generator) -> tuple[float, float, float]:
    level = rng.uniform(25, 245)
    red, green, blue = np.clip(level + rng.uniform(-9, 9, size=3), 0, 255)
    return float(red), float(green), float(blue)
