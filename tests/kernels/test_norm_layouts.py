"""Norms that keep channels_last: no copy on the meta device, and errors against float64 no larger than torch's."""

# N rows, C channels, H W positions

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlcm_fast.kernels import dispatch, reference
from rlcm_fast.kernels.patch import FusedGroupNorm, fuse_group_norms

SHAPE, GROUPS = (2, 12, 5, 7), 3
LAYOUTS = [torch.contiguous_format, torch.channels_last]


class Operations(TorchDispatchMode):
    """Notes the operations that copy, and while a norm runs those in it."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self.in_norms: list[str] = []
        self.is_norm = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_copy = func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.contiguous, torch.ops.aten.copy_)
        if is_copy and args[0].ndim >= 4:
            self.copies.append(str(func))
            if self.is_norm:
                self.in_norms.append(str(func))
        return result


@contextmanager
def by(kernels: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's operators have shapes on the meta device, too; they are never launched there."""
    with monkeypatch.context() as patch, dispatch.use(kernels):
        if kernels == "triton":
            patch.setattr(dispatch, "_problem", lambda tensors: None)
        yield


def meta_unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=2,
        )
    return nn.Module.to(unet, torch.bfloat16).to(memory_format=torch.channels_last)  # pyright: ignore


def as_on_a_gpu(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """What cuDNN returns for a weight in channels_last; the meta device gives another layout."""
    return output.contiguous(memory_format=torch.channels_last)


def copies_in_norms(unet: Any) -> tuple[int, int]:
    """Copies inside of norms in a forward pass, and the number of norms."""
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(as_on_a_gpu)
    norms = [module for module in unet.modules() if isinstance(module, nn.GroupNorm)]
    with Operations() as operations:
        for norm in norms:
            norm.register_forward_pre_hook(lambda *_: setattr(operations, "is_norm", True))
            norm.register_forward_hook(lambda *_: setattr(operations, "is_norm", False))
        x = torch.empty(2, 4, 8, 8, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        text = torch.empty(2, 5, 24, device="meta", dtype=torch.bfloat16)
        unet(x, torch.zeros(2, device="meta"), text)
    return len(operations.in_norms), len(norms)


def test_torchs_norms_copy_in_a_channels_last_unet():
    copies, norms = copies_in_norms(meta_unet())
    assert copies > norms / 2  # what follows a transformer is contiguous already, which copies its output


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_fused_norms_copy_nothing_in_a_unet(kernels: str, monkeypatch: pytest.MonkeyPatch):
    unet = meta_unet()
    fuse_group_norms(unet)
    with by(kernels, monkeypatch):
        copies, norms = copies_in_norms(unet)
    assert copies == 0 and norms > 10
    assert all(isinstance(norm, FusedGroupNorm) for norm in unet.modules() if isinstance(norm, nn.GroupNorm))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_fused_norm_keeps_channels_last_forward_and_backward(kernels: str, monkeypatch: pytest.MonkeyPatch):
    norm = FusedGroupNorm(nn.GroupNorm(GROUPS, SHAPE[1], device="meta", dtype=torch.bfloat16))
    x = torch.empty(SHAPE, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    with by(kernels, monkeypatch), Operations() as operations:
        y = norm(x)
        (gradient,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert operations.copies == []
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def results(run: Any, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    """The output and the gradients of x, weight and bias, in float64."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]  # in their own memory format
    y = run(*leaves)
    return [each.detach().double() for each in (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype)))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("way", ["operations", "compiled"])
def test_errors_against_float64_are_no_larger_than_torchs(
    layout: torch.memory_format, dtype: torch.dtype, silu: bool, way: str
):
    # A mean of 20 standard deviations: float32 statistics must be of the centred values.
    generator = torch.Generator().manual_seed(1)
    x = 20 + torch.randn(SHAPE, generator=generator)
    weight, bias = torch.randn(2, SHAPE[1], generator=generator)
    dy = torch.randn(SHAPE, generator=generator).to(dtype)
    tensors = [x.to(dtype).to(memory_format=layout), weight.to(dtype), bias.to(dtype)]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.group_norm_silu_in_place(x, GROUPS, weight, bias, 1e-5, silu)

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.group_norm(x, GROUPS, weight, bias, 1e-5)
        return F.silu(y) if silu else y

    run = torch.compile(ours, backend="aot_eager", dynamic=False) if way == "compiled" else ours
    truth = results(torchs, [tensor.double() for tensor in tensors], dy.double())
    found, usual = results(run, tensors, dy), results(torchs, tensors, dy)
    for true, mine, theirs in zip(truth, found, usual, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + 2e-6 * true.norm()


def test_under_torch_compile_a_fused_norm_is_made_of_operations():
    norm = FusedGroupNorm(nn.GroupNorm(GROUPS, SHAPE[1]))
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled: Any = torch.compile(norm, backend=backend, fullgraph=True)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(compiled(x), norm(x), rtol=1e-5, atol=1e-5)
    assert any("var_mean" in name for name in seen)
    assert not any("group_norm" in name for name in seen)
