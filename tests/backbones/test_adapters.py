"""LoRA adapters in a UNet: what is trained, what the start model is, what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.shared import tiny_pipelines
from rlcm_fast.backbones.adapters import add_adapters
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import LoraConfig, ModelConfig

CPU = torch.device("cpu")
LORA = LoraConfig(rank=2, alpha=3.0)


def load(folder: str, dtype: torch.dtype = torch.float32, lora: LoraConfig = LORA, seed: int = 0) -> Backbone:
    backbone = Backbone.load(ModelConfig(folder), CPU, dtype, kind="consistency")
    torch.manual_seed(seed)
    backbone.add_adapters(lora)
    return backbone


def train_a_little(unet: UNet2DConditionModel) -> None:
    """As if updates had moved the adapters."""
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))


def output(network: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text, guidance = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 24), (2, 16)))
    arguments = (x.to(dtype), torch.tensor([10, 500]))
    return network(*arguments, text.to(dtype), timestep_cond=guidance.to(dtype), return_dict=False)[0]


def test_only_float32_adapters_are_trained_and_they_start_at_the_model_itself(tiny_lcm_folder: str):
    plain = Backbone.load(ModelConfig(tiny_lcm_folder), CPU, torch.bfloat16, kind="consistency")
    backbone = load(tiny_lcm_folder, torch.bfloat16)
    trained = {name: p for name, p in backbone.unet.named_parameters() if p.requires_grad}
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert len(trained) == 2 * sum(".to_" in name and "weight" in name for name, _ in plain.unet.named_parameters())
    assert torch.equal(output(backbone.unet, torch.bfloat16), output(plain.unet, torch.bfloat16))
    train_a_little(backbone.unet)
    moved = output(backbone.unet, torch.bfloat16)
    assert moved.dtype == torch.bfloat16
    assert not torch.equal(moved, output(plain.unet, torch.bfloat16))


def test_the_start_model_is_the_network_without_its_adapters_and_takes_no_memory(tiny_lcm_folder: str):
    backbone = load(tiny_lcm_folder)
    start, expected = backbone.frozen_start(), output(backbone.unet).detach()
    train_a_little(backbone.unet)
    trained = [p for p in backbone.unet.parameters() if p.requires_grad]
    expected_gradients = torch.autograd.grad(output(backbone.unet).square().mean(), trained)
    loss = output(backbone.unet).square().mean()
    with torch.no_grad():  # between forward and backward, as the KL term does it
        assert torch.equal(output(start), expected)
    loss.backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(trained, expected_gradients, strict=True))
    assert not torch.equal(output(backbone.unet), expected), "they are on again"


def test_merged_weights_are_those_of_a_plain_unet_with_the_same_output(tiny_lcm_folder: str, tmp_path: Path):
    backbone = load(tiny_lcm_folder, lora=LoraConfig(rank=2, alpha=3.0, targets=["to_q", "conv1", "proj_in"]))
    train_a_little(backbone.unet)
    backbone.export(backbone.unet.state_dict(), tmp_path)
    stock = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert not [name for name, _ in stock.named_parameters() if "lora" in name or "base_layer" in name]
    torch.testing.assert_close(output(stock), output(backbone.unet), atol=1e-5, rtol=1e-4)
    assert [name for name, _ in backbone.unet.named_parameters() if ".lora_" in name], "training goes on with adapters"


@pytest.mark.parametrize(("target", "what"), [("to_x", "nothing"), ("o_q", "nothing"), ("norm1", "no layer")])
def test_a_target_that_cannot_have_adapters_is_named(target: str, what: str):
    with pytest.raises(ValueError, match=f"lora.targets names {target}, which is {what} of this UNet that can have"):
        add_adapters(tiny_pipelines.unet(), LoraConfig(rank=2, targets=["to_q", target]))
