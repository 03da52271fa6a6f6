"""Preparation on tensors against PIL, on a photograph that matplotlib brings."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rlcm_fast.rewards.pixels import CLIP_MEAN, CLIP_STD, HALF, Preparation, resize, resize_shortest_side


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """Grace Hopper, 512 x 600 pixels."""
    return Image.open(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg").convert("RGB")


def tensor_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(
    ("size", "at_most"), [((224, 224), 0.02), ((224, 262), 0.025), ((384, 384), 0.03), ((800, 938), 0.06)]
)
def test_resizing_differs_from_pil_by_little(photograph: Image.Image, size: tuple[int, int], at_most: float):
    """PIL rounds to 1/255 and clamps twice; measured 0.019, 0.024, 0.029, 0.056 at most, 0.0012 on average."""
    ours = resize(tensor_of(photograph), size[1], size[0])
    difference = (ours - tensor_of(photograph.resize(size, Image.Resampling.BICUBIC))).abs()
    assert difference.max() <= at_most
    assert difference.mean() <= 0.0013


def test_clip_sees_the_centre_of_a_picture_normalised(photograph: Image.Image):
    resized = photograph.resize((224, 262), Image.Resampling.BICUBIC).crop((0, 19, 224, 243))
    expected = (tensor_of(resized)[0] - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    prepared = Preparation(224)(tensor_of(photograph))
    assert prepared.shape == (1, 3, 224, 224) and prepared.dtype == torch.float32
    assert (prepared[0] - expected).abs().max() <= 0.025 / min(CLIP_STD)


def test_a_picture_may_be_squashed_or_cut_smaller_than_it_is_resized():
    image = torch.rand(1, 3, 30, 60)
    squashed = Preparation(16, HALF, HALF, fit="squash")(image)
    assert torch.allclose(squashed, resize(image, 16, 16) * 2 - 1, atol=1e-6)
    cut = Preparation(14, (0, 0, 0), (1, 1, 1), shortest_side=16)(image)
    assert torch.equal(cut, resize_shortest_side(image, 16)[..., 1:15, 9:23])


def test_a_picture_may_be_padded_with_black():
    padded = Preparation(17, (0, 0, 0), (1, 1, 1), fit="pad")(torch.ones(1, 3, 30, 60))
    assert padded.shape == (1, 3, 17, 17)
    assert padded[0, 0].mean(dim=1).round().tolist() == [0] * 4 + [1] * 8 + [0] * 5


def test_a_batch_is_prepared_as_its_images_one_by_one():
    images = torch.rand(3, 3, 64, 48)
    prepare = Preparation(32)
    one_by_one = torch.cat([prepare(image[None]) for image in images])
    assert (prepare(images) - one_by_one).abs().max() <= 1e-6


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_pictures_stay_flat_and_in_range(value: float):
    assert torch.allclose(resize(torch.full((1, 3, 50, 70), value), 224, 224), torch.tensor(value), atol=1e-6)


def test_overshoot_at_edges_is_clamped():
    edge = torch.zeros(1, 3, 64, 64)
    edge[..., 32:] = 1
    resized = resize(edge, 100, 100)
    assert resized.min() == 0 and resized.max() == 1
