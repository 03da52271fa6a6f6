"""The reward and the captioned grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlcm_fast.grids import captioned_grid
from rlcm_fast.shapes.grammar import parse
from rlcm_fast.shapes.renderer import render
from rlcm_fast.shapes.reward import ShapesAlignment
from rlcm_fast.shapes.scenes import scene_of
from rlcm_fast.trajectory import Prompt

TEXTS = ["a red circle", "a blue star above a green square", "a yellow triangle and a cyan circle", "a star"]


def images_of(texts: list[str]) -> torch.Tensor:
    rng = np.random.default_rng(0)
    drawn = [np.asarray(render(scene_of(parse(text), rng))) for text in texts]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 255


def test_the_reward_is_one_for_images_that_show_their_prompts():
    values = ShapesAlignment()(images_of(TEXTS), [Prompt(text) for text in TEXTS])
    assert values.dtype == torch.float32 and values.tolist() == [1, 1, 1, 1]


def test_the_reward_is_lower_for_the_prompts_of_other_images():
    values = ShapesAlignment()(images_of(TEXTS), [Prompt(text) for text in TEXTS[1:] + TEXTS[:1]])
    assert (values < 1).all() and (values >= 0).all()


def test_the_reward_works_on_images_that_carry_a_gradient():
    assert ShapesAlignment()(images_of(TEXTS[:1]).requires_grad_(), [Prompt(TEXTS[0])]).item() == 1


def test_a_prompt_outside_the_grammar_is_refused_by_name():
    with pytest.raises(ValueError, match="'a cat' is not in the grammar"):
        ShapesAlignment()(images_of(TEXTS[:1]), [Prompt("a cat")])


def test_the_reward_is_for_single_images():
    assert ShapesAlignment.scope == "image"


def test_a_grid_holds_the_doubled_images_with_room_for_captions():
    images = images_of(TEXTS)
    grid = captioned_grid(images, TEXTS, columns=3)
    assert grid.mode == "RGB"
    assert grid.width == 3 * (128 + 6) + 6 and grid.height > 2 * 128
    first = torch.from_numpy(np.array(grid)[6 : 6 + 128 : 2, 6 : 6 + 128 : 2]).permute(2, 0, 1) / 255
    assert torch.equal(first, images[0])


def test_long_captions_are_wrapped_onto_more_lines():
    image = torch.zeros(1, 3, 64, 64)
    short, long = (captioned_grid(image, [text], 1) for text in ("a star", "a yellow triangle right of a purple star"))
    assert short.width == long.width and short.height < long.height


def test_large_images_are_not_magnified():
    assert captioned_grid(torch.zeros(1, 3, 512, 512), ["a star"], 4).width == 512 + 12


def test_a_grid_needs_one_text_an_image():
    with pytest.raises(ValueError, match=r"len\(texts\)=1"):
        captioned_grid(torch.zeros(2, 3, 64, 64), ["a star"], 2)
