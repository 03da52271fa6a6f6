"""group_norm_silu on the CPU, in Triton's interpreter, against float64, and its own claims: large means, bits, memory.

The rule for errors is test_triton_gaussian's; the absolute term is here 1e-6 of the largest true value for each unit of
max |x| / std, since the mean itself is rounded to float32.
"""

# N rows, C H W hidden states, G groups

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlcm_fast.kernels import dispatch, functional
from rlcm_fast.kernels.triton_ops import group_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
CHUNKS = [((1, 6, 35, 31), FORMATS[0]), ((1, 40, 12, 13), FORMATS[1])]  # two chunks of positions, one not full


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], Tensor, int]:
    """x, weight, bias; the gradient of y; G. Dtypes and layouts of their own."""
    groups, width = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 4, 5, 10]))
    shape = (draw(st.integers(1, 3)), groups * width, draw(st.integers(2, 9)), draw(st.integers(1, 9)))
    layout = draw(st.sampled_from([*FORMATS, "rows of a larger tensor"]))
    if draw(st.integers(0, 3)) == 0:
        groups, (shape, layout) = 2, draw(st.sampled_from(CHUNKS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, parameter_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    x = (draw(st.sampled_from([0.0, 5.0])) + torch.randn(shape, generator=generator)).to(dtype)
    parameters = [torch.randn(shape[1], generator=generator).to(parameter_dtype) for _ in range(2)]
    dy = torch.randn(shape, generator=generator).to(dtype)
    dy = draw(st.sampled_from([dy, dy.to(memory_format=torch.channels_last), dy[:, :1, :1].expand(shape)]))
    return [laid_out(x, layout), *parameters], dy, groups


def laid_out(x: Tensor, layout: object) -> Tensor:
    if isinstance(layout, torch.memory_format):
        return x.contiguous(memory_format=layout)
    return torch.stack([torch.zeros_like(x), x], dim=1)[:, 1]


def with_gradients(kernels: str, inputs: list[Tensor], dy: Tensor, groups: int, silu: bool = True) -> list[Tensor]:
    """y and the gradients of x, weight, bias; in torch, which takes no mixtures, dtypes that differ meet in float32."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    mixed = kernels == "torch" and leaves[0].dtype != leaves[1].dtype
    x, weight, bias = (leaf.float() for leaf in leaves) if mixed else leaves
    with dispatch.use(kernels):
        y = functional.group_norm_silu(x, groups, weight, bias, silu=silu).to(leaves[0].dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_no_worse(ours: list[Tensor], theirs: list[Tensor], truth: list[Tensor], per_unit: float) -> None:
    """Largest error of each at most torch's, plus `per_unit` of the largest true value (and a rounding to bfloat16)."""
    for our, their, true in zip(ours, theirs, truth, strict=True):
        assert our.dtype == their.dtype
        unit = per_unit + (2.0**-8 if our.dtype == torch.bfloat16 else 0.0)  # the interpreter cuts off
        error, allowed = (our - true).abs().max(), (their - true).abs().max() + unit * true.abs().max()
        assert error <= allowed, f"{error} > {allowed}"


def deviations_from_zero(x: Tensor, groups: int) -> float:
    """The largest |x| in units of its group's standard deviation."""
    x = x.double().flatten(2).unflatten(1, (groups, -1)).flatten(2)
    return float((x.abs().amax(dim=2) / (x.var(dim=2, correction=0) + 1e-5).sqrt()).max())


@given(case=cases(), silu=st.sampled_from([True, True, True, False]))
@settings(deadline=None, max_examples=16, phases=[Phase.generate])
def test_y_and_its_gradients_are_as_exact_as_torchs(case, silu: bool):
    inputs, dy, groups = case
    ours = with_gradients("triton", inputs, dy, groups, silu)
    theirs = with_gradients("torch", inputs, dy, groups, silu)
    truth = with_gradients("torch", [tensor.double() for tensor in inputs], dy.double(), groups, silu)
    assert_no_worse(ours, theirs, truth, 1e-6 * (1 + deviations_from_zero(inputs[0], groups)))
    assert ours[0].stride() == ours[1].stride() == torch.empty_like(inputs[0]).stride()


@pytest.mark.parametrize(
    ("channels", "groups"), [(20, 2), (40, 2), (80, 2), (160, 2), (2560, 32)], ids=lambda size: str(size)
)
def test_groups_of_any_width(channels: int, groups: int):
    generator = torch.Generator().manual_seed(channels)
    inputs = [torch.randn(shape, generator=generator) for shape in ((1, channels, 2, 3), (channels,), (channels,))]
    dy = torch.randn(1, channels, 2, 3, generator=generator)
    for memory_format in FORMATS if channels < 200 else FORMATS[:1]:
        inputs[0] = inputs[0].contiguous(memory_format=memory_format)
        results = [with_gradients(kernels, inputs, dy, groups) for kernels in ("triton", "torch")]
        truth = with_gradients("torch", [tensor.double() for tensor in inputs], dy.double(), groups)
        assert_no_worse(results[0], results[1], truth, 1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of numpy; a GPU goes on with the infinity too
@pytest.mark.parametrize(("shape", "memory_format"), CHUNKS, ids=["contiguous", "channels_last"])
def test_a_large_mean_costs_only_its_own_rounding(shape: tuple[int, ...], memory_format: torch.memory_format):
    x = 1e3 + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=memory_format)
    _, mean, rstd = group_norm.group_norm_silu(x, torch.ones(shape[1]), torch.zeros(shape[1]), 2, 1e-5, True)
    grouped = x.double().unflatten(1, (2, -1)).flatten(2)
    true_mean, true_rstd = grouped.mean(dim=2), (grouped.var(dim=2, correction=0) + 1e-5).rsqrt()
    assert (mean - true_mean).abs().max() <= 1e3 * 2.0**-24
    assert (rstd / true_rstd - 1).abs().max() < 1e-5  # seen: 5e-6, the rounding of the chunks' means
    at_once = grouped.float().square().mean(dim=2) - grouped.float().mean(dim=2).square()
    assert ((at_once.abs() + 1e-5).rsqrt() / true_rstd - 1).abs().max() > 0.1  # E[x^2] - E[x]^2: no digit is left


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_values_of_any_size_overflow_to_no_nan():
    x = torch.linspace(-2, 2, 72).view(1, 2, 6, 6)
    inputs = [x, torch.tensor([1e30, 1e3]), torch.zeros(2)]
    for values in with_gradients("triton", inputs, torch.full_like(x, 1e-30), 1):
        assert values.isfinite().all()
    y = with_gradients("triton", inputs, x, 1)[0]
    torch.testing.assert_close(y, with_gradients("torch", inputs, x, 1)[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_row_is_the_same_bits_in_every_run_batch_and_place(memory_format: torch.memory_format):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(17, 4, 3, 5, generator=generator).to(memory_format=memory_format) for _ in range(2))
    parameters = [torch.randn(4, generator=generator) for _ in range(2)]
    together = with_gradients("triton", [x, *parameters], dy, 2)
    for rows in (slice(0, 1), slice(16, 17), slice(5, 8)):
        again = with_gradients("triton", [x[rows], *parameters], dy[rows], 2)
        assert torch.equal(again[0], together[0][rows]) and torch.equal(again[1], together[1][rows])
    rows = torch.arange(11, 3, -1)
    backwards, once_more = (with_gradients("triton", [x[rows], *parameters], dy[rows], 2) for _ in range(2))
    assert torch.equal(backwards[0], together[0][rows]) and torch.equal(backwards[1], together[1][rows])
    assert all(torch.equal(first, second) for first, second in zip(backwards, once_more, strict=True))


def test_the_operators_pass_torchs_own_checks():
    x, dy = torch.randn(2, 6, 3, 4, requires_grad=True), torch.randn(2, 6, 3, 4)
    weight, bias = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    for given_x in (x, x.detach().to(memory_format=torch.channels_last).requires_grad_()):
        torch.library.opcheck(group_norm.group_norm_silu, (given_x, weight, bias, 3, 1e-5, True))
    x, weight, bias = (tensor.detach() for tensor in (x, weight, bias))
    _, mean, rstd = group_norm.group_norm_silu(x, weight, bias, 3, 1e-5, True)
    centers, _ = group_norm.group_norm_silu_sums(x, dy, mean, rstd, weight, bias, True)
    arguments = (x, dy, mean, rstd, weight, bias)
    torch.library.opcheck(group_norm.group_norm_silu_sums, (*arguments, True))
    torch.library.opcheck(group_norm.group_norm_silu_input_gradient, (*arguments, centers, True))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_compiled_function_sees_the_operators_without_a_graph_break(memory_format: torch.memory_format):
    x = torch.randn(2, 6, 3, 4).to(memory_format=memory_format).requires_grad_()
    parameters = [torch.randn(6, requires_grad=True) for _ in range(2)]

    def loss(x: Tensor) -> Tensor:
        return functional.group_norm_silu(2 * x, 3, *parameters).square().sum()

    with dispatch.use("triton"):
        expected = torch.autograd.grad(loss(x), [x, *parameters])
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(x), [x, *parameters])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_the_backward_pass_keeps_x_once_where_torch_keeps_two_tensors():
    inputs = [torch.randn(2, 8, 16, 16), torch.ones(8), torch.zeros(8)]
    kept = {}
    for kernels in ("triton", "torch"):
        of_x = []
        leaves = [tensor.requires_grad_() for tensor in inputs]
        with dispatch.use(kernels), torch.autograd.graph.saved_tensors_hooks(of_x.append, lambda tensor: tensor):
            functional.group_norm_silu(leaves[0], 2, leaves[1], leaves[2])
        kept[kernels] = sum(tensor.shape == inputs[0].shape for tensor in of_x)
    assert kept == {"triton": 1, "torch": 2}


def test_torch_is_what_a_model_does_bit_for_bit():
    for dtype in DTYPES:
        x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((2, 6, 3, 4), (6,), (6,)))
        expected = F.group_norm(x, 3, weight, bias, 1e-6)
        assert torch.equal(functional.group_norm_silu(x, 3, weight, bias, 1e-6), F.silu(expected))
        assert torch.equal(functional.group_norm_silu(x, 3, weight, bias, 1e-6, silu=False), expected)


def test_mistakes_name_the_value_and_the_way_out():
    x, six = torch.zeros(2, 6, 3, 4), torch.ones(6)
    with pytest.raises(ValueError, match="num_groups=4 must divide C=6; try 2"):
        functional.group_norm_silu(x, 4, six, six)
    for arguments in ((x, 3, six[:3], six), (x, 3, six, six[:3]), (x[0], 3, six, six)):
        with pytest.raises(ValueError, match=r"give \(N, C, H, W\), \(C,\), \(C,\)"):
            functional.group_norm_silu(*arguments)
    with dispatch.use("triton"), pytest.raises(ValueError, match="neither contiguous nor channels_last"):
        functional.group_norm_silu(x[..., ::2], 3, six, six)
    with pytest.raises(ValueError, match="C H W=2147483648 must be below 2"):
        group_norm.chunks_of(torch.empty(1, 2, 2**15, 2**15, device="meta"))
