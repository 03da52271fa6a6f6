"""The clipped loss in Triton's interpreter: its value, gradient and statistics, alone and fused with log-probs."""

# N rows, C H W latent

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlcm_fast.kernels import dispatch, functional
from rlcm_fast.kernels.reference import RatioStats
from rlcm_fast.kernels.triton_ops import loss as triton_loss

CLIP, ADVANTAGE_CLIP = 1e-3, 4.0


def stats_of(stats: RatioStats) -> Tensor:
    return torch.stack(list(vars(stats).values())).double()


@st.composite
def losses(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, Tensor]:
    """log_prob, log_prob_old, advantages (N,) float32, the log-ratios anywhere from within the clip to beyond 20."""
    num_rows = draw(st.sampled_from([1, 2, 7, 64, 1024, 1500]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    log_prob = torch.randn(num_rows, generator=generator) - 1
    spread = draw(st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 0.5, 3.0, 40.0]))
    old = log_prob + spread * torch.randn(num_rows, generator=generator)
    advantages = 3 * torch.randn(num_rows, generator=generator)
    advantages[torch.rand(num_rows, generator=generator) < 0.2] = 0.0
    return log_prob, draw(st.sampled_from([old, None])), advantages


@given(case=losses())
@settings(deadline=None, max_examples=30, phases=[Phase.generate])
def test_the_loss_its_gradient_and_stats_are_as_exact_as_the_reference(case):
    results = []
    for choice, dtype in (("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        log_prob, old, advantages = (None if t is None else t.to(dtype) for t in case)
        assert log_prob is not None and advantages is not None
        log_prob.requires_grad_()
        with dispatch.use(choice):
            loss, stats = functional.clipped_ratio_loss(log_prob, old, advantages, CLIP, ADVANTAGE_CLIP)
        (grad,) = torch.autograd.grad(loss, log_prob, torch.tensor(-1.7, dtype=dtype))
        results.append((loss.detach().double(), grad.double(), stats_of(stats)))
    for ours, theirs, truth in zip(*results, strict=True):
        scale = truth.abs().max() + 1
        assert ((ours - truth).abs() <= (theirs - truth).abs() + 2e-6 * scale).all(), (ours, theirs, truth)


def test_rows_at_the_edge_of_the_clip_have_the_gradient_that_the_reference_has():
    log_ratio = torch.tensor([2e-3, 2e-3, -2e-3, -2e-3, 5e-4, 0.0, 25.0, -25.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, 1.0, -1.0, 1.0])
    grads = []
    for choice in ("torch", "triton"):
        log_prob = log_ratio.clone().requires_grad_()
        with dispatch.use(choice):
            loss, stats = functional.clipped_ratio_loss(log_prob, torch.zeros(8), advantages, CLIP, ADVANTAGE_CLIP)
        grads.append(torch.autograd.grad(loss, log_prob)[0])
        assert stats.clip_fraction_above == 3 / 8 and stats.clip_fraction_below == 3 / 8
        assert stats.clip_fraction == 6 / 8
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=0)
    assert (grads[1] == 0).tolist() == [True, False, False, True, False, False, True, True]


def test_on_policy_is_a_ratio_of_exactly_one_with_the_gradient_of_log_prob():
    log_prob, advantages = torch.randn(5, requires_grad=True), torch.tensor([1.0, -2.0, 0.0, 9.0, -9.0])
    with dispatch.use("triton"):
        loss, stats = functional.clipped_ratio_loss(log_prob, None, advantages, CLIP, ADVANTAGE_CLIP)
    assert stats_of(stats).tolist() == [1, 0, 0, 0, 0, 0]
    (grad,) = torch.autograd.grad(loss, log_prob)
    assert grad.tolist() == pytest.approx([-0.2, 0.4, 0.0, -0.8, 0.8])


@pytest.mark.parametrize("is_guided", [False, True])
@pytest.mark.parametrize("is_on_policy", [False, True])
def test_the_fused_loss_is_that_of_its_parts(is_guided: bool, is_on_policy: bool):
    generator = torch.Generator().manual_seed(1)
    x, m, m_uncond, x_next = (torch.randn(5, 3, 4, 6, generator=generator) for _ in range(4))
    m, x = m.contiguous(memory_format=torch.channels_last), x.bfloat16()
    coef, advantages = torch.rand(5, 3, generator=generator) + 0.2, torch.randn(5, generator=generator)
    uncond = m_uncond.requires_grad_() if is_guided else None
    leaves = [m.requires_grad_(), *([uncond] if is_guided else [])]
    with dispatch.use("torch"):
        log_prob = functional.gaussian_log_prob(x, m, x_next, coef, uncond, 3.0)
        old = None if is_on_policy else log_prob.detach() + torch.tensor([0, 1e-4, -5e-4, 0.01, -0.01])
        expected, expected_stats = functional.clipped_ratio_loss(log_prob, old, advantages, CLIP, ADVANTAGE_CLIP)
        expected_grads = torch.autograd.grad(0.3 * expected, leaves)
    with dispatch.use("triton"):
        loss, stats = functional.policy_loss(
            x, m, x_next, coef, old, advantages, CLIP, ADVANTAGE_CLIP, uncond, 3.0
        )  # fmt: skip
        grads = torch.autograd.grad(0.3 * loss, leaves)
        with torch.no_grad():
            without, _ = functional.policy_loss(x, m, x_next, coef, old, advantages, CLIP, ADVANTAGE_CLIP, uncond, 3.0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats_of(stats), stats_of(expected_stats), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-7)
    assert torch.equal(without, loss)


def on_policy_inputs() -> tuple[Tensor, ...]:
    """x, m, x_next (3, 2, 5, 7), coef (3, 3), advantages (3,)."""
    generator = torch.Generator().manual_seed(2)
    x, m, x_next = (torch.randn(3, 2, 5, 7, generator=generator) for _ in range(3))
    coef, advantages = torch.rand(3, 3, generator=generator) + 0.2, torch.randn(3, generator=generator)
    return x, m.bfloat16().requires_grad_(), x_next, coef, advantages


def test_the_announced_factor_changes_no_bit_of_the_gradient():
    x, m, x_next, coef, advantages = on_policy_inputs()
    for came in (1.0, 0.3):
        gradients = []
        for announced in (1.0, 0.3):
            with dispatch.use("triton"):
                loss, _ = functional.policy_loss(x, m, x_next, coef, None, advantages, CLIP, 5.0, factor=announced)
            gradients.append(torch.autograd.grad(came * loss, m)[0])
        with dispatch.use("torch"):
            loss, _ = functional.policy_loss(x, m, x_next, coef, None, advantages, CLIP, 5.0)
        expected = torch.autograd.grad(came * loss, m)[0]
        assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
        torch.testing.assert_close(gradients[0], expected)


def test_whole_numbers_are_passed_on_as_floats(monkeypatch: pytest.MonkeyPatch):
    """A plan's kernel was compiled for floats; an int in their place would be read as another number."""
    x, m, x_next, coef, advantages = on_policy_inputs()
    passed: list[object] = []
    monkeypatch.setattr(triton_loss, "launch", lambda kernel, plan, *arguments: passed.extend(arguments))
    with dispatch.use("triton"):
        functional.policy_loss(x, m, x_next, coef, None, advantages, 1, 5, None, 2, 1)
        functional.clipped_ratio_loss(advantages, None, advantages, 1, 5)
    assert {type(each) for each in passed} == {Tensor, float}


def test_a_second_backward_pass_gives_the_gradient_again_whatever_became_of_the_first():
    x, m, x_next, coef, advantages = on_policy_inputs()
    with dispatch.use("triton"):
        loss, _ = functional.policy_loss(x, m, x_next, coef, None, advantages, CLIP, 5.0)
    (first,) = torch.autograd.grad(loss, m, retain_graph=True)
    kept = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, m, retain_graph=True)[0], kept)
    above = torch.ones((), requires_grad=True)
    (again,) = torch.autograd.grad(loss, m, above, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again.sum().backward()


def test_a_row_without_noise_has_no_gradient():
    x, m, x_next, coef, advantages = on_policy_inputs()
    coef[1, 2] = 0.0
    for old in (None, torch.zeros(3)):
        with dispatch.use("triton"):
            loss, _ = functional.policy_loss(x, m, x_next, coef, old, advantages, CLIP, 5.0)
            log_prob = functional.gaussian_log_prob(x, m, x_next, coef)
        (gradient,) = torch.autograd.grad(loss + log_prob.sum(), m)
        assert loss.isfinite() and log_prob[1] == 0
        assert gradient.isfinite().all() and not gradient[1].any() and gradient[0].any()


def test_the_operators_pass_torchs_own_checks():
    x, m, x_next = (torch.randn(3, 2, 3, 4) for _ in range(3))
    coef, rows = torch.rand(3, 3) + 0.1, torch.randn(3)
    m.requires_grad_()
    torch.library.opcheck(triton_loss.loss_operator, (rows.clone().requires_grad_(), rows, rows, CLIP, 5.0))
    torch.library.opcheck(triton_loss.policy_operator, (x, m, None, x_next, coef, 1.0, rows, rows, CLIP, 5.0))


def test_a_compiled_loss_has_no_graph_break_and_the_same_gradient():
    x, m, x_next = (torch.randn(3, 2, 3, 4) for _ in range(3))
    coef, rows = torch.rand(3, 3) + 0.1, torch.randn(3)

    def loss(m: Tensor) -> Tensor:
        return functional.policy_loss(x, 2 * m, x_next, coef, rows, rows, CLIP, 5.0)[0] * 3

    with dispatch.use("triton"):
        expected = torch.autograd.grad(loss(m.requires_grad_()), m)[0]
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert torch.equal(torch.autograd.grad(compiled(m), m)[0], expected)
