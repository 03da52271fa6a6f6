from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rlcm_fast import plug_in
from rlcm_fast.rewards.diversity import Diversity
from rlcm_fast.trajectory import Prompt


@plug_in
class TopLeft:
    """An embedding: the first pixel."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images[:, :, 0, 0]


def diversity(images: Tensor, embedding: str = "thumbnails") -> float:
    reward = Diversity(embedding)
    return reward.value(reward.describe(images, [Prompt("a cat")] * len(images))[None]).item()


def flat(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 16, 16)


def test_it_is_zero_for_equal_images_and_one_for_black_and_white():
    assert diversity(flat(0.3, 0.3, 0.3)) == 0
    assert diversity(flat(0.0, 1.0)) == pytest.approx(1)


def test_it_is_the_mean_over_pairs():
    assert diversity(flat(0.0, 0.5, 1.0)) == pytest.approx((0.5 + 0.5 + 1.0) / 3)


def test_it_falls_when_images_repeat():
    images = torch.rand(4, 3, 64, 64)
    assert diversity(images) > diversity(images[[0, 0, 0, 1]]) > 0


def test_small_distances_are_not_lost():
    assert diversity(flat(0.5, 0.50001)) == pytest.approx(1e-5, rel=0.01)


def test_an_embedding_of_ones_own_is_measured_by_its_euclidean_distance():
    assert diversity(flat(0.0, 1.0), f"{__name__}:TopLeft") == pytest.approx(3**0.5)


def test_groups_are_valued_together_as_one_by_one_and_a_single_image_has_none():
    described = torch.rand(3, 4, 5)
    reward = Diversity()
    assert torch.equal(reward.value(described), torch.cat([reward.value(group[None]) for group in described]))
    assert reward.value(described[:, :1]).tolist() == [0, 0, 0]
