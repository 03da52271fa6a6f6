"""Memory format, attention and compilation leave the weights' names and the outputs as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from rlcm_fast.backbones.acceleration import accelerate
from rlcm_fast.config import EngineConfig

SLOW = (pytest.mark.slow, pytest.mark.telling)


@pytest.fixture(scope="module")
def unet(tiny_lcm_folder: str) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_lcm_folder, subfolder="unet").eval()


def output(unet: UNet2DConditionModel, batch_size: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, 4, 8, 8, generator=generator)
    text = torch.randn(batch_size, 5, 24, generator=generator)
    guidance = torch.randn(batch_size, 16, generator=generator)
    steps = torch.linspace(5, 900, batch_size).long()
    return unet(x, steps, text, timestep_cond=guidance, return_dict=False)[0]


@pytest.mark.parametrize("engine", [EngineConfig(channels_last=True), EngineConfig(compile="regional"),
                                    pytest.param(EngineConfig(compile="whole"), marks=SLOW)])  # fmt: skip
def test_outputs_gradients_and_names_stay(unet: UNet2DConditionModel, engine: EngineConfig):
    fast = copy.deepcopy(unet)
    accelerate(fast, engine, backend="aot_eager")
    assert list(fast.state_dict()) == list(unet.state_dict())
    torch.testing.assert_close(output(fast), output(unet), rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(output(model).square().sum(), list(model.parameters())) for model in (fast, unet)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_channels_last_is_that_of_every_convolution(unet: UNet2DConditionModel):
    fast = copy.deepcopy(unet)
    accelerate(fast, EngineConfig(channels_last=True))
    weights = [weight for weight in fast.parameters() if weight.ndim == 4]
    assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_compiled_blocks_are_called_compiled(unet: UNet2DConditionModel):
    fast = copy.deepcopy(unet)
    calls: list[int] = []
    accelerate(fast, EngineConfig(compile="regional"), backend=lambda graph, _: calls.append(1) or graph.forward)  # type: ignore[arg-type]
    output(fast)
    assert calls


@pytest.mark.parametrize("compile_", ["regional", pytest.param("whole", marks=SLOW)])
@pytest.mark.parametrize(
    ("num_shapes", "limit"), [(2, 2), pytest.param(6, 8, marks=pytest.mark.slow)], ids=["two shapes", "six shapes"]
)
def test_a_run_has_as_many_graphs_as_shapes(unet: UNet2DConditionModel, compile_: str, num_shapes: int, limit: int):
    """A grid, evaluation, rollout and update each have one, with and without gradients; torch's own limit is 8.

    A trace takes a second and more, so the quick case puts torch's limit at 2 and makes four graphs.
    """
    fast = copy.deepcopy(unet)
    with torch._dynamo.config.patch(recompile_limit=limit):
        accelerate(fast, EngineConfig(compile=compile_), backend="eager")  # type: ignore[arg-type]
        assert torch._dynamo.config.recompile_limit >= 64
        for batch_size in range(1, num_shapes + 1):
            with torch.no_grad():
                torch.testing.assert_close(output(fast, batch_size), output(unet, batch_size), rtol=1e-5, atol=1e-6)
            assert output(fast, batch_size).requires_grad
