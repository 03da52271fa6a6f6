"""Statistics of images whose values are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlcm_fast.config.guard import STATISTICS
from rlcm_fast.rewards.image_statistics import ImageStatistics
from rlcm_fast.rewards.jpeg import jpeg_kilobytes


def statistics(image: Tensor) -> dict[str, float]:
    (row,) = ImageStatistics()(image[None], [])
    return dict(zip(STATISTICS, row.tolist(), strict=True))


def painted(*colours: tuple[float, float, float], width: int = 64) -> Tensor:
    """Stripes of equal width."""
    stripes = [torch.tensor(colour)[:, None, None].expand(3, 64, width // len(colours)) for colour in colours]
    return torch.cat(stripes, dim=2)


def test_a_blank_image_has_one_colour_and_is_flat():
    found = statistics(painted((0.5, 0.5, 0.5)))
    assert [found[name] for name in STATISTICS[:4]] == [0, 0, 0, 1]
    assert found["jpeg_kb"] == jpeg_kilobytes(painted((0.5, 0.5, 0.5))[None], 95).item()


def test_four_colours_have_two_bits_and_three_edges():
    found = statistics(painted((1, 0, 0), (0.9, 0.9, 0), (0, 0.9, 0), (1, 1, 1)))
    assert found["colour_entropy"] == pytest.approx(2)
    assert found["edge_density"] == pytest.approx(3 / 63)
    assert found["saturation"] == pytest.approx((1 + 0.9 + 0.9 + 0) / 4)
    assert found["flat_area"] == 1  # stripes of 16 pixels meet between blocks


def test_noise_has_edges_everywhere_and_nothing_flat():
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = statistics(noise)
    assert found["flat_area"] == 0
    assert found["edge_density"] > 0.7
    assert 7 < found["colour_entropy"] <= 9
    assert found["saturation"] == pytest.approx(0.5, abs=0.02)  # of three uniform numbers: largest minus smallest


def test_sides_need_not_be_multiples_of_a_block_and_each_image_is_by_itself():
    images = torch.rand(3, 3, 21, 37, generator=torch.Generator().manual_seed(1))
    images[1] = 0.3
    together = ImageStatistics()(images, [])
    apart = torch.cat([ImageStatistics()(image[None], []) for image in images])
    assert torch.equal(together, apart)
    assert together[1, :4].tolist() == [0, 0, 0, 1]
