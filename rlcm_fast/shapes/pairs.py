"""Renders real images of ShapesWorld with captions, for the loss on real images: a training scene for each number.

The same number always gives the same pair. Open colours are drawn with the bias of the training images.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from rlcm_fast.permission import plug_in
from rlcm_fast.shapes.grammar import Caption, neutral_captions, one_shape_captions, two_shape_captions
from rlcm_fast.shapes.renderer import render
from rlcm_fast.shapes.scenes import scene_of, training_scenes


@plug_in
def one_shape(number: int) -> tuple[Image.Image, str]:
    """The pair of a one-shape caption, such as "a red circle"; all training captions are equally frequent."""
    return _pair(one_shape_captions, number)


@plug_in
def two_shapes(number: int) -> tuple[Image.Image, str]:
    """The pair of a two-shape caption, such as "a red circle left of a blue star"."""
    return _pair(two_shape_captions, number)


@plug_in
def neutral(number: int) -> tuple[Image.Image, str]:
    """The pair of a caption without a colour."""
    return _pair(lambda held_out: neutral_captions(), number)


@plug_in
def all_scenes(number: int) -> tuple[Image.Image, str]:
    """A pair from the mixture that trained the shipped models: about 35 % one shape, 20 % neutral, 45 % two shapes."""
    scene = next(training_scenes(np.random.default_rng(number)))
    return render(scene), str(scene.caption)


def _pair(captions_of_split: Callable[[bool], list[Caption]], number: int) -> tuple[Image.Image, str]:
    rng = np.random.default_rng(number)
    captions = captions_of_split(False)
    scene = scene_of(captions[rng.integers(len(captions))], rng)
    return render(scene), str(scene.caption)
