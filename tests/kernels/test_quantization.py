"""8-bit codes of moments: bitsandbytes' codebooks, and always the nearest value of them."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map

from rlcm_fast.kernels.quantization import codebook, dequantize, edges_between, quantize


@pytest.mark.parametrize("is_signed", [True, False])
def test_the_codebooks_are_those_of_bitsandbytes(is_signed: bool):
    theirs = create_dynamic_map(signed=is_signed)
    assert torch.equal(codebook(is_signed, torch.device("cpu")), theirs)


@pytest.mark.parametrize("is_signed", [True, False])
def test_quantisation_takes_the_nearest_value_of_the_codebook(is_signed: bool):
    values = torch.randn(3, 700) if is_signed else torch.rand(3, 700)
    codes, absmax = quantize(values, is_signed)
    scales = absmax.repeat_interleave(256)[: values.numel()].view_as(values)
    distance = (values[..., None] - scales[..., None] * codebook(is_signed, values.device)).abs()
    chosen = distance.gather(-1, codes.long()[..., None])[..., 0]
    assert (chosen <= distance.amin(dim=-1) + 1e-7).all()
    torch.testing.assert_close((dequantize(codes, absmax, is_signed) - values).abs(), chosen, rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_signed", [True, False])
def test_codes_count_the_edges_below(is_signed: bool):
    edges = edges_between(is_signed, torch.device("cpu"))[:-1]
    near = [torch.nextafter(edges, torch.tensor(direction)) for direction in (-2.0, 2.0)]
    values = torch.cat([edges, *near, torch.linspace(-1 if is_signed else 0, 1, 99_999), torch.tensor([1.0, 0.0])])
    values = values[: len(values) // 256 * 256].view(-1, 256).clone()
    values[:, 0] = 1.0  # so that a block's largest is 1
    codes = torch.bucketize(values, edges_between(is_signed, values.device)).to(torch.uint8)
    if not is_signed:
        codes = torch.where(values > 0, codes.clamp(min=1), codes)
    assert torch.equal(quantize(values, is_signed)[0], codes)


def test_a_second_moment_above_zero_is_not_lost_nor_one_of_zero_found():
    values = torch.tensor([0.0, 1e-30, 1e-9, 1.0])
    assert quantize(values, is_signed=False)[0].tolist() == [0, 1, 1, 255]
    assert quantize(torch.zeros(4), is_signed=False)[1] == 0
