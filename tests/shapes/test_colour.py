from __future__ import annotations

import numpy as np
import torch

from rlcm_fast.shapes.colour import ColourClassifier
from rlcm_fast.shapes.grammar import COLOURS, Caption, Object
from rlcm_fast.shapes.renderer import render
from rlcm_fast.shapes.scenes import Background, PlacedObject, Scene, scene_of
from rlcm_fast.trajectory import Prompt

GREY = Background((90, 90, 90), (160, 160, 160), 0)


def votes(*scenes: Scene) -> torch.Tensor:
    images = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes])).permute(0, 3, 1, 2) / 255
    return ColourClassifier()(images, [Prompt(str(scene.caption)) for scene in scenes])


def test_every_colour_is_voted_for_by_its_own_images():
    rng = np.random.default_rng(0)
    captions = [Caption((Object(shape, colour),)) for shape in ("circle", "star") for colour in COLOURS]
    found = votes(*(scene_of(caption, rng) for caption in captions))
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.eye(len(COLOURS)).repeat(2, 1))


def test_of_two_shapes_the_larger_has_the_vote():
    large, small = PlacedObject("square", "cyan", 20, 20, 15, 0), PlacedObject("circle", "red", 50, 50, 8, 0)
    caption = Caption((Object("circle"),))
    found = votes(Scene(caption, (large, small), GREY), Scene(caption, (small, large), GREY))
    assert found.argmax(dim=1).tolist() == [list(COLOURS).index("cyan")] * 2


def test_what_is_no_shape_has_no_vote():
    stroke = PlacedObject("square", "red", 10, 10, 30, 45)  # cut off by the corner
    beside = PlacedObject("circle", "blue", 50, 50, 8, 0)
    caption = Caption((Object("circle"),))
    blank, beside_a_stroke = votes(Scene(caption, (), GREY), Scene(caption, (stroke, beside), GREY))
    assert blank.tolist() == [0] * len(COLOURS)
    assert beside_a_stroke.argmax().item() == list(COLOURS).index("blue")
