"""The rewards' published scores, where their weights are on the machine: `python -m pytest -m hub`.

Nothing is downloaded; a test that lacks weights says which. Pictures come from the folder that RLCM_FAST_PICTURES
names: 000000039769.jpg of COCO's val2017, demo_image.jpg of the repository tgxs002/HPSv2 (assets/), and 1.webp to
4.webp of THUDM/ImageReward (assets/images/). RLCM_FAST_AESTHETIC_V2_5 names aesthetic_predictor_v2_5.pth.

Tolerances: a picture that is resized on tensors differs from PIL's by 0.0012 on average (test_pixels.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rlcm_fast.plugins import load_class
from rlcm_fast.rewards import BUILT_IN, Reward, build_reward
from rlcm_fast.rewards.aesthetic import HEAD, HEAD_2_5
from rlcm_fast.rewards.heads import AffineHead, multiply_out, read_tensors
from rlcm_fast.rewards.models import ModelFiles, files_of
from rlcm_fast.trajectory import Prompt

pytestmark = pytest.mark.hub


def require(files: ModelFiles) -> ModelFiles:
    """The files, or a skip that says how to get them."""
    try:
        missing = files.download()
    except ValueError as error:
        missing = str(error)
    if missing:
        pytest.skip(f"not on this machine: {missing}")
    return files


def reward(name: str, **arguments: Any) -> Reward:
    for files in files_of(load_class(name, BUILT_IN), arguments):
        require(files)
    return build_reward(name, arguments)


def picture(name: str) -> Tensor:
    """A picture (1, 3, H, W) of the folder that RLCM_FAST_PICTURES names."""
    file = Path(os.environ.get("RLCM_FAST_PICTURES", "no-folder")) / name
    if not file.is_file():
        pytest.skip(f"{name} is not in the folder RLCM_FAST_PICTURES; the head of this file says where it comes from")
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def scores_of_the_head(head: AffineHead) -> list[float]:
    """Of a zero vector, of 1/sqrt(E) everywhere, of the first unit vector."""
    width = len(head.weight)
    vectors = torch.stack([torch.zeros(width), torch.full((width,), width**-0.5), torch.eye(width)[0]])
    return head(vectors).tolist()


def test_the_head_of_aesthetic():
    tensors = read_tensors(require(ModelFiles("head", HEAD.source, HEAD)).file())
    head = multiply_out(tensors, "layers", (0, 2, 4, 6, 7), 768)
    assert scores_of_the_head(head) == pytest.approx([5.2366, 4.8833, 4.5451], abs=1e-4)
    assert head.weight.norm().item() == pytest.approx(17.9956, abs=1e-4)


def test_the_head_of_aesthetic_2_5():
    file = os.environ.get("RLCM_FAST_AESTHETIC_V2_5", "no-file.pth")
    tensors = read_tensors(require(ModelFiles("head", file, HEAD_2_5)).file())
    head = multiply_out(tensors, "scoring_head", (0, 2, 4, 6, 8), 1152)
    assert scores_of_the_head(head) == pytest.approx([1.9390, 3.6183, 2.7093], abs=1e-4)


def test_clip_score_of_noise_by_torchmetrics():
    noise = torch.randint(255, (3, 224, 224), generator=torch.Generator().manual_seed(42))[None] / 255
    scorer = reward("clip_score", model="openai/clip-vit-base-patch16", variant="torchmetrics")
    assert scorer(noise, [Prompt("a photo of a cat")]).item() == pytest.approx(24.4255, abs=0.01)


def test_clip_score_of_two_cats():
    cats = picture("000000039769.jpg")
    scorer = reward("clip_score", model="openai/clip-vit-base-patch32", variant="torchmetrics")
    scores = scorer(cats[[0, 0]], [Prompt("a photo of a cat"), Prompt("a photo of a dog")])
    assert scores.tolist() == pytest.approx([24.5701, 19.3049], abs=0.1)


def test_hps_of_the_demonstration():
    """A user's run of the original, in half precision."""
    scores = reward("hps_v2")(picture("demo_image.jpg"), [Prompt("cat with horn")])
    assert scores.item() == pytest.approx(0.288, abs=2e-3)


def test_image_reward_of_its_four_pictures():
    prompt = Prompt("a painting of an ocean with clouds and birds, day time, low depth field effect")
    scorer = reward("image_reward")
    scores = [scorer(picture(f"{number}.webp"), [prompt]).item() for number in (1, 2, 3, 4)]
    assert scores == pytest.approx([0.5812, 0.2745, -1.4132, -2.0296], abs=0.03)


@pytest.mark.parametrize("name", ["aesthetic", "clip_score", "pickscore", "hps_v2", "hps_v2_0", "image_reward"])
def test_full_size_scores_are_finite_and_do_not_depend_on_the_batch(name: str):
    """Measured by a peer for PickScore: batches moved scores by 1.7e-4 of 0.75."""
    scorer = reward(name)
    noise = torch.rand(2, 3, 300, 256, generator=torch.Generator().manual_seed(0))
    images = torch.cat([torch.zeros_like(noise[:1]), torch.ones_like(noise[:1]), noise])
    prompts = [Prompt("a cat"), Prompt("two dogs on a red car"), Prompt("a cat"), Prompt("")]
    together = scorer(images, prompts)
    one_by_one = torch.cat([scorer(images[i : i + 1].clone(), prompts[i : i + 1]) for i in range(len(images))])
    assert torch.isfinite(together).all()
    assert (together - one_by_one).abs().max() <= 2e-4 * together.abs().max()


def test_object_detection_of_two_cats_and_no_dog():
    """transformers' documentation has 0.614 and 0.665 for the cats, of the base model with ensemble."""
    scorer, cats = reward("object_detection"), picture("000000039769.jpg")
    assert scorer(cats, [Prompt("a cat")]).item() == pytest.approx(0.665, abs=0.02)
    assert scorer(cats, [Prompt("a cat and a dog")]).item() == pytest.approx(0.665 / 2, abs=0.02)


def test_geneval_counts_two_cats():
    scorer, cats = reward("geneval", rule="strict"), picture("000000039769.jpg")
    assert scorer(cats, [Prompt("a photo of two cats")]).item() == 1
    assert scorer(cats, [Prompt("a photo of three cats")]).item() == 0
