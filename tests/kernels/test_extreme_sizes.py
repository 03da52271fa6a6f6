"""Sizes beyond what a test can compute: grids within CUDA's limits, offsets beyond 2^31 elements.

65,536 rows of 4 x 256 x 256 are 2^34 elements. Grids are read off the launches, with tensors that have no memory;
offsets are tried on a few rows that lie far apart in a storage whose pages in between are never touched.
"""

# N rows, C H W latent

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlcm_fast.kernels import dispatch, functional
from rlcm_fast.kernels.triton_ops import gaussian, loss, rebel

LIMITS = (2**31 - 1, 65_535, 65_535)  # of a grid's x, y and z
NUM_ROWS, SHAPE = 65_536, (4, 256, 256)
FAR = 2**30  # elements from row to row: the number fits 32 bits, twice the number does not


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of every launch; nothing runs."""
    noted: list[tuple[int, ...]] = []

    def note(kernel: Any, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> None:
        noted.append(grid)

    monkeypatch.setattr(type(gaussian._log_prob_kernel), "run", note)
    return noted


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_grids_stay_within_the_limits_of_cuda(grids: list[tuple[int, ...]], memory_format: torch.memory_format):
    x = torch.empty(NUM_ROWS, *SHAPE, device="meta")
    m = torch.empty(NUM_ROWS, *SHAPE, device="meta", dtype=torch.bfloat16, memory_format=memory_format)
    coef, rows, seeds = (torch.empty(*size, device="meta") for size in ((NUM_ROWS, 3), (NUM_ROWS,), (NUM_ROWS,)))
    upstream = torch.empty((), device="meta")
    gaussian.gaussian_log_prob(x, m, m, x, coef, 7.5)
    gaussian.input_gradient((x, m, None, x, coef, 1.0), 1, rows, upstream)
    gaussian.gaussian_step(x, m, None, coef, x, None, 1.0)
    gaussian.gaussian_step(x, m, None, coef, None, seeds.long(), 1.0)
    loss.policy_loss(x, m, None, x, coef, 1.0, rows, rows, 1e-4, 10.0)
    loss.clipped_ratio_loss(rows, rows, rows, 1e-4, 10.0)
    pairs = torch.empty(NUM_ROWS, 50, device="meta")
    rebel.rebel_residual(pairs, pairs, rows, 1.0)
    assert len(grids) == 1 + 1 + 1 + 1 + 1 + 1 + 1
    for grid in grids:
        assert all(0 < size <= limit for size, limit in zip(grid, LIMITS, strict=False)), grid


def test_rows_farther_apart_than_32_bits_reach_are_found():
    generator = torch.Generator().manual_seed(0)
    size = (3, 2, 5, 7)
    near = torch.randn(size, generator=generator).bfloat16()
    storage = torch.empty(2 * FAR + near[0].numel(), dtype=torch.bfloat16)  # 4 GiB, of which three pages are used
    far = storage.as_strided(size, (FAR, 35, 7, 1)).copy_(near)
    coef, rows = torch.rand(3, 3, generator=generator) + 0.1, torch.randn(3, generator=generator)
    results = []
    for rows_of in (near, far):
        with dispatch.use("triton"):
            log_prob = functional.gaussian_log_prob(rows_of, rows_of, rows_of, coef, rows_of, 3.0)
            step = functional.gaussian_step(rows_of, rows_of, coef, rows_of, None, rows_of, 3.0)
        gradient = gaussian.input_gradient((rows_of, rows_of, None, rows_of, coef, 1.0), 1, rows, None)
        results.append([log_prob, *step, gradient])
    for of_near, of_far in zip(*results, strict=True):
        assert torch.equal(of_near, of_far)
