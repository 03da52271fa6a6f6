"""The graded score: as the exact one where an image shows its caption, and a slope where that one has a step."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from rlcm_fast.rewards import build_reward
from rlcm_fast.shapes.detector import MIN_CONFIDENCE, detect, score
from rlcm_fast.shapes.graded import ShapesAlignmentGraded, graded_score
from rlcm_fast.shapes.grammar import Caption, parse
from rlcm_fast.shapes.renderer import render
from rlcm_fast.shapes.scenes import Background, PlacedObject, Scene, training_scenes
from rlcm_fast.trajectory import Prompt

GREY = Background((128, 128, 128), (128, 128, 128), 0)
STAR, SQUARE = PlacedObject("star", "blue", 16, 32, 12, 0), PlacedObject("square", "red", 48, 32, 10, 0)


def image_of(*objects: PlacedObject) -> torch.Tensor:
    pixels = np.asarray(render(Scene(parse("a star"), objects, GREY))).copy()
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def graded(caption: str, *objects: PlacedObject) -> float:
    return graded_score(detect(image_of(*objects))[0], parse(caption))


def blurred(image: torch.Tensor, sigma: float) -> torch.Tensor:
    offsets = torch.arange(-9.0, 10.0)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    rows = torch.nn.functional.conv2d(torch.nn.functional.pad(image, (9, 9, 9, 9), "replicate"), kernel, groups=3)
    return torch.nn.functional.conv2d(rows, kernel.transpose(2, 3), groups=3)


def test_scenes_have_nearly_one_for_their_own_caption_and_less_for_another():
    scenes = list(islice(training_scenes(np.random.default_rng(0)), 150))
    images = torch.cat([image_of(*scene.objects) for scene in scenes])
    found = detect(images)
    own = [graded_score(f, s.caption) for f, s in zip(found, scenes, strict=True)]
    other = [graded_score(f, s.caption) for f, s in zip(found, scenes[1:] + scenes[:1], strict=True)]
    assert min(own) > 0.6 and np.mean(own) > 0.9  # the shares of relations whose shapes stand nearly askew are lower
    assert np.mean(other) < 0.6 and max(own + other) <= 1


def test_a_star_too_blurred_to_be_known_is_worth_more_than_a_blank_and_less_than_a_sharp_one():
    caption = parse("a blue star")
    values = []
    for sigma in (0.5, 2.0, 4.0, 5.0):
        found = detect(blurred(image_of(STAR), sigma))[0]
        values.append((score(found, caption), graded_score(found, caption)))
    exact, slope = zip(*values, strict=True)
    assert exact[:2] == (1, 1) and exact[-2:] == (0, 0)
    assert 1 >= slope[0] >= slope[1] > slope[2] > slope[3] > 0
    assert graded_score(detect(torch.full((1, 3, 64, 64), 0.5))[0], caption) == 0


def test_the_share_of_a_relation_grows_with_the_displacement_and_is_half_where_shapes_stand_askew():
    caption = "a blue star left of a red square"
    values = [graded(caption, replace(STAR, y=y), SQUARE) for y in (52, 48, 32)]
    assert values[0] < values[1] < values[2]
    mirrored = graded("a blue star right of a red square", STAR, SQUARE)
    parts = graded("a blue star and a red square", STAR, SQUARE)
    assert mirrored == pytest.approx(parts * 2 / 3, abs=0.02)
    assert graded(caption, STAR, SQUARE) > 0.9


def test_a_wrong_colour_halves_a_part_and_a_shape_too_many_costs():
    right = graded("a blue star", STAR)
    assert graded("a red star", STAR) == pytest.approx(right / 2)
    assert graded("a star", STAR) == pytest.approx(right)
    assert graded("a blue star", STAR, SQUARE) == pytest.approx(right / 2)


def test_what_the_detector_does_not_know_still_counts_by_its_likeness():
    found = detect(image_of(STAR))[0][0]
    rough = replace(found, confidence=MIN_CONFIDENCE - 0.05, likeness=(0.6, 0.6, 0.6, MIN_CONFIDENCE - 0.05))
    assert score([rough], parse("a blue star")) == 0
    assert graded_score([rough], parse("a blue star")) == pytest.approx(0.5)


def test_a_star_that_looks_more_like_a_circle_counts_by_how_little_more():
    found = detect(image_of(STAR))[0][0]
    values = []
    for circle in (0.7, 0.75, 0.8, 0.85, 0.9):
        round_star = replace(found, shape="circle", confidence=circle, likeness=(circle, 0.6, 0.6, 0.8))
        values.append(graded_score([round_star], parse("a blue star")))
    assert values == pytest.approx([1, 1, 2 / 3, 1 / 3, 0])


def test_a_relation_counts_by_its_weight():
    found, caption = detect(image_of(STAR, SQUARE))[0], parse("a blue star right of a red square")  # it stands left
    parts = graded("a blue star and a red square", STAR, SQUARE)
    assert graded_score(found, caption, 0.0) == pytest.approx(parts)
    assert graded_score(found, caption, 0.5) == pytest.approx(parts * 2 / 2.5)
    images, prompts = image_of(STAR, SQUARE), [Prompt(str(caption))]
    assert build_reward("shapes_alignment_graded", {"relation_weight": 0.5})(images, prompts).item() == pytest.approx(
        parts * 2 / 2.5
    )
    with pytest.raises(ValueError, match=r"relation_weight=-1 must be 0 or more and finite"):
        build_reward("shapes_alignment_graded", {"relation_weight": -1})


def test_it_is_a_reward_by_name_and_refuses_other_prompts():
    reward = build_reward("shapes_alignment_graded", {})
    assert isinstance(reward, ShapesAlignmentGraded) and reward.scope == "image"
    values = reward(torch.cat([image_of(STAR), image_of(SQUARE)]), [Prompt("a blue star"), Prompt("a blue star")])
    assert values.dtype == torch.float32 and values[0] > 0.85 > 0.4 > values[1] >= 0
    with pytest.raises(ValueError, match="'a cat' is not in the grammar"):
        reward(image_of(STAR), [Prompt("a cat")])


def test_likeness_is_that_of_every_shape_and_the_confidence_the_largest():
    found = detect(image_of(STAR))[0][0]
    assert len(found.likeness) == 4 and found.confidence == max(found.likeness) == found.likeness[3]
    assert isinstance(parse("a star"), Caption)
