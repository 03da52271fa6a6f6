"""How real images look, on renders, on blanks and on shapes of the wrong kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rlcm_fast.rewards import build_reward
from rlcm_fast.shapes.grammar import parse
from rlcm_fast.shapes.realism import DetectorConfidence, RenderDistance
from rlcm_fast.shapes.renderer import render
from rlcm_fast.shapes.scenes import scene_of
from rlcm_fast.trajectory import Prompt

PROMPTS = [Prompt(text) for text in ("a red circle", "a blue square", "a green star", "a yellow triangle") * 8]


def renders(prompts: list[Prompt], seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    pictures = [np.asarray(render(scene_of(parse(prompt.text), rng))) for prompt in prompts]
    return torch.from_numpy(np.stack(pictures)).movedim(3, 1).float() / 255


def test_the_detector_is_confident_of_renders_and_not_of_blanks():
    confidence = DetectorConfidence()
    assert confidence(renders(PROMPTS, 0), PROMPTS).min() > 0.85
    assert confidence(torch.full((2, 3, 64, 64), 0.5), PROMPTS[:2]).tolist() == [0.0, 0.0]


def test_the_distance_to_renders_is_near_zero_for_renders_and_grows_with_what_is_wrong():
    reward = RenderDistance()

    def value(images: Tensor) -> float:
        return reward.value(reward.describe(images, PROMPTS)[None]).item()

    real = value(renders(PROMPTS, 1))
    grey = value(torch.full((len(PROMPTS), 3, 64, 64), 0.5))
    others = value(renders([Prompt("a purple circle")] * len(PROMPTS), 1))
    half = renders(PROMPTS, 1)
    half[::2] = 0.5
    assert abs(real) < 0.1 * abs(grey)
    assert grey < value(half) < real
    assert others < real - 0.02


def test_a_caption_has_the_same_renders_in_every_call():
    reward, images = RenderDistance(), torch.full((4, 3, 64, 64), 0.5)
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    described = reward.describe(images, prompts)
    assert torch.equal(described, reward.describe(images, prompts))
    _, of_renders = described.chunk(2, dim=1)
    assert not torch.equal(of_renders[0], of_renders[1])
    again = reward.describe(images[:1], prompts[:1])
    assert torch.allclose(again, described[:1], atol=1e-5)


def test_a_group_of_equal_sets_has_the_closed_form_of_the_energy_distance():
    points = torch.tensor([[0.0], [2.0]])
    described = torch.cat([points, points], dim=1)[None]
    assert RenderDistance().value(described).item() == pytest.approx(-(2 * 1.0 - 2 - 2))


def test_the_rewards_can_be_named_in_a_config():
    assert build_reward("rlcm_fast.shapes.realism:DetectorConfidence", {}).scope == "image"
    assert build_reward("rlcm_fast.shapes.realism:RenderDistance", {}, group_size=4).scope == "set"
