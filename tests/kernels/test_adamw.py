"""AdamW with 8-bit moments: bitsandbytes' format and steps, Triton as the reference, bit for bit."""

from __future__ import annotations

import copy

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from rlcm_fast.kernels import dispatch, reference_adamw
from rlcm_fast.kernels.adamw import AdamW8bit
from rlcm_fast.kernels.quantization import dequantize
from rlcm_fast.kernels.triton_ops import adamw as triton_adamw

SHAPES = [(5, 8, 3, 37), (5000,), (3, 7), (16, 16, 4, 5), (1,)]  # large and uneven, large, small, large, tiny


def weights(dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    return [nn.Parameter(v.contiguous(memory_format=memory_format) if v.ndim == 4 else v) for v in values]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    """Of sizes from 1e-5 to 1e-2, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        size = 10 ** (-3 * torch.rand(param.shape, generator=generator) - 2)
        values = size * torch.randn(param.shape, generator=generator)
        param.grad = (values * (torch.rand(param.shape, generator=generator) > 0.1)).to(param.dtype)


def everything(optimizer: AdamW8bit) -> list[Tensor]:
    states = [state[key] for state in optimizer.state.values() for key in sorted(state) if key != "step"]
    return [*(param.detach() for group in optimizer.param_groups for param in group["params"]), *states]


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_a_gradient_that_stops_beside_large_ones_makes_no_jump(choice: str):
    """Zero after 2e-4 of the largest: float32 AdamW goes 0.67 lr there; with v rounded to zero it would go 74 lr."""
    param = nn.Parameter(torch.zeros(4096))
    optimizer = AdamW8bit([param], lr=1.0, weight_decay=0.0)
    for size in (2e-4, 0.0):
        before = param.detach().clone()
        param.grad = torch.where(torch.arange(4096) % 2 == 0, 1e-2 * size, 1e-2)
        with dispatch.use(choice):
            optimizer.step()
    assert (before - param).abs().max() < 1.001


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_is_the_reference(dtype: torch.dtype, memory_format: torch.memory_format):
    """Bit for bit in bfloat16 and in all moments; float32 weights but for the last bit of torch's square root."""
    results = []
    for choice in ("torch", "triton"):
        params = weights(dtype, memory_format)
        optimizer = AdamW8bit(params, lr=3e-3, weight_decay=0.1, seed=7, counts_lost_updates=True)
        for step in range(3):
            set_gradients(params, step)
            with dispatch.use(choice):
                optimizer.step(grad_scale=torch.tensor(0.37) if step == 1 else None)
        results.append([*everything(optimizer), optimizer.counts])
        assert all(param.is_contiguous(memory_format=memory_format) for param in params if param.ndim == 4)
    assert len(results[0]) == len(SHAPES) + 3 * 4 + 2 * 2 + 1
    for i, (theirs, ours) in enumerate(zip(*results, strict=True)):
        if dtype == torch.float32 and i < len(SHAPES):
            torch.testing.assert_close(ours, theirs, rtol=2**-22, atol=1e-9)
        else:
            assert torch.equal(theirs, ours)


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_a_scale_that_is_not_finite_writes_nothing(choice: str):
    """A gradient whose norm is NaN or infinite gives such a scale: the device decides, and nothing waits."""
    params = weights(torch.bfloat16)[1:3]  # one with 8-bit moments, one with float32 ones
    optimizer = AdamW8bit(params, seed=7, counts_lost_updates=True)
    assert optimizer.counts is not None
    with dispatch.use(choice):
        set_gradients(params, 0)
        optimizer.step(grad_scale=torch.tensor(0.5))
        before = [tensor.clone() for tensor in (*everything(optimizer), optimizer.counts)]
        for param in params:
            param.grad = torch.full_like(param, torch.nan)
        for scale in ("nan", "inf", "-inf"):
            optimizer.step(grad_scale=torch.tensor(float(scale)))
    after = (*everything(optimizer), optimizer.counts)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert optimizer.counts[0] > 0


def test_a_step_from_one_state_is_that_of_bitsandbytes():
    """Weights to float32's rounding, moments to the codebook's gaps: on a CPU theirs are not always the nearest."""
    params = weights(torch.float32)
    theirs = bitsandbytes.optim.AdamW8bit(params, lr=1e-3, weight_decay=0.1)
    for step in range(6):
        copied = copy.deepcopy(params)
        ours = AdamW8bit(copied, lr=1e-3, weight_decay=0.1)
        ours.load_bitsandbytes_state_dict(theirs.state_dict())
        for group, optimizer in ((params, theirs), (copied, ours)):
            set_gradients(group, step)
            optimizer.step()
        for a, b in zip(copied, params, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
            state, other = ours.state[a], theirs.state[b]
            if "absmax1" not in state:
                continue
            for i, is_signed in ((1, True), (2, False)):
                torch.testing.assert_close(state[f"absmax{i}"], other[f"absmax{i}"], rtol=1e-5, atol=0)
                values = [dequantize(s[f"state{i}"], s[f"absmax{i}"], is_signed) for s in (state, other)]
                gap = 1.01 * 0.9 / (64 if is_signed else 128) * values[1].abs().max()
                assert (values[0] - values[1]).abs().max() <= gap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_steps_end_as_near_to_float32_adamw_as_those_of_bitsandbytes(dtype: torch.dtype):
    """Gradients of one size: a fifth of signal and the rest noise."""
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    truth, ours, theirs = ([nn.Parameter(torch.ones(100, 256, dtype=d))] for d in (torch.float32, dtype, dtype))
    optimizers = [
        torch.optim.AdamW(truth, **settings),
        AdamW8bit(ours, stochastic_rounding=False, **settings),
        bitsandbytes.optim.AdamW8bit(theirs, **settings),
    ]
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(100, 256, generator=generator)
    for _ in range(10):
        grad = 1e-4 * (0.2 * signal + torch.randn(100, 256, generator=generator)).bfloat16()
        for optimizer in optimizers:
            (param,) = optimizer.param_groups[0]["params"]
            param.grad = grad.to(param.dtype)
            optimizer.step()
    errors = [(param.detach().float() - truth[0].detach()).norm().item() for (param,) in (ours, theirs)]
    assert errors[0] <= 1.02 * errors[1]
    assert errors[0] <= 0.1 * (truth[0].detach() - 1).norm() or dtype == torch.bfloat16


@pytest.mark.parametrize("to_theirs", [True, False])
def test_a_run_goes_on_where_the_other_optimizer_stopped(to_theirs: bool):
    params = weights(torch.float32)
    ours, theirs = AdamW8bit(params, lr=1e-3, weight_decay=0.1), bitsandbytes.optim.AdamW8bit(params, lr=1e-3)
    before, after = (ours, theirs) if to_theirs else (theirs, ours)
    for step in range(4):
        set_gradients(params, step)
        before.step()
    copied = copy.deepcopy(params)
    if to_theirs:
        theirs.load_state_dict(ours.bitsandbytes_state_dict())
    else:
        ours.load_bitsandbytes_state_dict(theirs.state_dict())
    straight = type(before)(copied)
    straight.load_state_dict(before.state_dict())
    for group, optimizer in ((params, after), (copied, straight)):
        set_gradients(group, 4)
        optimizer.step()
    for a, b in zip(params, copied, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert after.param_groups[0]["weight_decay"] == before.param_groups[0]["weight_decay"]


def test_states_of_bitsandbytes_for_channels_last_weights_are_refused():
    params = weights(torch.float32, torch.channels_last)
    theirs = bitsandbytes.optim.AdamW8bit(params)
    set_gradients(params, 0)
    theirs.step()
    with pytest.raises(ValueError, match=r"state1 of weight 0 .* make them contiguous before its first step"):
        AdamW8bit(params).load_bitsandbytes_state_dict(theirs.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_optimizer_goes_on_bit_for_bit(dtype: torch.dtype, tmp_path):
    params = weights(dtype, torch.channels_last)
    optimizer = AdamW8bit(params, lr=1e-2)
    set_gradients(params, 0)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    others = copy.deepcopy(params)
    resumed = AdamW8bit(others, lr=1.0)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for group in (params, others):
        set_gradients(group, 1)
    optimizer.step()
    resumed.step()
    for a, b in zip(everything(optimizer), everything(resumed), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_states_follow_their_weight_to_another_memory_format():
    params = weights(torch.float32, torch.channels_last)
    optimizer = AdamW8bit(params)
    set_gradients(params, 0)
    optimizer.step()
    others = [nn.Parameter(param.detach().contiguous()) for param in params]
    moved = AdamW8bit(others)
    moved.load_state_dict(optimizer.state_dict())
    a, b = optimizer.state[params[0]], moved.state[others[0]]
    assert b["state1"].is_contiguous() and not a["state1"].is_contiguous()
    before, after = (dequantize(state["state1"], state["absmax1"], is_signed=True) for state in (a, b))
    assert (before - after).abs().max() <= 0.5 / 64 * before.abs().max()  # half of the codebook's largest gap


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_weights_that_step_in_the_backward_pass_end_where_the_others_do(choice: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.SiLU(), nn.Linear(80, 1)).bfloat16()
    other, x = copy.deepcopy(model), torch.randn(4, 64).bfloat16()
    optimizer, hooked = AdamW8bit(model.parameters(), seed=5), AdamW8bit(other.parameters(), seed=5)
    for weight in other.parameters():
        weight.register_post_accumulate_grad_hook(hooked.step_parameter)
    with dispatch.use(choice):
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            other(x).square().sum().backward()
    assert all(weight.grad is None for weight in other.parameters())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_launch_steps_all_weights_of_a_kind(monkeypatch: pytest.MonkeyPatch):
    launches = []
    launch = triton_adamw.adamw_8bit_
    monkeypatch.setattr(triton_adamw, "adamw_8bit_", lambda *a: launches.append(len(a[0])) or launch(*a))
    params = weights(torch.bfloat16)
    set_gradients(params, 0)
    with dispatch.use("triton"):
        AdamW8bit(params).step()
    assert launches == [3, 2]  # of 8-bit and of float32 moments


def test_the_operator_passes_torchs_own_checks():
    param, grad = torch.randn(300), torch.randn(300)
    states = [torch.zeros(300, dtype=torch.uint8) for _ in range(2)]
    absmax = [torch.zeros(2) for _ in range(2)]
    scalars = list(vars(reference_adamw.AdamWScalars.at(1, 1e-3, (0.9, 0.99), 1e-8, 0.0)).values())
    arguments = (
        [param],
        [grad],
        *([state] for state in (*states, *absmax)),
        [0],
        scalars,
        1,
        0,
        False,
        None,
        torch.zeros(2, dtype=torch.int64),
    )
    torch.library.opcheck(triton_adamw.adamw_8bit_, arguments)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda p: AdamW8bit([p], lr=-1.0), "lr=-1.0 must not be negative"),
        (lambda p: AdamW8bit([p], betas=(0.9, 1.0)), "betas=(0.9, 1.0) must both be in [0, 1)"),
        (lambda p: AdamW8bit([p.half()]), "adamw_8bit_ needs float32 or bfloat16 weights, not torch.float16"),
        (lambda p: AdamW8bit([p[:, ::2]]), "has gaps or overlaps in memory; call .contiguous() on it"),
    ],
)
def test_a_mistake_is_one_line(make, text: str):
    def begin() -> None:
        optimizer = make(torch.ones(4, 6))
        (param,) = optimizer.param_groups[0]["params"]
        param.grad = torch.ones_like(param)
        optimizer.step()

    with pytest.raises(ValueError) as error:
        begin()
    assert text in str(error.value)


def test_a_foreign_weight_is_refused():
    with pytest.raises(ValueError, match=r"a weight of shape \(3,\) does not belong to this optimizer"):
        AdamW8bit([torch.ones(2)]).step_parameter(torch.ones(3))
