"""Weights rounded stochastically: without a bias, and without losing updates below their last digit."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor, nn

from rlcm_fast.kernels import dispatch, functional, reference_adamw
from rlcm_fast.kernels.adamw import AdamW8bit


def rounded(size: int, choice: str) -> Tensor:
    """So many values of 1 + 0.3 * 2^-7 in bfloat16, by an update."""
    param = nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
    param.grad = -torch.ones(size, dtype=torch.bfloat16)
    optimizer = AdamW8bit([param], lr=0.3 * 2**-7, eps=0.0, weight_decay=0.0, betas=(0.0, 0.0), seed=3)
    with dispatch.use(choice):
        optimizer.step()
    return param.detach()


def test_100_000_roundings_have_the_mean_of_what_was_rounded():
    """Between two neighbours 2^-7 apart, the mean of 100,000 has a standard error of at most 1.2e-5."""
    values = rounded(100_000, "torch")
    assert set(values.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(values.double().mean().item() - (1.0 + 0.3 * 2**-7)) < 3e-5
    assert torch.equal(rounded(10_000, "triton"), values[:10_000]), "the same roundings, not only the same mean"


def test_rounding_keeps_what_is_exact_or_not_finite_and_reaches_both_neighbours_of_a_negative():
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, 2.0**-130])
    assert torch.equal(reference_adamw.round_stochastically(exact, 0, 1, 0).float(), exact)
    assert reference_adamw.round_stochastically(torch.tensor([math.nan]), 0, 1, 0).isnan().all()
    negative = reference_adamw.round_stochastically(torch.full((4096,), -1.001953125), 0, 1, 0).float()
    assert set(negative.unique().tolist()) == {-1.0078125, -1.0}
    assert negative.mean().item() == pytest.approx(-1.001953125, abs=2e-4)


def test_updates_below_half_a_unit_are_lost_by_nearest_and_kept_by_stochastic_rounding():
    moved = {}
    for is_stochastic in (False, True):
        param = nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))
        optimizer = AdamW8bit(
            [param], lr=1e-5, weight_decay=0.0, stochastic_rounding=is_stochastic, counts_lost_updates=True
        )
        for _ in range(50):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[is_stochastic] = 1.0 - param.double().mean().item()
        assert optimizer.counts is not None
        wanted, lost = optimizer.counts.tolist()
        assert wanted == 50 * 8192
        # the neighbour below 1 is 2^-8 away: a step of 1e-5 is taken by one weight of 391
        assert lost / wanted == pytest.approx(1 - 1e-5 * 2**8, abs=3e-4) if is_stochastic else lost == wanted
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(50e-5, rel=0.1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sums_keep_on_average_what_rounding_to_nearest_loses(memory_format: torch.memory_format):
    """1,000 times 2^-10 on 1, whose neighbour is 2^-7 away; Triton is the reference bit for bit.

    The standard error of the mean of 2,295 sums is 1.7e-3.
    """
    shape = (3, 5, 17, 9)
    addend = torch.full(shape, 2.0**-10, dtype=torch.bfloat16)
    sums = {}
    for choice in ("torch", "triton"):
        sums[choice] = torch.ones(shape, dtype=torch.bfloat16).to(memory_format=memory_format)
        for number in range(1, 1001 if choice == "torch" else 6):
            with dispatch.use(choice):
                functional.add_rounded_(sums[choice], addend, seed=3, addition=torch.tensor([2, number]), index=5)
            if number == 5:
                sums[f"{choice} 5"] = sums[choice].clone()
        assert sums[choice].is_contiguous(memory_format=memory_format)
    assert torch.equal(sums["torch 5"], sums["triton 5"])
    assert len(sums["torch 5"].unique()) > 1
    assert sums["torch"].double().mean().item() == pytest.approx(1 + 1000 * 2.0**-10, abs=6e-3)


# SHA-256 of the sums below when step and number were arguments of the launch: runs that are resumed go on with them.
BITS = "1848bcb37d565463805da2be95e0260e6e961c6d996194326ccc3bd119d1161f"


def sums_of(choice: str, additions: list[tuple[int, int]], seed: int) -> list[Tensor]:
    """The sums after each addition, whose step and number lie at one address."""
    generator, addition = torch.Generator().manual_seed(1), torch.zeros(2, dtype=torch.int64)
    total, addend = (torch.randn(7, 5, 9, 11, generator=generator) * scale for scale in (1, 0.01))
    total, found = total.bfloat16(), []
    for numbers in additions:
        addition.copy_(torch.tensor(numbers))
        with dispatch.use(choice):
            functional.add_rounded_(total, addend.bfloat16(), seed=seed, addition=addition, index=4)
        found.append(total.clone())
    return found


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_sums_have_the_bits_that_they_always_had(choice: str):
    digest = hashlib.sha256()
    for seed in (0, 3, 2**40 + 7):
        for total in sums_of(choice, [(step, number) for step in (0, 5) for number in (1, 2, 700)], seed):
            digest.update(total.view(torch.int16).numpy().tobytes())
    assert digest.hexdigest() == BITS


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_number_0_rounds_a_sum_to_nearest_as_torch_does(choice: str):
    nearest = sums_of(choice, [(2, 0), (3, 0)], 3)
    generator = torch.Generator().manual_seed(1)
    total, addend = (torch.randn(7, 5, 9, 11, generator=generator) * scale for scale in (1, 0.01))
    total = total.bfloat16()
    for found in nearest:
        total += addend.bfloat16()
        assert torch.equal(found, total)
    assert not torch.equal(sums_of(choice, [(2, 1)], 3)[0], nearest[0])


def test_sums_of_float32_are_refused():
    addition = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="add_rounded_ needs a bfloat16 total, not torch.float32; float32 sums"):
        functional.add_rounded_(torch.ones(3), torch.ones(3).bfloat16(), seed=0, addition=addition, index=0)
