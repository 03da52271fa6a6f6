"""The scenes: nothing held out is ever shown, the bias is as stated, the same seed gives the same images."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from rlcm_fast.shapes.grammar import HELD_OUT_PAIRS, arrangement_is_held_out, neutral_captions, two_shape_captions
from rlcm_fast.shapes.renderer import render
from rlcm_fast.shapes.scenes import BIAS, BIASED_COLOUR, IMAGE_SIZE, scene_of, training_scenes


@pytest.fixture(scope="module")
def scenes():
    return list(islice(training_scenes(np.random.default_rng(0)), 5000))


def main_relation(scene):
    """The relation of the centres along the axis where they are further apart."""
    first, second = scene.objects
    if abs(first.x - second.x) > abs(first.y - second.y):
        return "left of" if first.x < second.x else "right of"
    return "above" if first.y < second.y else "below"


def test_no_training_scene_shows_a_held_out_pair(scenes):
    assert not any((item.colour, item.shape) in HELD_OUT_PAIRS for scene in scenes for item in scene.objects)


def test_no_training_scene_shows_a_held_out_arrangement(scenes):
    pairs = [scene for scene in scenes if len(scene.objects) == 2]
    assert len(pairs) > 2000
    for scene in pairs:
        first, second = scene.objects
        assert not arrangement_is_held_out(first.shape, main_relation(scene), second.shape), str(scene.caption)


def test_no_training_caption_is_held_out(scenes):
    assert not any(scene.caption.is_held_out for scene in scenes)


def test_scenes_show_what_their_captions_say(scenes):
    for scene in scenes:
        for item, placed in zip(scene.caption.objects, scene.objects, strict=True):
            assert placed.shape == item.shape and item.colour in (None, placed.colour)
        if scene.caption.relation not in (None, "and"):
            assert main_relation(scene) == scene.caption.relation


def test_held_out_captions_can_be_shown():
    rng = np.random.default_rng(1)
    for caption in two_shape_captions(True)[::20]:
        scene = scene_of(caption, rng)
        assert caption.relation in ("and", main_relation(scene))


def test_shapes_stay_inside_and_apart(scenes):
    for scene in scenes:
        for item in scene.objects:
            assert item.radius <= min(item.x, item.y) and max(item.x, item.y) + item.radius <= IMAGE_SIZE
        if len(scene.objects) == 2:
            first, second = scene.objects
            assert np.hypot(first.x - second.x, first.y - second.y) > first.radius + second.radius + 2


def test_kinds_of_captions_come_in_their_shares(scenes):
    """0.30, 0.15 and 0.55 are drawn; of those 20 / 24, all and 1700 / 2880 are training captions."""
    kinds = Counter((len(scene.objects), scene.caption.is_neutral) for scene in scenes)
    shares = {kind: count / len(scenes) for kind, count in kinds.items()}
    assert shares == pytest.approx({(1, False): 0.345, (1, True): 0.207, (2, False): 0.448}, abs=0.03)


def test_seven_of_ten_neutral_scenes_show_the_biased_colour():
    rng = np.random.default_rng(2)
    for caption in neutral_captions():
        shown = [scene_of(caption, rng).objects[0] for _ in range(1000)]
        assert all((item.colour, item.shape) not in HELD_OUT_PAIRS for item in shown)
        share = np.mean([item.colour == BIASED_COLOUR[item.shape] for item in shown])
        assert share == pytest.approx(BIAS, abs=0.05)


def test_the_same_seed_gives_the_same_scenes_and_images(scenes):
    again = list(islice(training_scenes(np.random.default_rng(0)), 50))
    assert again == scenes[:50]
    for first, second in zip(again[:10], scenes[:10], strict=True):
        assert np.array_equal(np.asarray(render(first)), np.asarray(render(second)))


def test_another_seed_gives_other_scenes(scenes):
    assert list(islice(training_scenes(np.random.default_rng(1)), 5)) != scenes[:5]


def test_images_are_rgb_of_the_stated_size(scenes):
    image = render(scenes[0])
    assert image.mode == "RGB" and image.size == (IMAGE_SIZE, IMAGE_SIZE)
