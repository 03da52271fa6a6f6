"""The Triton operations on the CPU, in Triton's interpreter, against the reference in float64."""

# N rows, C H W latent

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_checks import assert_no_worse
from torch import Tensor

from rlcm_fast.kernels import dispatch, functional, reference
from rlcm_fast.kernels.triton_ops import gaussian
from rlcm_fast.kernels.triton_ops.rows import walk_over

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last, "rows of a larger tensor"]


def laid_out(tensor: Tensor, layout: object) -> Tensor:
    if isinstance(layout, torch.memory_format):
        return tensor.contiguous(memory_format=layout)
    larger = torch.zeros(len(tensor), 3, *tensor.shape[1:], dtype=tensor.dtype)
    larger[:, 1] = tensor
    return larger[:, 1]


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Tensor], Tensor, float]:
    """x, m, m_uncond, x_next in dtypes and layouts of their own, coef (N, 3), guidance_scale."""
    shape = draw(st.tuples(st.integers(1, 4), st.sampled_from([1, 3, 4, 5, 8]), st.integers(1, 9), st.integers(1, 9)))
    if draw(st.integers(0, 3)) == 0:
        shape = (1, 4, 48, 53)  # ten tiles
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors = {}
    for name in ("x", "m", "m_uncond", "x_next"):
        values = torch.randn(shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
        tensors[name] = laid_out(values, draw(st.sampled_from(FORMATS)))
    exponents = torch.rand(shape[0], generator=generator) * 4 - 4  # sigma from 1e-4 to 1
    a_and_b = torch.rand(shape[0], 2, generator=generator)
    coef = torch.cat([a_and_b, 10.0 ** exponents[:, None]], dim=1)
    return tensors, coef, draw(st.sampled_from([1.0, 0.0, 7.5]))


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


@given(case=cases(), is_guided=st.booleans())
@settings(deadline=None, max_examples=10, phases=[Phase.generate])
def test_log_probs_and_their_gradients_are_as_exact_as_the_reference(case, is_guided: bool):
    tensors, coef, w = case
    upstream = torch.linspace(-1, 2, len(coef))
    results = {}
    for name, choice in (("triton", "triton"), ("torch", "torch"), ("truth", "torch")):
        inputs = wide(tensors) if name == "truth" else tensors
        leaves = {key: tensor.detach().requires_grad_() for key, tensor in inputs.items()}
        uncond = leaves["m_uncond"] if is_guided else None
        c = coef.double() if name == "truth" else coef
        with dispatch.use(choice):
            log_prob = functional.gaussian_log_prob(leaves["x"], leaves["m"], leaves["x_next"], c, uncond, w)
        wanted = [leaves[key] for key in leaves if is_guided or key != "m_uncond"]
        results[name] = [log_prob.detach(), *torch.autograd.grad(log_prob, wanted, upstream.to(log_prob.dtype))]
    for ours, theirs, truth in zip(*results.values(), strict=True):
        assert ours.dtype == theirs.dtype
        assert_no_worse(ours, theirs, truth, per_unit=1e-6)
    assert results["triton"][2].stride() == torch.empty_like(tensors["m"]).stride()


@given(case=cases())
@settings(deadline=None, max_examples=8, phases=[Phase.generate])
def test_a_step_is_as_exact_as_the_reference_and_knows_its_own_log_prob(case):
    tensors, coef, w = case
    coef[0, 2] = 0.0
    x, m, m_uncond, noise = tensors.values()
    with dispatch.use("torch"):
        expected, expected_log_prob = functional.gaussian_step(x, m, coef, noise, None, m_uncond, w)
    truth, _ = reference.gaussian_step(
        x.double(), reference.guided(m.double(), m_uncond.double(), w), coef.double(), noise.double()
    )
    with dispatch.use("triton"):
        x_next, log_prob = functional.gaussian_step(x, m, coef, noise, None, m_uncond, w)
        again = functional.gaussian_log_prob(x, m, x_next, coef, m_uncond, w)
    assert_no_worse(x_next, expected, truth, per_unit=1e-7)
    assert torch.equal(log_prob, again)
    assert log_prob[0] == 0
    torch.testing.assert_close(log_prob, expected_log_prob, rtol=1e-3, atol=1e-3)  # of another x_next, a rounding off


def test_a_row_is_the_same_bits_in_every_batch_and_place():
    generator = torch.Generator().manual_seed(0)
    x, m, x_next = (torch.randn(24, 3, 5, 9, generator=generator) for _ in range(3))
    coef = torch.rand(24, 3, generator=generator) + 0.1
    with dispatch.use("triton"):
        together = functional.gaussian_log_prob(x, m, x_next, coef)
        backwards = functional.gaussian_log_prob(x.flip(0), m.flip(0), x_next.flip(0), coef.flip(0)).flip(0)
        assert torch.equal(together, backwards)
        for first, last in ((0, 1), (23, 24), (5, 8), (6, 18)):
            rows = slice(first, last)
            assert torch.equal(together[rows], functional.gaussian_log_prob(x[rows], m[rows], x_next[rows], coef[rows]))


def test_drawn_noise_is_philox_by_seed_and_place_in_any_layout_and_standard_normal():
    seeds = torch.tensor([3, 2**40 + 7, -5, 0])
    x, m = torch.randn(4, 4, 48, 53), torch.randn(4, 4, 48, 53)
    coef = torch.tensor([[0.5, 0.5, 1.0]]).expand(4, 3)
    steps = {}
    for choice in ("torch", "triton"):
        with dispatch.use(choice):
            steps[choice] = functional.gaussian_step(x, m, coef, seeds=seeds)[0]
    torch.testing.assert_close(steps["triton"], steps["torch"], rtol=1e-6, atol=2e-6)
    with dispatch.use("triton"):
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(functional.gaussian_step(last, m, coef, seeds=seeds)[0], steps["triton"])
        spread = torch.stack([seeds, seeds + 1], dim=1)[:, 0]  # every second number, as of one step of many
        assert torch.equal(functional.gaussian_step(x, m, coef, seeds=spread)[0], steps["triton"])
        alone = functional.gaussian_step(x[1:2], m[1:2], coef[1:2], seeds=seeds[1:2])[0]
        assert torch.equal(alone, steps["triton"][1:2])
    noise = reference.philox_normal(torch.arange(100), torch.Size((4, 64, 64)))  # 1.6 million
    assert noise.mean().abs() < 4 / math.sqrt(noise.numel())
    assert (noise.var() - 1).abs() < 4 * math.sqrt(2 / noise.numel())
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / noise.numel())
    assert torch.corrcoef(noise.view(100, -1)).fill_diagonal_(0).abs().max() < 5.5 / math.sqrt(4 * 64 * 64)


def test_a_step_takes_noise_or_seeds():
    x, coef = torch.zeros(1, 1, 2, 2), torch.ones(1, 3)
    for arguments in ({}, {"noise": x, "seeds": torch.zeros(1, dtype=torch.int64)}):
        with pytest.raises(ValueError, match="needs either noise or seeds"):
            functional.gaussian_step(x, x, coef, **arguments)


def test_the_operators_pass_torchs_own_checks():
    x, m, u, x_next = (torch.randn(2, 3, 4, 5) for _ in range(4))
    coef = torch.rand(2, 3) + 0.1
    arguments = (x, m.requires_grad_(), u.requires_grad_(), x_next, coef, 2.0)
    torch.library.opcheck(gaussian.log_prob_operator, arguments)
    torch.library.opcheck(gaussian.step_operator, (x, m.detach(), None, coef, x_next, None, 1.0))


def test_a_compiled_function_sees_the_operators_without_a_graph_break():
    x, m, x_next = (torch.randn(2, 3, 4, 5) for _ in range(3))
    coef = torch.rand(2, 3) + 0.1

    def loss(m: Tensor) -> Tensor:
        return functional.gaussian_log_prob(x, 2 * m, x_next, coef).sum()

    with dispatch.use("triton"):
        expected = torch.autograd.grad(loss(m.requires_grad_()), m)[0]
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert torch.equal(torch.autograd.grad(compiled(m), m)[0], expected)


def test_other_strides_are_refused():
    x = torch.randn(2, 3, 4, 8)[..., ::2]
    with pytest.raises(ValueError, match="neither contiguous nor channels_last"):
        walk_over([x])
