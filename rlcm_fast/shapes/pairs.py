"""Real images of ShapesWorld with their captions, for the pretraining loss: a number is a render of a training scene.

The same number gives the same pair. Colours that a caption leaves open are drawn with the bias of the training images.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from rlcm_fast.shapes.grammar import Caption, neutral_captions, one_shape_captions, two_shape_captions
from rlcm_fast.shapes.renderer import render
from rlcm_fast.shapes.scenes import scene_of, training_scenes


def one_shape(number: int) -> tuple[Image.Image, str]:
    """ "a red circle", ..., each training caption as often as another."""
    return _of(one_shape_captions, number)


def two_shapes(number: int) -> tuple[Image.Image, str]:
    """ "a red circle left of a blue star", ..."""
    return _of(two_shape_captions, number)


def neutral(number: int) -> tuple[Image.Image, str]:
    """The captions without a colour."""
    return _of(lambda held_out: neutral_captions(), number)


def all_scenes(number: int) -> tuple[Image.Image, str]:
    """The mixture that the shipped models were trained on: about 35 % one shape, 20 % neutral, 45 % two shapes."""
    scene = next(training_scenes(np.random.default_rng(number)))
    return render(scene), str(scene.caption)


def _of(captions_of: Callable[[bool], list[Caption]], number: int) -> tuple[Image.Image, str]:
    rng = np.random.default_rng(number)
    captions = captions_of(False)
    scene = scene_of(captions[rng.integers(len(captions))], rng)
    return render(scene), str(scene.caption)
