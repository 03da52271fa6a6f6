"""What we call of other libraries and what only a GPU runs: xformers' attention, bitsandbytes' optimizer steps."""

# B samples, C H W latent, L tokens, E embedding

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from rlcm_fast.backbones.acceleration import accelerate
from rlcm_fast.config import EngineConfig, OptimizerConfig
from rlcm_fast.engine.optimizers import build_optimizer, load_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_xformers_attention_gives_the_outputs_and_gradients_of_torchs(dtype: torch.dtype):
    """Each within twice the error of torch's own attention in that dtype, against float64."""
    # One that is built for another torch is installed and cannot be imported.
    pytest.importorskip("xformers.ops", reason="xformers cannot be imported", exc_type=ImportError)
    plain = _unet().to(DEVICE)
    exact, fast = copy.deepcopy(plain).double(), copy.deepcopy(plain).to(dtype)
    plain = plain.to(dtype)
    accelerate(fast, EngineConfig(attention="xformers"))
    processors = {type(each).__name__ for each in fast.attn_processors.values()}
    assert processors == {"XFormersAttnProcessor"}
    truth, ours, theirs = (_outputs_and_gradients(model) for model in (exact, fast, plain))
    for true, our, their in zip(truth, ours, theirs, strict=True):
        error, allowed = (our - true).norm(), (their - true).norm()
        assert error <= 2 * allowed + 1e-6 * true.norm()


def _unet() -> UNet2DConditionModel:
    """Two heads of 40 and 80 numbers, as SD 1.5 has."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(80, 160),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        time_cond_proj_dim=16,
    )


def _outputs_and_gradients(unet: nn.Module) -> list[Tensor]:
    """In float64: the output of a batch of two, and the gradient of its mean square in each weight."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(unet.parameters()).dtype
    inputs = [torch.randn(2, *size, generator=generator) for size in ((4, 8, 8), (5, 24), (16,))]
    x, text, guidance = (tensor.to(DEVICE, dtype) for tensor in inputs)
    steps = torch.tensor([5, 900], device=DEVICE)
    output = unet(x, steps, text, timestep_cond=guidance, return_dict=False)[0]
    gradients = torch.autograd.grad(output.square().mean(), list(unet.parameters()))
    return [tensor.detach().double() for tensor in (output, *gradients)]


OPTIMIZERS = pytest.mark.parametrize("name", ["bnb_adamw_8bit", "bnb_paged_adamw_8bit"])


def _optimizer(weight: nn.Parameter, name: str) -> torch.optim.Optimizer:
    """Built as a run builds it."""
    holder = nn.ParameterList([weight])
    config = OptimizerConfig(name=name, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)  # type: ignore[arg-type]
    return build_optimizer(holder, config, EngineConfig(), seed=0)


def _step(optimizer: torch.optim.Optimizer, weight: nn.Parameter, number: int) -> None:
    """With a gradient that is a fifth of signal and the rest noise."""
    signal, noise = (torch.Generator().manual_seed(seed) for seed in (0, 1 + number))
    size = weight.shape
    gradient = 0.2 * torch.randn(size, generator=signal) + torch.randn(size, generator=noise)
    weight.grad = (1e-4 * gradient).to(weight.device, weight.dtype)
    optimizer.step()


@OPTIMIZERS
def test_ten_steps_of_bitsandbytes_end_near_those_of_float32_adamw(name: str):
    ends = []
    for each in (name, "adamw"):
        weight = nn.Parameter(torch.ones(100, 256, device=DEVICE))
        optimizer = _optimizer(weight, each)
        for number in range(10):
            _step(optimizer, weight, number)
        ends.append(weight.detach().clone())
    moved = (ends[1] - 1).norm()
    assert 0 < (ends[0] - ends[1]).norm() <= 0.1 * moved


@OPTIMIZERS
def test_steps_of_bitsandbytes_go_on_from_saved_states_bit_for_bit(name: str):
    # Step three times, and save weight and states.
    weight = nn.Parameter(torch.ones(100, 256, device=DEVICE))
    optimizer = _optimizer(weight, name)
    for number in range(3):
        _step(optimizer, weight, number)
    saved = {key: value.clone() for key, value in optimizer.state[weight].items() if isinstance(value, Tensor)}
    assert saved["state1"].dtype == torch.uint8

    # Go on from them in a new optimizer.
    resumed = nn.Parameter(weight.detach().clone())
    other = _optimizer(resumed, name)
    load_state(other, resumed, saved, step=3)
    for number in range(3, 5):
        _step(optimizer, weight, number)
        _step(other, resumed, number)
    assert torch.equal(resumed, weight)
